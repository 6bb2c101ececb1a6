"""The same tasks over several sizes, modes and seeds: what a larger slice or a wider model buys,
fitted and per parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from slicefine.capacity.samples import Samples
from slicefine.config import SliceConfig
from slicefine.continual.metrics import FORMULAS, knee, marginal_gains, power_law
from slicefine.continual.sequence import Run, TaskSamples, TrainingOptions, run

KNEE = (
    "a heuristic: the first size whose next doubling raises AA by less than {:.3g}; it knows"
    " nothing of costs"
)
ATTACHED = (
    "attach: each task's delta alone on the untouched base, chosen by the task's id, which must be"
    " known when asked. It cannot forget: proven here by bit-equal logits and by the base's hash"
)


@dataclass
class Sweep:
    """runs: one per mode, size and seed. over: what size means, "rank" (of slices) or "width" (of
    the model).
    """

    tasks: list[str]
    over: str
    runs: list[Run]
    recipe: TrainingOptions
    threshold: float

    @property
    def modes(self) -> list[str]:
        return list(dict.fromkeys(r.mode for r in self.runs))

    def sizes(self, mode: str) -> list[int]:
        return sorted({r.size for r in self.runs if r.mode == mode})

    def mean(self, mode: str, size: int) -> dict[str, Any]:
        """Means over seeds: matrix, AA, AF, LA, BWT, JA, alone, drifts, parameters."""
        mine = [r for r in self.runs if (r.mode, r.size) == (mode, size)]
        T = len(self.tasks)
        values: dict[str, Any] = {
            "matrix": [
                [fmean(r.matrix[i][t] for r in mine) for t in range(T)] for i in range(T)
            ]
        }
        values.update(
            {key: fmean(r.measures[key] for r in mine) for key in mine[0].measures}
        )
        # what was lost of what was learned
        values["AF_by_LA"] = values["AF"] / values["LA"] if values["LA"] else None
        joint = [fmean(r.joint) for r in mine if r.joint]
        values["JA"] = fmean(joint) if joint else None
        alone = [r.alone for r in mine if r.alone]
        values["alone"] = [fmean(a[t] for a in alone) for t in range(T)] if alone else None
        values["output_drift"] = {
            "mean": fmean(r.output_drift["mean"] for r in mine),
            "max": max(r.output_drift["max"] for r in mine),
        }
        values["weight_drift"] = fmean(r.weight_drift for r in mine)
        values["parameters"], values["model_parameters"] = (
            mine[0].parameters,
            mine[0].model_parameters,
        )
        values["seeds"] = [r.seed for r in mine]
        values["unlearned"] = [
            name for t, name in enumerate(self.tasks) if not all(r.learned[t] for r in mine)
        ]
        drops = [r.base_drop for r in mine if r.base_drop is not None]
        values["base_drop"] = fmean(drops) if drops else None
        values["proof"] = mine[0].proof
        return values

    def trends(self, mode: str) -> dict[str, Any]:
        """Over the sizes of a mode: power laws of drift and AF, gains of AA and of -AF, and a knee;
        {} for one size.
        """
        sizes = self.sizes(mode)
        if len(sizes) < 2:
            return {}
        rows = [self.mean(mode, s) for s in sizes]
        column = lambda key: [row[key] for row in rows]
        laws = {key: power_law(sizes, column(key)) for key in ("weight_drift", "AF")}
        return {
            "weight_drift": laws["weight_drift"] and asdict(laws["weight_drift"]),
            "AF": laws["AF"] and asdict(laws["AF"]),
            "gains_AA": marginal_gains(sizes, column("parameters"), column("AA")),
            "gains_less_forgetting": marginal_gains(
                sizes, column("parameters"), [-f for f in column("AF")]
            ),
            "knee": knee(sizes, column("AA"), self.threshold),
            "knee_is": KNEE.format(self.threshold),
        }

    def forgets(self, mode: str, size: int) -> bool:
        """Whether AF and BWT say anything: a task before the last one was learned."""
        unlearned = self.mean(mode, size)["unlearned"]
        return any(name not in unlearned for name in self.tasks[:-1])

    def warnings(self) -> list[str]:
        """One line for each mode and size that has not learned all of its tasks."""
        found = []
        for mode in self.modes:
            for size in self.sizes(mode):
                names = self.mean(mode, size)["unlearned"]
                if names:
                    found.append(
                        f"{mode}, {self.over} {size}: not learned: {', '.join(names)}. Just after"
                        " training, the accuracy is no better than always answering the most"
                        " common label, so there is nothing to forget. Train longer (epochs), at a"
                        " higher learning rate, or on more rows."
                    )
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines: ``by_mode[mode][size]`` has matrix, AA, AF, LA, BWT."""
        return {
            "tasks": self.tasks,
            "over": self.over,
            "formulas": list(FORMULAS),
            "warnings": self.warnings(),
            "recipe": asdict(self.recipe),
            "by_mode": {
                m: {str(s): self.mean(m, s) for s in self.sizes(m)} for m in self.modes
            },
            "trends": {m: self.trends(m) for m in self.modes},
            "runs": [r.row() for r in self.runs],
        }


def sweep(
    make_model: Callable[..., nn.Module],
    tasks: list[TaskSamples] | Callable[[int], list[TaskSamples]],
    sizes: Sequence[int],
    modes: Sequence[str] = ("same", "disjoint", "attach"),
    *,
    over: str = "rank",
    recipe: TrainingOptions | None = None,
    config: SliceConfig | None = None,
    seeds: Sequence[int] = (0,),
    joint: bool = True,
    alone: bool = False,
    base_test: Samples | None = None,
    threshold: float = 0.01,
    progress: Callable[[Run], None] | None = None,
    save: Path | None = None,
) -> Sweep:
    """`run` over sizes, modes and seeds.

    make_model: () -> the pretrained model (over="rank"), or width -> a model (over="width", which
    trains every weight: mode "full"). save: a folder for the deltas of mode ``attach``, by size and
    task. tasks: a list, or seed -> list. sizes: ranks or widths. threshold: of the knee. progress:
    called after each run. The reference of joint training is made once per size and seed.
    """
    if over not in ("rank", "width"):
        raise ValueError(
            f"over is {over!r}; expected 'rank' (of slices) or 'width' (of the model)"
        )
    if over == "width":
        # a model of another width has no pretrained weights to put slices in
        modes = ("full",)
    if not sizes or any(
        isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes
    ):
        raise ValueError(f"sizes are {list(sizes)!r}; expected whole numbers, 1 or more")
    recipe = recipe or TrainingOptions()
    runs: list[Run] = []
    listed = tasks if isinstance(tasks, list) else []
    for seed in seeds:
        listed = tasks if isinstance(tasks, list) else tasks(seed)
        for size in sorted(set(sizes)):
            first: Run | None = None
            for mode in modes:
                make = (lambda s=size: make_model(s)) if over == "width" else make_model
                # mode attach refuses both: what cannot be forgotten needs no rehearsal
                own = (
                    replace(recipe, seed=seed)
                    if mode != "attach"
                    else replace(recipe, seed=seed, replay=0, functional=0.0)
                )
                made = run(
                    make,
                    listed,
                    mode,
                    size,
                    recipe=own,
                    config=config,
                    joint=joint and first is None,
                    alone=alone and first is None,
                    base_test=base_test,
                    save=save / f"{over}-{size}" if save and seed == seeds[0] else None,
                )
                if first is None:
                    first = made
                else:
                    # the references do not depend on the mode
                    made.joint, made.alone = first.joint, first.alone
                runs.append(made)
                if progress is not None:
                    progress(made)
    return Sweep([t.name for t in listed], over, runs, recipe, threshold)
