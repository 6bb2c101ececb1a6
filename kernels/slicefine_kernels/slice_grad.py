"""slice_grad: G = dY[:, rows]^T X, (R, K) float32.

Tokens are split over programs; each writes its own partial sum and a second pass adds them in order, so the result is the
same on every run. dY and X are read once per tile of the other's features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slicefine_kernels.configs import grad_config, token_splits
from slicefine_kernels.gradient_tile import gradient_tile
from slicefine_kernels.launch import dot_options, on_device_of, processors


@triton.jit
def _slice_grad_kernel(
    dy_ptr,
    x_ptr,
    rows_ptr,
    out_ptr,
    stride_dyt,
    stride_dyr,
    stride_xt,
    stride_xk,
    T,
    R,
    K,
    tokens_per_split,
    HAS_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pid_r = tl.program_id(0)
    pid_k = tl.program_id(1)
    pid_split = tl.program_id(2)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    t_begin = pid_split * tokens_per_split
    t_end = tl.minimum(t_begin + tokens_per_split, T)
    acc = gradient_tile(
        dy_ptr, x_ptr, rows_ptr, stride_dyt, stride_dyr, stride_xt, stride_xk, R, K, t_begin, t_end, offs_r, offs_k,
        HAS_ROWS, BLOCK_R, BLOCK_K, BLOCK_T, INPUT_PRECISION, UPCAST,
    )  # fmt: skip
    # out: [splits, R, K]
    out = out_ptr + pid_split.to(tl.int64) * R * K + offs_r[:, None].to(tl.int64) * K + offs_k[None, :]
    tl.store(out, acc, mask=(offs_r < R)[:, None] & (offs_k < K)[None, :])


def slice_grad(grad_output: Tensor, input: Tensor, rows: Tensor | None = None) -> Tensor:
    """grad_output: (n, out), input: (n, K), rows: (R,) int64 or None for all -> (R, K) float32."""
    T, K = input.shape
    R = grad_output.shape[1] if rows is None else rows.numel()
    config = grad_config(R, K, input.element_size())
    tiles = triton.cdiv(R, config.BLOCK_R) * triton.cdiv(K, config.BLOCK_K)
    splits = token_splits(T, tiles, processors(input.device), config.BLOCK_T)
    tokens_per_split = triton.cdiv(triton.cdiv(T, splits), config.BLOCK_T) * config.BLOCK_T if T else config.BLOCK_T
    partial = torch.empty((splits, R, K), dtype=torch.float32, device=input.device)
    with on_device_of(input):
        _slice_grad_kernel[(triton.cdiv(R, config.BLOCK_R), triton.cdiv(K, config.BLOCK_K), splits)](
            grad_output, input, grad_output if rows is None else rows, partial,
            grad_output.stride(0), grad_output.stride(1), input.stride(0), input.stride(1),
            T, R, K, tokens_per_split,
            HAS_ROWS=rows is not None, BLOCK_R=config.BLOCK_R, BLOCK_K=config.BLOCK_K, BLOCK_T=config.BLOCK_T,
            **dot_options(input.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0)
