"""Positions, orders and coverage, against brute force."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slicefine.originals import Originals
from slicefine.slices import (
    SLICE_TYPES,
    SliceSchedule,
    SliceSpec,
    covered_share,
    planned_coverage,
    read_slice,
)

specs = st.builds(
    lambda out, inn, kind, r, r_out, contiguous, seed: SliceSpec(
        out, inn, kind, min(r, out, inn), min(r_out, out), contiguous, seed
    ),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(SLICE_TYPES),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 5),
)


def entries(spec, axis, position) -> torch.Tensor:
    rows, cols = spec.features(axis, position)
    mask = torch.zeros(spec.out_features, spec.in_features, dtype=torch.bool)
    mask[
        (torch.arange(spec.out_features) if rows is None else rows)[:, None],
        torch.arange(spec.in_features) if cols is None else cols,
    ] = True
    return mask


@settings(max_examples=150, deadline=None)
@given(specs)
def test_the_positions_of_an_axis_cover_everything_with_slices_of_one_shape(spec):
    for axis in spec.axes:
        union = torch.zeros(spec.out_features, spec.in_features, dtype=torch.bool)
        for position in range(spec.positions(axis)):
            mask = entries(spec, axis, position)
            assert int(mask.sum()) == spec.shape(axis)[0] * spec.shape(axis)[1]
            union |= mask
            assert covered_share(spec, {axis: range(position + 1)}) == pytest.approx(
                union.double().mean().item()
            )
        assert bool(union.all())
        with pytest.raises(ValueError, match="position is"):
            spec.features(axis, spec.positions(axis))


@settings(max_examples=150, deadline=None)
@given(
    specs,
    st.sampled_from(["ascending", "descending", "random", "fixed"]),
    st.integers(1, 7),
    st.integers(0, 60),
)
def test_planned_coverage_is_what_happens(spec, mode, interval, steps):
    schedule = SliceSchedule(spec, mode, interval)
    positions, share = planned_coverage(schedule, steps)
    union = torch.zeros(spec.out_features, spec.in_features, dtype=torch.bool)
    seen = set()
    for _ in range(steps):
        where = (schedule.axis, schedule.position[schedule.axis])
        seen.add(where)
        union |= entries(spec, *where)
        if schedule.step(trained=True):
            schedule.move(lambda axis: torch.zeros(spec.positions(axis)))
    assert positions == len(seen)
    assert (
        share
        == pytest.approx(union.double().mean().item(), abs=1e-12)
        == pytest.approx(schedule.coverage(), abs=1e-12)
    )


@pytest.mark.parametrize(
    "mode", ["ascending", "descending", "random", "gradient", "magnitude"]
)
def test_every_sweep_visits_each_position_once(mode):
    schedule = SliceSchedule(
        SliceSpec(10, 23, "column", 4, seed=3), mode, 1, start_position=2
    )
    order = [schedule.position["column"]]
    for i in range(17):
        schedule.step(trained=True)
        schedule.move(
            lambda axis, i=i: torch.rand(6, generator=torch.Generator().manual_seed(i))
        )
        order.append(schedule.position["column"])
    assert order[0] == 2
    for sweep in range(3):
        assert sorted(order[6 * sweep : 6 * sweep + 6]) == list(range(6))
    if mode == "random":
        assert order[:6] != order[6:12]


def test_the_last_slice_overlaps_instead_of_shrinking():
    spec = SliceSpec(5, 10, "column", 4)
    assert [spec.features("column", p)[1].tolist() for p in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [6, 7, 8, 9],
    ]


def test_row_column_alternates():
    schedule = SliceSchedule(SliceSpec(6, 9, "row_column", 3), "ascending", 1)
    path = []
    for _ in range(7):
        path.append((schedule.axis, schedule.position[schedule.axis]))
        schedule.step(trained=True)
        schedule.move(lambda axis: torch.zeros(1))
    assert path == [
        ("column", 0),
        ("row", 0),
        ("column", 1),
        ("row", 1),
        ("column", 2),
        ("row", 0),
        ("column", 0),
    ]


def test_the_example_of_the_issue():
    """5,000 steps, interval 100, r 8: 50 positions, 13 % of each 3,072-wide weight."""
    positions, share = planned_coverage(
        SliceSchedule(SliceSpec(3072, 3072, "column", 8), "ascending", 100), 5000
    )
    assert positions == 50 and round(100 * share) == 13


def test_a_schedule_round_trips():
    spec = SliceSpec(10, 23, "row_column", 4)
    one, two = SliceSchedule(spec, "random", 2), SliceSchedule(spec, "random", 2)
    for schedule, steps in ((one, 13), (two, 0)):
        for _ in range(steps):
            if schedule.step(trained=True):
                schedule.move(lambda axis: torch.zeros(1))
    two.load_state_dict(one.state_dict())
    assert (two.axis, two.position, two.coverage()) == (
        one.axis,
        one.position,
        one.coverage(),
    )
    with pytest.raises(
        ValueError, match=r"differ from this layer's in slice_type \(saved 3, here 0\)"
    ):
        SliceSchedule(SliceSpec(10, 23, "column", 4), "random", 2).load_state_dict(
            one.state_dict()
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SliceSpec(5, 6, "diagonal"),
            "slice_type is 'diagonal'; expected one of column, row, block, row_column",
        ),
        (lambda: SliceSpec(5, 6, "column", 7), "it has 6 input features"),
        (lambda: SliceSpec(5, 6, "block", 2, r_out=6), "it has 5 output features"),
        (
            lambda: SliceSchedule(SliceSpec(5, 6, "column", 2), "spiral"),
            "switch_mode is 'spiral'",
        ),
        (
            lambda: SliceSchedule(SliceSpec(5, 6, "column", 2), interval=0),
            "switch_interval is 0",
        ),
        (
            lambda: SliceSchedule(SliceSpec(5, 6, "column", 2), start_position=3),
            "has positions 0 to 2",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_more_positions_than_a_list_is_made_for():
    """A random order beyond what one permutation is made for is still a permutation."""
    spec = SliceSpec(140, 130, "block", 1, 1)
    schedule = SliceSchedule(spec, "random", 1, start_position=77)
    order = [schedule.position["block"]]
    for _ in range(2 * 140 * 130 - 1):
        schedule.step(trained=True)
        schedule.move(lambda axis: torch.zeros(1))
        order.append(schedule.position["block"])
    first, second = order[: 140 * 130], order[140 * 130 :]
    assert order[0] == 77 and sorted(first) == sorted(second) == list(range(140 * 130))
    assert first != second
    # neighbors in time are no neighbors in place
    steps = torch.tensor(first, dtype=torch.float64).diff().abs()
    assert steps.mean() == pytest.approx(140 * 130 / 3, rel=0.05)


@pytest.mark.parametrize("mode", ["ascending", "descending", "random"])
def test_a_move_of_a_large_weight_takes_less_than_a_millisecond(mode):
    schedule = SliceSchedule(SliceSpec(4096, 11008, "block", 16, 16), mode, 100)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        schedule.move(lambda axis: torch.zeros(1))
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3
    start = time.perf_counter()
    positions, share = planned_coverage(schedule, 5000)
    assert positions == 50 and share == pytest.approx(50 * 256 / (4096 * 11008))
    assert time.perf_counter() - start < 0.5


def test_the_coverage_of_blocks_makes_nothing_as_large_as_the_weight():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, torch.Tensor):
                    self.numel = max(self.numel, value.numel())
            return out

    schedule = SliceSchedule(SliceSpec(1000, 1100, "block", 16, 16), "random", 1)
    with Largest() as largest:
        for _ in range(50):
            schedule.step(trained=True)
            schedule.move(lambda axis: torch.zeros(1))
        assert 0 < schedule.coverage() < 1
        planned_coverage(schedule, 2000)
    assert largest.numel <= 64 * 70


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("kind", SLICE_TYPES)
def test_bookkeeping_stays_on_the_host(kind, contiguous):
    """Also where models are made on another device by default; "meta" stands for any."""
    spec = SliceSpec(10, 23, kind, 4, 3, contiguous)
    modes = ("ascending", "random", "magnitude")
    with torch.device("meta"):
        schedules = [SliceSchedule(spec, mode, 1) for mode in modes]
        for schedule, _ in itertools.product(schedules, range(5)):
            schedule.step(trained=True)
            schedule.move(lambda axis: torch.ones(spec.positions(axis), device="cpu"))
            assert schedule.coverage() > 0
        ledger = Originals(spec)
        rows, cols = spec.features(spec.axes[0], 1)
    places = [*schedules[0].visited.values(), *schedules[0].swept.values(), rows, cols]
    assert {p.device.type for p in places if p is not None} == {"cpu"}
    weight = torch.randn(10, 23)
    with torch.device("meta"):
        ledger.record(read_slice(weight, rows, cols), rows, cols)
        ledger.join()
    assert torch.equal(ledger.restored(weight + 0), weight)
