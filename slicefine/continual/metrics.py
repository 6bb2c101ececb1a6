"""Measures of learning task after task, from the matrix a[i][t]: accuracy on task t after training
on task i.

AF here is Chaudhry et al.'s (2018). The width paper's code averages over all T tasks and its
preprint uses (LA - AA) T / (T - 1): these differ by up to 25 %, so every table of slicefine prints
the formula.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Matrix = Sequence[Sequence[float]]
AA = "AA = 1/T sum_t a[T][t]"
AF = "AF = 1/(T-1) sum_{t<T} ( max_{t<=i<T} a[i][t] - a[T][t] )"
LA = "LA = 1/T sum_t a[t][t]"
BWT = "BWT = 1/(T-1) sum_{t<T} ( a[T][t] - a[t][t] )"
FORMULAS = (AA, AF, LA, BWT)
# Two standard errors: one run in forty of a model that learned nothing would pass.
ERRORS_ABOVE_CHANCE = 2.0


def average_accuracy(a: Matrix) -> float:
    """AA: mean accuracy over all tasks after the last one."""
    _check(a)
    return sum(a[-1]) / len(a)


def average_forgetting(a: Matrix) -> float:
    """AF: mean, over all tasks but the last, of the best accuracy that was ever had minus the final
    one; 0 for one task.
    """
    _check(a)
    T = len(a)
    # the best before the end, not the accuracy just after training: a later task may help an
    # earlier one
    return sum(
        max(a[i][t] for i in range(t, T - 1)) - a[T - 1][t] for t in range(T - 1)
    ) / max(1, T - 1)


def learning_accuracy(a: Matrix) -> float:
    """LA: mean accuracy on each task just after it was trained."""
    _check(a)
    return sum(a[t][t] for t in range(len(a))) / len(a)


def backward_transfer(a: Matrix) -> float:
    """BWT: mean change on each task between its own training and the end; 0 for one task."""
    _check(a)
    T = len(a)
    return sum(a[T - 1][t] - a[t][t] for t in range(T - 1)) / max(1, T - 1)


def majority_share(labels: Sequence[int]) -> float:
    """The accuracy of always answering the most common label."""
    return Counter(labels).most_common(1)[0][1] / len(labels)


def is_learned(accuracy: float, labels: Sequence[int]) -> bool:
    """Whether an accuracy on these labels is more than the most common label alone would reach, by
    more than chance explains.

    What was never learned cannot be forgotten: an AF of 0 says nothing of such a task.
    """
    chance = majority_share(labels)
    error = math.sqrt(chance * (1 - chance) / len(labels))
    return accuracy > chance + ERRORS_ABOVE_CHANCE * error


def summary(a: Matrix) -> dict[str, float]:
    """AA, AF, LA and BWT of a matrix."""
    return {
        "AA": average_accuracy(a),
        "AF": average_forgetting(a),
        "LA": learning_accuracy(a),
        "BWT": backward_transfer(a),
    }


def _check(a: Matrix) -> None:
    if not a or any(len(row) != len(a) for row in a):
        raise ValueError(
            f"the accuracy matrix has rows of {sorted({len(r) for r in a})} and {len(a)} rows;"
            " expected T rows of T, one per task"
        )
    if any(not math.isfinite(a[i][t]) for i in range(len(a)) for t in range(i + 1)):
        raise ValueError(
            "the accuracy matrix holds NaN at or below its diagonal; expected every task seen so"
            " far to be tested"
        )


@dataclass(frozen=True)
class PowerLaw:
    """y = gamma x^-beta by least squares of logarithms. r2: share of the variance of log y
    explained; points: used.
    """

    gamma: float
    beta: float
    r2: float
    points: int


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """The fit, or None with fewer than two different positive points (zeros have no logarithm)."""
    pairs = [
        (math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b > 0
    ]
    if len({p for p, _ in pairs}) < 2:
        return None
    mx, my = (sum(p[k] for p in pairs) / len(pairs) for k in (0, 1))
    sxx = sum((p - mx) ** 2 for p, _ in pairs)
    sxy = sum((p - mx) * (q - my) for p, q in pairs)
    # log y = log gamma - beta log x
    slope = sxy / sxx
    total = sum((q - my) ** 2 for _, q in pairs)
    rest = sum((q - my - slope * (p - mx)) ** 2 for p, q in pairs)
    return PowerLaw(
        math.exp(my - slope * mx),
        -slope,
        1.0 if total == 0 else 1 - rest / total,
        len(pairs),
    )


def marginal_gains(
    sizes: Sequence[int], parameters: Sequence[int], value: Sequence[float]
) -> list[dict[str, Any]]:
    """What each step to the next size gains in ``value``: per doubling, per added unit of size and
    per added parameter.
    """
    steps = []
    for i in range(1, len(sizes)):
        gain, doublings = value[i] - value[i - 1], math.log2(sizes[i] / sizes[i - 1])
        more = parameters[i] - parameters[i - 1]
        steps.append(
            {
                "from": sizes[i - 1],
                "to": sizes[i],
                "gain": gain,
                "per_doubling": gain / doublings,
                "per_unit": gain / (sizes[i] - sizes[i - 1]),
                "per_parameter": gain / more if more else math.nan,
            }
        )
    return steps


def knee(sizes: Sequence[int], value: Sequence[float], threshold: float = 0.01) -> int:
    """A heuristic: the first size whose next doubling gains less than ``threshold`` in ``value``;
    the last if none does.
    """
    for i in range(len(sizes) - 1):
        if (value[i + 1] - value[i]) / math.log2(sizes[i + 1] / sizes[i]) < threshold:
            return sizes[i]
    return sizes[-1]
