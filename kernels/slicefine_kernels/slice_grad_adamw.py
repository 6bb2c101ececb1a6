"""slice_grad_adamw: gradient, AdamW and write-through of one slice in one launch; no gradient
buffer exists.

As in `slice_grad` the tokens are split over programs; whoever arrives last at a tile has its
gradient in registers and updates.
"""

from __future__ import annotations

import math

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
from slicefine_kernels.launch import gradient_launch, on_device_of


@triton.jit
def _slice_grad_adamw_kernel(
    dy_ptr,
    x_ptr,
    p_ptr,
    m_ptr,
    v_ptr,
    w_ptr,
    rows_ptr,
    cols_ptr,
    step_ptr,
    partials_ptr,
    tickets_ptr,
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
    last = True
    if SPLIT:
        last = hand_in(g, partials_ptr, tickets_ptr, tile, split, splits, BLOCK_R, BLOCK_K)
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
        row = offs_r.to(tl.int64)
        col = offs_k.to(tl.int64)
        if HAS_ROWS:
            row = tl.load(rows_ptr + row, mask=mask_r, other=0)
        if HAS_COLS:
            col = tl.load(cols_ptr + col, mask=mask_k, other=0)
        if STOCHASTIC:
            value = round_bf16_stochastic(p, philox_word(seed, offs.to(tl.uint32), 0))
        elif w_ptr.dtype.element_ty == tl.bfloat16:
            value = round_bf16(p)
        else:
            value = p.to(w_ptr.dtype.element_ty)
        tl.store(w_ptr + row[:, None] * stride_wr + col[None, :] * stride_wc, value, mask=mask)


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
    """grad_output: (n, out), input: (n, K); master, exp_avg, exp_avg_sq: (R, K) float32; weight:
    (out, in); step: () float32.
    """
    for name, t in (("master", master), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not t.is_contiguous():
            raise ValueError(
                f"{name} has strides {t.stride()} for shape {tuple(t.shape)}; expected contiguous"
            )
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
            exp_avg,
            exp_avg_sq,
            weight,
            grad_output if rows is None else rows,
            grad_output if cols is None else cols,
            step,
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
            lr,
            beta1,
            beta2,
            math.log(beta1),
            math.log(beta2),
            eps,
            weight_decay,
            -1.0 if maximize else 1.0,
            seed or 0,
            HAS_ROWS=rows is not None,
            HAS_COLS=cols is not None,
            STOCHASTIC=seed is not None and weight.dtype == torch.bfloat16,
            **launch.options,
        )
