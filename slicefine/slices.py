"""What a slice is: which features it holds, in what order positions follow each other, what has
been covered.

Pure bookkeeping over one weight of shape (out_features, in_features); nothing here touches the
weight itself.
An *axis* is ``"column"`` (features of the input), ``"row"`` (features of the output) or ``"block"``
(both).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

# bookkeeping stays on the host, also under torch.set_default_device
HOST = torch.device("cpu")
SliceType = Literal["column", "row", "block", "row_column"]
SwitchMode = Literal["ascending", "descending", "random", "fixed", "gradient", "magnitude"]
StatePolicy = Literal["reset", "keep", "remember"]
SLICE_TYPES: tuple[str, ...] = get_args(SliceType)
SWITCH_MODES: tuple[str, ...] = get_args(SwitchMode)
STATE_POLICIES: tuple[str, ...] = get_args(StatePolicy)


@dataclass(frozen=True)
class SliceSpec:
    """Every slice that one weight of shape (out_features, in_features) can have.

    r: width of a slice; for a block its width along the input.
    r_out: height of a block, along the output.
    contiguous: neighboring features, or features scattered by a seeded permutation.
    """

    out_features: int
    in_features: int
    slice_type: str = "column"
    r: int = 8
    r_out: int = 8
    contiguous: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.slice_type not in SLICE_TYPES:
            raise ValueError(
                f"slice_type is {self.slice_type!r}; expected one of {', '.join(SLICE_TYPES)}"
            )
        for axis in self.axes:
            for width, features, what in self.extents(axis):
                if not 1 <= width <= features:
                    raise ValueError(
                        f"a {axis} slice of width {width} does not fit a weight of shape"
                        f" ({self.out_features}, {self.in_features}): it has {features} {what}"
                        f" features. Choose 1 <= r <= {features}, or leave this layer out"
                        " (exclude_modules, rank_pattern)."
                    )

    def extents(self, axis: str) -> list[tuple[int, int, str]]:
        columns = (self.r, self.in_features, "input")
        rows = (self.r_out if axis == "block" else self.r, self.out_features, "output")
        return {"column": [columns], "row": [rows], "block": [rows, columns]}[axis]

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that moves alternate between; one, but for ``row_column``."""
        return ("column", "row") if self.slice_type == "row_column" else (self.slice_type,)

    def positions(self, axis: str) -> int:
        """Number of positions on an axis: enough to cover every feature once; the last overlaps if
        r does not divide.
        """
        return math.prod(-(-features // width) for width, features, _ in self.extents(axis))

    def shape(self, axis: str) -> tuple[int, int]:
        """Shape of the slice on an axis."""
        rows = {"column": self.out_features, "row": self.r, "block": self.r_out}[axis]
        return rows, self.in_features if axis == "row" else self.r

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the one trainable parameter: the slice's, or flat and large enough for both axes
        of ``row_column``.
        """
        if self.slice_type == "row_column":
            return (max(math.prod(self.shape(axis)) for axis in self.axes),)
        return self.shape(self.slice_type)

    def features(self, axis: str, position: int) -> tuple[Tensor | None, Tensor | None]:
        """The slice at a position: (rows, cols), int64, ascending; None stands for all rows or all
        columns.
        """
        if not 0 <= position < self.positions(axis):
            raise ValueError(
                f"position is {position}; a {axis} slice of this weight has positions 0 to"
                f" {self.positions(axis) - 1}"
            )
        row, col = position, position
        if axis == "block":
            # Blocks are numbered along the input first, then along the output.
            row, col = divmod(position, -(-self.in_features // self.r))
        rows = (
            self._indices(row, self.r_out if axis == "block" else self.r, self.out_features)
            if axis != "column"
            else None
        )
        cols = self._indices(col, self.r, self.in_features) if axis != "row" else None
        return rows, cols

    def order(self, features: int) -> Tensor | None:
        """(features,) int64, the order in which positions take features; None for their own."""
        return None if self.contiguous else _permutation(features, self.seed)

    def _indices(self, position: int, width: int, features: int) -> Tensor:
        # The last position moves back to stay inside: it overlaps the one before it.
        start = min(position * width, features - width)
        order = self.order(features)
        if order is None:
            return torch.arange(start, start + width, device=HOST)
        # ascending: whoever stores features (as runs) or looks them up (searchsorted) relies on it
        return order[start : start + width].sort().values


def pool_features(features: int, size: int, contiguous: bool, seed: int) -> Tensor:
    """The input features between which a slice beside a packed weight moves.

    Args:
        features: of the layer.
        size: how many of them.
        contiguous: the first ones, or features scattered by a seeded permutation.
        seed: of that permutation.

    Returns:
        (size,) int64, ascending, on the host.
    """
    if contiguous:
        return torch.arange(size, device=HOST)
    return _permutation(features, seed)[:size].sort().values


def _permutation(count: int, seed: int) -> Tensor:
    """(count,) int64, on the host whatever the default device is: the generator is there."""
    generator = torch.Generator(HOST).manual_seed(seed)
    return torch.randperm(count, generator=generator, device=HOST)


def _position_at(mode: str, count: int, start: int, turn: int, seed: int) -> int:
    """The position at a turn, for the modes that need no score, without a list of the others."""
    sweep, index = divmod(turn, count)
    if mode == "fixed":
        return start
    if mode != "random":
        return (start + (-index if mode == "descending" else index)) % count
    if count > _PERMUTED:
        return _shuffled(count, start, index, (seed, sweep))
    # another order each sweep; far apart, so that sweep 2 of seed 0 is not sweep 1 of seed 1
    order = _permutation(count, seed + 7919 * sweep)
    if sweep:
        return int(order[index])
    # in the first sweep the configured position comes first, the others keep their order
    if index == 0:
        return start
    place = int((order == start).nonzero())
    return int(order[index - 1 if index <= place else index])


# a permutation of that many is made in a quarter of a millisecond; blocks may have more positions
_PERMUTED = 16_384


def _shuffled(count: int, start: int, index: int, key: tuple[int, int]) -> int:
    """The value at one index of a pseudo-random permutation of ``range(count)``.

    A Feistel network permutes the next power of four; values outside are sent through again until
    they are inside, which keeps it a permutation (cycle walking).
    """
    half = _half_bits(count)
    value = _feistel(index, half, key)
    while value >= count:
        value = _feistel(value, half, key)
    if key[1]:
        return value
    # the first sweep begins at the configured position, which changes places with another
    first = _feistel(0, half, key)
    while first >= count:
        first = _feistel(first, half, key)
    return {first: start, start: first}.get(value, value)


def _feistel(value: int, half: int, key: tuple[int, int]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for turn in range(4):
        # Undone by the same exclusive or: a permutation, whatever `_mixed` is.
        left, right = right, left ^ (_mixed(key, turn, right) & mask)
    return left << half | right


def _half_bits(count: int) -> int:
    """Bits of each half of what the network permutes: its 4**half values are less than four times
    count, so a walk ends after four rounds on average at most.
    """
    return (max(count - 1, 1).bit_length() + 1) // 2


def _mixed(key: tuple[int, int], turn: int, right: int) -> int:
    # crc32, not hash(), which Python salts in every process; the key makes each sweep another order
    return zlib.crc32(f"{key[0]} {key[1]} {turn} {right}".encode())


@dataclass
class SliceSchedule:
    """When the slice of one weight moves, where to, and where it has been.

    Each sweep visits every position of an axis once, in the order of ``mode``; ``gradient`` and
    ``magnitude`` visit the
    position with the highest score among those that the sweep has not seen. ``row_column``
    alternates axes at each move.
    ``interval`` counts optimizer steps; None never moves.
    """

    spec: SliceSpec
    mode: str = "ascending"
    interval: int | None = None
    start_position: int = 0
    steps: int = 0
    moves: int = 0
    position: dict[str, int] = field(default_factory=dict)
    # bool per position: has trained there
    visited: dict[str, Tensor] = field(default_factory=dict)
    # bool per position: seen in the current sweep
    swept: dict[str, Tensor] = field(default_factory=dict)
    # int64 per position: the step after which it was left last, 0 where it never trained
    left: dict[str, Tensor] = field(default_factory=dict)
    # the whole weight may have changed up to this step: it was loaded, reverted, written by hand
    rewritten: int = 0
    # axis -> position -> optimizer state
    remembered: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    # the number of moves after which ``visited`` has been written last
    _noted: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in SWITCH_MODES:
            raise ValueError(
                f"switch_mode is {self.mode!r}; expected one of {', '.join(SWITCH_MODES)}"
            )
        if self.interval is not None and self.interval < 1:
            raise ValueError(
                f"switch_interval is {self.interval}; expected a number of optimizer steps >= 1, or"
                " None for a slice that stays"
            )
        for axis in self.spec.axes:
            count = self.spec.positions(axis)
            if not 0 <= self.start_position < count:
                raise ValueError(
                    f"start_position is {self.start_position}; a {axis} slice (r={self.spec.r}) of"
                    f" a weight of shape ({self.spec.out_features}, {self.spec.in_features}) has"
                    f" positions 0 to {count - 1}"
                )
            self.position[axis] = self.start_position
            self.visited[axis] = torch.zeros(count, dtype=torch.bool, device=HOST)
            self.swept[axis] = torch.zeros(count, dtype=torch.bool, device=HOST)
            self.left[axis] = torch.zeros(count, dtype=torch.int64, device=HOST)
        # the first axis is at its first position already; the second gets there at its first move
        self.swept[self.axis][self.start_position] = True

    @property
    def axis(self) -> str:
        return self.spec.axes[self.moves % len(self.spec.axes)]

    @property
    def next_axis(self) -> str:
        return self.spec.axes[(self.moves + 1) % len(self.spec.axes)]

    @property
    def moves_after_this_step(self) -> bool:
        return self.interval is not None and (self.steps + 1) % self.interval == 0

    @property
    def needs_gradient_scores(self) -> bool:
        """True during the one step whose gradient decides the next position."""
        return self.mode == "gradient" and self.moves_after_this_step

    def step(self, trained: bool) -> bool:
        """Count one optimizer step; returns whether the slice must move now."""
        # Every layer asks at every step; a tensor is written only after a move.
        if trained and self._noted != self.moves:
            self.visited[self.axis][self.position[self.axis]] = True
            self._noted = self.moves
        self.steps += 1
        return self.interval is not None and self.steps % self.interval == 0

    def move(self, scores: Callable[[str], Tensor]) -> None:
        """Go to the next position. ``scores(axis)`` gives one score per position of the axis; only
        score modes call it.
        """
        here = self.position[self.axis]
        # not asked of a tensor: a plan's have no values. After a load it is not known: count it
        if self._noted in (None, self.moves):
            self.left[self.axis][here] = self.steps
        axis = self.next_axis
        self.moves += 1
        count = self.spec.positions(axis)
        # how often this axis has had its turn before
        turn = self.moves // len(self.spec.axes)
        # the first turn of the second axis of row_column: it stays where the configuration puts it
        if turn == 0:
            self.swept[axis][self.position[axis]] = True
            return
        if self.mode in ("gradient", "magnitude"):
            if bool(self.swept[axis].all()):
                self.swept[axis].zero_()
            score = scores(axis).to("cpu", torch.float64)
            # an overflow says nothing; what this sweep has seen never wins
            score = score.nan_to_num(0.0, 0.0, 0.0).masked_fill(self.swept[axis], -math.inf)
            self.position[axis] = int(score.argmax())
        else:
            self.position[axis] = _position_at(
                self.mode, count, self.start_position, turn, self.spec.seed
            )
        self.swept[axis][self.position[axis]] = True

    def note_rewritten(self) -> None:
        """Note that values outside the slice may have changed since the last step."""
        # the step to come: who asks for what has changed since this one must get it. Before the
        # first step it is the start of the training.
        self.rewritten = self.steps + 1 if self.steps else 0

    def trained_after(self, step: int) -> dict[str, list[int]]:
        """Axis -> the positions that may have trained after ``step``, ascending."""
        found = {
            axis: (left > step).nonzero().flatten().tolist()
            for axis, left in self.left.items()
        }
        here = self.position[self.axis]
        if self.steps > step and bool(self.visited[self.axis][here]):
            found[self.axis] = sorted({*found[self.axis], here})
        return found

    def coverage(self) -> float:
        """Share of the weight's entries that has trained so far, in [0, 1]."""
        return _share(self.spec, self.visited)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, so ``torch.load(weights_only=True)`` takes it."""
        return {
            "identity": self._identity(),
            "steps": self.steps,
            "moves": self.moves,
            "position": dict(self.position),
            "visited": {axis: v.clone() for axis, v in self.visited.items()},
            "swept": {axis: v.clone() for axis, v in self.swept.items()},
            "left": {axis: v.clone() for axis, v in self.left.items()},
            "rewritten": self.rewritten,
            "remembered": {axis: dict(states) for axis, states in self.remembered.items()},
        }

    def _identity(self) -> dict[str, int]:
        """Everything that must be the same for a state to mean the same, as numbers (indices for
        the named values).
        """
        spec = self.spec
        return {
            "slice_type": SLICE_TYPES.index(spec.slice_type),
            "out_features": spec.out_features,
            "in_features": spec.in_features,
            "r": spec.r,
            "r_out": spec.r_out,
            "contiguous": int(spec.contiguous),
            "seed": spec.seed,
            "switch_mode": SWITCH_MODES.index(self.mode),
            "switch_interval": self.interval or 0,
            "start_position": self.start_position,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless a saved state is of the same slices."""
        mine, given = self._identity(), state["identity"]
        if differing := [
            f"{key} (saved {given.get(key)}, here {mine[key]})"
            for key in mine
            if given.get(key) != mine[key]
        ]:
            raise ValueError(
                f"the saved slices differ from this layer's in {', '.join(differing)}. Build the"
                " model with the saved SliceConfig."
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_state(state)
        self.steps, self.moves, self._noted = int(state["steps"]), int(state["moves"]), None
        self.position = {axis: int(p) for axis, p in state["position"].items()}
        self.visited = {axis: v.clone() for axis, v in state["visited"].items()}
        self.swept = {axis: v.clone() for axis, v in state["swept"].items()}
        # states of before these were kept: everything may have changed
        self.rewritten = int(state.get("rewritten", self.steps))
        left = state.get("left", {axis: v * self.steps for axis, v in self.visited.items()})
        self.left = {axis: v.to(torch.int64).clone() for axis, v in left.items()}
        self.remembered = {
            axis: {int(p): s for p, s in states.items()}
            for axis, states in state["remembered"].items()
        }


def covered_share(spec: SliceSpec, positions: Mapping[str, Iterable[int]]) -> float:
    """Exact share of the entries of W in the union of the given slices.

    Args:
        spec: the slices of the weight.
        positions: axis -> positions.
    """
    visited = {}
    for axis, listed in positions.items():
        count = spec.positions(axis)
        seen = torch.zeros(count, dtype=torch.bool, device=HOST)
        indices = torch.tensor(list(listed), dtype=torch.int64, device=HOST)
        if bool(((indices < 0) | (indices >= count)).any()):
            raise ValueError(
                f"positions of a {axis} slice of this weight are 0 to {count - 1}"
            )
        seen[indices] = True
        visited[axis] = seen
    return _share(spec, visited)


def _share(spec: SliceSpec, visited: Mapping[str, Tensor]) -> float:
    """The share from bools per position; a permutation of the features does not change it."""
    # An entry is missed where its row and its column both are: the missed shares multiply.
    missed = 1.0
    for axis, seen in visited.items():
        extents = spec.extents(axis)
        grid = seen.view(-1, *(_count(extent) for extent in extents[-1:]))
        covered = _covered(grid, *extents[-1][:2])
        if len(extents) > 1:
            width, features, _ = extents[0]
            # the last two rows of blocks may overlap; in the rows that they share, a feature is
            # covered by either
            overlap = len(grid) * width - features
            total = width * int(covered.sum())
            if overlap:
                either = _covered((grid[-2] | grid[-1]).unsqueeze(0), *extents[1][:2])
                total -= overlap * int(covered[-2:].sum() - either)
        else:
            total = int(covered)
        missed *= 1.0 - total / math.prod(features for _, features, _ in extents)
    return 1.0 - missed


def _count(extent: tuple[int, int, str]) -> int:
    width, features, _ = extent
    return -(-features // width)


def _covered(seen: Tensor, width: int, features: int) -> Tensor:
    """(rows,) int64: how many features the positions of each row cover. seen: (rows, positions).

    Only the last position overlaps another, the one before it.
    """
    overlap = seen.shape[1] * width - features
    covered = width * seen.sum(1)
    if overlap:
        covered -= overlap * (seen[:, -2] & seen[:, -1]).to(torch.int64)
    return covered


def planned_coverage(schedule: SliceSchedule, steps: int) -> tuple[int, float]:
    """What ``steps`` optimizer steps from the start will cover.

    Score modes visit every position once a sweep, in an order not known yet; the count is exact
    and the share is that of an ascending sweep (equal whenever r divides the width).

    Returns:
        (number of positions trained, share of the weight's entries).
    """
    if steps < 1:
        return 0, 0.0
    spec, start = schedule.spec, schedule.start_position
    mode = "ascending" if schedule.mode in ("gradient", "magnitude") else schedule.mode
    # rounded up: a turn that has begun has trained
    turns = -(-steps // schedule.interval) if schedule.interval else 1
    visited = {}
    for place, axis in enumerate(spec.axes):
        count = spec.positions(axis)
        # how often this axis has its turn: row_column alternates
        own = -(-(turns - place) // len(spec.axes))
        if own > 0:
            visited[axis] = _visited(mode, count, start, own, spec.seed)
    return sum(int(seen.sum()) for seen in visited.values()), _share(spec, visited)


def _visited(mode: str, count: int, start: int, turns: int, seed: int) -> Tensor:
    """(count,) bool: where the first turns on an axis go."""
    seen = torch.zeros(count, dtype=torch.bool, device=HOST)
    if mode == "fixed":
        seen[start] = True
        return seen
    if turns >= count:
        # Every mode is a permutation of the positions: a whole sweep has been everywhere.
        return ~seen
    if mode != "random":
        order = torch.arange(turns, device=HOST)
        seen[(start - order if mode == "descending" else start + order) % count] = True
    elif count > _PERMUTED:
        seen[_first_shuffled(count, start, turns, seed)] = True
    else:
        order = _permutation(count, seed)
        # the configured position comes first, the others keep their order
        seen[order[order != start][: turns - 1]] = True
        seen[start] = True
    return seen


def _first_shuffled(count: int, start: int, turns: int, seed: int) -> Tensor:
    """(turns,) int64: `_shuffled` of the first indices of the first sweep."""
    half = _half_bits(count)
    # four tables of the mixing function in place of four calls for each index
    tables = [
        torch.tensor([_mixed((seed, 0), turn, right) for right in range(1 << half)])
        for turn in range(4)
    ]
    values = torch.arange(turns, device=HOST)
    outside = torch.ones(turns, dtype=torch.bool, device=HOST)
    mask = (1 << half) - 1
    while bool(outside.any()):
        left, right = values[outside] >> half, values[outside] & mask
        for table in tables:
            left, right = right, left ^ (table[right] & mask)
        values[outside] = left << half | right
        outside = values >= count
    first = values[0].clone()
    values[values == start] = first
    values[0] = start
    return values


def read_slice(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """A copy of ``weight[rows][:, cols]``, (R, K), never larger than the slice on the way."""
    if rows is not None and cols is not None:
        # weight[rows][:, cols] would copy whole rows on the way
        return weight[rows.unsqueeze(1), cols]
    if rows is not None:
        return weight.index_select(0, rows)
    if cols is not None:
        return weight.index_select(1, cols)
    return weight.clone()


def write_slice(
    weight: Tensor, rows: Tensor | None, cols: Tensor | None, values: Tensor
) -> None:
    """``weight[rows][:, cols] = values`` in place; values (R, K) in the weight's dtype."""
    if rows is not None and cols is not None:
        weight[rows.unsqueeze(1), cols] = values
    elif rows is not None:
        weight.index_copy_(0, rows, values)
    elif cols is not None:
        weight.index_copy_(1, cols, values)
    else:
        weight.copy_(values)


def rounds_to(master: Tensor, truth: Tensor) -> Tensor:
    """Where the master is a more precise copy of the weight; bfloat16 may have been rounded
    stochastically, up or down.
    """
    nearest = master.to(truth.dtype) == truth
    if truth.dtype != torch.bfloat16:
        return nearest
    # bfloat16 is the upper half of a float32: rounding toward zero keeps it, the other way adds 1.
    # The shift and the int16 both extend the sign, so negative values compare too.
    down = master.view(torch.int32) >> 16
    bits = truth.contiguous().view(torch.int16).to(torch.int32)
    return nearest | (down == bits) | (down + 1 == bits)
