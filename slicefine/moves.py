"""What every optimizer step does to slices: write through, count, move; and which layers a slice
parameter belongs to.

Moves happen inside ``optimizer.step()`` of any `torch.optim.Optimizer` that holds slice parameters:
a hook that PyTorch
calls after each step brings the weights up to date and moves the slices whose interval is over.
`slicefine.linear` imports
this module, so there is no SliceLinear without the hook.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from slicefine.linear import SliceLinear

# slice parameter -> the layers that use it (several where a weight is tied); not an attribute of
# the parameter, which
# would not survive pickling
_LAYERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_registrations = 0  # tells a cached list of layers from a current one


@dataclass
class _Slices:
    """The slices of an optimizer as they were found last; the parameters are held, so that no other
    can take an id.
    """

    registrations: int
    parameters: list[Tensor]
    layers: dict[Tensor, list[weakref.ref[SliceLinear]]]


_SLICES: weakref.WeakKeyDictionary[Optimizer, _Slices] = weakref.WeakKeyDictionary()


def layers_of(parameter: Tensor) -> list[SliceLinear]:
    """The layers whose active slice this parameter is; empty for any other parameter."""
    return [
        layer for reference in _LAYERS.get(parameter) or () if (layer := reference()) is not None
    ]


def register(layer: SliceLinear) -> None:
    """Note that a layer uses its slice_weight."""
    global _registrations
    parameter = layer._parameters.get("slice_weight")
    if parameter is not None and layer not in layers_of(parameter):
        _LAYERS[parameter] = [*(_LAYERS.get(parameter) or ()), weakref.ref(layer)]
        _registrations += 1


def slices_of(optimizer: Optimizer) -> dict[Tensor, list[SliceLinear]]:
    """The slice parameters of an optimizer, each with the layers that use it.

    Every step asks, and a lookup by weak key costs as much as the update of a small slice: so what
        was found is kept for as
    long as the optimizer's parameters and the layers are the same.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    known = _SLICES.get(optimizer)
    if (
        known is None
        or known.registrations != _registrations
        or len(known.parameters) != len(parameters)
        or any(a is not b for a, b in zip(known.parameters, parameters, strict=True))
    ):
        found = {
            p: [weakref.ref(layer) for layer in layers]
            for p in parameters
            if (layers := layers_of(p))
        }
        known = _SLICES[optimizer] = _Slices(_registrations, parameters, found)
    alive = {
        p: [layer for r in refs if (layer := r()) is not None] for p, refs in known.layers.items()
    }
    return {p: layers for p, layers in alive.items() if layers}


def finish_step(optimizer: Optimizer, trained: set[Tensor] | None = None) -> None:
    """Write every changed slice through to its weight, count the step, and move the slices that are
    due.

    trained: the slices that the optimizer has updated and written through itself; None: those with
        a gradient, not yet
    written. Not told by version counters: torch's fused optimizers write to parameters without
    counting it.
    """
    for parameter, layers in slices_of(optimizer).items():
        updated = parameter.grad is not None if trained is None else parameter in trained
        if trained is None and layers[0].schedule.steps == 0:
            _warn_if_resumed(optimizer, parameter, layers)
        for layer in layers if updated and trained is None else ():
            layer.write_through()
        first = layers[0]
        if first.schedule.step(updated):
            _move(optimizer, parameter, layers)


def _warn_if_resumed(optimizer: Optimizer, parameter: Tensor, layers: list[SliceLinear]) -> None:
    """An optimizer whose state has many steps before the slices' first has been loaded without the
    slices' own state.
    """
    step = optimizer.state.get(parameter, {}).get("step", 1)
    if float(step) > 1:
        for layer in layers:
            layer.ledger = None  # it would take the checkpoint's values for the base's
        warnings.warn(
            f"{type(optimizer).__name__} resumes at step {int(step) - 1}, but the slices start at"
            " their first position with moments of another, and what the base was is lost:"
            " load_slice_state_dict(model, ...) restores them, and SliceAdamW's state_dict holds"
            " them itself",
            stacklevel=3,
        )


def _move(optimizer: Optimizer, parameter: Tensor, layers: list[SliceLinear]) -> None:
    first = layers[0]
    schedule, policy = first.schedule, first.state_on_switch
    if (
        schedule.mode == "gradient"
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
    ):
        raise RuntimeError(
            "switch_mode='gradient' under torch.distributed: each process would choose by its own"
            " gradients and the slices would drift apart. Use 'ascending', 'random' or 'magnitude'."
        )
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    axis, position = schedule.axis, schedule.position[schedule.axis]
    for layer in layers:
        layer.synchronise()
    schedule.move(first.position_scores)
    first.scores = {}
    if (schedule.axis, schedule.position[schedule.axis]) == (axis, position):
        return  # the slice stays: so do its master's extra bits and its moments
    if policy == "remember" and state:
        kept = tree_map(
            lambda t: t.detach().to("cpu", copy=True) if isinstance(t, Tensor) else t, dict(state)
        )
        schedule.remembered.setdefault(axis, {})[position] = kept
    for layer in layers:
        layer.place()
    if policy == "keep" and first.spec.slice_type != "row_column":
        return  # moments of a row slice mean nothing for a column slice, so alternating axes start afresh
    optimizer.state.pop(parameter, None)
    remembered = schedule.remembered.get(schedule.axis, {}).pop(
        schedule.position[schedule.axis], None
    )
    if remembered is not None:
        optimizer.state[parameter] = {
            k: _beside(v, state.get(k), parameter) for k, v in remembered.items()
        }


def _beside(value: Any, current: Any, parameter: Tensor) -> Any:
    """A remembered value on the device where the optimizer keeps this entry: some hold ``step`` on
    the CPU.
    """
    if not isinstance(value, Tensor):
        return value
    where = current.device if isinstance(current, Tensor) else parameter.device
    return value.to(where, copy=True)  # a checkpoint in memory may hold the remembered tensor too


def _after_any_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if not getattr(optimizer, "finishes_its_steps", False):  # SliceAdamW does
        finish_step(optimizer)


register_optimizer_step_post_hook(_after_any_step)
