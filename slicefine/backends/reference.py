"""Every op in plain PyTorch: the oracle of the other backends, and what runs where they do not.

Same signatures as the functions of `slicefine.ops`; sizes are those of
`slicefine.backends.operands`. Arithmetic is float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slicefine.backends.lean_reference import gated_activation as gated_activation
from slicefine.backends.lean_reference import (
    gated_activation_backward as gated_activation_backward,
)
from slicefine.backends.lean_reference import rms_norm as rms_norm
from slicefine.backends.lean_reference import rms_norm_backward as rms_norm_backward
from slicefine.backends.operands import (
    BLOCK_8BIT,
    AdamWOptions,
    AdamWSlice,
    AdamWSlice8bit,
    SliceWrite,
)
from slicefine.slices import write_slice


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def take_columns(
    input: Tensor,  # [..., in]
    cols: Tensor,  # [K] int64
) -> Tensor:
    """The columns of a slice's input that its gradient needs: ``input[..., cols]`` with one row per
    token.

    Returns:
        [N, K], contiguous, a copy.
    """
    return input.index_select(-1, cols).reshape(-1, cols.shape[0])


def slice_grad(
    grad_output: Tensor,  # [N, out]
    input: Tensor,  # [N, K], already the columns of the slice
    rows: Tensor | None = None,  # [R] int64
) -> Tensor:
    """Gradient of a slice of W: ``grad_output[:, rows].T @ input``.

    Returns:
        [R, K], float32 or float64.
    """
    if rows is not None:
        grad_output = grad_output.index_select(1, rows)
    dtype = accumulation_dtype(grad_output.dtype)
    # [R, N] @ [N, K] -> [R, K]; cast first: a 16-bit product would round the sum over tokens
    return grad_output.to(dtype).t() @ input.to(dtype)


def slice_adamw(slices: Sequence[AdamWSlice], options: AdamWOptions) -> None:
    """AdamW on each master, in place, then ``weight[rows][:, cols] = cast(master)``.

    Source: Loshchilov & Hutter 2019, algorithm 2, in the order of operations of torch.optim.AdamW.
    """
    for i, s in enumerate(slices):
        _adamw(s, options)
        write_slice(s.weight, s.rows, s.cols, _written(s, options, i))


def _adamw(s: AdamWSlice, options: AdamWOptions) -> None:
    assert s.grad is not None
    # bias corrections in Python floats are float64, which the other backends must come close to
    t = float(s.step)
    beta1, beta2 = options.beta1, options.beta2
    s.master.mul_(1 - options.lr * options.weight_decay)
    grad = -s.grad if options.maximize else s.grad
    s.exp_avg.lerp_(grad, 1 - beta1)
    s.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    # sqrt(v_hat) + eps, with eps outside of the root as in torch.optim.AdamW
    denominator = (s.exp_avg_sq.sqrt() / (1 - beta2**t) ** 0.5).add_(options.eps)
    s.master.addcdiv_(s.exp_avg, denominator, value=-options.lr / (1 - beta1**t))


def _written(
    s: AdamWSlice | AdamWSlice8bit, options: AdamWOptions, slice_id: int
) -> Tensor:
    return round_to(s.master, s.weight.dtype, options.seed, slice_id)


def slice_adamw_8bit(
    slices: Sequence[AdamWSlice8bit],
    codebook: Tensor,  # [2, 256] float32, `dynamic_codebook`
    options: AdamWOptions,
) -> None:
    """`slice_adamw` with moments in 8 bits; the update uses the new moments before they are
    rounded.

    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    """
    for i, s in enumerate(slices):
        # _adamw changes m and v in place, so what is quantized below are the new moments
        m = dequantize_blockwise(s.exp_avg, s.exp_avg_scale, codebook[0])
        v = dequantize_blockwise(s.exp_avg_sq, s.exp_avg_sq_scale, codebook[1])
        _adamw(
            AdamWSlice(s.master, s.grad, m, v, s.weight, s.rows, s.cols, s.step), options
        )
        write_slice(s.weight, s.rows, s.cols, _written(s, options, i))
        for values, codes, scales, book in (
            (m, s.exp_avg, s.exp_avg_scale, codebook[0]),
            (v, s.exp_avg_sq, s.exp_avg_sq_scale, codebook[1]),
        ):
            new_codes, new_scales = quantize_blockwise(values, book)
            codes.copy_(new_codes)
            scales.copy_(new_scales)


def slice_grad_adamw(
    grad_output: Tensor,  # [N, out]
    input: Tensor,  # [N, K], already the columns of the slice
    active: AdamWSlice,
    options: AdamWOptions,
) -> None:
    """`slice_grad` followed by `slice_adamw` for one slice; its ``grad`` is not read."""
    grad = slice_grad(grad_output, input, active.rows)
    slice_adamw([active._replace(grad=grad)], options)


def write_slices(slices: Sequence[SliceWrite]) -> None:
    """``weight[rows][:, cols] = cast(master)`` for each slice, to nearest."""
    for s in slices:
        write_slice(s.weight, s.rows, s.cols, s.master.to(s.weight.dtype))


def dynamic_codebook() -> Tensor:
    """(2, 256) float32, ascending in [-1, 1] and [0, 1]: the values of 8-bit codes for signed and
    for unsigned moments.

    A dynamic exponent: values of decade 10**-e are spaced linearly, finer decades get fewer of
    them. Source: Dettmers 2016, 8-bit Approximations for Parallelism in Deep Learning; Dettmers et
    al. 2022.
    """
    books = []
    for signed in (True, False):
        # zero has a code of its own: a moment that is 0 stays 0
        values = [0.0, 1.0]
        for exponent in range(7):
            count = 2**exponent if signed else 2 ** (exponent + 1)
            edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
            middles = (10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
            values += middles + ([-x for x in middles] if signed else [])
        books.append(sorted(values))
    return torch.tensor(books, dtype=torch.float64).float()


def quantize_blockwise(values: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """(codes uint8 as values, scales (blocks,)): the nearest value of the book times the largest
    magnitude of the block; a positive value of an unsigned book is never zero."""
    flat = values.float().flatten()
    # [blocks, 256]; the zeros of the padding raise no scale
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK_8BIT)).view(
        -1, BLOCK_8BIT
    )
    scales = blocks.abs().amax(1)
    ratios = blocks * torch.where(scales > 0, 1.0 / scales, 0.0).unsqueeze(1)
    # the borders between codes are the midpoints of their values: the nearest value wins
    codes = torch.bucketize(ratios, (book[:-1] + book[1:]) / 2)
    # A second moment that rounds to zero beside a first moment that does not makes the next step
    # tens of times too large.
    codes = torch.where((codes == 0) & (blocks > 0), 1, codes)
    return codes.to(torch.uint8).flatten()[: len(flat)].view(values.shape), scales


def dequantize_blockwise(codes: Tensor, scales: Tensor, book: Tensor) -> Tensor:
    """Counterpart of `quantize_blockwise`, float32."""
    spread = scales.repeat_interleave(BLOCK_8BIT)[: codes.numel()].view(codes.shape)
    return book[codes.long()] * spread


def round_to(
    values: Tensor, dtype: torch.dtype, seed: int | None = None, slice_id: int = 0
) -> Tensor:
    """Cast to nearest, or with a seed stochastically to bfloat16: up with probability = the
    fraction that is cut off.
    """
    if seed is None or dtype != torch.bfloat16:
        return values.to(dtype)
    # int64, because torch has no full arithmetic on unsigned 32 bits
    bits = values.float().view(torch.int32).to(torch.int64)
    index = torch.arange(values.numel(), device=values.device).view(values.shape)
    # random bits below the cut carry into the kept ones as often as the cut fraction says
    up = (bits + (philox(seed, index, slice_id) & 0xFFFF)) & 0xFFFF0000
    rounded = (
        # back into the range of int32, whose bits are then read as float32 again
        torch.where(up >= 2**31, up - 2**32, up)
        .to(torch.int32)
        .view(torch.float32)
        .to(torch.bfloat16)
    )
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def philox(seed: int, c0: Tensor, c1: int) -> Tensor:
    """First word of Philox4x32-10 with counter (c0, c1, 0, 0), as int64 in [0, 2^32). Source:
    Salmon et al. 2011.
    """
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    one, two, three = torch.full_like(c0, c1), torch.zeros_like(c0), torch.zeros_like(c0)
    c0 = c0 & 0xFFFFFFFF
    # ten rounds, as in Triton's and CUDA's generators: the backends must draw the same bits
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
