"""Paired comparisons of methods on the rows of one test set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
from scipy import stats

ALPHA, POWER = 0.05, 0.8
# Share of the rows on which two good methods differ, for the figure that is given beforehand.
DISCORDANT = 0.1


@dataclass(frozen=True)
class Difference:
    """Mean of (the leader's score - the other's) over the rows, with its 95 % interval."""

    mean: float
    low: float
    high: float
    p: float
    test: str


def compare(leader: Any, other: Any, binary: bool, seed: int) -> Difference:
    """Scores of two methods on the same rows, [seeds, rows]; higher is better.

    The exact McNemar test where each row is right or wrong once; else a bootstrap over rows, whose
    scores are means over the seeds: seeds on one row are no independent evidence.
    """
    first, second = numpy.atleast_2d(leader), numpy.atleast_2d(other)
    difference = first.mean(0) - second.mean(0)
    mean = float(difference.mean())
    if not difference.any():
        return Difference(0.0, 0.0, 0.0, 1.0, "equal on every row")
    drawn = stats.bootstrap(
        (difference,), numpy.mean, method="percentile", n_resamples=9999, rng=seed
    )
    low, high = map(float, drawn.confidence_interval)
    if binary and len(first) == 1:
        wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
        p = float(stats.binomtest(wins, wins + losses).pvalue)
        return Difference(mean, low, high, p, "exact McNemar")
    draws = drawn.bootstrap_distribution
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2 * (int(tail) + 1) / (len(draws) + 1))
    return Difference(mean, low, high, p, "paired bootstrap")


def holm(values: dict[str, float]) -> dict[str, float]:
    """p values corrected for their number by Holm's steps."""
    result, largest = {}, 0.0
    for rank, name in enumerate(sorted(values, key=lambda key: values[key])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[name]))
        result[name] = largest
    return result


def detectable(rows: int, comparisons: int) -> tuple[float, float]:
    """Smallest difference of accuracies that a test set can show.

    Returns:
        (what McNemar's test finds with a power of 0.8 if `DISCORDANT` of the rows differ; what no
        exact test can go below, where every differing row speaks for the same method), as shares.
    """
    alpha = ALPHA / max(1, comparisons)
    z = stats.norm.isf(alpha / 2) + stats.norm.isf(1 - POWER)
    least = math.ceil(math.log2(2 / alpha))
    return float(z * math.sqrt(DISCORDANT / rows)), least / rows


def calibration_error(confidence: Any, right: Any, bins: int = 10) -> float:
    """Expected calibration error: |confidence - accuracy| over bins, weighted by their rows."""
    confidence, right = numpy.asarray(confidence), numpy.asarray(right, dtype=float)
    place = numpy.minimum((confidence * bins).astype(int), bins - 1)
    parts = [place == i for i in range(bins)]
    return float(sum(abs(confidence[p].sum() - right[p].sum()) for p in parts) / len(right))
