"""The lean ops in plain PyTorch: tensors in, tensors out. The oracle of faster backends.

n tokens, d features. A forward returns what a backward needs beside its inputs; no op computes a
gradient for a weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    late_cast: bool,
    internal: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """RMSNorm: ``(offset + weight) * x / sqrt(mean(x ** 2) + eps)``.

    Args:
        x: (..., d).
        weight: (d,).
        offset: 0, or 1 as in Gemma.
        late_cast: multiply by the weight before the result is rounded to x's dtype, not after.
        internal: dtype of the arithmetic.
    Returns:
        y (..., d), and rstd (..., 1) in the internal dtype.
    """
    wide = x.to(internal)
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    # Gemma scales in float32 and rounds once; Llama rounds before it scales
    if late_cast:
        return (normed * (offset + weight.to(internal))).to(x.dtype), rstd
    scale = weight if not offset else offset + weight
    return scale * normed.to(x.dtype), rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, offset: float
) -> Tensor:
    """The gradient for x of `rms_norm`; (..., d), in x's dtype."""
    internal = rstd.dtype
    wide = x.to(internal)
    # dx = rstd (s - x mean(s x) rstd^2) with s = dy (offset + w)
    scaled = grad.to(internal) * (offset + weight.to(internal))
    along = (scaled * wide).mean(-1, keepdim=True) * rstd.pow(2)
    return ((scaled - wide * along) * rstd).to(x.dtype)


def activation(x: Tensor, kind: str) -> Tensor:
    """One of ACTIVATIONS."""
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def activation_backward(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """The gradient for x of `activation`."""
    if kind == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    how = "tanh" if kind == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, x, approximate=how)


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """``activation(gate) * up``, as in SwiGLU and GeGLU; gate, up (..., m)."""
    return activation(gate, kind) * up


def gated_activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """The gradients for gate and up of `gated_activation`; the activation is computed again."""
    # in place: the activation is a temporary of this function
    grad_up = activation(gate, kind).mul_(grad)
    return activation_backward(grad * up, gate, kind), grad_up
