"""The GPU suite: its parts run small, through the interpreter, and a part that fails is told."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from benchmarks import layers, methods
from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import build, correctness, graphs, worker
from benchmarks.gpu import model as model_part
from benchmarks.gpu.job import PARTS, Job, Part, seconds_for
from slicefine import ops

ROOT = Path(__file__).parents[2]


BOTH = ["gradients", "updates", "graphs"]
SMALL_PARTS = [
    *BOTH,
    *(f"{name}_cuda" for name in BOTH),
    "training",
    "lean",
    "layers",
    "kernels",
    "model",
]


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
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=ROOT
    )


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
    assert (
        len([r for r in report["parts"]["gradients"]["rows"] if r["backend"] == "triton"])
        == 27
    )
    assert {
        row["method"] for row in report["parts"]["layers"]["rows"] if "method" in row
    } == set(layers.METHODS)
    assert report["parts"]["layers"]["bars"] and report["parts"]["kernels"]["bars"]
    if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):
        peers = {row["method"] for row in report["parts"]["model"]["rows"] if row.get("ms")}
        assert {
            "floor",
            "slice column",
            "lora",
            "miss",
            "shira",
            "masked gradient",
        } <= peers
    text = path.with_suffix(".md").read_text()
    assert (
        "**Not a GPU**" in text and "layer step 48 x 64" in text and "at most 1.05" in text
    )
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
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--results",
            str(tmp_path / "results"),
        ]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 2 and "no GPU here" in result.stderr
        # what could not run is on record
        (path,) = (tmp_path / "results").glob("no-GPU-*.json")
        report = json.loads(path.read_text())
        assert list(report["parts"]) == [part.name for part in PARTS]
        for part in report["parts"].values():
            assert part["status"].startswith("missing: no GPU here") and not part["rows"]
        page = path.with_suffix(".md").read_text()
        assert "**Nothing ran**" in page and "times mean nothing" not in page


WORKER = """
import sys
from benchmarks.gpu import worker
from benchmarks.gpu.job import Part
names = {"works": 200, "raises": 200, "crashes": 200, "hangs": 1, "long": 480}
parts = [
    Part(name, f"tests.benchmarks.parts:part_that_{name}", seconds, 900 if name == "long" else 0)
    for name, seconds in names.items()
]
sys.exit(worker.main(parts))
"""


def test_a_part_that_fails_crashes_or_hangs_is_recorded_and_the_rest_run(tmp_path, capsys):
    known = ["works", "raises", "crashes", "hangs", "long"]
    parts = [Part(name, "", 1, least=0) for name in known]
    report = suite.Report("cpu", tmp_path)
    # Two minutes, a quarter of the suite's eight, so 200 are 50 seconds: a process has time to start
    # on a busy machine. The last part claims all of it, so the one that hangs gets its quarter of a
    # second.
    suite.supervise(parts, "cpu", 2.0, report, [sys.executable, "-c", WORKER], grace=0.5)
    found = report.found["parts"]
    assert list(found) == ["works", "raises", "crashes", "hangs", "long"]
    assert found["works"]["status"] == "ok" and found["works"]["rows"] == [{"value": 1.5}]
    assert (
        found["raises"]["status"] == "failed"
        and "ValueError: deliberate" in found["raises"]["error"]
    )
    assert found["raises"]["rows"] == [{"value": 2.5}]
    assert (
        found["crashes"]["rows"] == [{"value": 3.5}]
        and "status 11" in found["crashes"]["error"]
    )
    assert "still running" in found["hangs"]["error"]
    assert found["long"]["status"] == "skipped: no time left"
    assert json.loads(report.path.read_text()) == report.found
    text = report.path.with_suffix(".md").read_text()
    assert (
        "| a ratio | 1.2 | at most 1.05 | no |" in text and "ValueError: deliberate" in text
    )
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
    assert list(job.within_time("abc")) == ["a"] and job.notes == [
        "no time left for 2 of 3 cases"
    ]
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
    assert "peft is missing" in rows[1]["absent"] and "peft is missing" in layers.table(
        rows
    )
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
        return ops.slice_grad(
            b["dy"], b["x"], first[0][1] if b is first[0][0] else b["rows"]
        )

    assert graphs.replay_differs(stale, shape, "cpu") == [
        "result, replay 1",
        "result, replay 2",
    ]


class HostForDevice(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on the host."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return func(
            *("cpu" if type(a) is str and a == "cuda" else a for a in args), **kwargs
        )


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
    for name in (
        "synchronize",
        "set_sync_debug_mode",
        "empty_cache",
        "reset_peak_memory_stats",
    ):
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
        correctness,
        "SMALL",
        (correctness.GradientCase(65, 40, 17, "scattered", tf32=True),),
    )
    with HostForDevice():
        for name in ("gradients", "graphs", "kernels"):
            (part,) = [p for p in PARTS if p.name == name]
            result = worker.run_part(part, Job("cuda", True, time.time() + 60, tmp_path))
            assert result["status"] == "ok" and len(result["rows"]) >= 1, result
    if not torch.cuda.is_available():
        assert result["notes"] and result["notes"][0].startswith("no kernel times: ")
