"""Spectral balance of a weight: are its contiguous groups of rows or columns alike?

An anomaly detector, and no evidence of pretraining: a random matrix is better balanced than a
trained one, because balance is what exchangeable rows give. What it finds are blocks where a
contiguous slice would behave unlike the others. Source: the groups W_g, their Gram matrices and the
two ratios follow arXiv 2510.08513, lemma 2.1; the nulls are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AXES = ("row", "column")
# features in a group at the most, unless the number of groups is given
GROUP_WIDTH = 64
# A group is flagged where it is both unlikely under a shuffle of the features and different enough
# to matter.
_Z, _ENERGY_FACTOR, _PROFILE_FACTOR = 4.0, 2.0, 4.0


@dataclass(frozen=True)
class Null:
    """A statistic over draws of a null: its mean and its largest value. draws: how many."""

    mean: float
    largest: float
    draws: int


@dataclass(frozen=True)
class Balance:
    """Spectral balance of one weight on one axis.

    energies: (k,) mean eigenvalue of W_g W_g^T over the group's features, its squared Frobenius
    norm per feature. energy_ratio: largest of them over smallest. energy_cv: their coefficient of
    variation. energy_z: (k,) of each group, in standard deviations of a random group of as many
    features (exact under a shuffle). profile_ratio: largest ratio, over pairs of groups and the top
    half of the ranks, of their normalized spectra. group_profile_ratios: (k,) the same of each
    group to the median group. effective_ranks: (k,) exp of the spectrum's entropy. permutation,
    gaussian: statistic ("energy_ratio", "profile_ratio", "effective_rank_min") -> its `Null`: the
    weight's own features shuffled; a Gaussian matrix of the same shape. flagged: (group, first
    feature, past the last, why) of groups where a contiguous slice would behave unlike the others.
    """

    axis: str
    groups: int
    energies: list[float]
    energy_ratio: float
    energy_cv: float
    energy_z: list[float]
    profile_ratio: float
    group_profile_ratios: list[float]
    effective_ranks: list[float]
    permutation: dict[str, Null]
    gaussian: dict[str, Null]
    flagged: list[tuple[int, int, int, str]]
    spectra: list[list[float]]


def group_bounds(features: int, groups: int | None = None) -> list[tuple[int, int]]:
    """Contiguous groups of nearly equal width: (first, past the last). Without a number: at least
    8, at most `GROUP_WIDTH` wide."""
    if groups is None:
        groups = min(features, max(8, -(-features // GROUP_WIDTH)))
    if not 2 <= groups <= features:
        raise ValueError(
            f"groups is {groups}; expected 2 to {features}, the number of features on this axis"
        )
    return [(features * g // groups, features * (g + 1) // groups) for g in range(groups)]


def spectral_balance(
    weight: Tensor,
    axis: str = "row",
    groups: int | None = None,
    draws: int = 200,
    seed: int = 0,
    gaussian: dict[str, Null] | None = None,
) -> Balance:
    """How alike the contiguous groups of a weight are, beside two nulls.

    weight: (out_features, in_features). axis: "row" groups output features, "column" input
    features. draws: of each null. gaussian: the Gaussian null of this shape where it has been
    computed before (`gaussian_null`). out: a `Balance`. Memory beyond the weight: one group of its
    features in float64. Raises ValueError for another axis, a weight that is no matrix, a zero or
    non-finite weight.
    """
    matrix = _oriented(weight, axis)
    features = matrix.shape[0]
    bounds = group_bounds(features, groups)
    own = _statistics(matrix, bounds)
    if gaussian is None:
        gaussian = gaussian_null(tuple(weight.shape), axis, len(bounds), draws, seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [
        _statistics(matrix, bounds, torch.randperm(features, generator=generator))
        for _ in range(draws)
    ]
    permutation = _nulls(shuffled)
    energies, ranks = own["energies"], own["effective_ranks"]
    z = _energy_z(
        torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64).square().cpu(), bounds
    )
    expected_profile = max(
        permutation["profile_ratio"].largest, gaussian["profile_ratio"].largest
    )
    return Balance(
        axis,
        len(bounds),
        energies.tolist(),
        own["energy_ratio"],
        float(energies.std(correction=0) / energies.mean()),
        z.tolist(),
        own["profile_ratio"],
        own["group_profile_ratios"].tolist(),
        ranks.tolist(),
        permutation,
        gaussian,
        _flags(own, z, bounds, expected_profile),
        [spectrum.tolist() for spectrum in own["spectra"]],
    )


def gaussian_null(
    shape: tuple[int, ...], axis: str, groups: int, draws: int = 200, seed: int = 0
) -> dict[str, Null]:
    """The statistics of Gaussian matrices of a shape: one matrix, its features grouped anew in each
    draw.
    """
    # another stream than that of the permutations
    generator = torch.Generator().manual_seed(seed + 1)
    matrix = _oriented(torch.randn(shape, generator=generator), axis)
    bounds = group_bounds(matrix.shape[0], groups)
    # regrouping one matrix is far cheaper than drawing new ones, and rows of a Gaussian are
    # exchangeable
    drawn = [
        torch.randperm(matrix.shape[0], generator=generator) for _ in range(max(draws, 1))
    ]
    return _nulls([_statistics(matrix, bounds, order) for order in drawn])


def _oriented(weight: Tensor, axis: str) -> Tensor:
    """The matrix whose rows are the features of the axis."""
    if axis not in AXES:
        raise ValueError(f"axis is {axis!r}; expected one of {', '.join(AXES)}")
    if weight.dim() != 2:
        raise ValueError(
            f"the weight has shape {tuple(weight.shape)}; expected (out_features, in_features)"
        )
    return weight.detach() if axis == "row" else weight.detach().t()


def _statistics(
    matrix: Tensor, bounds: list[tuple[int, int]], order: Tensor | None = None
) -> dict[str, Any]:
    """The statistics of the groups, of the features (rows) in their own order or in another; in
    float64, one group at a time."""
    by_width: dict[int, list[int]] = {}
    for g, (start, stop) in enumerate(bounds):
        by_width.setdefault(stop - start, []).append(g)
    values: dict[int, Tensor] = {}
    # groups of one width together: one decomposition for all of them
    for indices in by_width.values():
        stack = torch.stack([_gram_of_group(matrix, *bounds[g], order) for g in indices])
        if not bool(torch.isfinite(stack).all()):
            raise ValueError(
                "the weight has values that are not finite; there is no spectrum to compare"
            )
        values.update(
            zip(indices, torch.linalg.eigvalsh(stack).flip(-1).clamp_min(0.0), strict=True)
        )
    spectra = [values[g] for g in range(len(bounds))]
    energies = torch.stack([s.mean() for s in spectra])
    if not float(energies.max()) > 0.0:
        raise ValueError("the weight is zero; there is no spectrum to compare")
    shares = [s / s.sum().clamp_min(1e-300) for s in spectra]
    # the lower half of a spectrum is rounding where a group has low rank
    half = max(1, min(len(s) for s in shares) // 2)
    # (k, half)
    top = torch.stack([s[:half] for s in shares]).clamp_min(1e-18)
    middle = top.median(0).values
    return {
        "energies": energies,
        "energy_ratio": float(energies.max() / energies.min().clamp_min(1e-300)),
        "profile_ratio": float((top.max(0).values / top.min(0).values).max()),
        "group_profile_ratios": torch.maximum(top / middle, middle / top).max(1).values,
        "effective_ranks": torch.stack(
            [(-(s * s.clamp_min(1e-300).log()).sum()).exp() for s in shares]
        ),
        "spectra": shares,
    }


def _gram_of_group(
    matrix: Tensor,
    start: int,
    stop: int,
    order: Tensor | None,
) -> Tensor:
    """Inner products of the features of a group: (n, n), float64."""
    group = (
        matrix[start:stop] if order is None else matrix[order[start:stop].to(matrix.device)]
    )
    group = group.to("cpu", torch.float64)
    return group @ group.t()


def _nulls(drawn: list[dict[str, Any]]) -> dict[str, Null]:
    columns = {
        "energy_ratio": [d["energy_ratio"] for d in drawn],
        "profile_ratio": [d["profile_ratio"] for d in drawn],
        "effective_rank_min": [float(d["effective_ranks"].min()) for d in drawn],
    }
    return {name: Null(sum(v) / len(v), max(v), len(v)) for name, v in columns.items()}


def _energy_z(norms: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """z of each group's mean squared norm against a group drawn without replacement: mean and
    variance are known exactly."""
    # a population, not a sample: the groups are drawn from these very features
    d, variance = len(norms), norms.var(correction=0)
    scores = []
    for start, stop in bounds:
        n = stop - start
        # of a mean of n drawn from d without replacement
        deviation = (variance / n * (d - n) / (d - 1)).sqrt()
        scores.append(
            (norms[start:stop].mean() - norms.mean()) / deviation.clamp_min(1e-300)
        )
    return torch.stack(scores)


def _flags(
    own: dict[str, Any], z: Tensor, bounds: list[tuple[int, int]], expected_profile: float
) -> list[tuple[int, int, int, str]]:
    # the median: one extreme group would pull a mean towards itself
    middle = own["energies"].median()
    flagged = []
    for g, (start, stop) in enumerate(bounds):
        factor = float(own["energies"][g] / middle)
        reasons = []
        # both: in a wide layer the smallest difference is significant
        if abs(float(z[g])) > _Z and not 1 / _ENERGY_FACTOR < factor < _ENERGY_FACTOR:
            reasons.append(
                f"energy {factor:.3g} times the median group's (z {float(z[g]):+.1f})"
            )
        profile = float(own["group_profile_ratios"][g])
        if profile > _PROFILE_FACTOR * expected_profile:
            reasons.append(
                f"profile {profile:.3g} times off the median group's (nulls reach"
                f" {expected_profile:.3g})"
            )
        if reasons:
            flagged.append((g, start, stop, "; ".join(reasons)))
    return flagged
