"""Task energy: how many directions the features of the user's data span at the input of a layer.

Always to be read beside the same quantity of a randomly initialized model
(`slicefine.diagnose.capture.random_weights`). Source: cumulative explained variance of centered
features, arXiv 2510.08513; the label-aligned variant is the share of the centered label matrix
inside the span of the first k principal components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TAUS = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Energy:
    """Energy of n feature vectors of width d.

    curve: (min(n, d),) cumulative explained variance after 1, 2, ... components. k: tau -> least
    number of components with that share. effective_rank: exp of the spectrum's entropy. aligned:
    (min(n, d),) share of the centered labels' energy within the first components, or None without
    labels. aligned_k: tau -> least number of components that hold tau of what all of them hold.
    dead: number of features that never vary.
    """

    samples: int
    width: int
    curve: list[float]
    k: dict[float, int]
    effective_rank: float
    dead: int
    aligned: list[float] | None = None
    aligned_k: dict[float, int] | None = None


def task_energy(
    features: Tensor,
    taus: Sequence[float] = TAUS,
    labels: Tensor | None = None,
    label_features: Tensor | None = None,
) -> Energy:
    """Cumulative explained variance of centered features.

    features: (n, d). labels: (m,) class numbers or (m, c) targets, for the label-aligned variant.
    label_features: (m, d), one row per label where features are finer than labels (tokens of a
    labeled text); ``features`` otherwise. out: an `Energy`. Raises ValueError for fewer than two
    rows, features that do not vary, labels of another length.
    """
    if features.dim() != 2 or features.shape[0] < 2:
        raise ValueError(
            f"features have shape {tuple(features.shape)}; expected (n, d) with at least two rows"
        )
    if not all(0 < tau <= 1 for tau in taus):
        raise ValueError(
            f"taus are {tuple(taus)}; expected shares between 0, exclusive, and 1"
        )
    # a common offset is no direction in which examples differ
    centered = _centered(features)
    energy = centered.square().sum(0)
    if not float(energy.sum()) > 0.0 or not bool(torch.isfinite(energy).all()):
        raise ValueError(
            "the features do not vary or are not finite; they have no principal components"
        )
    spectrum, _ = _principal(centered, vectors=False)
    curve = (spectrum.cumsum(0) / spectrum.sum()).clamp_max(1.0)
    share = spectrum / spectrum.sum()
    aligned = aligned_k = None
    if labels is not None:
        held = _aligned(
            centered if label_features is None else _centered(label_features), labels
        )
        aligned, aligned_k = (
            held.tolist(),
            {tau: _reach(held, tau * float(held[-1])) for tau in taus},
        )
    return Energy(
        features.shape[0],
        features.shape[1],
        curve.tolist(),
        {tau: _reach(curve, tau) for tau in taus},
        float((-(share * share.clamp_min(1e-300).log()).sum()).exp()),
        int((energy <= 1e-12 * energy.max()).sum()),
        aligned,
        aligned_k,
    )


def _centered(features: Tensor) -> Tensor:
    # float64: small shares are read off the far end of the spectrum
    features = features.to("cpu", torch.float64)
    return features - features.mean(0)


def _principal(centered: Tensor, vectors: bool) -> tuple[Tensor, Tensor | None]:
    """(eigenvalues, left singular vectors (n, k) if asked for), largest first, from the smaller of
    the two Gram matrices."""
    # the nonzero eigenvalues of both Gram matrices are the same; the smaller one is cheaper
    n, d = centered.shape
    if n <= d or vectors:
        values, left = torch.linalg.eigh(centered @ centered.t())
        keep = min(n, d)
        return values.flip(0)[:keep].clamp_min(0.0), left.flip(1)[:, :keep]
    return torch.linalg.eigvalsh(centered.t() @ centered).flip(0).clamp_min(0.0), None


def _reach(curve: Tensor, level: float) -> int:
    """Least number of components whose share is at least the level; rounding in the last bits does
    not count.
    """
    return min(int((curve < level - 1e-12).sum()) + 1, len(curve))


def _aligned(centered: Tensor, labels: Tensor) -> Tensor:
    """||U_k^T Y||^2 / ||Y||^2 of the centered labels Y for every k."""
    if len(labels) != len(centered):
        raise ValueError(
            f"{len(labels)} labels for {len(centered)} rows of features; expected one each"
        )
    # regression targets come as a matrix already
    targets = torch.nn.functional.one_hot(labels.long()) if labels.dim() == 1 else labels
    targets = _centered(targets)
    total = targets.square().sum()
    if not float(total) > 0.0:
        raise ValueError("all labels are the same; there is nothing to align with")
    spectrum, left = _principal(centered, vectors=True)
    assert left is not None
    # directions without variance hold nothing a linear layer could read
    left = left[:, spectrum > 1e-12 * spectrum[0]]
    held = (left.t() @ targets).square().sum(1).cumsum(0) / total
    return held.clamp_max(1.0)
