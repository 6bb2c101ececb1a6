"""The benchmark of what a layer costs beside its arithmetic runs, on a few layers."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import overhead


def test_every_case_is_measured_beside_its_base(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(overhead, "LAYERS", 3)
    threads = torch.get_num_threads()
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["overhead", "--rounds", "2", "--json", str(out)])
    try:
        assert overhead.main() == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(out.read_text())["rows"]
    assert {row["group"] for row in rows} == set(overhead.GROUPS)
    for group in overhead.GROUPS:
        first, *others = [row for row in rows if row["group"] == group]
        assert first["case"] == first["base"] and first["ratio"] == 1.0
        assert {row["base"] for row in others} == {first["case"]} and len(others) >= 4
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_what_is_timed_trains():
    calls = overhead.steps()
    made = calls["column"].__self__  # type: ignore[attr-defined]
    before = [layer.weight.clone() for layer in made.model]
    calls["column"]()
    for layer, weight in zip(made.model, before, strict=True):
        assert not torch.equal(layer.weight[:, :8], weight[:, :8])
        assert torch.equal(layer.weight[:, 8:], weight[:, 8:])
    moving = calls[f"column, moves every {overhead.INTERVAL}"].__self__  # type: ignore[attr-defined]
    for _ in range(overhead.INTERVAL):
        moving.step()
    assert {layer.schedule.moves for layer in moving.model} == {1}


def test_nothing_is_timed_of_a_slice_that_trains_otherwise(monkeypatch):
    def unequal(*_):
        raise AssertionError("differs")

    monkeypatch.setattr(overhead, "agreement", unequal)
    monkeypatch.setattr(overhead, "measure", None)
    monkeypatch.setattr(sys, "argv", ["overhead"])
    with pytest.raises(AssertionError, match="differs"):
        overhead.main()
