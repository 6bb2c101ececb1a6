"""Is one method better than another on the same test rows, or is it chance? By SciPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ALPHA, POWER = 0.05, 0.8
# share of the rows on which two methods differ, before anything has run
_DISCORDANT = 0.1
_RESAMPLES = 9_999


@dataclass(frozen=True)
class Pair:
    """A method held against the best one, on the same rows.

    Args:
        name: of the method.
        difference: best minus this one, in the unit of the scores.
        low, high: 95 % confidence interval of the difference.
        p: two-sided, before the correction.
        corrected: by Holm's method over all pairs.
        test: "McNemar, exact" or "paired bootstrap".
    """

    name: str
    difference: float
    low: float
    high: float
    p: float
    corrected: float
    test: str

    @property
    def tied(self) -> bool:
        """Whether chance alone may have made the difference."""
        return not self.corrected < ALPHA


def smallest_difference(rows: int, pairs: int) -> float:
    """The smallest difference of accuracy that a test set can show.

    Args:
        rows: of the test set.
        pairs: comparisons that are made.

    Returns:
        Share of rows, for a two-sided McNemar test at 5 % over all pairs (Bonferroni, which Holm
        does not fall below) and a power of 80 %, where two methods differ on 10 % of the rows.
    """
    level = stats.norm.isf(ALPHA / (2 * max(1, pairs)))
    power = stats.norm.ppf(POWER)
    return float((level + power) * math.sqrt(_DISCORDANT / rows))


def compare(
    scores: dict[str, np.ndarray], best: str, seed: int = 0, binary: bool = True
) -> list[Pair]:
    """Hold every method against the best one.

    Args:
        scores: by method, (seeds, rows), higher is better; the same rows in the same order.
        best: one of the methods.
        seed: of the resampling.
        binary: scores are 0 or 1. One seed of those gets McNemar's exact test; all else a paired
            bootstrap over rows, of the means over seeds.

    Returns:
        A pair for every other method, in their order.
    """
    found = []
    for name, values in scores.items():
        if name == best:
            continue
        rows = scores[best].mean(0) - values.mean(0)
        low, high, chance = _bootstrap(rows, seed)
        test = "paired bootstrap"
        if binary and len(values) == 1 and len(scores[best]) == 1:
            wins, losses = int((rows > 0).sum()), int((rows < 0).sum())
            chance = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
            test = "McNemar, exact"
        found.append((name, float(rows.mean()), low, high, float(chance), test))
    corrected = holm([pair[4] for pair in found])
    return [
        Pair(name, difference, low, high, p, c, test)
        for (name, difference, low, high, p, test), c in zip(found, corrected, strict=True)
    ]


def _bootstrap(rows: np.ndarray, seed: int) -> tuple[float, float, float]:
    """(low, high, p) of the mean over rows."""
    if not np.any(rows != rows[0]):
        mean = float(rows[0])
        return mean, mean, 1.0 if mean == 0 else 0.0
    result = stats.bootstrap(
        (rows,),
        np.mean,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=500,
    )
    draws = result.bootstrap_distribution
    # the resample that is the sample itself counts, so that p is never 0
    side = min((draws <= 0).sum(), (draws >= 0).sum()) + 1
    interval = result.confidence_interval
    chance = min(1.0, 2 * float(side) / (_RESAMPLES + 1))
    return float(interval.low), float(interval.high), chance


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for the number of tests (Holm, 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: |confidence - accuracy|, by bins of confidence (Guo et al., 2017).

    Args:
        confidence: (n,) probability of the predicted class, in [0, 1].
        right: (n,) whether it was right.
        bins: of equal width.
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(confidence[place == b].mean() - right[place == b].mean()) * (place == b).sum()
        for b in range(bins)
        if (place == b).any()
    ]
    return float(sum(gaps) / len(confidence))
