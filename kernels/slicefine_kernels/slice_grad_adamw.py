"""slice_grad_adamw: gradient, AdamW and write-through of one slice in one launch; no gradient
buffer exists.

As in `slice_grad` the tokens are split over programs; whoever arrives last at a tile has its
gradient in registers and updates.
"""

from __future__ import annotations

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
from slicefine_kernels.gradient_tile import add_up, gradient_tile, hand_in
from slicefine_kernels.launch import (
    AdamWOptions,
    adamw_scalars,
    check_contiguous,
    gradient_launch,
    on_device_of,
)


@triton.jit
def _slice_grad_adamw_kernel(
    dy_ptr,  # [T, out]
    x_ptr,  # [T, K]
    p_ptr,  # [R, K]
    m_ptr,  # [R, K]
    v_ptr,  # [R, K]
    w_ptr,  # [out, in]
    rows_ptr,  # [R]
    cols_ptr,  # [K]
    step_ptr,  # []
    partials_ptr,  # [tiles, splits, BLOCK_R, BLOCK_K]
    tickets_ptr,  # [tiles]
    stride_dyt,
    stride_dyr,
    stride_xt,
    stride_xk,
    stride_wr,
    stride_wc,
    T,
    R,
    K,
    tokens_per_split,
    splits,
    lr,
    beta1,
    beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    sign,
    seed,
    HAS_ROWS: tl.constexpr,
    HAS_COLS: tl.constexpr,
    SPLIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # axis 0: a tile of the slice; axis 1: a part of the tokens
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_k = tl.cdiv(K, BLOCK_K)
    offs_r = (tile // tiles_k) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = (tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    t_begin = split * tokens_per_split
    g = gradient_tile(
        dy_ptr,
        x_ptr,
        rows_ptr,
        stride_dyt,
        stride_dyr,
        stride_xt,
        stride_xk,
        R,
        K,
        t_begin,
        tl.minimum(t_begin + tokens_per_split, T),
        offs_r,
        offs_k,
        HAS_ROWS,
        BLOCK_R,
        BLOCK_K,
        BLOCK_T,
        INPUT_PRECISION,
        UPCAST,
    )
    # without a split this program has the whole gradient of its tile
    last = True
    if SPLIT:
        last = hand_in(g, partials_ptr, tickets_ptr, tile, split, splits, BLOCK_R, BLOCK_K)
    # Adam is not linear in the gradient: only who has all of it may update
    if last:
        if SPLIT:
            g = add_up(partials_ptr, tickets_ptr, tile, splits, BLOCK_R, BLOCK_K)

        # AdamW, [BLOCK_R, BLOCK_K]
        mask_r = offs_r < R
        mask_k = offs_k < K
        mask = mask_r[:, None] & mask_k[None, :]
        offs = offs_r[:, None] * K + offs_k[None, :]
        p = tl.load(p_ptr + offs, mask=mask, other=0.0)
        m = tl.load(m_ptr + offs, mask=mask, other=0.0)
        v = tl.load(v_ptr + offs, mask=mask, other=0.0)
        # read on the device, so that a captured graph sees the step of each replay
        step = tl.load(step_ptr)
        correction1 = one_minus_power(log_beta1, step)
        correction2 = one_minus_power(log_beta2, step)
        p, m, v = adamw_update(
            p, sign * g, m, v, lr, beta1, beta2, eps, weight_decay, correction1, correction2
        )
        tl.store(p_ptr + offs, p, mask=mask)
        tl.store(m_ptr + offs, m, mask=mask)
        tl.store(v_ptr + offs, v, mask=mask)

        # write-through
        # int64: row * stride passes 2^31 in the weight of a large head
        row = offs_r.to(tl.int64)
        col = offs_k.to(tl.int64)
        if HAS_ROWS:
            row = tl.load(rows_ptr + row, mask=mask_r, other=0)
        if HAS_COLS:
            col = tl.load(cols_ptr + col, mask=mask_k, other=0)
        if STOCHASTIC:
            # by the place in the slice: the result does not depend on the tiling
            value = round_bf16_stochastic(p, philox_word(seed, offs.to(tl.uint32), 0))
        elif w_ptr.dtype.element_ty == tl.bfloat16:
            value = round_bf16(p)
        else:
            value = p.to(w_ptr.dtype.element_ty)
        tl.store(
            w_ptr + row[:, None] * stride_wr + col[None, :] * stride_wc, value, mask=mask
        )


def slice_grad_adamw(
    grad_output: Tensor,  # [T, out]
    input: Tensor,  # [T, K]
    active: Any,
    options: AdamWOptions,
) -> None:
    """active: the slice, as `slice_adamw` takes it; its grad is not read."""
    master, weight, rows, cols = active.master, active.weight, active.rows, active.cols
    check_contiguous(master=master, exp_avg=active.exp_avg, exp_avg_sq=active.exp_avg_sq)
    T, K = input.shape
    R = master.shape[0]
    if master.numel() == 0:
        return
    launch = gradient_launch(input, T, R, K)
    with on_device_of(input):
        _slice_grad_adamw_kernel[launch.grid](
            grad_output,
            input,
            master,
            active.exp_avg,
            active.exp_avg_sq,
            weight,
            grad_output if rows is None else rows,
            grad_output if cols is None else cols,
            active.step,
            launch.partials,
            launch.tickets,
            grad_output.stride(0),
            grad_output.stride(1),
            input.stride(0),
            input.stride(1),
            weight.stride(0),
            weight.stride(1),
            T,
            R,
            K,
            launch.tokens_per_split,
            launch.splits,
            *adamw_scalars(options),
            HAS_ROWS=rows is not None,
            HAS_COLS=cols is not None,
            STOCHASTIC=options.seed is not None and weight.dtype == torch.bfloat16,
            **launch.options,
        )
