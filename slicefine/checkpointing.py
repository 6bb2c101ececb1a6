"""Activation checkpointing of models whose first layers are frozen.

A reentrant checkpoint (``use_reentrant=True``) trains nothing unless one of its inputs carries a
gradient, and behind frozen embeddings none does. So the outputs of the embeddings are made to carry
one, wherever checkpoints of that kind are on; the others need nothing. transformers puts hooks of
its own there, each time that checkpoints are switched on, and forgets those of the time before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def then_let_inputs_carry_gradients(enable: Callable[..., Any]) -> Callable[..., Any]:
    """A model's method that switches checkpointing on, which also looks after its inputs."""

    @functools.wraps(enable)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = enable(self, *args, **kwargs)
        let_inputs_carry_gradients(self)
        return result

    return wrapper


def without_earlier_hooks(enable: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' ``enable_input_require_grads``, which takes its earlier hooks off first."""

    @functools.wraps(enable)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.disable_input_require_grads()
        return enable(self, *args, **kwargs)

    return wrapper


def has_input_hooks(model: nn.Module) -> bool:
    """Whether transformers' hooks are on the model's input embeddings."""
    return bool(getattr(model, "_require_grads_hooks", None))


def remove_input_hooks(model: Any, keep_transformers: bool) -> None:
    """Take off what makes the embeddings' outputs carry gradients.

    Args:
        model: with or without such hooks.
        keep_transformers: leave transformers' hooks, which were there before the slices.
    """
    if has_input_hooks(model) and not keep_transformers:
        model.disable_input_require_grads()
    for module in model.modules():
        for key in [k for k, h in module._forward_hooks.items() if h is _carry_gradients]:
            del module._forward_hooks[key]


def let_inputs_carry_gradients(model: nn.Module) -> None:
    """Make the outputs of a model's input embeddings carry gradients, if its checkpoints ask."""
    if not any(_reentrant(module) for module in model.modules()):
        return
    for module in list(model.modules()):
        embeddings = _input_embeddings(module)
        if embeddings is None:
            continue
        hooks = embeddings._forward_hooks.values()
        if not any(hook is _carry_gradients for hook in hooks):
            embeddings.register_forward_hook(_carry_gradients)


def _reentrant(module: Any) -> bool:
    """Whether a module runs its layers in reentrant checkpoints, as transformers sets them up."""
    if not getattr(module, "gradient_checkpointing", False):
        return False
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    # without a say torch.utils.checkpoint is reentrant
    return getattr(checkpoint, "keywords", {}).get("use_reentrant", True) is not False


def _input_embeddings(module: Any) -> nn.Module | None:
    get = getattr(module, "get_input_embeddings", None)
    if not callable(get):
        return None
    try:
        embeddings = get()
    except NotImplementedError:
        # transformers' answer for a model without any
        return None
    return embeddings if isinstance(embeddings, nn.Module) else None


def _carry_gradients(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook. Some embeddings give a tuple, whose first tensor counts."""
    if not torch.is_grad_enabled():
        return output
    if isinstance(output, Tensor):
        return _carrying(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        first = _carrying(output[0])
        return (
            type(output)(first, *output[1:])
            if hasattr(output, "_fields")
            else (first, *output[1:])
        )
    return output


def _carrying(tensor: Tensor) -> Tensor:
    if tensor.requires_grad or not tensor.dtype.is_floating_point:
        return tensor
    # no leaf: models add positions to their embeddings in place
    return tensor.detach().requires_grad_().clone()
