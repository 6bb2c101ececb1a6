"""Short trainings on the user's data that are taken back afterwards: the learning-rate range test,
and candidates side by side.

`slicefine train` runs on transformers' Trainer; a trial keeps a loop of its own. It takes any
nn.Module with any loss, where transformers need not be installed; it stops before the backward pass
of the step whose loss says so; every step draws the same dropout for every candidate; and it leaves
parameters, buffers and modes as they were, bit for bit. Trainer would have to be overridden in each
of these, and nothing of what it adds (checkpoints, schedulers, trackers) is wanted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slicefine.config import SliceConfig
from slicefine.diagnose.capture import Batch, Track, quietly
from slicefine.diagnose.winning import Loss, loss_of_output
from slicefine.groups import HEAD_LR, parameter_groups
from slicefine.model import get_slice_model, slice_layers
from slicefine.optim import SliceAdamW


@dataclass(frozen=True)
class TrialOptions:
    """How a short training runs. head_lr: of what is fully trained. warmup: share of the steps,
    linear decay to 0 after it. clip: gradient norm, 0 for none."""

    head_lr: float = HEAD_LR
    warmup: float = 0.1
    clip: float = 1.0
    seed: int = 0
    # such as autocast
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class ShortRun:
    """losses: of the training batches, before each step. held_loss: mean over the held-out batches
    afterwards, None without them."""

    losses: list[float]
    held_loss: float | None


@dataclass(frozen=True)
class RangeTest:
    """A learning-rate range test. lrs, losses, smoothed: (steps,), smoothed with an exponential
    average.

    low: where the smoothed loss has made a tenth of its fall. high: where it is lowest. suggested:
    a tenth of high, at least low. diverged: whether it was stopped by a loss above its start.
    usable: whether the smoothed loss fell at all.
    """

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    low: float
    high: float
    suggested: float
    diverged: bool
    usable: bool
    notes: list[str] = field(default_factory=list)


def short_training(
    model: nn.Module,
    config: SliceConfig,
    batches: Sequence[Batch],
    lr: float | Callable[[int], float],
    steps: int,
    held: Sequence[Batch] = (),
    recipe: TrialOptions | None = None,
    loss: Loss = loss_of_output,
    stop: Callable[[list[float]], bool] = lambda losses: False,
    ticks: Iterable[Any] | None = None,
) -> ShortRun:
    """Train slices at their first positions for a few steps, look at the held-out loss, and take
    everything back bit for bit.

    config: its slices do not move during the run, so that what is to be taken back is known.
    batches: used in turn. lr: peak of warm-up and linear decay, or a function of the step. stop:
    losses so far -> whether to end early.
    """
    recipe = recipe or TrialOptions()
    modes = {name: module.training for name, module in model.named_modules()}
    still = SliceConfig.from_dict({**config.to_dict(), "switch_interval": None})
    get_slice_model(model, still)
    trained = [p for p in model.parameters() if p.requires_grad]
    # slices as well as whole modules; the weight outside of a slice is never written
    originals = {p: p.detach().clone() for p in trained}
    # batch statistics move in training mode; the slice indices do not, and belong to the layers
    buffers = {
        name: b.detach().clone()
        for name, b in model.named_buffers()
        if not name.split(".")[-1].startswith("slice_")
    }
    groups = parameter_groups(model, lr=1.0, head_lr=2.0)
    new = [group["lr"] == 2.0 for group in groups]
    losses: list[float] = []
    try:
        # a learning rate of 1: every step sets those of the groups
        optimizer = SliceAdamW(groups, lr=1.0, seed=recipe.seed)
        model.train()
        for step, _ in zip(
            range(steps), ticks if ticks is not None else range(steps), strict=False
        ):
            factor = _shape(step, steps, recipe.warmup)
            warm = min(1.0, (step + 1) / max(1, round(recipe.warmup * steps)))
            rate = lr(step) if callable(lr) else lr * factor
            head_rate = recipe.head_lr * (warm if callable(lr) else factor)
            for group, is_head in zip(optimizer.param_groups, new, strict=True):
                group["lr"] = head_rate if is_head else rate
            # the same dropout for every candidate
            torch.manual_seed(recipe.seed + step)
            with recipe.context():
                value = loss(model, batches[step % len(batches)])
            losses.append(value.item())
            # before backward: gradients of an infinite loss would only spoil the moments
            if stop(losses) or not math.isfinite(losses[-1]):
                break
            value.backward()
            if recipe.clip:
                torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
        held_loss = _held_loss(model, held, recipe, loss) if held else None
    finally:
        with torch.no_grad():
            for parameter, value in originals.items():
                parameter.copy_(value)
                parameter.grad = None
            for layer in slice_layers(model):
                # the weight follows its restored master, bit for bit
                layer.write_through()
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        model.merge_and_unload()  # type: ignore[operator]
        for name, module in model.named_modules():
            module.training = modes[name]
    return ShortRun(losses, held_loss)


def _shape(step: int, steps: int, warmup: float) -> float:
    warm = max(1, round(warmup * steps))
    return (
        (step + 1) / warm
        if step < warm
        else max(0.0, (steps - step) / max(1, steps - warm))
    )


@torch.no_grad()
def _held_loss(
    model: nn.Module, held: Sequence[Batch], recipe: TrialOptions, loss: Loss
) -> float:
    model.eval()
    total = count = 0.0
    for batch in held:
        # by examples: the last batch may be smaller
        size = len(next(iter(batch.values())))
        with recipe.context():
            total += float(loss(model, batch)) * size
        count += size
    return total / count


def lr_range_test(
    model: nn.Module,
    config: SliceConfig,
    batches: Sequence[Batch],
    lowest: float = 1e-5,
    highest: float = 1.0,
    steps: int = 60,
    recipe: TrialOptions | None = None,
    loss: Loss = loss_of_output,
    track: Track = quietly,
) -> RangeTest:
    """Raise the learning rate of the slices from step to step and watch the loss; the model is the
    same afterwards.

    lowest, highest: geometric ends of the range. It stops where the smoothed loss exceeds its start
    by as much as it had fallen, and by a tenth at least. Source: Smith, arXiv 1506.01186.
    """
    if not 0 < lowest < highest or steps < 10:
        raise ValueError(
            f"lowest is {lowest}, highest {highest}, steps {steps}; expected 0 < lowest < highest"
            " and at least 10 steps"
        )
    at = lambda step: lowest * (highest / lowest) ** (step / (steps - 1))

    def diverged(losses: list[float]) -> bool:
        smooth = smoothed(losses)
        return len(losses) > 5 and smooth[-1] > smooth[0] + max(
            0.1 * abs(smooth[0]), smooth[0] - min(smooth)
        )

    ticks = track(range(steps), "learning-rate range test", steps)
    # no held-out batches: the range test reads the training loss as it goes
    run = short_training(
        model, config, batches, at, steps, (), recipe, loss, diverged, ticks
    )
    # a loss without a value has no place in an average
    losses = [value for value in run.losses if math.isfinite(value)]
    return read_range(
        [at(i) for i in range(len(losses))],
        losses,
        len(run.losses) < steps or len(losses) < len(run.losses),
    )


def smoothed(losses: Sequence[float], beta: float = 0.9) -> list[float]:
    """Exponential average without the bias towards its start."""
    average, result = 0.0, []
    for i, value in enumerate(losses, 1):
        average = beta * average + (1 - beta) * value
        result.append(average / (1 - beta**i))
    return result


def read_range(lrs: Sequence[float], losses: Sequence[float], diverged: bool) -> RangeTest:
    """low, high and a suggestion from a curve of losses over rising learning rates."""
    smooth = smoothed(losses)
    # the smoothed curve, as single batches are too noisy to find a minimum in
    lowest = min(range(len(smooth)), key=smooth.__getitem__)
    fall = smooth[0] - smooth[lowest]
    usable = lowest > 0 and fall > 0.0
    # learning begins where a tenth of the whole fall is reached
    reached = next(
        (i for i in range(lowest + 1) if smooth[0] - smooth[i] >= 0.1 * fall), lowest
    )
    low, high = lrs[reached], lrs[lowest]
    notes = []
    if not usable:
        notes.append(
            "the loss never fell below its start: no learning rate in this range trains these"
            " slices, or the batches are too noisy"
        )
    if not diverged:
        notes.append(
            "the loss had not risen again at the highest learning rate; the upper end is not known"
        )
    return RangeTest(
        list(lrs),
        list(losses),
        smooth,
        low,
        high,
        max(high / 10, low),
        diverged,
        usable,
        notes,
    )
