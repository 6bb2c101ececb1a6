"""How many answers a few weights can correct: bounds by theorem, curves by measurement, predictions
without training.

Source: Sohn et al., Fine-Tuning Capacity, UAI 2024, arXiv 2408.00359; slices and LoRA are
not in that paper, so theirs is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slicefine.capacity.editing import METHODS, Attempt
from slicefine.capacity.samples import Samples, predict
from slicefine.config import SliceConfig


@dataclass(frozen=True)
class Point:
    """One measurement: whether ``parameters`` trained numbers corrected N of K answers and kept the
    others.

    wrong: answers of the K that are not as asked. steps: that were taken.
    """

    method: str
    size: int
    parameters: int
    N: int
    K: int
    seed: int
    solved: bool
    wrong: int
    steps: int


def ftc_curve(
    make_model: Callable[[], nn.Module],
    samples: Samples,
    edits: Sequence[int],
    sizes: Mapping[str, Sequence[int]],
    *,
    config: SliceConfig | None = None,
    layers: int = 2,
    steps: int = 1500,
    lr: float = 1e-2,
    seeds: Sequence[int] = (0,),
) -> list[Point]:
    """The fine-tuning capacity of methods, measured by one protocol.

    For every N in ``edits``: N of the K samples get another label, uniformly chosen; each method
    trains its parameters only, on
    all K, from the smallest of its sizes upwards until all K answers are as asked (the criterion:
    classification of the edits
    *and* of the rest, no average of errors).
    make_model: the pretrained model, afresh. samples: K of them with the labels that the model
        gives; those it gets wrong would
    count against the method. sizes: method ("slice", "lora", "side") -> ascending sizes. config:
    layers and axis of slices
    and LoRA. layers: of a side.
    """
    if unknown := [m for m in sizes if m not in METHODS]:
        raise ValueError(
            f"sizes names method {unknown[0]!r}; expected some of {', '.join(METHODS)}"
        )
    answers = predict(make_model(), samples.inputs)
    if wrong := int((answers.argmax(1) != samples.labels).sum()):
        raise ValueError(
            f"the model gets {wrong} of the {len(samples)} labels wrong before any edit; expected"
            " labels that it gives, predict(...).argmax(1)"
        )
    points = []
    for seed in seeds:
        for N in edits:
            changed = relabeled(samples, N, answers.shape[1], seed)
            for method, grid in sizes.items():
                for size in grid:
                    points.append(
                        _measure(
                            make_model(),
                            method,
                            size,
                            changed,
                            N,
                            config,
                            layers,
                            steps,
                            lr,
                            seed,
                        )
                    )
                    # sizes ascend, and the smallest that solves it is what is asked for
                    if points[-1].solved:
                        break
    return points


def _measure(
    model: nn.Module,
    method: str,
    size: int,
    samples: Samples,
    N: int,
    config: SliceConfig | None,
    layers: int,
    steps: int,
    lr: float,
    seed: int,
) -> Point:
    trial = Attempt(model, method, size, config, layers, seed=seed)
    # the order in which `relabeled` has changed the first N
    order = _order(len(samples), seed)
    fit = trial.fit(
        samples[order[:N]],
        samples[order[N:]] if len(samples) > N else None,
        steps=steps,
        lr=lr,
        seed=seed,
    )
    return Point(
        method,
        size,
        trial.trainable,
        N,
        len(samples),
        seed,
        fit.solved,
        fit.wrong,
        fit.steps,
    )


def relabeled(
    samples: Samples,
    N: int,
    classes: int,
    seed: int,
) -> Samples:
    """N samples, the first of a seeded order, get another label, uniformly chosen."""
    if not 1 <= N <= len(samples):
        raise ValueError(f"N is {N}; there are {len(samples)} samples")
    chosen = _order(len(samples), seed)[:N]
    labels = samples.labels.clone()
    # an offset of at least 1, modulo the classes: never the old label
    other = torch.randint(
        1, classes, (N,), generator=torch.Generator().manual_seed(seed + 1)
    )
    labels[chosen] = (labels[chosen] + other) % classes
    return Samples(samples.inputs, labels)


def _order(K: int, seed: int) -> torch.Tensor:
    """A seeded order of the samples; the first N are edited."""
    return torch.randperm(K, generator=torch.Generator().manual_seed(seed))


def smallest(points: Sequence[Point]) -> dict[tuple[str, int], dict[str, Any]]:
    """(method, N) -> size and parameters of the largest, over seeds, of the smallest sizes that
    solved it; None if one did not.
    """
    result: dict[tuple[str, int], dict[str, Any]] = {}
    for key in dict.fromkeys((p.method, p.N) for p in points):
        mine = [p for p in points if (p.method, p.N) == key]
        best = {
            s: min(
                (p for p in mine if p.seed == s and p.solved),
                key=lambda p: p.size,
                default=None,
            )
            for s in {p.seed for p in mine}
        }
        solved = [p for p in best.values() if p is not None]
        # a seed without a solution leaves the size unknown
        worst = max(solved, key=lambda p: p.size) if len(solved) == len(best) else None
        result[key] = {
            "size": worst and worst.size,
            "parameters": worst and worst.parameters,
        }
    return result
