"""rms_norm: y = (offset + w) x rstd and its gradient for x; a program makes one token at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slicefine_kernels.adamw import round_bf16
from slicefine_kernels.configs import norm_config
from slicefine_kernels.launch import on_device_of


@triton.jit
def _rounded(value, like):
    # a plain cast to bfloat16 truncates in Triton's interpreter
    if like.dtype == tl.bfloat16:
        result = round_bf16(value)
    else:
        result = value.to(like.dtype)
    return result


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    rstd_ptr,
    stride_xn,
    D,
    eps,
    offset,
    LATE_CAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * stride_xn
    y_ptr += token * D
    offs = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        mask = start + offs < D
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        squares += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / D + eps)
    tl.store(rstd_ptr + token, rstd)
    for start in range(0, D, BLOCK):
        mask = start + offs < D
        # again, from the cache that the first pass has filled
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0)
        w = tl.load(w_ptr + start + offs, mask=mask, other=0.0)
        normed = x.to(tl.float32) * rstd
        scale = offset + w.to(tl.float32)
        if not LATE_CAST:
            normed = _rounded(normed, x).to(tl.float32)
            scale = _rounded(scale, x).to(tl.float32)
        tl.store(y_ptr + start + offs, _rounded(normed * scale, x), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,
    rstd_ptr,
    dx_ptr,
    stride_dyn,
    stride_xn,
    D,
    offset,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dy_ptr += token * stride_dyn
    x_ptr += token * stride_xn
    dx_ptr += token * D
    offs = tl.arange(0, BLOCK)
    rstd = tl.load(rstd_ptr + token)
    products = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        mask = start + offs < D
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        products += dy * (offset + w) * x
    # dx = rstd (s - x mean(s x) rstd^2) with s = dy (offset + w)
    along = tl.sum(products, axis=0) / D * rstd * rstd
    for start in range(0, D, BLOCK):
        mask = start + offs < D
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0)
        w = tl.load(w_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        dx = (dy * (offset + w) - x.to(tl.float32) * along) * rstd
        tl.store(dx_ptr + start + offs, _rounded(dx, x), mask=mask)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    late_cast: bool,
    internal: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x [..., d], weight [d] -> y [..., d], rstd [..., 1] float32."""
    flat = rows_of(x)
    n, d = flat.shape
    y = x.new_empty(x.shape)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    config = norm_config(d)
    if n:
        with on_device_of(x):
            _rms_norm_fwd_kernel[(n,)](
                flat,
                weight.contiguous(),
                y,
                rstd,
                flat.stride(0),
                d,
                eps,
                offset,
                LATE_CAST=late_cast,
                BLOCK=config.BLOCK,
                num_warps=config.num_warps,
            )
    return y, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, offset: float
) -> Tensor:
    """grad, x [..., d], rstd [..., 1], weight [d] -> dx [..., d]."""
    flat, above = rows_of(x), rows_of(grad)
    n, d = flat.shape
    dx = x.new_empty(x.shape)
    config = norm_config(d)
    if n:
        with on_device_of(x):
            _rms_norm_bwd_kernel[(n,)](
                above,
                flat,
                weight.contiguous(),
                rstd.contiguous(),
                dx,
                above.stride(0),
                flat.stride(0),
                d,
                offset,
                BLOCK=config.BLOCK,
                num_warps=config.num_warps,
            )
    return dx


def rows_of(x: Tensor) -> Tensor:
    """[..., d] -> [n, d] with the features of a token side by side; a copy only where needed."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
