"""`make quality`: are the library's defaults as good as LoRA at its best, and as full fine-tuning?

    python -m benchmarks.quality [--tasks ...] [--once]

Small pieces, one after another: a piece that is in benchmarks/results/quality/ is not run again, so
the command may be stopped at any moment and started again. Learning rates are chosen on the
validation part with seed 0; the test part is scored for three seeds afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.quality import corpora
from benchmarks.quality.in_turns import TextTask, Way, train_in_turns
from benchmarks.quality.sentiment import data_folder
from slicefine.atomic import write_text
from slicefine.groups import LR

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quality"
# one rate more where the best is the last; full fine-tuning's is a tenth of LoRA's
RATES = {"lora": (5e-4, 1e-3, 2e-3)}
FULL_LR = 1e-4
TASKS = ("movie", "brown", "tweets", "amazon", "movie5", "spam")
TRAIN, VALIDATION, TEST, EPOCHS, SEEDS = 800, 1_000, 1_500, 4, (0, 1, 2)
Row = dict[str, Any]
# (task, ways in turns, seed, part)
Piece = tuple[str, list[Way], int, str]

# each differs from the defaults in one thing
VARIANTS: list[dict[str, Any]] = [
    {"contiguous": True},
    {"r": 16},
    {"bias": "none", "norms": "none"},
    {"r": 32},
    {"r": 128},
    {"switch_interval": 25},
    {"switch_interval": None},
]


class Results:
    """The rows of all tasks, a file a task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, task: str) -> list[Row]:
        path = self.folder / f"{task}.json"
        return json.loads(path.read_text()) if path.exists() else []

    def add(self, task: str, rows: list[Row]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) for row in [*self.of(task), *rows]]
        write_text(self.folder / f"{task}.json", "[\n" + ",\n".join(lines) + "\n]\n")

    def find(self, task: str, way: Way, seed: int, part: str) -> Row | None:
        same = (
            row
            for row in self.of(task)
            if row["seed"] == seed and row["part"] == part and key_of(row) == way.key
        )
        return next(same, None)

    def best_rate(self, task: str, method: str, config: dict[str, Any]) -> float:
        """The rate with the highest validation accuracy, the lower loss where two are equal."""
        rows = [
            row
            for row in self.of(task)
            if row["part"] == "validation"
            and row["seed"] == 0
            and (row["method"], row["config"]) == (method, config)
        ]
        return max(rows, key=lambda row: (row["value"], -row["loss"]))["lr"]


def key_of(row: Row) -> tuple[str, str, float]:
    return Way(row["method"], row["lr"], row["config"]).key


def pieces(tasks: list[str], results: Results) -> Iterator[Piece]:
    """What is to be run, the most telling first: slices at the advised rate beside LoRA at the best
    of its grid, then full fine-tuning, then the other widths, positions and rates of slices.
    """
    for task in tasks:
        for lr in RATES["lora"]:
            yield task, [Way("slice", lr), Way("lora", lr)], 0, "validation"
        if results.best_rate(task, "lora", {}) == max(RATES["lora"]):
            yield task, [Way("lora", 2 * max(RATES["lora"]))], 0, "validation"
        for seed in SEEDS[:2]:
            yield task, _pair(task, results), seed, "test"
    for task in tasks:
        yield task, _pair(task, results), SEEDS[-1], "test"
    for seed in SEEDS:
        for task in tasks:
            yield task, [Way("full", FULL_LR)], seed, "test"
    for task in tasks:
        for config in VARIANTS:
            yield task, [Way("slice", LR, config)], 0, "validation"


def _pair(task: str, results: Results) -> list[Way]:
    return [Way("slice", LR), Way("lora", results.best_rate(task, "lora", {}))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=corpora.NAMES, default=TASKS)
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results, loaded = Results(given.out), {}
    for name, ways, seed, part in pieces(given.tasks, results):
        missing = [way for way in ways if results.find(name, way, seed, part) is None]
        if not missing:
            continue
        if name not in loaded:
            corpus = corpora.load(name, given.data, TRAIN, VALIDATION, TEST)
            loaded[name] = TextTask(name, corpus)
        rows = train_in_turns(loaded[name], missing, seed, part, EPOCHS)
        results.add(name, rows)
        for row in rows:
            shown = (
                "task",
                "method",
                "config",
                "lr",
                "seed",
                "part",
                "value",
                "ms_per_step",
            )
            print(*(row[key] for key in shown), flush=True)


if __name__ == "__main__":
    main()
