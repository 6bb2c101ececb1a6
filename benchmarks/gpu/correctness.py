"""The ops of every backend that runs here against float64: random data, poisoned memory, odd
shapes, nothing written outside.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.job import Job
from slicefine import SliceAdamW, SliceConfig, get_slice_model, ops
from slicefine.backends import reference
from slicefine.backends.operands import AdamWOptions, AdamWSlice
from slicefine.backends.select import BACKENDS
from slicefine.slices import read_slice, write_slice

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
HYPERPARAMETERS = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "maximize": False,
}
KERNELS = ("triton", "cuda")


def refusal(job: Job, name: str) -> str | None:
    """Why a backend's kernels cannot run here, or None."""
    if name in job.broken:
        return "its correctness part ended in an error"
    backend = BACKENDS.get(name)
    return (
        backend.refusal(job.device, set(DTYPES.values()))
        if backend
        else "this commit does not have it"
    )


def backends(job: Job) -> list[str]:
    """The kernels that run here; a row says why another does not. Raises RuntimeError where none
    does.
    """
    reasons = {name: refusal(job, name) for name in KERNELS}
    for name, reason in reasons.items():
        if reason is not None:
            job.row(backend=name, absent=reason)
    found = [name for name, reason in reasons.items() if reason is None]
    if not found:
        raise RuntimeError(f"none of {', '.join(KERNELS)} runs on {job.device}: {reasons}")
    return found


def available(job: Job, name: str) -> bool:
    """Whether a part about one backend can run; if not, why is what the part reports."""
    job.missing = refusal(job, name)
    return job.missing is None


def poison() -> None:
    """Fill with NaN what the caching allocator will hand out next, and the workspaces that the
    kernels keep on the GPU.
    """
    # bytes: the allocator's small blocks and large ones
    sizes = [2**19] * 64 + [2**22] * 16 + [2**26] * 4
    blocks = [torch.full((size // 4,), float("nan"), device="cuda") for size in sizes]
    for owner in ("slicefine_kernels.launch", "slicefine.backends.cuda"):
        for partials, _ in getattr(sys.modules.get(owner), "_workspaces", {}).values():
            partials.fill_(float("nan"))
    del blocks


@contextmanager
def poisoned(device: str) -> Iterator[None]:
    """Inside, `torch.empty` holds NaN: on a GPU what has just been freed, on a CPU by torch's own
    option.
    """
    if device == "cuda":
        poison()
        yield
        return
    # brings fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# Slice_grad


@dataclass(frozen=True)
class GradientCase:
    """rows: None, "run" (neighbors) or "scattered". layout: how dY and X lie in memory. runs: must
    agree bit for bit.
    """

    n: int
    out: int
    width: int
    rows: str | None = None
    layout: str = "plain"
    runs: int = 2
    tf32: bool = False


SMALL = (
    GradientCase(1, 1, 1),
    GradientCase(63, 129, 1),
    GradientCase(65, 40, 17, "scattered"),
    GradientCase(0, 64, 16),
    GradientCase(129, 33, 16, "run", "offset", 4),
    GradientCase(70, 33, 16, None, "padded"),
    GradientCase(70, 33, 16, "scattered", "every second"),
    GradientCase(33, 17, 5, None, "transposed"),
    GradientCase(65, 40, 17, tf32=True),
)
LARGE = (
    *SMALL,
    GradientCase(8192, 4096, 16, runs=20),
    GradientCase(8192, 4096, 16, "scattered"),
    GradientCase(8192, 16, 4096, "run", runs=20),
    GradientCase(8192, 4096, 1),
    GradientCase(8192, 4096, 64),
    GradientCase(4097, 1000, 64, "scattered"),
    GradientCase(2048, 512, 256, runs=20),
    GradientCase(100_000, 128, 16, runs=20),
    GradientCase(8192, 4096, 16, None, "offset"),
    GradientCase(8192, 256, 4096, "scattered"),
    GradientCase(8192, 4096, 16, tf32=True),
    GradientCase(0, 4096, 64),
    GradientCase(8192, 4096, 8),
    GradientCase(8192, 4096, 32),
    GradientCase(1, 4096, 256),
    GradientCase(63, 4096, 129, "run"),
    GradientCase(8192, 4096, 63, None, "padded"),
    GradientCase(8192, 4096, 16, None, "transposed"),
    GradientCase(2048, 4096, 129, "run", "every second"),
)


def laid_out(n: int, width: int, layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """(n, width), random; its storage holds NaN wherever the tensor does not."""
    values = torch.randn(n, width, device=device).to(dtype)
    if layout == "plain":
        return values
    if layout == "transposed":
        return values.t().contiguous().t()
    nan = lambda *shape: torch.full(shape, float("nan"), dtype=dtype, device=device)
    views = {
        "offset": lambda: nan(n * width + 1)[1:].view(n, width),
        "padded": lambda: nan(n, width + 3)[:, 1 : width + 1],
        "every second": lambda: nan(n, 2 * width)[:, ::2],
    }
    return views[layout]().copy_(values)


def operands(
    case: GradientCase, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dY, X and the rows of the slice: a third of the output features."""
    height = max(1, case.out // 3)
    rows = None
    if case.rows == "run":
        rows = torch.arange(case.out - height, case.out, device=device)
    elif case.rows == "scattered":
        rows = torch.randperm(case.out, device=device)[:height]
    shapes = (case.out, case.width)
    dy, x = (laid_out(case.n, width, case.layout, dtype, device) for width in shapes)
    return dy, x, rows


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def plain_product(dy: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    """torch's product of the same operands with a float32 result: what the kernel's error is
    measured by.
    """
    chosen = dy if rows is None else dy.index_select(1, rows)
    if not dy.is_cuda or dy.dtype == torch.float32 or dy.shape[0] == 0:
        return chosen.t().float() @ x.float()
    matmul = torch.backends.cuda.matmul
    before = (
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )
    matmul.allow_bf16_reduced_precision_reduction = (
        matmul.allow_fp16_reduced_precision_reduction
    ) = False
    try:
        return torch.mm(chosen.t(), x, out_dtype=torch.float32)
    finally:
        (
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction,
        ) = before


def gradient_row(case: GradientCase, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Largest and root-mean-square error against float64, where, and the bound that it must keep.

    The bound is twice torch's error, and two units of float32 (with TF32 allowed, four of TF32) of
    the sum of |products|.
    """
    dy, x, rows = operands(case, dtype, device)
    with tf32(case.tf32):
        with poisoned(device):
            found = ops.slice_grad(dy, x, rows)
        same = True
        for _ in range(case.runs - 1):
            with poisoned(device):
                same &= torch.equal(found, ops.slice_grad(dy, x, rows))
        plain = plain_product(dy, x, rows)
    exact = reference.slice_grad(dy.double(), x.double(), rows)
    unit = 2.0**-8 if case.tf32 and dtype == torch.float32 else 2.0**-22
    bound = (
        2 * (plain.double() - exact).abs().amax()
        + unit * reference.slice_grad(dy.double().abs(), x.double().abs(), rows).amax()
    )
    error = (found.double() - exact).abs()
    worst = int(error.nan_to_num(float("inf")).argmax())
    return {
        "n": case.n,
        "out": case.out,
        "width": case.width,
        "rows": case.rows,
        "layout": case.layout,
        "tf32": case.tf32,
        "error": float(error.max()),
        "rms": float(error.square().mean().sqrt()),
        "at": [worst // found.shape[1], worst % found.shape[1]],
        "bound": float(bound),
        "runs": case.runs,
        "repeatable": same,
        "ok": bool(error.max() <= bound) and same,
    }


def gradients(job: Job, name: str = "triton") -> None:
    """slice_grad: shapes, layouts, positions, dtypes; the same bits on every run."""
    if not available(job, name):
        return
    tasks = [(dtype, case) for dtype in DTYPES for case in (SMALL if job.small else LARGE)]
    for dtype, case in job.within_time(tasks, 3.0):
        label = {"backend": name, "dtype": dtype}
        with job.attempt(**label, case=str(case)), ops.use_backend(name):
            job.row(**label, **gradient_row(case, DTYPES[dtype], job.device))


def gradients_cuda(job: Job) -> None:
    gradients(job, "cuda")


# Slice_adamw and slice_grad_adamw


def surrounded(height: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    """A random weight in the middle of a larger one of NaN, so that strides and writes outside
    show.
    """
    base = torch.full((height + 2, width + 3), float("nan"), dtype=dtype, device=device)
    return base[1:-1, 2:-1].copy_(torch.randn(height, width, device=device).to(dtype))


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)


def positions(
    kind: str, out: int, width: int, scattered: bool, device: str
) -> tuple[Tensor | None, Tensor | None]:
    pick = lambda size, r: (
        torch.randperm(size)[:r] if scattered else torch.arange(size - r, size)
    ).to(device)
    rows = pick(out, 17) if kind in ("row", "block") else None
    cols = pick(width, 7) if kind in ("column", "block") else None
    return rows, cols


def update_row(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    kind: str,
    scattered: bool,
    seed: int | None,
    fused: bool,
    device: str,
) -> dict[str, Any]:
    """One update against float64 and the reference in float32; what is in the weight, bit for bit,
    inside and outside.
    """
    n, out, width = shape
    rows, cols = positions(kind, out, width, scattered, device)
    R, K = out if rows is None else len(rows), width if cols is None else len(cols)
    dy, x = (
        torch.randn(n, out, device=device).to(dtype),
        torch.randn(n, K, device=device).to(dtype),
    )
    start = [
        torch.randn(R, K, device=device),
        0.1 * torch.randn(R, K, device=device),
        0.1 * torch.rand(R, K, device=device),
    ]
    weight, step = surrounded(out, width, dtype, device), torch.tensor(3.0, device=device)
    assert weight._base is not None
    before, nearest = weight._base.clone(), AdamWOptions(**HYPERPARAMETERS)
    exact = [t.double() for t in start]
    gradient = reference.slice_grad(dy.double(), x.double(), rows)
    active = lambda state, grad, w: AdamWSlice(
        state[0], grad, *state[1:], w, rows, cols, step
    )
    scratch = torch.zeros_like(weight, dtype=torch.float64)
    reference.slice_adamw([active(exact, gradient, scratch)], nearest)
    plain = [t.clone() for t in start]
    plain_gradient = plain_product(dy, x, rows) if fused else gradient.float()
    reference.slice_adamw(
        [active(plain, plain_gradient, torch.zeros_like(weight))], nearest
    )
    found = [t.clone() for t in start]
    options = AdamWOptions(**HYPERPARAMETERS, seed=seed)
    with poisoned(device):
        if fused:
            ops.slice_grad_adamw(dy, x, active(found, None, weight), options)
        else:
            ops.slice_adamw([active(found, gradient.float(), weight)], options)
    errors = [
        float((a.double() - b).abs().max()) for a, b in zip(found, exact, strict=True)
    ]
    # what `gradient_row` allows the gradient, through m's and v's share of it
    unsure = (
        2.0**-22
        * float(reference.slice_grad(dy.double().abs(), x.double().abs(), rows).amax())
        if fused
        else 0.0
    )
    through = (0.0, 0.1 * unsure, 2e-3 * float(gradient.abs().amax()) * unsure)
    bounds = [
        float(2 * (a.double() - b).abs().max() + 2e-6 * (1 + b.abs().max())) + more
        for a, b, more in zip(plain, exact, through, strict=True)
    ]
    rounded = reference.round_to(
        found[0], dtype, seed if dtype == torch.bfloat16 else None, 0
    )
    written = torch.equal(read_slice(weight, rows, cols), rounded)
    write_slice(before[1:-1, 2:-1], rows, cols, rounded)
    outside = torch.equal(bits(before), bits(weight._base))
    good = all(e <= b for e, b in zip(errors, bounds, strict=True))
    return {
        "error_p": errors[0],
        "error_m": errors[1],
        "error_v": errors[2],
        "bound_p": bounds[0],
        "written": written,
        "outside_kept": outside,
        "ok": good and written and outside,
    }


def updates(job: Job, name: str = "triton") -> None:
    """slice_adamw and slice_grad_adamw: slice types, positions, both roundings; every bit of the
    weight accounted for.
    """
    if not available(job, name):
        return
    shape = (20, 33, 40) if job.small else (2048, 1000, 1031)
    cases = [
        (dtype, kind, scattered, seed, fused)
        for scattered in (False, True)
        for dtype in DTYPES
        for kind in ("column", "row", "block", "all")
        for seed in (None, 2**40 + 12345)
        for fused in (True, False)
        if not (scattered and kind == "all") and (seed is None or dtype == "bf16")
    ]
    for dtype, kind, scattered, seed, fused in job.within_time(cases, 3.0):
        label = {
            "backend": name,
            "op": "slice_grad_adamw" if fused else "slice_adamw",
            "dtype": dtype,
            "slice": kind,
            "scattered": scattered,
            "stochastic": seed is not None,
        }
        with job.attempt(**label), ops.use_backend(name):
            job.row(
                **label,
                **update_row(
                    shape, DTYPES[dtype], kind, scattered, seed, fused, job.device
                ),
            )


def updates_cuda(job: Job) -> None:
    updates(job, "cuda")


# Training


def losses(
    kind: str, backend: str, in_bwd: bool, width: int, steps: int, device: str
) -> list[float]:
    """A small net, moving slices, one seed."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
    ).to(device)
    model = get_slice_model(net, SliceConfig(r=8, slice_type=kind, switch_interval=5))
    optimizer = SliceAdamW(model.parameters(), lr=1e-3, optimizer_in_bwd=in_bwd)
    x, y, found = (
        torch.randn(64, width, device=device),
        torch.randn(64, width, device=device),
        [],
    )
    with ops.use_backend(backend):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
    return torch.stack(found).tolist()


def training(job: Job) -> None:
    """Losses of a small net in float32, moves included, against the same training on the reference
    backend.
    """
    width, steps = (24, 6) if job.small else (256, 60)
    names = backends(job)
    for kind in job.within_time(("column", "row", "block", "row_column"), 3.0):
        oracle = losses(kind, "reference", False, width, steps, job.device)
        for name in names:
            for in_bwd in (False, True):
                label = {"backend": name, "slice": kind, "in_bwd": in_bwd}
                with job.attempt(**label):
                    found = losses(kind, name, in_bwd, width, steps, job.device)
                    difference = max(abs(a - b) for a, b in zip(oracle, found, strict=True))
                    learnt = oracle[0] - oracle[-1] > 10 * difference
                    job.row(
                        **label,
                        steps=steps,
                        largest_difference=difference,
                        loss=found[-1],
                        ok=difference < 1e-4 and learnt,
                    )
