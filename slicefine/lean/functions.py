"""The autograd functions of lean modules: what is kept for backward, and nothing else.

``remake(ctx)`` gives the forward's result once more, so that a row slice behind it need not keep
its input (`slicefine.function.source_of`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from slicefine.backends import lean_reference as reference
from slicefine.lean import ops


def _kept(ctx) -> tuple[Tensor, ...]:
    """What forward has saved. Read once: a checkpoint computes its layer for one reading only."""
    if getattr(ctx, "read", None) is None:
        ctx.read = ctx.saved_tensors
    return ctx.read


def _let_go(ctx) -> tuple[Tensor, ...]:
    """The same for the last time, in backward."""
    kept = _kept(ctx)
    ctx.read = ctx.remade = None
    return kept


def _fused(fits: bool) -> Any:
    """The ops, or plain PyTorch: for a compiler, which fuses it better than it fuses around an op,
    and for dtypes that the ops do not take.
    """
    return ops if fits and not torch.compiler.is_compiling() else reference


class RMSNormFunction(Function):
    """RMSNorm with a frozen weight; keeps x and one number a token."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, late_cast, internal):
        run = _fused(ops.takes_norm(x, weight, internal))
        options = eps, offset, late_cast, internal
        y, rstd = run.rms_norm(x, weight, *options)
        # neither x / rms nor its float32 copy: both follow from these in one pass
        ctx.save_for_backward(x, rstd, weight)
        ctx.run, ctx.options = run, options
        return y

    @staticmethod
    def remake(ctx) -> Tensor:
        # for the query, the key and the value, or for gate and up: made for the first of them
        if getattr(ctx, "remade", None) is None:
            x, _, weight = _kept(ctx)
            # the same code gives the same bits
            ctx.remade, _ = ctx.run.rms_norm(x, weight, *ctx.options)
        return ctx.remade

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, rstd, weight = _let_go(ctx)
        # a gradient may come in the dtype of a wider weight
        run = ctx.run if grad.dtype == x.dtype else reference
        grad_x = run.rms_norm_backward(grad, x, rstd, weight, ctx.options[1])
        return grad_x, None, None, None, None, None


class LayerNormFunction(Function):
    """torch's LayerNorm with frozen weights, and a way to make its result again."""

    @staticmethod
    def forward(ctx, x, shape, weight, bias, eps):
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.shape = shape
        ctx.eps = eps
        return y

    @staticmethod
    def remake(ctx) -> Tensor:
        if getattr(ctx, "remade", None) is None:
            x, _, _, weight, bias = _kept(ctx)
            # the same operator again gives the same bits
            ctx.remade = F.layer_norm(x, ctx.shape, weight, bias, ctx.eps)
        return ctx.remade

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, rstd, weight, bias = _let_go(ctx)
        grad_x, *_ = torch.ops.aten.native_layer_norm_backward(
            grad, x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
        )
        return grad_x, None, None, None, None


class GatedActivationFunction(Function):
    """activation(gate) * up; keeps gate and up."""

    @staticmethod
    def forward(ctx, gate, up, kind):
        # not the activation and not the product: both are made again from these
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.run = kind, _fused(gate.dtype == up.dtype)
        return ctx.run.gated_activation(gate, up, kind)

    @staticmethod
    def remake(ctx) -> Tensor:
        # not held: one layer reads it, and it is the widest tensor of its block
        return ctx.run.gated_activation(*_kept(ctx), ctx.kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = _let_go(ctx)
        grad_gate, grad_up = ctx.run.gated_activation_backward(grad, gate, up, ctx.kind)
        return grad_gate, grad_up, None


class ActivationFunction(Function):
    """activation(x); keeps x."""

    @staticmethod
    def forward(ctx, x, kind):
        ctx.save_for_backward(x)
        ctx.kind = kind
        return reference.activation(x, kind)

    @staticmethod
    def remake(ctx) -> Tensor:
        (x,) = _kept(ctx)
        return reference.activation(x, ctx.kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = _let_go(ctx)
        return reference.activation_backward(grad, x, ctx.kind), None


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return GatedActivationFunction.apply(gate, up, kind)  # type: ignore[return-value]
