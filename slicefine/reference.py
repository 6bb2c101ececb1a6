"""Every op in plain PyTorch: the oracle of the other backends, and what runs where they do not.

Same signatures as the ops in `slicefine.ops`. A slice of W (out, in) is given by ``rows`` (R,) and ``cols`` (K,), int64,
None for all. Arithmetic is float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def slice_grad(grad_output: Tensor, input: Tensor, rows: Tensor | None = None) -> Tensor:
    """Gradient of a slice of W: ``grad_output[:, rows].T @ input``.

    grad_output: (n, out). input: (n, K), already the columns of the slice.
    out: (R, K), float32 or float64.
    """
    if rows is not None:
        grad_output = grad_output.index_select(1, rows)
    dtype = accumulation_dtype(grad_output.dtype)
    return grad_output.to(dtype).t() @ input.to(dtype)


def slice_adamw(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weights: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    seed: int | None,
) -> None:
    """AdamW on each master (R, K), in place, then ``weight[rows][:, cols] = cast(master)``.

    steps: (), the number of this update, counted from 1. seed: round to bfloat16 stochastically; None rounds to nearest.
    Source: Loshchilov & Hutter 2019, algorithm 2, in the order of operations of torch.optim.AdamW.
    """
    for i, (p, g, m, v, step) in enumerate(zip(masters, grads, exp_avgs, exp_avg_sqs, steps, strict=True)):
        t = float(step)
        p.mul_(1 - lr * weight_decay)
        g = -g if maximize else g
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (v.sqrt() / (1 - beta2**t) ** 0.5).add_(eps)
        p.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))
        write_slice(weights[i], rows[i], cols[i], round_to(p, weights[i].dtype, seed, i))


def slice_grad_adamw(
    grad_output: Tensor,
    input: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    seed: int | None,
) -> None:
    """`slice_grad` followed by `slice_adamw` for one slice."""
    grad = slice_grad(grad_output, input, rows)
    slice_adamw(
        [master], [grad], [exp_avg], [exp_avg_sq], [weight], [rows], [cols], [step],
        lr, beta1, beta2, eps, weight_decay, maximize, seed,
    )  # fmt: skip


def read_slice(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """A copy of ``weight[rows][:, cols]``, (R, K), never larger than the slice on the way."""
    if rows is not None and cols is not None:
        return weight[rows.unsqueeze(1), cols]
    if rows is not None:
        return weight.index_select(0, rows)
    if cols is not None:
        return weight.index_select(1, cols)
    return weight.clone()


def write_slice(weight: Tensor, rows: Tensor | None, cols: Tensor | None, values: Tensor) -> None:
    """``weight[rows][:, cols] = values`` in place; values (R, K) in the weight's dtype."""
    if rows is not None and cols is not None:
        weight[rows.unsqueeze(1), cols] = values
    elif rows is not None:
        weight.index_copy_(0, rows, values)
    elif cols is not None:
        weight.index_copy_(1, cols, values)
    else:
        weight.copy_(values)


def round_to(values: Tensor, dtype: torch.dtype, seed: int | None = None, slice_id: int = 0) -> Tensor:
    """Cast to nearest, or with a seed stochastically to bfloat16: up with probability = the fraction that is cut off."""
    if seed is None or dtype != torch.bfloat16:
        return values.to(dtype)
    bits = values.float().view(torch.int32).to(torch.int64)
    index = torch.arange(values.numel(), device=values.device).view(values.shape)
    up = (bits + (philox(seed, index, slice_id) & 0xFFFF)) & 0xFFFF0000
    rounded = torch.where(up >= 2**31, up - 2**32, up).to(torch.int32).view(torch.float32).to(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def philox(seed: int, c0: Tensor, c1: int) -> Tensor:
    """First word of Philox4x32-10 with counter (c0, c1, 0, 0), as int64 in [0, 2^32). Source: Salmon et al. 2011."""
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    one, two, three = torch.full_like(c0, c1), torch.zeros_like(c0), torch.zeros_like(c0)
    c0 = c0 & 0xFFFFFFFF
    for _ in range(10):
        high_a, low_a = _multiply_32(0xD2511F53, c0)
        high_b, low_b = _multiply_32(0xCD9E8D57, two)
        c0, one, two, three = high_b ^ one ^ k0, low_b, high_a ^ three ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0


def _multiply_32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product in int64 without overflow, by 16-bit halves of a."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
