"""What every optimizer step does to slices: write through, count, move.

Moves happen inside ``optimizer.step()`` of any `torch.optim.Optimizer` that holds slice parameters:
a hook that PyTorch calls after each step brings the weights up to date and moves the slices whose
interval is over. `slicefine.linear` imports this module, so there is no SliceLinear without the
hook.

A step counts once, when the outermost ``step()`` returns, and only if it has updated a slice: an
optimizer that calls another one's step (SAM, Lookahead, ZeroRedundancyOptimizer) takes one step.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._pytree import tree_map

from slicefine import beside, guard
from slicefine.agreement import follow_taken
from slicefine.kept import WriteThrough
from slicefine.layer import SliceLayer
from slicefine.registry import slices_of
from slicefine.scores import position_scores

# In a parameter group of an optimizer: the steps that its slices have taken. Groups are part of
# every optimizer's state_dict, so a resumed optimizer tells whether the slices were resumed too.
STEPS_KEY = "slice_steps"

_WRITES: weakref.WeakKeyDictionary[Optimizer, WriteThrough] = weakref.WeakKeyDictionary()


@dataclass
class _Running:
    """A call of ``step()`` that has not returned.

    frame: id of its Python frame, by which a call that an exception has ended is told from others.
    updated: slices updated so far, each with the innermost optimizer that did it.
    optimizers: this one and those whose steps it has called.
    found: the slices of those optimizers that have been asked for them in this step.
    """

    optimizer: Optimizer
    frame: int
    updated: dict[Tensor, Optimizer] = field(default_factory=dict)
    optimizers: list[Optimizer] = field(default_factory=list)
    found: dict[Optimizer, dict[Tensor, list[SliceLayer]]] = field(default_factory=dict)
    finished: bool = False


class _Stack(threading.local):
    def __init__(self) -> None:
        self.running: list[_Running] = []


_STACK = _Stack()


def _before_any_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    running = _STACK.running
    if running:
        # a step that raised has had no post hook; its entry would swallow the count of this one
        running[:] = _alive(running)
    running.append(_Running(optimizer, id(sys._getframe(1)), optimizers=[optimizer]))
    beside.before_step(optimizer)
    follow_taken()
    # torch calls an optimizer's own hooks first, and one of a user's may run the model
    own = optimizer._optimizer_step_post_hooks
    if own and next(iter(own.values())) is not _before_own_hooks and slices_of(optimizer):
        handle = optimizer.register_step_post_hook(_before_own_hooks)
        for key in [key for key in own if key != handle.id]:
            own[key] = own.pop(key)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None or not callable(closure):
        return None
    # LBFGS and its like change the parameters between two calls of the closure
    following = _following(optimizer, closure)
    if "closure" in kwargs:
        return args, {**kwargs, "closure": following}
    return (optimizer, following, *args[2:]), kwargs


def _alive(running: list[_Running]) -> list[_Running]:
    """Without calls that an exception has ended before their post hook."""
    frames, frame = {}, sys._getframe(1)
    while frame is not None:
        frames[id(frame)] = frame
        frame = frame.f_back
    alive = []
    for entry in running:
        frame = frames.get(entry.frame)
        # a later frame may have got the same id
        if frame is not None and frame.f_locals.get("self") is entry.optimizer:
            alive.append(entry)
    return alive


def _following(optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
    """A closure that sees what the optimizer has written since: a compiled forward does not look."""

    @functools.wraps(closure)
    def follow() -> Any:
        for layers in slices_of(optimizer).values():
            for layer in layers:
                layer.sync()
        return closure()

    return follow


def _before_own_hooks(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """Write through before a hook of the user's; `_after_any_step` comes when those have run."""
    if getattr(optimizer, "finishes_its_steps", False) or _skipped(optimizer):
        return
    for parameter, layers in slices_of(optimizer).items():
        for layer in layers if parameter.grad is not None else ():
            layer.write_through()


def _after_any_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    running = _STACK.running
    # entries above belong to calls that never returned
    while running and running[-1].optimizer is not optimizer:
        running.pop()
    if not running:
        return
    step = running.pop()
    if step.finished:
        return
    # SliceAdamW has reported its own; a fused optimizer under GradScaler may have skipped its update
    if not getattr(optimizer, "finishes_its_steps", False) and not _skipped(optimizer):
        _write_through(optimizer, step)
    if not running:
        _count(step)
        return
    # what it has updated counts when the step that called this one returns
    outer = running[-1]
    outer.updated.update(step.updated)
    outer.optimizers += step.optimizers
    outer.found.update(step.found)


def _skipped(optimizer: Optimizer) -> bool:
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _write_through(optimizer: Optimizer, step: _Running) -> None:
    # version counters cannot be used: fused optimizers do not bump them
    slices: list[tuple[Tensor, SliceLayer]] = []
    found = step.found[optimizer] = slices_of(optimizer)
    for parameter, layers in found.items():
        if parameter.grad is None and parameter not in step.updated:
            continue
        step.updated.setdefault(parameter, optimizer)
        slices += [(parameter, layer) for layer in layers]
    if optimizer not in _WRITES:
        _WRITES[optimizer] = WriteThrough()
    _WRITES[optimizer].write(slices)


def finish_step(
    optimizer: Optimizer, trained: set[Tensor], found: dict[Tensor, list[SliceLayer]]
) -> None:
    """Count a step of an optimizer that writes through itself, and move the slices that are due.

    Args:
        optimizer: whose ``finishes_its_steps`` is True.
        trained: the slices that it has updated and written through.
        found: what `slices_of` says of it.
    """
    running = _STACK.running
    updated = dict.fromkeys(trained, optimizer)
    if running and running[-1].optimizer is optimizer:
        step = running[-1]
        step.updated.update(updated)
        step.found[optimizer] = found
        # an outer optimizer's step is still running; it counts for both
        if len(running) > 1:
            return
    else:
        step = _Running(optimizer, 0, updated, [optimizer], {optimizer: found})
    step.finished = True
    _count(step)


def _count(step: _Running) -> None:
    """Count a step for all slices of its optimizers, and move those whose interval is over."""
    if not step.updated:
        return
    slices: dict[Tensor, list[SliceLayer]] = {}
    for optimizer in step.optimizers:
        found = step.found.get(optimizer)
        slices.update(slices_of(optimizer) if found is None else found)
    # before the first move: a move would record the checkpoint's values as the base
    _check_resumed(step, slices)
    # every schedule counts, also where a slice got no gradient, so that layers move together
    for parameter, layers in slices.items():
        if layers[0].schedule.step(parameter in step.updated):
            _move(_by_state(step, parameter), parameter, layers)
    guard.check_step(step.optimizer, slices, step.updated.keys())


def _by_state(step: _Running, parameter: Tensor) -> list[Optimizer]:
    """The optimizers of a step, the one that holds the moments of a slice first."""
    first = step.updated.get(parameter)
    optimizers = step.optimizers if first is None else [first, *step.optimizers]
    return sorted(optimizers, key=lambda optimizer: not optimizer.state.get(parameter))


def _check_resumed(step: _Running, slices: dict[Tensor, list[SliceLayer]]) -> None:
    """Warn, once, of an optimizer that was loaded without the slices' own state."""
    resumed, groups = 0, []
    for optimizer in step.optimizers:
        if getattr(optimizer, "finishes_its_steps", False):
            continue
        held = slices_of(optimizer)
        for group in optimizer.param_groups:
            first = next((p for p in group["params"] if p in held), None)
            if first is None:
                continue
            steps = held[first][0].schedule.steps
            # torch.distributed.checkpoint takes a step without an effect before it loads
            if steps <= 1:
                counted = float(optimizer.state.get(first, {}).get("step", 1)) - 1
                resumed = max(
                    resumed, group.get(STEPS_KEY, 0) - steps, int(counted) - steps
                )
            groups.append((group, steps + 1))
    # afterwards: an optimizer may share its groups with the one that it wraps
    for group, steps in groups:
        group[STEPS_KEY] = steps
    if not resumed:
        return
    name = type(step.optimizer).__name__
    reason = f"{name} was resumed at step {resumed} without the state of the slices"
    for layers in slices.values():
        for layer in layers:
            # otherwise the checkpoint's values would be recorded as originals
            layer.originals, layer.originals_lost = None, reason
    warnings.warn(
        f"{name} resumes at step {resumed}, but the slices start at their first position, and what"
        " the base was is lost: load_slice_state_dict(model, ...) restores them, and SliceAdamW's"
        " state_dict holds them itself",
        stacklevel=5,
    )


def _move(optimizers: list[Optimizer], parameter: Tensor, layers: list[SliceLayer]) -> None:
    first = layers[0]
    schedule, policy = first.schedule, first.state_on_switch
    if schedule.mode == "gradient" and _distributed():
        raise RuntimeError(
            "switch_mode='gradient' under torch.distributed: each process would choose by its own"
            " gradients and the slices would drift apart. Use 'ascending', 'random' or 'magnitude'."
        )
    state: dict[str, Any] = optimizers[0].state.get(parameter, {})
    axis, position = schedule.axis, schedule.position[schedule.axis]
    for layer in layers:
        # the weight must have the master's last values before the slice leaves
        layer.sync()
    schedule.move(functools.partial(position_scores, first))
    if first.scores is not None:
        first.scores.clear()
    if (schedule.axis, schedule.position[schedule.axis]) == (axis, position):
        # the slice stays: so do its master's extra bits and its moments
        return
    if policy == "remember" and state:
        schedule.remembered.setdefault(axis, {})[position] = tree_map(_to_host, dict(state))
    for layer in layers:
        layer.select_slice()
    if policy == "keep" and first.spec.slice_type != "row_column":
        # moments of a row slice mean nothing for a column slice, so alternating axes start afresh
        return
    for optimizer in optimizers:
        # moments of the old position would push the new one by gradients it never had
        optimizer.state.pop(parameter, None)
    positions = schedule.remembered.get(schedule.axis, {})
    remembered = positions.pop(schedule.position[schedule.axis], None)
    if remembered is not None:
        restored = {k: _beside(v, state.get(k), parameter) for k, v in remembered.items()}
        optimizers[0].state[parameter] = restored


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _to_host(value: Any) -> Any:
    # a copy: the optimizer goes on writing to its own tensor
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _beside(value: Any, current: Any, parameter: Tensor) -> Any:
    """A remembered value on the device where the optimizer keeps this entry.

    Some hold ``step`` on the CPU.
    """
    if not isinstance(value, Tensor):
        return value
    where = current.device if isinstance(current, Tensor) else parameter.device
    # a checkpoint in memory may hold the remembered tensor too
    return value.to(where, copy=True)


register_optimizer_step_pre_hook(_before_any_step)
register_optimizer_step_post_hook(_after_any_step)
