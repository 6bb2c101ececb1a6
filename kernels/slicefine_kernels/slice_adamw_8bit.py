"""slice_adamw_8bit: `slice_adamw` with both moments in 8 bits, one scale per 256 of them (Dettmers
et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slicefine_kernels.adamw import (
    adamw_update,
    one_minus_power,
    philox_word,
    round_bf16,
    round_bf16_stochastic,
)
from slicefine_kernels.launch import (
    AdamWOptions,
    adamw_scalars,
    address,
    address_table,
    check_contiguous,
    on_device_of,
)

_FIELDS = tl.constexpr(15)
_QUANTUM = tl.constexpr(256)  # elements that share a scale
_BLOCKS = 4  # of them per program

_TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _nearest_code(ratio, book_ptr):
    """The number of midpoints below the ratio: binary search in the 256 ascending values of a
    codebook.
    """
    code = tl.zeros(ratio.shape, dtype=tl.int32)
    # eight halvings for 256 codes, unrolled; every lane takes the same path
    for bit in tl.static_range(8):
        trial = code + (128 >> bit)
        # the border between two codes lies midway between their values
        middle = (tl.load(book_ptr + trial - 1) + tl.load(book_ptr + trial)) * 0.5
        code = tl.where(ratio > middle, trial, code)
    return code


@triton.jit
def _quantize(values, codes, scales, mask, scale_mask, book_ptr):
    """values [BLOCKS, 256] -> their codes and scales [BLOCKS], stored."""
    # the largest magnitude maps to 1: no value of the block is clipped
    scale = tl.max(tl.abs(values), axis=1)
    # a NaN stays, as in the reference
    scale = tl.where(
        tl.max((values != values).to(tl.int32), axis=1) > 0, float("nan"), scale
    )
    inverse = 1.0 / tl.where(scale > 0, scale, 1.0)  # a block of zeros keeps its zeros
    code = _nearest_code(values * inverse[:, None], book_ptr)
    # a positive second moment never rounds to zero (csrc/numeric.h, nonzero_code)
    code = tl.where((code == 0) & (values > 0.0), 1, code)
    tl.store(codes, code.to(tl.uint8), mask=mask)
    tl.store(scales, scale, mask=scale_mask)


@triton.jit
def _slice_adamw_8bit_kernel(
    table_ptr,  # [slices, _FIELDS] int64
    book_ptr,  # [2, 256]
    lr,
    beta1,
    beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    sign,
    seed,
    STOCHASTIC: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # a program takes whole quanta, so a scale is written by exactly one program
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    entry = table_ptr + tl.program_id(1) * _FIELDS
    R = tl.load(entry + 10)
    K = tl.load(entry + 11)
    if first * _QUANTUM >= R * K:
        return  # the grid is as long as the largest slice
    block = first + tl.arange(0, BLOCKS)
    offs = block[:, None] * _QUANTUM + tl.arange(0, _QUANTUM)[None, :]  # [BLOCKS, 256]
    mask = offs < R * K
    # a scale exists for the last quantum even where only part of it is filled
    mask_s = block * _QUANTUM < R * K
    p_ptr = tl.load(entry).to(tl.pointer_type(tl.float32)) + offs
    m_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.uint8)) + offs
    v_ptr = tl.load(entry + 3).to(tl.pointer_type(tl.uint8)) + offs
    m_scales = tl.load(entry + 4).to(tl.pointer_type(tl.float32)) + block
    v_scales = tl.load(entry + 5).to(tl.pointer_type(tl.float32)) + block

    # AdamW
    g = (
        tl.load(
            tl.load(entry + 1).to(tl.pointer_type(tl.float32)) + offs, mask=mask, other=0.0
        )
        * sign
    )
    p = tl.load(p_ptr, mask=mask, other=0.0)
    # [BLOCKS, 256]: code -> value of the signed book, times the scale of its row
    m = tl.load(book_ptr + tl.load(m_ptr, mask=mask, other=0).to(tl.int32))
    # code 0 of the signed book is no zero: an unmasked tail would enter the block's scale
    m = tl.where(mask, m * tl.load(m_scales, mask=mask_s, other=0.0)[:, None], 0.0)
    # the unsigned book is the second row
    v = tl.load(book_ptr + 256 + tl.load(v_ptr, mask=mask, other=0).to(tl.int32))
    v = tl.where(mask, v * tl.load(v_scales, mask=mask_s, other=0.0)[:, None], 0.0)
    step = tl.load(tl.load(entry + 9).to(tl.pointer_type(tl.float32)))
    correction1 = one_minus_power(log_beta1, step)
    correction2 = one_minus_power(log_beta2, step)
    p, m, v = adamw_update(
        p, g, m, v, lr, beta1, beta2, eps, weight_decay, correction1, correction2
    )
    tl.store(p_ptr, p, mask=mask)
    # only now: the update has used the moments before they are rounded
    _quantize(m, m_ptr, m_scales, mask, mask_s, book_ptr)
    _quantize(v, v_ptr, v_scales, mask, mask_s, book_ptr + 256)

    # write-through
    rows_address = tl.load(entry + 7)
    cols_address = tl.load(entry + 8)
    row = offs // K
    col = offs % K
    if rows_address != 0:
        row = tl.load(rows_address.to(tl.pointer_type(tl.int64)) + row, mask=mask, other=0)
    if cols_address != 0:
        col = tl.load(cols_address.to(tl.pointer_type(tl.int64)) + col, mask=mask, other=0)
    if STOCHASTIC:
        word = philox_word(seed, offs.to(tl.uint32), tl.load(entry + 14).to(tl.uint32))
        value = round_bf16_stochastic(p, word)
    elif tl.bfloat16 == WEIGHT_DTYPE:
        value = round_bf16(p)
    else:
        value = p.to(WEIGHT_DTYPE)
    w_ptr = tl.load(entry + 6).to(tl.pointer_type(WEIGHT_DTYPE))
    tl.store(
        w_ptr + row * tl.load(entry + 12) + col * tl.load(entry + 13), value, mask=mask
    )


def slice_adamw_8bit(
    slices: Sequence[Any],
    codebook: Tensor,  # [2, 256]
    options: AdamWOptions,
) -> None:
    """For each slice: master, grad [R, K] float32; exp_avg, exp_avg_sq [R, K] uint8; their scales
    [ceil(R * K / 256)]; weight [out, in]; rows [R] and cols [K] int64 or None for all; step []
    float32 on the device.
    """
    grads = [s.grad.to(torch.float32).contiguous() for s in slices]
    for dtype in dict.fromkeys(s.weight.dtype for s in slices):
        entries, largest = [], 0
        for i, s in enumerate(slices):
            if s.weight.dtype != dtype or s.master.numel() == 0:
                continue
            check_contiguous(master=s.master, exp_avg=s.exp_avg, exp_avg_sq=s.exp_avg_sq)
            moments = (s.exp_avg, s.exp_avg_sq, s.exp_avg_scale, s.exp_avg_sq_scale)
            tensors = (s.master, grads[i], *moments, s.weight, s.rows, s.cols, s.step)
            entries.append((*map(address, tensors), *s.master.shape, *s.weight.stride(), i))
            largest = max(largest, s.master.numel())
        if not entries:
            continue
        weight = slices[0].weight
        with on_device_of(weight):
            _slice_adamw_8bit_kernel[(triton.cdiv(largest, _BLOCKS * 256), len(entries))](
                address_table(tuple(entries), weight.device),
                codebook,
                *adamw_scalars(options),
                STOCHASTIC=options.seed is not None and dtype == torch.bfloat16,
                WEIGHT_DTYPE=_TRITON_DTYPE[dtype],
                BLOCKS=_BLOCKS,
                num_warps=8,
            )
