"""The tests of significance, against values worked out elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from slicefine.compare.statistics import (
    calibration_error,
    compare,
    holm,
    smallest_difference,
)


def test_mcnemar_is_exact():
    a = np.ones((1, 30))
    b = np.ones((1, 30))
    b[0, :8] = 0
    a[0, 29] = 0
    # 8 rows one way and 1 the other: 2 * (1 + 9) / 2**9
    (pair,) = compare({"a": a, "b": b}, "a")
    assert pair.test == "McNemar, exact" and pair.p == pytest.approx(20 / 512)
    assert pair.difference == pytest.approx(7 / 30) and not pair.tied


def test_no_difference_is_a_tie():
    a = np.ones((1, 10))
    (pair,) = compare({"a": a, "b": a.copy()}, "a")
    assert (pair.difference, pair.p) == (0, 1) and pair.tied


def test_the_bootstrap_finds_what_is_there_and_not_what_is_not():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(3, 400))
    scores = {
        "best": base + 0.2,
        "same": base + 0.2 + rng.normal(scale=0.5, size=base.shape),
        "worse": base + rng.normal(scale=0.5, size=base.shape),
    }
    same, worse = compare(scores, "best", binary=False)
    assert same.tied and not worse.tied
    assert worse.low < 0.2 < worse.high and worse.p <= worse.corrected
    # the same seed draws the same
    assert compare(scores, "best", binary=False) == [same, worse]


def test_the_bootstrap_is_right_about_chance():
    """Of 200 comparisons without a difference about 5 % are called one."""
    rng = np.random.default_rng(1)
    wrong = 0
    for seed in range(200):
        rows = rng.normal(size=(2, 60))
        (pair,) = compare({"a": rows[:1], "b": rows[1:]}, "a", seed, binary=False)
        wrong += not pair.tied
    assert 3 <= wrong <= 20


def test_holm():
    # Holm (1979): the smallest times 4, the next times 3, never falling
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_the_smallest_difference():
    # (1.9600 + 0.8416) * sqrt(0.1 / 1000)
    assert smallest_difference(1000, 1) == pytest.approx(2.8016 * math.sqrt(1e-4), rel=1e-4)
    assert smallest_difference(1000, 5) > smallest_difference(1000, 1)


def test_calibration_error():
    confidence = np.array([0.95, 0.95, 0.65, 0.65])
    right = np.array([1, 1, 1, 0])
    # half the rows off by 0.05, half by 0.15
    assert calibration_error(confidence, right) == pytest.approx(0.1)
    assert calibration_error(np.ones(5), np.ones(5)) == 0
