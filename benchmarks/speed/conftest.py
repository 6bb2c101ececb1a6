"""Options of the suite, and how a case's turns become one pytest-benchmark entry per method."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from benchmarks.record import where
from benchmarks.speed.registry import CASES, Case, quick_cases
from benchmarks.speed.turns import measure, peak_memory, roofs, row_of
from slicefine.backends.select import BACKENDS, backend_for


class Replay:
    """A clock that pytest-benchmark reads, moved by times that have been measured already.

    pytest-benchmark times one function to its end before it starts the next, so a machine that
    slows down would be held against whichever ran last. Here the methods of a case run in turns,
    once, and each test plays its recorded times to ``benchmark.pedantic``: JSON, storage and
    --benchmark-compare see ordinary benchmarks, through public options alone.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.pending: list[float] = []

    def __call__(self) -> float:
        return self.now

    def load(self, seconds: list[float]) -> None:
        self.now, self.pending = 0.0, list(reversed(seconds))

    def play(self) -> None:
        self.now += self.pending.pop()


REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("slicefine benchmarks")
    group.addoption("--quick", action="store_true", help="one small case of each kind")
    group.addoption(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=("cpu", "cuda"),
    )
    group.addoption(
        "--part",
        action="append",
        help="models, layers, moves or ops; may be given several times",
    )


def pytest_configure(config: pytest.Config) -> None:
    # peft's SHiRA makes sparse tensors
    config.addinivalue_line("filterwarnings", "ignore:Sparse invariant checks:UserWarning")
    # it says that nothing was benchmarked where a check was red, and pyproject.toml makes an error
    # of that
    config.addinivalue_line(
        "filterwarnings", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "method"} <= set(metafunc.fixturenames):
        config = metafunc.config
        cases = quick_cases() if config.getoption("--quick") else CASES
        parts = config.getoption("--part")
        chosen = [case for case in cases if not parts or case.part in parts]
        metafunc.parametrize(
            ("case", "method"),
            [
                pytest.param(
                    case,
                    method,
                    id=f"{case.name}/{method.name}",
                    marks=pytest.mark.benchmark(group=case.name, timer=REPLAY),
                )
                for case in chosen
                for method in case.methods
            ],
        )


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], dict[str, float]]:
    """Device, what every row says of the place, and what the machine reaches."""
    device = request.config.getoption("--device")
    if device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    place = {**where(device), "device_type": device}
    try:
        place["peft"] = version("peft")
    except PackageNotFoundError:
        place["peft"] = None
    module = backend_for(device, {torch.float32})
    place["backend"] = next(
        name for name, backend in BACKENDS.items() if backend.load()[0] is module
    )
    return device, place, roofs(device)


@pytest.fixture
def measured(case: Case, rows_of: Any) -> Any:
    return rows_of(case)


@pytest.fixture(scope="session")
def rows_of(machine: Any) -> Any:
    """case -> (rows, times) by method; checked and measured once, when the first of its methods is
    asked for.
    """
    done: dict[str, Any] = {}

    def run(case: Case) -> Any:
        if case.name not in done:
            # one case's models at a time
            done.clear()
            try:
                done[case.name] = run_case(case, *machine)
            except Exception as error:
                done[case.name] = error
        if isinstance(done[case.name], Exception):
            raise done[case.name]
        return done[case.name]

    return run


def run_case(
    case: Case, device: str, place: dict[str, Any], roofs: dict[str, float]
) -> Any:
    """(rows, times) of a case by method. The check comes first: if it is red nothing is timed."""
    part = importlib.import_module(f"benchmarks.speed.{case.part}")
    contestants = part.contestants(case, device)
    part.check(case, device, contestants)
    # a model's check has made two steps
    warmup = 0 if case.part == "models" else 1
    times = measure(
        contestants,
        device,
        case.seconds,
        case.min_rounds,
        case.max_rounds,
        case.part == "ops",
        warmup,
    )
    rows = {}
    for method in case.methods:
        peak = peak_memory(contestants[method.name], device) if case.memory else None
        rows[method.name] = row_of(
            case, method, contestants[method.name], times, peak, place, roofs
        )
    return rows, times
