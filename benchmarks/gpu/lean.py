"""The ops of lean models against float64: norms and gated products in the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.correctness import DTYPES, available, laid_out, poisoned
from benchmarks.gpu.job import Job
from slicefine import ops
from slicefine.backends import lean_reference
from slicefine.lean import ops as lean_ops

# tokens, features, how they lie in memory
SMALL = ((5, 33, "plain"), (3, 200, "offset"), (4, 64, "every second"))
LARGE = (*SMALL, (8192, 3072, "plain"), (4097, 8192, "padded"), (1, 16_000, "plain"))


def errors(
    found: tuple[Tensor, ...], exact: tuple[Tensor, ...], plain: tuple[Tensor, ...]
) -> dict[str, Any]:
    """The largest error against float64, and whether it is at most twice plain PyTorch's, or one
    rounding where plain PyTorch happens to hit.
    """
    worst, ok = 0.0, True
    for one, precise, other in zip(found, exact, plain, strict=True):
        scale = precise.abs().max().item()
        error = (one.double() - precise).abs().max().item() / scale
        allowed = (other.double() - precise).abs().max().item() / scale
        worst = max(worst, error)
        ok = ok and error <= 2 * allowed + torch.finfo(one.dtype).eps
    return {"largest_error": worst, "ok": ok}


def norm_row(
    n: int, d: int, layout: str, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """RMSNorm and its gradient."""
    x, grad = (laid_out(n, d, layout, dtype, device) for _ in range(2))
    weight = torch.rand(d, device=device).add_(0.5).to(dtype)
    run = lambda module, tensors, internal: (
        *(made := module.rms_norm(*tensors[:2], 1e-5, 0.0, False, internal)),
        module.rms_norm_backward(tensors[2], tensors[0], made[1], tensors[1], 0.0),
    )
    tensors = (x, weight, grad)
    exact = run(lean_reference, [t.double() for t in tensors], torch.float64)
    plain = run(lean_reference, tensors, torch.float32)
    with poisoned(device):
        return errors(run(lean_ops, tensors, torch.float32), exact, plain)


def gate_row(
    n: int, m: int, layout: str, dtype: torch.dtype, kind: str, device: str
) -> dict[str, Any]:
    """The gated product and its gradients."""
    tensors = [laid_out(n, m, layout, dtype, device) for _ in range(3)]
    run = lambda module, gate, up, grad: (
        module.gated_activation(gate, up, kind),
        *module.gated_activation_backward(grad, gate, up, kind),
    )
    exact = run(lean_reference, *(t.double() for t in tensors))
    plain = run(lean_reference, *tensors)
    with poisoned(device):
        return errors(run(lean_ops, *tensors), exact, plain)


def lean(job: Job) -> None:
    """Every dtype, odd sizes, views whose rows lie apart."""
    if not available(job, "triton"):
        return
    for n, width, layout in job.within_time(SMALL if job.small else LARGE, 2.0):
        for dtype in DTYPES.values():
            label = {"n": n, "width": width, "layout": layout, "dtype": str(dtype)}
            with job.attempt(op="rms_norm", **label), ops.use_backend("triton"):
                job.row(
                    op="rms_norm", **label, **norm_row(n, width, layout, dtype, job.device)
                )
            for kind in lean_reference.ACTIVATIONS:
                what = {"op": f"gated_activation, {kind}", **label}
                with job.attempt(**what), ops.use_backend("triton"):
                    job.row(**what, **gate_row(n, width, layout, dtype, kind, job.device))
