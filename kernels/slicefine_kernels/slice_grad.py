"""slice_grad: G = dY[:, rows]^T X, (R, K) float32, in one launch.

Tokens are split over programs; each leaves its partial sum in the workspace, and the last to arrive
at a tile adds them in
order, so the result is the same on every run. dY and X are read once per tile of the other's
features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slicefine_kernels.gradient_tile import add_up, gradient_tile, hand_in
from slicefine_kernels.launch import gradient_launch, on_device_of


@triton.jit
def _slice_grad_kernel(
    dy_ptr,  # [T, out]
    x_ptr,  # [T, K]
    rows_ptr,  # [R]
    out_ptr,  # [R, K]
    partials_ptr,  # [tiles, splits, BLOCK_R, BLOCK_K]
    tickets_ptr,  # [tiles]
    stride_dyt,
    stride_dyr,
    stride_xt,
    stride_xk,
    T,
    R,
    K,
    tokens_per_split,
    splits,
    HAS_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # programs beside each other read the same tokens
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_k = tl.cdiv(K, BLOCK_K)
    offs_r = (tile // tiles_k) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = (tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    t_begin = split * tokens_per_split
    acc = gradient_tile(
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
        last = hand_in(
            acc, partials_ptr, tickets_ptr, tile, split, splits, BLOCK_R, BLOCK_K
        )
    # a program that is not the last has left its sum in the workspace and is done
    if last:
        if SPLIT:
            acc = add_up(partials_ptr, tickets_ptr, tile, splits, BLOCK_R, BLOCK_K)
        # int32 is enough: the launcher refuses R * K from 2**31 on
        out = out_ptr + offs_r[:, None] * K + offs_k[None, :]
        tl.store(out, acc, mask=(offs_r < R)[:, None] & (offs_k < K)[None, :])


def slice_grad(
    grad_output: Tensor,  # [T, out]
    input: Tensor,  # [T, K]
    rows: Tensor | None = None,  # [R] int64, None for all
) -> Tensor:
    """[R, K] float32."""
    T, K = input.shape
    R = grad_output.shape[1] if rows is None else rows.numel()
    out = torch.empty((R, K), dtype=torch.float32, device=input.device)
    if out.numel() == 0:
        return out
    # also for no tokens: their gradient is zeros, which `empty` does not hold
    launch = gradient_launch(input, T, R, K)
    with on_device_of(input):
        _slice_grad_kernel[launch.grid](
            grad_output,
            input,
            # a pointer must be passed; without HAS_ROWS it is never read
            grad_output if rows is None else rows,
            out,
            launch.partials,
            launch.tickets,
            grad_output.stride(0),
            grad_output.stride(1),
            input.stride(0),
            input.stride(1),
            T,
            R,
            K,
            launch.tokens_per_split,
            launch.splits,
            HAS_ROWS=rows is not None,
            **launch.options,
        )
    return out
