"""gated_activation: y = act(gate) up and its gradients; nothing is kept but gate and up.

act(x) = x s(x): s = 1 / (1 + e^-u) with u = x for SiLU and u = 2 sqrt(2/pi) (x + 0.044715 x^3) for
GELU by tanh, s = (1 + erf(x / sqrt(2))) / 2 for GELU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slicefine_kernels.configs import gate_config
from slicefine_kernels.launch import on_device_of
from slicefine_kernels.rms_norm import _rounded, rows_of

_KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


@triton.jit
def _share_and_slope(x, KIND: tl.constexpr):
    """s(x), and act'(x)."""
    if KIND == 2:
        s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = s + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        u = x
        du = 1.0
        if KIND == 1:
            u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            du = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        # held where e^-u is a float32: 1 / inf times an infinite x would be no number
        s = 1.0 / (1.0 + tl.exp(tl.minimum(-u, 88.0)))
        slope = s * (1.0 + x * (1.0 - s) * du)
    return s, slope


@triton.jit
def _gated_activation_fwd_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    stride_gn,
    stride_un,
    M,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < M
    gate = tl.load(gate_ptr + token * stride_gn + offs, mask=mask, other=0.0)
    up = tl.load(up_ptr + token * stride_un + offs, mask=mask, other=0.0)
    x = gate.to(tl.float32)
    s, _ = _share_and_slope(x, KIND)
    y = x * s * up.to(tl.float32)
    tl.store(y_ptr + token * M + offs, _rounded(y, gate), mask=mask)


@triton.jit
def _gated_activation_bwd_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    stride_dyn,
    stride_gn,
    stride_un,
    M,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < M
    dy = tl.load(dy_ptr + token * stride_dyn + offs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + token * stride_gn + offs, mask=mask, other=0.0)
    up = tl.load(up_ptr + token * stride_un + offs, mask=mask, other=0.0)
    x = gate.to(tl.float32)
    s, slope = _share_and_slope(x, KIND)
    place = token * M + offs
    tl.store(dgate_ptr + place, _rounded(dy * up.to(tl.float32) * slope, gate), mask=mask)
    tl.store(dup_ptr + place, _rounded(dy * x * s, gate), mask=mask)


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """gate, up [..., m] -> [..., m]."""
    gates, ups = rows_of(gate), rows_of(up)
    n, m = gates.shape
    y = gate.new_empty(gate.shape)
    config = gate_config()
    if n:
        with on_device_of(gate):
            _gated_activation_fwd_kernel[(n, triton.cdiv(m, config.BLOCK))](
                gates,
                ups,
                y,
                gates.stride(0),
                ups.stride(0),
                m,
                KIND=_KINDS[kind],
                BLOCK=config.BLOCK,
                num_warps=config.num_warps,
            )
    return y


def gated_activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """grad, gate, up [..., m] -> the gradients for gate and up."""
    above, gates, ups = rows_of(grad), rows_of(gate), rows_of(up)
    n, m = gates.shape
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    config = gate_config()
    if n:
        with on_device_of(gate):
            _gated_activation_bwd_kernel[(n, triton.cdiv(m, config.BLOCK))](
                above,
                gates,
                ups,
                grad_gate,
                grad_up,
                above.stride(0),
                gates.stride(0),
                ups.stride(0),
                m,
                KIND=_KINDS[kind],
                BLOCK=config.BLOCK,
                num_warps=config.num_warps,
            )
    return grad_gate, grad_up
