"""What a comparison comes to: one sentence, the rows behind it, and a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from slicefine.compare.statistics import Pair
from slicefine.training.recipe import Recipe


@dataclass
class Contender:
    """A method with its chosen rate.

    Args:
        name: of the method.
        lr: chosen on the validation rows.
        scores: (seeds, rows) of the test rows; 1 or 0, or minus the loss.
        seeds: of the trainings, counted from 0.
        seconds: of every training.
        look: `slicefine.compare.trial.Look` as a dict.
        calibration: expected calibration error, None for language models.
        flips: share of the test rows that the plain model does better on.
        forgetting: growth of the loss on the original data, as a share.
        gates: why it is not recommended whatever its score.
    """

    name: str
    lr: float
    scores: np.ndarray
    seeds: list[int]
    seconds: list[float]
    look: dict[str, Any]
    calibration: float | None = None
    flips: float | None = None
    forgetting: float | None = None
    gates: list[str] = field(default_factory=list)

    @property
    def value(self) -> float:
        """Mean of the scores; higher is better."""
        return float(self.scores.mean())

    @property
    def cost(self) -> tuple[int, int, str]:
        """What ties are broken by: memory, then parameters. Times are left out: they are noisy, and
        the same comparison run again must say the same.
        """
        return self.look["peak_bytes"], self.look["trainable"], self.name


@dataclass(frozen=True)
class Verdict:
    """The end of a comparison.

    Args:
        best: name of the method with the highest score.
        recommended: the cheapest of those that are tied with it; None if gates stop them all.
        sentence: for the user.
        contenders: all that were trained.
        pairs: each held against the best.
        struck: method -> why it was not trained.
        metric: of the task.
        recipe: of the recommended method, or of slices.
    """

    best: str
    recommended: str | None
    sentence: str
    contenders: list[Contender]
    pairs: list[Pair]
    struck: dict[str, str]
    metric: str
    recipe: Recipe

    def rows(self) -> list[dict[str, Any]]:
        """One row a method and seed, in the form of benchmarks/results/quality."""
        return [
            {
                "task": self.recipe.data,
                "model": self.recipe.model,
                "method": c.name,
                "config": self.recipe.slices if c.name == "slice" else {},
                "lr": c.lr,
                "seed": seed,
                "metric": self.metric,
                "value": shown(self.metric, float(scores.mean())),
                "trainable": c.look["trainable"],
                "peak_bytes": c.look["peak_bytes"],
                "ms_per_step": c.look["ms_per_step"],
                "seconds": seconds,
                "file_bytes": c.look["file_bytes"],
                "inference_overhead": c.look["overhead"],
                "calibration_error": c.calibration,
                "flips": c.flips,
                "forgetting": c.forgetting,
            }
            for c in self.contenders
            for seed, seconds, scores in zip(c.seeds, c.seconds, c.scores, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": self.sentence,
            "best": self.best,
            "recommended": self.recommended,
            "pairs": [{**pair.__dict__, "tied": pair.tied} for pair in self.pairs],
            "gates": {c.name: c.gates for c in self.contenders if c.gates},
            "struck": self.struck,
            "rows": self.rows(),
        }


def shown(metric: str, value: float) -> float:
    """A mean score as its metric: accuracy in %, perplexity."""
    return 100 * value if metric == "accuracy" else float(np.exp(-value))


def decide(
    contenders: list[Contender],
    first: Contender,
    pairs: Sequence[Pair],
    struck: dict[str, str],
    metric: str,
    recipe: Recipe,
) -> Verdict:
    """The verdict: the cheapest method that no test tells from the best one, and that no gate stops."""
    tied = [first.name, *(pair.name for pair in pairs if pair.tied)]
    allowed = [c for c in contenders if c.name in tied and not c.gates]
    winner = min(allowed, key=lambda c: c.cost, default=None)
    text = _sentence(first, winner, pairs, metric)
    slices = next((c for c in contenders if c.name == "slice"), None)
    lr = slices.lr if slices else recipe.lr
    return Verdict(
        first.name,
        winner.name if winner else None,
        text,
        contenders,
        list(pairs),
        struck,
        metric,
        replace(recipe, lr=lr, slices=dict(recipe.slices)),
    )


def _sentence(
    first: Contender, winner: Contender | None, pairs: Sequence[Pair], metric: str
) -> str:
    rows, unit = first.scores.shape[1], "%" if metric == "accuracy" else "perplexity"
    start = f"{first.name} is best with {shown(metric, first.value):.1f} {unit} on {rows:,d} rows"
    ties = [pair for pair in pairs if pair.tied]
    if ties:
        start += ", tied with " + ", ".join(_difference(pair, metric) for pair in ties)
    elif pairs:
        start += ", ahead of all others (5 %, corrected by Holm)"
    if winner is None:
        return (
            f"{start}; gates stop it and all that are tied with it: nothing is recommended."
        )
    mib = winner.look["peak_bytes"] / 2**20
    why = "it is best" if not ties else f"the least memory of these, {mib:,.0f} MiB a step"
    return f"{start}. Use {winner.name}: {why}."


def _difference(pair: Pair, metric: str) -> str:
    scale, unit = (100, " points") if metric == "accuracy" else (1, " of the loss")
    mean, low, high = (0.0 - scale * x for x in (pair.difference, pair.high, pair.low))
    return f"{pair.name} ({mean:+.2f}{unit}, 95 % from {low:+.2f} to {high:+.2f})"
