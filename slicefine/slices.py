"""What a slice is: which features it holds, in what order positions follow each other, what has
been covered.

Pure bookkeeping over one weight of shape (out_features, in_features); nothing here touches the
weight itself.
An *axis* is ``"column"`` (features of the input), ``"row"`` (features of the output) or ``"block"``
(both).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

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
    contiguous: neighbouring features, or features scattered by a seeded permutation.
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
            for width, features, what in self._extents(axis):
                if not 1 <= width <= features:
                    raise ValueError(
                        f"a {axis} slice of width {width} does not fit a weight of shape"
                        f" ({self.out_features}, {self.in_features}): it has {features} {what}"
                        f" features. Choose 1 <= r <= {features}, or leave this layer out"
                        " (exclude_modules, rank_pattern)."
                    )

    def _extents(self, axis: str) -> list[tuple[int, int, str]]:
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
        return math.prod(-(-features // width) for width, features, _ in self._extents(axis))

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
            row, col = divmod(position, -(-self.in_features // self.r))
        rows = (
            self._indices(row, self.r_out if axis == "block" else self.r, self.out_features)
            if axis != "column"
            else None
        )
        cols = self._indices(col, self.r, self.in_features) if axis != "row" else None
        return rows, cols

    def _indices(self, position: int, width: int, features: int) -> Tensor:
        start = min(position * width, features - width)
        if self.contiguous:
            return torch.arange(start, start + width)
        order = torch.randperm(features, generator=torch.Generator().manual_seed(self.seed))
        return order[start : start + width].sort().values


def _sweep_order(mode: str, count: int, start: int, sweep: int, seed: int) -> list[int]:
    """The order of positions within one sweep, for the modes that need no score."""
    if mode == "fixed":
        return [start] * count
    if mode == "random":
        order = torch.randperm(
            count, generator=torch.Generator().manual_seed(seed + 7919 * sweep)
        ).tolist()
        if sweep == 0:  # the first position is the configured one
            order.remove(start)
            order.insert(0, start)
        return order
    step = -1 if mode == "descending" else 1
    return [(start + step * i) % count for i in range(count)]


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
    visited: dict[str, Tensor] = field(default_factory=dict)  # bool per position: has trained there
    swept: dict[str, Tensor] = field(
        default_factory=dict
    )  # bool per position: seen in the current sweep
    remembered: dict[str, dict[int, dict[str, Any]]] = field(
        default_factory=dict
    )  # axis -> position -> optimizer state

    _noted: tuple[int, int] | None = field(
        default=None, repr=False
    )  # (moves, position) that ``visited`` has on record

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
            self.visited[axis] = torch.zeros(count, dtype=torch.bool)
            self.swept[axis] = torch.zeros(count, dtype=torch.bool)
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
        if trained and self._noted != (self.moves, self.position[self.axis]):
            self.visited[self.axis][self.position[self.axis]] = True
            self._noted = (self.moves, self.position[self.axis])
        move = self.moves_after_this_step
        self.steps += 1
        return move

    def move(self, scores: Callable[[str], Tensor]) -> None:
        """Go to the next position. ``scores(axis)`` gives one score per position of the axis; only
        score modes call it.
        """
        axis = self.next_axis
        self.moves += 1
        count = self.spec.positions(axis)
        turn = self.moves // len(self.spec.axes)  # how often this axis has had its turn before
        if turn == 0:  # the first turn of the second axis of row_column
            self.swept[axis][self.position[axis]] = True
            return
        if self.mode in ("gradient", "magnitude"):
            if bool(self.swept[axis].all()):
                self.swept[axis].zero_()
            score = scores(axis).to("cpu", torch.float64)
            score = score.nan_to_num(0.0, 0.0, 0.0).masked_fill(
                self.swept[axis], -math.inf
            )  # an overflow says nothing
            self.position[axis] = int(score.argmax())
        else:
            order = _sweep_order(
                self.mode, count, self.start_position, turn // count, self.spec.seed
            )
            self.position[axis] = order[turn % count]
        self.swept[axis][self.position[axis]] = True

    def coverage(self) -> float:
        """Share of the weight's entries that has trained so far, in [0, 1]."""
        return covered_share(
            self.spec, {axis: v.nonzero().flatten().tolist() for axis, v in self.visited.items()}
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, so ``torch.load(weights_only=True)`` takes it."""
        return {
            "identity": self._identity(),
            "steps": self.steps,
            "moves": self.moves,
            "position": dict(self.position),
            "visited": {axis: v.clone() for axis, v in self.visited.items()},
            "swept": {axis: v.clone() for axis, v in self.swept.items()},
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
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
        self.steps, self.moves, self._noted = int(state["steps"]), int(state["moves"]), None
        self.position = {axis: int(p) for axis, p in state["position"].items()}
        self.visited = {axis: v.clone() for axis, v in state["visited"].items()}
        self.swept = {axis: v.clone() for axis, v in state["swept"].items()}
        self.remembered = {
            axis: {int(p): s for p, s in states.items()}
            for axis, states in state["remembered"].items()
        }


def covered_share(spec: SliceSpec, positions: Mapping[str, Iterable[int]]) -> float:
    """Exact share of the entries of W in the union of the given slices; positions: axis ->
    positions.
    """
    covered = {
        "rows": torch.zeros(spec.out_features, dtype=torch.bool),
        "cols": torch.zeros(spec.in_features, dtype=torch.bool),
    }
    if spec.slice_type == "block":
        grid = torch.zeros(spec.out_features, spec.in_features, dtype=torch.bool)
        for position in positions.get("block", ()):
            rows, cols = spec.features("block", position)
            assert rows is not None and cols is not None
            grid[rows.unsqueeze(1), cols] = True
        return grid.double().mean().item()
    for axis, listed in positions.items():
        for position in listed:
            rows, cols = spec.features(axis, position)
            if cols is not None:
                covered["cols"][cols] = True
            if rows is not None:
                covered["rows"][rows] = True
    missed = math.prod(1.0 - c.double().mean().item() for c in covered.values())
    return 1.0 - missed


def planned_coverage(schedule: SliceSchedule, steps: int) -> tuple[int, float]:
    """What ``steps`` optimizer steps will cover: (number of positions trained, share of the
    weight's entries).

    Score modes visit every position once a sweep, in an order not known yet; the count is exact and
    the share is that of
    an ascending sweep (equal whenever r divides the width).
    """
    if steps < 1:
        return 0, 0.0
    mode = "ascending" if schedule.mode in ("gradient", "magnitude") else schedule.mode
    trial = SliceSchedule(schedule.spec, mode, None, schedule.start_position)
    seen: dict[str, set[int]] = {axis: set() for axis in schedule.spec.axes}
    turns = -(-steps // schedule.interval) if schedule.interval else 1
    everything = len(trial.spec.axes) * max(trial.spec.positions(axis) for axis in trial.spec.axes)
    for turn in range(min(turns, everything + 1)):
        if turn:
            trial.move(lambda axis: torch.zeros(trial.spec.positions(axis)))
        seen[trial.axis].add(trial.position[trial.axis])
    return sum(map(len, seen.values())), covered_share(schedule.spec, seen)


def read_slice(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """A copy of ``weight[rows][:, cols]``, (R, K), never larger than the slice on the way."""
    if rows is not None and cols is not None:
        return weight[rows.unsqueeze(1), cols]
    if rows is not None:
        return weight.index_select(0, rows)
    if cols is not None:
        return weight.index_select(1, cols)
    return weight.clone()


def write_slice(weight: Tensor, rows: Tensor | None, cols: Tensor | None, values: Tensor) -> None:
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
    down = master.view(torch.int32) >> 16
    bits = truth.contiguous().view(torch.int16).to(torch.int32)
    return nearest | (down == bits) | (down + 1 == bits)
