"""Activation checkpointing by the model's own method, whole or selective (torch's)."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

_ENABLE = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
_DISABLE = ("activation_checkpointing_disable", "gradient_checkpointing_disable")
_HOOKS = "_require_grads_hooks"
_TIMM = "set_grad_checkpointing"


@dataclass
class Added:
    """What the model's own method has added: attributes by module, hooks on its inputs."""

    attributes: dict[str, list[str]]
    input_hooks: bool


def enable(model: nn.Module, how: str) -> Added:
    """Switch checkpoints on.

    Args:
        how: "full" or "selective".
    Returns:
        What `disable` needs.
    Raises:
        ValueError: the model has no method for it, or none that can be selective.
    """
    method = next((n for n in _ENABLE if hasattr(model, n)), None)
    # the reentrant kind needs an input with a gradient, which a frozen embedding does not give
    options: dict[str, Any] = {"use_reentrant": False}
    if "respect_saved_tensors_hooks" in inspect.signature(torch_checkpoint).parameters:
        # so that hooks, such as those of track_memory, see what a selective checkpoint keeps
        options["respect_saved_tensors_hooks"] = True
    if how == "selective":
        options["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, policy
        )
    # compared afterwards: what the model's method sets differs from library to library
    had = {name: set(vars(module)) for name, module in model.named_modules()}
    # hooks that were there before are not ours to remove
    hooked = bool(getattr(model, _HOOKS, None))
    if method is not None:
        getattr(model, method)(options)
    elif hasattr(model, _TIMM) and how == "full":
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    else:
        raise ValueError(
            f"{type(model).__name__} has none of {', '.join((*_ENABLE, _TIMM))}, or none that can"
            f" be selective: checkpoint={how!r} is not for it"
        )
    attributes = {
        name: sorted(set(vars(module)) - had[name])
        for name, module in model.named_modules()
    }
    return Added(attributes, not hooked and bool(getattr(model, _HOOKS, None)))


def disable(model: nn.Module, added: Added) -> None:
    """Switch them off, and take away what `enable` has added."""
    method = next((n for n in _DISABLE if hasattr(model, n)), None)
    if method is not None:
        getattr(model, method)()
    elif hasattr(model, _TIMM):
        model.set_grad_checkpointing(False)  # type: ignore[operator]
    if added.input_hooks:
        model.disable_input_require_grads()  # type: ignore[operator]
    for name, module in model.named_modules():
        for key in added.attributes.get(name, ()):
            module.__dict__.pop(key, None)


def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep attention, and products whose result is not wider than what went in."""
    name = getattr(op, "_overloadpacket", op).__name__
    # attention takes T^2 operations to make again and T numbers to keep
    if name.startswith("_scaled_dot_product"):
        return CheckpointPolicy.MUST_SAVE
    if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        # mm(input, weight), addmm(bias, input, weight); aten's weight is [in, out]
        entering, weight = args[-2:]
        # the widening products of an MLP are most of what a layer would keep
        if weight.shape[1] <= entering.shape[1]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
