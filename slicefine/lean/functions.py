"""The autograd functions of lean modules: what is kept for backward, and nothing else."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from slicefine.lean import reference


class RMSNormFunction(Function):
    """RMSNorm with a frozen weight; keeps x and one number a token."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, late_cast, internal):
        y, rstd = reference.rms_norm(x, weight, eps, offset, late_cast, internal)
        # neither x / rms nor its float32 copy: both follow from these in one pass
        ctx.save_for_backward(x, rstd, weight)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, rstd, weight = ctx.saved_tensors
        grad_x = reference.rms_norm_backward(grad, x, rstd, weight, ctx.offset)
        return grad_x, None, None, None, None, None


class GatedActivationFunction(Function):
    """activation(gate) * up; keeps gate and up."""

    @staticmethod
    def forward(ctx, gate, up, kind):
        # not the activation and not the product: both are made again from these
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return reference.gated_activation(gate, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = reference.gated_activation_backward(grad, gate, up, ctx.kind)
        return grad_gate, grad_up, None


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return GatedActivationFunction.apply(gate, up, kind)  # type: ignore[return-value]
