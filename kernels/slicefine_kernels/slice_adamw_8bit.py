"""slice_adamw_8bit: `slice_adamw` with both moments in 8 bits, one scale per 256 of them (Dettmers
et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
from slicefine_kernels.launch import address, address_table, on_device_of

_FIELDS = tl.constexpr(15)
_QUANTUM = tl.constexpr(256)  # elements that share a scale
_BLOCKS = 4  # of them per program

_TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _nearest_code(ratio, book_ptr):
    """The number of midpoints below the ratio: binary search in the 256 ascending values of a
    codebook.
    """
    code = tl.zeros(ratio.shape, dtype=tl.int32)
    for bit in tl.static_range(8):
        trial = code + (128 >> bit)
        middle = (tl.load(book_ptr + trial - 1) + tl.load(book_ptr + trial)) * 0.5
        code = tl.where(ratio > middle, trial, code)
    return code


@triton.jit
def _quantize(values, codes, scales, mask, scale_mask, book_ptr):
    """values [BLOCKS, 256] -> their codes and scales [BLOCKS], stored."""
    scale = tl.max(tl.abs(values), axis=1)
    # a NaN stays, as in the reference
    scale = tl.where(tl.max((values != values).to(tl.int32), axis=1) > 0, float("nan"), scale)
    inverse = 1.0 / tl.where(scale > 0, scale, 1.0)  # a block of zeros keeps its zeros
    code = _nearest_code(values * inverse[:, None], book_ptr)
    # a positive second moment never rounds to zero (csrc/numeric.h, nonzero_code)
    code = tl.where((code == 0) & (values > 0.0), 1, code)
    tl.store(codes, code.to(tl.uint8), mask=mask)
    tl.store(scales, scale, mask=scale_mask)


@triton.jit
def _slice_adamw_8bit_kernel(
    table_ptr,
    book_ptr,
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
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    entry = table_ptr + tl.program_id(1) * _FIELDS
    R = tl.load(entry + 10)
    K = tl.load(entry + 11)
    if first * _QUANTUM >= R * K:
        return  # the grid is as long as the largest slice
    block = first + tl.arange(0, BLOCKS)
    offs = block[:, None] * _QUANTUM + tl.arange(0, _QUANTUM)[None, :]  # [BLOCKS, 256]
    mask = offs < R * K
    mask_s = block * _QUANTUM < R * K
    p_ptr = tl.load(entry).to(tl.pointer_type(tl.float32)) + offs
    m_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.uint8)) + offs
    v_ptr = tl.load(entry + 3).to(tl.pointer_type(tl.uint8)) + offs
    m_scales = tl.load(entry + 4).to(tl.pointer_type(tl.float32)) + block
    v_scales = tl.load(entry + 5).to(tl.pointer_type(tl.float32)) + block

    # AdamW
    g = (
        tl.load(tl.load(entry + 1).to(tl.pointer_type(tl.float32)) + offs, mask=mask, other=0.0)
        * sign
    )
    p = tl.load(p_ptr, mask=mask, other=0.0)
    m = tl.load(book_ptr + tl.load(m_ptr, mask=mask, other=0).to(tl.int32))
    m = tl.where(mask, m * tl.load(m_scales, mask=mask_s, other=0.0)[:, None], 0.0)
    v = tl.load(book_ptr + 256 + tl.load(v_ptr, mask=mask, other=0).to(tl.int32))
    v = tl.where(mask, v * tl.load(v_scales, mask=mask_s, other=0.0)[:, None], 0.0)
    step = tl.load(tl.load(entry + 9).to(tl.pointer_type(tl.float32)))
    correction1 = one_minus_power(log_beta1, step)
    correction2 = one_minus_power(log_beta2, step)
    p, m, v = adamw_update(
        p, g, m, v, lr, beta1, beta2, eps, weight_decay, correction1, correction2
    )
    tl.store(p_ptr, p, mask=mask)
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
    tl.store(w_ptr + row * tl.load(entry + 12) + col * tl.load(entry + 13), value, mask=mask)


def slice_adamw_8bit(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    codebook: Tensor,
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
    """masters, grads: (R, K) float32; exp_avgs, exp_avg_sqs: (R, K) uint8; scales: (ceil(R K /
    256),); codebook: (2, 256).
    """
    grads = [g.to(torch.float32).contiguous() for g in grads]
    for dtype in dict.fromkeys(w.dtype for w in weights):
        entries, largest = [], 0
        for i, (p, m, v, weight) in enumerate(
            zip(masters, exp_avgs, exp_avg_sqs, weights, strict=True)
        ):
            if weight.dtype != dtype or p.numel() == 0:
                continue
            for name, t in (("master", p), ("exp_avg", m), ("exp_avg_sq", v)):
                if not t.is_contiguous():
                    raise ValueError(
                        f"{name} has strides {t.stride()} for shape {tuple(t.shape)}; expected"
                        " contiguous"
                    )
            tensors = (
                p,
                grads[i],
                m,
                v,
                exp_avg_scales[i],
                exp_avg_sq_scales[i],
                weight,
                rows[i],
                cols[i],
                steps[i],
            )
            entries.append((*map(address, tensors), *p.shape, *weight.stride(), i))
            largest = max(largest, p.numel())
        if not entries:
            continue
        with on_device_of(weights[0]):
            _slice_adamw_8bit_kernel[(triton.cdiv(largest, _BLOCKS * 256), len(entries))](
                address_table(tuple(entries), weights[0].device),
                codebook,
                lr,
                beta1,
                beta2,
                math.log(beta1),
                math.log(beta2),
                eps,
                weight_decay,
                -1.0 if maximize else 1.0,
                seed or 0,
                STOCHASTIC=seed is not None and dtype == torch.bfloat16,
                WEIGHT_DTYPE=_TRITON_DTYPE[dtype],
                BLOCKS=_BLOCKS,
                num_warps=8,
            )
