"""The guard: slices that do not train are named after the first steps of an optimizer.

A slice trains if its layer is called, its output reaches the loss, and the weight follows. Fused
losses and fused blocks read a weight without calling the layer, parametrizations compute it from
something else, a new head throws the layer away: all of that would train nothing and say nothing.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from slicefine.agreement import State, equal
from slicefine.layer import SliceLayer, Watch
from slicefine.registry import name_of

# steps after which slices are judged
FIRST_STEPS = 3
# steps that a layer may be without a call, as experts and conditional branches are
IDLE_STEPS = 100

_NOT_CALLED = "it has not been called"
_ADVICE = (
    "Leave such layers out (SliceConfig(exclude_modules=[...])), or call them; "
    "SliceConfig(unused_slices='warn' or 'ignore') goes on without them."
)


@dataclass
class _Guard:
    """What is known of the slices of an optimizer; waiting: those without a gradient so far."""

    waiting: set[Tensor]
    count: int
    steps: int = 0
    done: bool = False


_GUARDS: weakref.WeakKeyDictionary[Optimizer, _Guard] = weakref.WeakKeyDictionary()


def check_step(
    optimizer: Optimizer,
    slices: Mapping[Tensor, list[SliceLayer]],
    updated: Collection[Tensor],
) -> None:
    """Note which slices a step has updated, and judge the others when it is time.

    Args:
        optimizer: the outermost one of the step.
        slices: all slices of the step's optimizers.
        updated: the slices that this step has updated.

    Raises:
        RuntimeError: Slices do not train, and their config has unused_slices="error".
    """
    guard = _GUARDS.get(optimizer)
    if guard is None:
        waiting = {
            p for group in optimizer.param_groups for p in group["params"] if name_of(p)
        }
        guard = _GUARDS[optimizer] = _Guard(
            waiting | set(slices), len(waiting | set(slices))
        )
        for layers in slices.values():
            for layer in layers:
                # what has read the weight before training says nothing
                layer.watch = Watch()
    if guard.done:
        return
    guard.steps += 1
    guard.waiting.difference_update(updated)
    if guard.steps == FIRST_STEPS:
        _judge(guard, slices, last=False)
    if guard.steps > FIRST_STEPS and (not guard.waiting or guard.steps == IDLE_STEPS):
        guard.done = True
        _judge(guard, slices, last=True)
        for layers in slices.values():
            for layer in layers:
                layer.watch = None


def _judge(guard: _Guard, slices: Mapping[Tensor, list[SliceLayer]], last: bool) -> None:
    """Name slices that do not train; ``last``: no layer may be idle any more."""
    faults: dict[str, str] = {}
    unused: dict[str, str] = {}
    strict = True
    for parameter in list(guard.waiting):
        layers = slices.get(parameter)
        name = name_of(parameter) or "a slice"
        if layers is None:
            faults[name] = "its layer is no longer there: replaced or resized after slicing"
        elif layers[0].unused_slices != "ignore":
            strict = strict and layers[0].unused_slices == "error"
            reason, fault = _why_unused(layers)
            if reason == _NOT_CALLED and not last:
                continue
            (faults if fault else unused)[name] = reason
        guard.waiting.discard(parameter)
    if not last:
        for parameter, layers in slices.items():
            if layers[0].unused_slices != "ignore" and not _follows(layers[0]):
                strict = strict and layers[0].unused_slices == "error"
                faults[name_of(parameter) or "a slice"] = _STRAYED
    if not faults and not unused:
        return
    most = 2 * (len(faults) + len(unused)) > guard.count
    message = _message(guard.steps, {**faults, **unused})
    if strict and (faults or most):
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=6)


_STRAYED = "its weight does not follow: it is computed from something else, or was replaced"


def _why_unused(layers: list[SliceLayer]) -> tuple[str, bool]:
    """Why a slice has had no gradient, and whether that is a fault whatever the model."""
    if not layers[0].slice_weight.requires_grad:
        return "its slice_weight was frozen by hand (requires_grad=False)", True
    watches = [layer.watch for layer in layers if layer.watch is not None]
    if any(watch.called for watch in watches):
        return "its output does not reach the loss", False
    if any(watch.read for watch in watches):
        return "its weight is read without calling the layer, as fused losses do", True
    return _NOT_CALLED, False


@torch.no_grad()
def _follows(layer: SliceLayer) -> bool:
    """Whether the weight holds what the master says."""
    if layer.disabled or layer.weight_sharded:
        return True
    if layer.agreement.state(layer) is State.STAND_IN:
        return False
    return equal(layer)


def _message(steps: int, reasons: Mapping[str, str]) -> str:
    shown = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:8]]
    if len(reasons) > len(shown):
        shown.append(f"  and {len(reasons) - len(shown)} more")
    listing = "\n".join(shown)
    return f"after {steps} steps these slices have not trained:\n{listing}\n{_ADVICE}"
