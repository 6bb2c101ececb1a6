"""The ops of lean modules: schemas, fakes and checks, as `slicefine.ops` has them for slices.

n tokens, d features of a norm, m of a gated MLP. No op has a gradient for a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slicefine.backends import lean_reference
from slicefine.backends.select import backend_for, direct

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def rms_norm(
    x: Tensor,  # [..., d]
    weight: Tensor,  # [d]
    eps: float,
    offset: float,
    late_cast: bool,
    internal: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """RMSNorm: ``(offset + weight) * x / sqrt(mean(x ** 2) + eps)``.

    Returns:
        y [..., d], and rstd [..., 1] in the internal dtype.

    Raises:
        ValueError: Shapes or devices do not agree.
        TypeError: Dtypes do not agree.
    """
    module = _direct("rms_norm", x)
    if module is None:
        return torch.ops.slicefine.rms_norm(x, weight, eps, offset, late_cast, internal)
    _check_norm("rms_norm", x, weight, internal)
    return module.rms_norm(x, weight, eps, offset, late_cast, internal)


def rms_norm_backward(
    grad: Tensor,  # [..., d]
    x: Tensor,  # [..., d]
    rstd: Tensor,  # [..., 1]
    weight: Tensor,  # [d]
    offset: float,
) -> Tensor:
    """The gradient for x of `rms_norm`; errors as there."""
    module = _direct("rms_norm_backward", x, grad)
    if module is None:
        return torch.ops.slicefine.rms_norm_backward(grad, x, rstd, weight, offset)
    _check_norm("rms_norm_backward", x, weight, rstd.dtype)
    _check_alike("rms_norm_backward", x=x, grad=grad)
    return module.rms_norm_backward(grad, x, rstd, weight, offset)


def gated_activation(
    gate: Tensor,  # [..., m]
    up: Tensor,  # [..., m]
    kind: str,
) -> Tensor:
    """``activation(gate) * up``, as in SwiGLU and GeGLU, rounded once.

    Returns:
        [..., m].

    Raises:
        ValueError: Shapes or devices do not agree, or there is no such activation.
        TypeError: Dtypes do not agree.
    """
    module = _direct("gated_activation", gate, up)
    if module is None:
        return torch.ops.slicefine.gated_activation(gate, up, kind)
    _check_gate("gated_activation", kind, gate=gate, up=up)
    return module.gated_activation(gate, up, kind)


def gated_activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """The gradients for gate and up of `gated_activation`; errors as there."""
    module = _direct("gated_activation_backward", gate, up, grad)
    if module is None:
        return torch.ops.slicefine.gated_activation_backward(grad, gate, up, kind)
    _check_gate("gated_activation_backward", kind, gate=gate, up=up, grad=grad)
    return module.gated_activation_backward(grad, gate, up, kind)


def takes_norm(x: Tensor, weight: Tensor, internal: torch.dtype) -> bool:
    """Whether the ops take this norm; other mixtures of dtypes are left to plain PyTorch."""
    wide = internal == torch.float32 or internal == x.dtype == torch.float64
    return wide and weight.dtype == x.dtype and x.dtype in _FLOATS


def _direct(op: str, *tensors: Tensor) -> Any:
    module = direct(*tensors)
    return module if hasattr(module, op) else None


# Checks


def _check_norm(
    op: str,
    x: Tensor,
    weight: Tensor,
    internal: torch.dtype,
) -> None:
    if x.shape[-1:] != weight.shape:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (..., d)"
            " and (d,)"
        )
    if not takes_norm(x, weight, internal):
        raise TypeError(
            f"{op}: x is {x.dtype}, weight {weight.dtype}, the arithmetic {internal}; expected one"
            " floating dtype, and float32, or float64 for float64"
        )
    if x.device != weight.device:
        raise ValueError(f"{op}: x is on {x.device}, weight on {weight.device}")


def _check_gate(op: str, kind: str, **tensors: Tensor) -> None:
    if kind not in lean_reference.ACTIVATIONS:
        known = ", ".join(lean_reference.ACTIVATIONS)
        raise ValueError(f"{op}: no activation {kind!r}; expected one of {known}")
    _check_alike(op, **tensors)


def _check_alike(op: str, **tensors: Tensor) -> None:
    (first, like), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != like.dtype:
            raise TypeError(f"{op}: {first} is {like.dtype}, {name} {tensor.dtype}")
        if tensor.shape != like.shape or tensor.device != like.device:
            raise ValueError(
                f"{op}: {first} has shape {tuple(like.shape)} on {like.device}, {name}"
                f" {tuple(tensor.shape)} on {tensor.device}; expected the same"
            )


# What the dispatcher calls


def _rms_norm(
    x,
    weight,
    eps,
    offset,
    late_cast,
    internal,
):
    _check_norm("rms_norm", x, weight, internal)
    module = backend_for(x.device.type, {x.dtype}, "rms_norm")
    y, rstd = module.rms_norm(x, weight, eps, offset, late_cast, internal)
    # whatever the strides of x are: as the fake says
    return y.contiguous(), rstd.contiguous()


def _rms_norm_backward(
    grad,
    x,
    rstd,
    weight,
    offset,
):
    op = "rms_norm_backward"
    _check_norm(op, x, weight, rstd.dtype)
    _check_alike(op, x=x, grad=grad)
    module = backend_for(x.device.type, {x.dtype}, op)
    return module.rms_norm_backward(grad, x, rstd, weight, offset).contiguous()


def _gated_activation(gate, up, kind):
    _check_gate("gated_activation", kind, gate=gate, up=up)
    module = backend_for(gate.device.type, {gate.dtype}, "gated_activation")
    return module.gated_activation(gate, up, kind).contiguous()


def _gated_activation_backward(
    grad,
    gate,
    up,
    kind,
):
    op = "gated_activation_backward"
    _check_gate(op, kind, gate=gate, up=up, grad=grad)
    module = backend_for(gate.device.type, {gate.dtype}, op)
    grads = module.gated_activation_backward(grad, gate, up, kind)
    return grads[0].contiguous(), grads[1].contiguous()


def _fake_rms_norm(
    x,
    weight,
    eps,
    offset,
    late_cast,
    internal,
):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=internal)


def _fake_gate_gradients(
    grad,
    gate,
    up,
    kind,
):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_library = torch.library.Library("slicefine", "FRAGMENT")
for _name, _schema, _function, _fake in (
    (
        "rms_norm",
        "(Tensor x, Tensor weight, float eps, float offset, bool late_cast, ScalarType"
        " internal) -> (Tensor, Tensor)",
        _rms_norm,
        _fake_rms_norm,
    ),
    (
        "rms_norm_backward",
        "(Tensor grad, Tensor x, Tensor rstd, Tensor weight, float offset) -> Tensor",
        _rms_norm_backward,
        lambda grad, x, *rest: x.new_empty(x.shape),
    ),
    (
        "gated_activation",
        "(Tensor gate, Tensor up, str kind) -> Tensor",
        _gated_activation,
        lambda gate, up, kind: gate.new_empty(gate.shape),
    ),
    (
        "gated_activation_backward",
        "(Tensor grad, Tensor gate, Tensor up, str kind) -> (Tensor, Tensor)",
        _gated_activation_backward,
        _fake_gate_gradients,
    ),
):
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"slicefine::{_name}", _fake, lib=_library)
