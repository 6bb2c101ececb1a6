"""Losses that read the weight of a language model's head without calling it.

TRL and Liger compute the loss from ``lm_head.weight`` in pieces. They do it by a forward of their
own in the place of the model's, so it can be told before the first step; a sliced head would get no
gradient there.
"""

from __future__ import annotations

import inspect
from types import CodeType
from typing import Any

from torch import nn

from slicefine.layer import SliceLayer


def refuse_fused_head(model: nn.Module) -> None:
    """Raise ValueError if the model's head has slices and its forward reads the weight past them.

    Args:
        model: a language model; every other is let through.
    """
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if not isinstance(head, SliceLayer):
        return
    name = next(name for name, module in model.named_modules() if module is head)
    if reader := _reader(model, name.rpartition(".")[2]):
        raise ValueError(
            f"{name} has slices, and {reader} computes the loss from {name}.weight without calling"
            " the layer, so they would never train. Leave it out"
            f" (exclude_modules=[{name!r}]), train it whole (modules_to_save=[{name!r}]), or use a"
            " loss that calls the head"
        )


def _reader(model: nn.Module, child: str) -> str | None:
    """What has taken the place of the model's forward and reads the weight of a child of it."""
    forward: Any = model.forward
    # functools.wraps gives it the name of what it has replaced
    function = getattr(forward, "__func__", forward)
    module = getattr(function, "__globals__", {}).get("__name__", "")
    if module in {kind.__module__ for kind in type(model).__mro__}:
        # the model's own, which was read when slices were made
        return None
    if not inspect.isfunction(function):
        return None
    names = _names(function.__code__)
    if "weight" in names and names & {child, "get_output_embeddings"}:
        return f"{module}.{function.__code__.co_name}"
    return None


def _names(code: CodeType) -> set[str]:
    names = {*code.co_names, *code.co_varnames, *code.co_freevars}
    for constant in code.co_consts:
        names |= _names(constant) if isinstance(constant, CodeType) else set()
    return names
