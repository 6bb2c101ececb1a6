"""What every optimizer step does to slices: write through, count, move.

Moves happen inside ``optimizer.step()`` of any `torch.optim.Optimizer` that holds slice parameters:
a hook that PyTorch calls after each step brings the weights up to date and moves the slices whose
interval is over. `slicefine.linear` imports this module, so there is no SliceLinear without the
hook.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._pytree import tree_map

from slicefine.layer import SliceLayer
from slicefine.registry import slices_of
from slicefine.scores import position_scores


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


def _warn_if_resumed(optimizer: Optimizer, parameter: Tensor, layers: list[SliceLayer]) -> None:
    """An optimizer whose state has many steps before the slices' first has been loaded without the
    slices' own state.
    """
    step = optimizer.state.get(parameter, {}).get("step", 1)
    if float(step) > 1:
        for layer in layers:
            # otherwise the checkpoint's values would be recorded as originals
            layer.originals = None
        warnings.warn(
            f"{type(optimizer).__name__} resumes at step {int(step) - 1}, but the slices start at"
            " their first position with moments of another, and what the base was is lost:"
            " load_slice_state_dict(model, ...) restores them, and SliceAdamW's state_dict holds"
            " them itself",
            stacklevel=3,
        )


def _move(optimizer: Optimizer, parameter: Tensor, layers: list[SliceLayer]) -> None:
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
        layer.sync()
    schedule.move(functools.partial(position_scores, first))
    if first.scores is not None:
        first.scores.clear()
    if (schedule.axis, schedule.position[schedule.axis]) == (axis, position):
        return  # the slice stays: so do its master's extra bits and its moments
    if policy == "remember" and state:
        kept = tree_map(
            lambda t: t.detach().to("cpu", copy=True) if isinstance(t, Tensor) else t, dict(state)
        )
        schedule.remembered.setdefault(axis, {})[position] = kept
    for layer in layers:
        layer.select_slice()
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
