"""Is what `slicefine advise` recommends better than the default? Three tasks, three seeds, one recipe; the answer as it comes out.

    python -m benchmarks.advised --out benchmarks/results/advised.json

Per task: advice from the training rows alone (seed 0), then three arms with seeds 0, 1, 2: the default `SliceConfig()` at `slicefine train`'s default learning rate, the same at the advised learning rate, and the
advised configuration at the advised learning rate. The third against the first is what a user gets, the third against the second what the slices' part of the advice is worth.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import where
from benchmarks.text_tasks import NAMES, encoder, rows_of, train_once
from slicefine import SliceConfig

DEFAULT_LR = 1e-3  # of slicefine train


def advised(rows: list[dict[str, str]], folder: Path, epochs: int, max_length: int) -> dict[str, Any]:
    """The advice from these rows alone, as `slicefine advise` gives it."""
    from slicefine.cli.advise import advice_for
    from slicefine.cli.diagnose import load_subject
    from slicefine.cli.tasks import Columns

    path = folder / "advised-train.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    subject = load_subject(encoder(), str(path), None, Columns("text", "label", "image"), 96, max_length, 0, "cpu")
    return advice_for(
        subject, "MiniLM", r=16, epochs=epochs, batch_size=32, max_length=max_length, trial_steps=40, held=256, bf16=True, seed=0
    )  # fmt: skip


def summary(task: dict[str, Any]) -> dict[str, Any]:
    """Mean accuracy and peak of each arm; whether the advised one is at least as accurate with no more memory."""
    arms = {}
    for name in ("default", "default, advised lr", "advised"):
        runs = [run for run in task["runs"] if run["arm"] == name]
        arms[name] = {
            "mean": sum(run["accuracy"] for run in runs) / len(runs), "accuracies": [round(run["accuracy"], 2) for run in runs],
            "peak_bytes": max(run["peak_bytes"] for run in runs), "trainable": runs[0]["trainable"],
        }  # fmt: skip
    first, last = arms["default"], arms["advised"]
    return {
        **arms,
        "as_accurate": last["mean"] >= first["mean"],
        "no_more_memory": last["peak_bytes"] <= first["peak_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="+", default=list(NAMES))
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--test", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "where": where("cpu"),
        "settings": {k: v for k, v in vars(given).items() if k not in ("out", "folder")},
        "tasks": {},
    }
    for name in given.tasks:
        train, test = rows_of(name, given.folder)
        train, test = train[: given.train], test[: given.test]
        start = time.perf_counter()
        advice = advised(train, given.folder, given.epochs, 64)
        seconds = time.perf_counter() - start
        advice.pop("survey")
        task: dict[str, Any] = {"advice": advice, "advice_seconds": seconds, "runs": []}
        config = SliceConfig.from_dict(advice["config"])
        arms = {
            "default": (SliceConfig(), DEFAULT_LR),
            "default, advised lr": (SliceConfig(), advice["lr"]),
            "advised": (config, advice["lr"]),
        }
        for seed in range(given.seeds):
            for arm, (slices, lr) in arms.items():
                task["runs"].append(
                    {"arm": arm, "seed": seed, "lr": lr, **train_once(train, test, slices, lr, seed, given.epochs)}
                )
                print(name, task["runs"][-1], flush=True)
        found["tasks"][name] = {**task, "summary": summary(task)}
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(found["tasks"][name]["summary"]), flush=True)


if __name__ == "__main__":
    main()
