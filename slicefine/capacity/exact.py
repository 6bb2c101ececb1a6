"""Networks that take given values on given samples by construction: no training, and zero on every
other sample listed.

Both work along one projection w = direction . x. Two layers: a continuous piecewise linear function
of w; an edit is a bump between the untouched samples beside it. Three layers: the edits are split
into groups of neighbors; a unit of the second layer is a zigzag in w that meets one edit per group
inside [-1, 1] and is steep enough to be outside [-2, 2] at every other sample, where the hat ``2
clamp(t, -1, 1) - clamp(t, -2, 2)`` on top of it is zero. Source: Sohn et al., Fine-Tuning Capacity,
UAI 2024, arXiv 2408.00359, theorems 4.1 and 5.1. Unlike theirs the three-layer network needs no
units for the untouched samples beside an edit, so it has sqrt(3) times fewer neurons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

# A gap between projections below this share of their spread is lost in the rounding of float64
# products.
_CLOSEST = 1e-11


class Bumps(nn.Module):
    """The two-layer construction: (B, features) -> (B, outputs), float64.

    direction: (features,). knots: (m,), ascending. at: (m + 1, outputs) values at the left end of
    each interval between knots, slopes: (m + 1, outputs); the first and the last interval are flat.
    It is evaluated interval by interval, so that it is exactly zero wherever it is flat at zero;
    `relu_network` is the same function as a sum of m ReLUs.
    """

    direction: Tensor
    knots: Tensor
    at: Tensor
    slopes: Tensor
    layers = 2

    def __init__(
        self, direction: Tensor, knots: Tensor, at: Tensor, slopes: Tensor
    ) -> None:
        super().__init__()
        for name, value in (
            ("direction", direction),
            ("knots", knots),
            ("at", at),
            ("slopes", slopes),
        ):
            self.register_buffer(name, value)

    @property
    def neurons(self) -> int:
        return len(self.knots)

    @property
    def stored(self) -> int:
        """Numbers that the network needs: direction, knots, one slope change per knot and output,
        the leftmost values.
        """
        return (
            self.direction.numel()
            + self.knots.numel() * (1 + self.at.shape[1])
            + self.at.shape[1]
        )

    def forward(self, features: Tensor) -> Tensor:
        w = features.to(self.direction.dtype) @ self.direction
        interval = torch.searchsorted(self.knots, w.contiguous(), right=True)
        # the first interval has no left end; it is flat, so any point will do
        start = torch.cat([self.knots[:1], self.knots])[interval]
        return self.at[interval] + self.slopes[interval] * (w - start).unsqueeze(-1)

    def relu_network(self) -> nn.Sequential:
        """The same function as Linear, ReLU, Linear with `neurons` hidden neurons; its first weight
        has rank 1.
        """
        first = _linear(self.direction.expand(self.neurons, -1), -self.knots)
        last = _linear((self.slopes[1:] - self.slopes[:-1]).t(), self.at[0])
        return nn.Sequential(first, nn.ReLU(), last)

    def error_bound(self, features: Tensor, dtype: torch.dtype) -> float:
        """Largest error on these features, to first order, if everything were computed in
        ``dtype``.

        The projection and the knots are rounded, and the steepest slope multiplies that: (features
            + 2) u |direction|.|x| slope,
        plus the rounding of the values, u the unit roundoff.
        """
        u = torch.finfo(dtype).eps / 2
        size = (features.double().abs() @ self.direction.double().abs()).max()
        steepest, largest = self.slopes.abs().max(), self.at.abs().max()
        return float(u * ((features.shape[1] + 2) * size * steepest + 4 * largest))


class Zigzags(nn.Module):
    """The three-layer construction: (B, features) -> (B, outputs), float64.

    edges: (p + 1,) of the groups along the projection. heights: (units, p + 1) of each zigzag at
    the edges. readout: (outputs, units) factor of a unit's hat in each output. `relu_network` is
    the same function as three linear layers: 2p neurons, then 4 per unit.
    """

    direction: Tensor
    edges: Tensor
    heights: Tensor
    readout: Tensor
    layers = 3

    def __init__(
        self, direction: Tensor, edges: Tensor, heights: Tensor, readout: Tensor
    ) -> None:
        super().__init__()
        for name, value in (
            ("direction", direction),
            ("edges", edges),
            ("heights", heights),
            ("readout", readout),
        ):
            self.register_buffer(name, value)

    @property
    def neurons(self) -> int:
        return 2 * (len(self.edges) - 1) + 4 * len(self.heights)

    @property
    def stored(self) -> int:
        """Numbers that the network needs; each unit adds to one output."""
        return (
            self.direction.numel()
            + self.edges.numel()
            + self.heights.numel()
            + len(self.heights)
        )

    def forward(self, features: Tensor) -> Tensor:
        w = features.to(self.direction.dtype) @ self.direction
        # outside of all groups every unit is constant
        w = w.clamp(self.edges[0], self.edges[-1])
        group = (
            torch.searchsorted(self.edges, w.contiguous(), right=True)
            .sub(1)
            .clamp(max=len(self.edges) - 2)
        )
        left, right = self.edges[group], self.edges[group + 1]
        share = ((w - left) / (right - left)).unsqueeze(-1)
        heights = self.heights.t()
        t = heights[group] * (1 - share) + heights[group + 1] * share
        # a zigzag of two hard-tanh functions: -1 at -1, 1 at 1, zero at 0 and beyond -2 and 2
        return (2 * t.clamp(-1, 1) - t.clamp(-2, 2)) @ self.readout.t()

    def relu_network(self) -> nn.Sequential:
        """The same function as Linear, ReLU, Linear, ReLU, Linear with `neurons` hidden neurons."""
        left, right = self.edges[:-1], self.edges[1:]
        # hard-tanh of group l: relu(t + 1) - relu(t - 1) - 1 with t from -1 at its left edge to 1
        # at its right edge
        scale, center = 2 / (right - left), (left + right) / 2
        rise = (self.heights[:, 1:] - self.heights[:, :-1]) / 2
        middle = (self.heights[:, 0] + self.heights[:, -1]) / 2
        first = _linear(
            torch.cat([scale, scale])[:, None] * self.direction,
            torch.cat([1 - center * scale, -1 - center * scale]),
        )
        bend = torch.tensor([2.0, 1.0, -1.0, -2.0], dtype=self.edges.dtype)
        weight = torch.cat([rise, -rise], 1)
        second = _linear(
            weight.repeat_interleave(4, 0),
            ((middle - rise.sum(1))[:, None] + bend).flatten(),
        )
        hat = torch.tensor([-1.0, 2.0, -2.0, 1.0], dtype=self.edges.dtype)
        last = _linear(
            (self.readout[:, :, None] * hat).flatten(1),
            torch.zeros_like(self.readout[:, 0]),
        )
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


@dataclass(frozen=True)
class Line:
    """Samples along a projection, equal projections merged.

    position: (k,) ascending. edited: (k,) bool. value: (k, outputs), zero where not edited.
    """

    position: Tensor
    edited: Tensor
    value: Tensor

    @property
    def smallest_gap(self) -> float:
        """Between an edit and its nearest neighbor, as a share of the standard deviation of all
        positions; inf if alone.
        """
        gaps = self.position.diff()
        # gaps between two kept samples do not matter: nothing bends there
        beside = gaps[self.edited[1:] | self.edited[:-1]]
        spread = self.position.std(correction=0)
        return float(beside.min() / spread) if len(beside) and spread > 0 else math.inf


def project(
    features: Tensor,
    direction: Tensor,
    index: Tensor,
    value: Tensor,
) -> Line:
    """Sort samples by direction . x and merge equal ones.

    features: (K, d) float64. index: (N,) the edits. value: (N, outputs) what they need.
    Raises ValueError if an edit has the projection of a sample that needs something else.
    """
    w = features @ direction
    needed = torch.zeros(len(w), value.shape[1], dtype=torch.float64)
    needed[index] = value
    edited = torch.zeros(len(w), dtype=torch.bool)
    edited[index] = True
    # equal projections are one point on the line; what they need must agree
    position, where = torch.unique(w, return_inverse=True)
    merged = torch.zeros(len(position), value.shape[1], dtype=torch.float64)
    merged[where] = needed
    is_edit = torch.zeros(len(position), dtype=torch.bool)
    is_edit[where[index]] = True
    if (
        clash := ((merged[where] != needed).any(1) | (is_edit[where] & ~edited))
        .nonzero()
        .flatten()
        .tolist()
    ):
        other = int((where == where[clash[0]]).nonzero().flatten()[0])
        pair = (
            (other, clash[0])
            if other != clash[0]
            else (clash[0], int((where == where[clash[0]]).nonzero()[-1]))
        )
        raise ValueError(
            f"samples {pair[0]} and {pair[1]} have the same features along the projection and need"
            " different answers: a function of the features cannot tell them apart. Remove one of"
            " them, or take features of another module."
        )
    return Line(position, is_edit, merged)


def two_layers(direction: Tensor, line: Line, slack: float) -> Bumps:
    """Theorem 4.1's interpolant: at most 3 knots per edit.

    slack: how far from an untouched sample towards the edit the bump begins, as a share of the gap,
    in [0, 1). 0 puts the knot on the sample (fewest neurons); more lets features vary a little
    without touching the answers kept.
    """
    position, edited, value = line.position, line.edited, line.value
    nodes: list[tuple[Tensor, Tensor]] = []
    zero = torch.zeros_like(value[0])
    for i in edited.nonzero().flatten().tolist():
        for j in (i - 1, i, i + 1):
            if j == i:
                nodes.append((position[i], value[i]))
            elif 0 <= j < len(position) and not edited[j]:
                node = position[j] + slack * (position[i] - position[j])
                # one guard between two edits
                if not (nodes and bool(nodes[-1][0] >= node)):
                    nodes.append((node, zero))
    where, at = torch.stack([n for n, _ in nodes]), torch.stack([v for _, v in nodes])
    flat = torch.zeros(1, value.shape[1], dtype=torch.float64)
    # flat at both ends: samples beyond the last edit are left alone
    slopes = torch.cat([flat, at.diff(dim=0) / where.diff().unsqueeze(1), flat])
    # a knot where nothing bends would cost a neuron for nothing
    bends = (slopes[1:] != slopes[:-1]).any(1)
    keep = bends.nonzero().flatten()
    first = torch.zeros(1, dtype=torch.long)
    return Bumps(
        direction,
        where[keep],
        torch.cat([at[first], at[keep]]),
        torch.cat([flat, slopes[1:][keep]]),
    )


def three_layers(direction: Tensor, line: Line, slack: float) -> Zigzags:
    """Theorem 5.1's network on the edits alone: about 4 sqrt(2 N) neurons for one output, 4 sqrt(2
    C N) at most for C.

    slack: an untouched sample is kept at 2 / (1 - slack) or more from zero in every unit.
    """
    position, value = line.position, line.value
    targets = line.edited.nonzero().flatten()
    wanted = [value[targets, c] != 0 for c in range(value.shape[1])]
    groups = _best_grouping(len(targets), wanted)
    spread = position.std(correction=0).clamp(min=torch.finfo(torch.float64).tiny)
    first, last = position[targets[groups[0][0]]], position[targets[groups[-1][-1]]]
    # of the size of an average gap between edits
    margin = spread / math.sqrt(len(targets))
    # halfway between neighboring groups
    inner = [
        (position[targets[a[-1]]] + position[targets[b[0]]]) / 2
        for a, b in pairwise(groups)
    ]
    edges = torch.stack([first - margin, *inner, last + margin])
    heights, readout = [], []
    for c, mine in enumerate(wanted):
        # values in [-1, 1], which is what a unit can make
        scale = value[:, c].abs().max()
        if scale == 0:
            continue
        units = max(int(mine[g].sum()) for g in groups)
        owned = [targets[g][mine[g]] for g in groups]
        for unit in _zigzags(position, value[:, c] / scale, edges, owned, units, slack):
            heights.append(unit)
            readout.append(scale * torch.eye(value.shape[1], dtype=torch.float64)[c])
    if not heights:
        raise ValueError("every edit needs a change of zero: there is nothing to construct")
    return Zigzags(direction, edges, torch.stack(heights), torch.stack(readout, 1))


def _best_grouping(count: int, wanted: list[Tensor]) -> list[Tensor]:
    """Runs of neighboring edits such that 2 per group and 4 per unit are fewest in sum."""
    best: tuple[int, list[Tensor]] | None = None
    for p in range(1, count + 1):
        groups = list(torch.arange(count).tensor_split(p))
        neurons = 2 * p + 4 * sum(
            max(int(mine[g].sum()) for g in groups) for mine in wanted
        )
        if best is None or neurons < best[0]:
            best = neurons, groups
        # more groups alone would cost more than the best so far
        if 2 * p > best[0]:
            break
    assert best is not None
    return best[1]


def _zigzags(
    position: Tensor,
    value: Tensor,
    edges: Tensor,
    owned: list[Tensor],
    units: int,
    slack: float,
) -> list[Tensor]:
    """Heights at the edges of the units of one output; each owns at most one edit per group."""
    # of the homogeneous zigzag at the left edge of a group
    swing = torch.ones(units, dtype=torch.float64)
    # of a zigzag through the values
    base = torch.zeros(units, dtype=torch.float64)
    swings, bases = [swing], [base]
    mine = torch.zeros(units, len(position), dtype=torch.bool)
    for group, edits in enumerate(owned):
        left, right = edges[group], edges[group + 1]
        at, wanted = position[edits], value[edits]
        if (missing := units - len(edits)) > 0:
            # a unit without an edit in this group takes the value 0 between samples
            virtual = _widest_gaps(position, left, right, missing)
            at, wanted = (
                torch.cat([at, virtual]),
                torch.cat([wanted, torch.zeros(missing, dtype=torch.float64)]),
            )
        share = (at - left) / (right - left)
        # the unit that swings most meets its edit last, and so swings less in the next group
        chosen = torch.empty(units, dtype=torch.long)
        chosen[swing.abs().argsort()] = share.argsort()
        share, wanted = share[chosen], wanted[chosen]
        for unit in range(units):
            if chosen[unit] < len(edits):
                mine[unit, edits[chosen[unit]]] = True
        # height at the right edge of the line that is zero at the edit
        swing = -swing * (1 - share) / share
        # and of the line that has the wanted value there
        base = (wanted - base * (1 - share)) / share
        swings.append(swing)
        bases.append(base)
    heights = []
    for unit in range(units):
        rows = [torch.stack([h[unit] for h in kind]) for kind in (swings, bases)]
        away, through = (_on_zigzag(position, edges, row)[~mine[unit]] for row in rows)
        # the least factor that keeps every sample but this unit's own away from [-2, 2]
        needed = (2 / (1 - slack) + through.abs()) / away.abs()
        heights.append(rows[1] + needed.max() * rows[0] if len(needed) else rows[1])
    return heights


def _widest_gaps(
    position: Tensor,
    left: Tensor,
    right: Tensor,
    count: int,
) -> Tensor:
    """(count,) midpoints of the widest gaps between samples inside [left, right], halved again
    where there are too few.
    """
    ends = torch.cat(
        [left[None], position[(position > left) & (position < right)], right[None]]
    )
    while len(ends) - 1 < count:
        ends = torch.cat([ends, (ends[1:] + ends[:-1]) / 2]).sort().values
    gaps = ends.diff()
    widest = gaps.topk(count).indices
    return ends[widest] + gaps[widest] / 2


def _on_zigzag(position: Tensor, edges: Tensor, heights: Tensor) -> Tensor:
    w = position.clamp(edges[0], edges[-1])
    group = torch.searchsorted(edges, w, right=True).sub(1).clamp(max=len(edges) - 2)
    share = (w - edges[group]) / (edges[group + 1] - edges[group])
    return heights[group] * (1 - share) + heights[group + 1] * share


def choose_direction(
    features: Tensor,
    index: Tensor,
    value: Tensor,
    projection: str,
    tries: int,
    prefer: str,
    layers: int,
    seed: int,
) -> tuple[Tensor, Line]:
    """The best of several projections: (direction (d,), unit length in standardized features; the
    samples along it).

    projection: "random" directions, or "lda": the one that separates the edits from the rest,
    beside the random ones. prefer: "conditioning", the largest gap beside an edit; "neurons", the
    fewest of them (two layers).
    """
    std = features.std(0, correction=0)
    inverse = torch.where(
        std > 0, 1 / std.clamp(min=torch.finfo(torch.float64).tiny), torch.zeros_like(std)
    )
    if not bool(inverse.any()):
        raise ValueError(
            "all samples have the same features; nothing can tell the edits from the rest"
        )
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randn(
        max(tries, 1), features.shape[1], generator=generator, dtype=torch.float64
    )
    directions = list(candidates * inverse)
    if projection == "lda":
        directions.append(_discriminant(features * inverse, index) * inverse)
    best: tuple[float, Tensor, Line] | None = None
    clash: ValueError | None = None
    for direction in directions:
        direction = direction / (features @ direction).std(correction=0).clamp(
            min=torch.finfo(torch.float64).tiny
        )
        try:
            line = project(features, direction, index, value)
        except ValueError as error:
            # another direction may tell the two apart
            clash = error
            continue
        if line.smallest_gap < _CLOSEST:
            clash = ValueError(
                f"an edit is {line.smallest_gap:.1e} standard deviations from its neighbor along"
                f" the best projection; expected {_CLOSEST:g} or more. Raise tries, or remove"
                " samples that nearly coincide."
            )
            continue
        if prefer == "neurons" and layers == 2:
            score = -float(two_layers(direction, line, 0.0).neurons)
        else:
            score = line.smallest_gap
        if best is None or score > best[0]:
            best = score, direction, line
    if best is None:
        assert clash is not None
        raise clash
    return best[1], best[2]


def _discriminant(features: Tensor, index: Tensor) -> Tensor:
    """Fisher's direction between the edits and the rest, with a ridge of a thousandth of the mean
    variance.
    """
    edited = torch.zeros(len(features), dtype=torch.bool)
    edited[index] = True
    inside, outside = features[edited], features[~edited]
    if not len(outside):
        return features.new_ones(features.shape[1])
    centered = torch.cat([inside - inside.mean(0), outside - outside.mean(0)])
    scatter = centered.t() @ centered / len(features)
    # with more features than samples the scatter matrix is singular
    ridge = 1e-3 * scatter.diagonal().mean() + torch.finfo(torch.float64).tiny
    eye = torch.eye(len(scatter), dtype=torch.float64)
    return torch.linalg.solve(scatter + ridge * eye, inside.mean(0) - outside.mean(0))
