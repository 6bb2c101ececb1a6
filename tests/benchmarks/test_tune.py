"""The tuner: its candidates, its search, its file."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from slicefine_kernels import tuned
from slicefine_kernels.configs import MAX_TILE, GradConfig, default_config, tile_class

from benchmarks import tune
from slicefine import ops

ROOT = Path(__file__).parents[2]


def test_the_tuners_candidates():
    for side, thin, size in tune.classes():
        R, K = (4096, thin) if side == "rows" else (thin, 4096)
        start = default_config(R, K, size)
        near = list(tune.neighbors(start, side, thin, size))
        assert 5 <= len(near) == len(set(near)) and start not in near
        for config in near:
            assert config.BLOCK_R * config.BLOCK_K <= MAX_TILE
            assert (config.BLOCK_K if side == "rows" else config.BLOCK_R) <= thin
            assert (
                config.BLOCK_R + config.BLOCK_K
            ) * config.BLOCK_T * size * config.num_stages <= tune.SHARED_BYTES
        assert tile_class(R, K, size) == (side, thin, size)


def test_the_tuners_search_goes_downhill_past_what_fails():
    near = lambda n: (m for m in (n - 1, n + 1))
    times = {
        5: 10.0,
        4: None,
        6: 9.0,
        7: 5.0,
        8: 4.99,
        9: 1.0,
    }  # a failure at 4, no gain worth having at 8
    assert tune.search(5, near, times.get, lambda: True) == (7, 5.0, 10.0)
    assert tune.search(5, near, times.get, lambda: False) == (5, 10.0, 10.0)
    with pytest.raises(RuntimeError, match="the default configuration 4"):
        tune.search(4, near, times.get, lambda: True)


def test_the_tuners_file_round_trips_and_keeps_other_machines(tmp_path):
    names = tuple(field.name for field in dataclasses.fields(GradConfig))
    tiles = lambda *values: (*values, *(None,) * (len(names) - 5))
    old = {
        ("sm_80", "rows", 16, 2): tune.Entry(
            tiles(128, 16, 64, 4, 3), "A100, 2026-11-01: 0.1 ms, default 0.2 ms"
        ),
        ("sm_90", "rows", 16, 2): tune.Entry(
            tiles(64, 16, 64, 4, 3), "gone: the default won"
        ),
    }
    new = {
        ("sm_90", "cols", 64, 4): tune.Entry(
            tiles(16, 64, 32, 4, 2), "H200, 2026-11-23: 0.3 ms, default 0.4 ms"
        )
    }
    entries = tune.merged(old, new, {("sm_90", "rows", 16, 2), ("sm_90", "cols", 64, 4)})
    text = tune.rendered(entries, names)
    assert tune.parsed(text) == entries and list(entries) == [
        ("sm_80", "rows", 16, 2),
        ("sm_90", "cols", 64, 4),
    ]
    found: dict = {}
    exec(text, found)
    assert found["GRAD"] == {key: entry.values for key, entry in entries.items()}
    assert all(GradConfig(*values) for values in found["GRAD"].values())
    exec(tune.rendered({}, names), found)
    assert found["GRAD"] == {} and "No GPU has been measured yet" in found["__doc__"]
    (tmp_path / "tuned.py").write_text(text)
    ruff = shutil.which(
        "ruff",
        path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    )
    if ruff:
        subprocess.run(
            [ruff, "format", "--check", "--line-length", "120", str(tmp_path / "tuned.py")],
            check=True,
        )


def test_the_tuner_runs_small(monkeypatch):
    """One class through the interpreter: an improvement is an entry, a wrong result is none."""
    measured = iter([10.0, 9.9, 5.0, 7.0])
    monkeypatch.setattr("benchmarks.gpu.kernels.milliseconds", lambda *_: next(measured))
    entries, keys = tune.tune("cpu", 1.0, tune.classes()[:1])
    assert keys == {("cpu", "rows", 16, 2)} == entries.keys() and tuned.GRAD == {}
    (entry,) = entries.values()
    assert (
        GradConfig(*entry.values) != default_config(48, 16, 2)
        and "5.0000 ms, default 10.0000 ms" in entry.comment
    )
    bench = tune.Bench("rows", 16, 2, "cpu")
    monkeypatch.setattr(ops, "slice_grad", lambda dy, x: torch.zeros(48, 16))
    assert bench(default_config(48, 16, 2)) is None
