"""Do positions chosen by a score beat an order that knows nothing? Accuracy and training loss of
the switch modes, seed by seed.

    python -m benchmarks.quality.switch_modes --out benchmarks/results/switch-modes.json

gradient: the position with the largest Frobenius norm of the slice's gradient in the step before
the move. magnitude: the largest norm of its weights. Both visit each position once a sweep, as
random and ascending do. Everything else is equal: rows, batches, head, learning rate, interval. The
first position is the same for all.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.text_tasks import rows_of, train_once
from benchmarks.record import where
from slicefine import SliceConfig

MODES = ("random", "ascending", "gradient", "magnitude")


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Against random, over seeds: mean difference of accuracy and its standard error; "beats" needs
    more than two of them."""
    by = {(run["mode"], run["seed"]): run["accuracy"] for run in runs}
    seeds = sorted({seed for _, seed in by})
    result = {}
    for mode in MODES:
        accuracies = [by[mode, seed] for seed in seeds]
        differences = [by[mode, seed] - by["random", seed] for seed in seeds]
        mean = sum(differences) / len(seeds)
        error = math.sqrt(
            sum((d - mean) ** 2 for d in differences) / max(1, len(seeds) - 1) / len(seeds)
        )
        result[mode] = {
            "mean": sum(accuracies) / len(seeds),
            "accuracies": [round(a, 2) for a in accuracies],
            "against_random": mean,
            "standard_error": error,
            "beats_random": mode != "random" and mean > 2 * error,
        }
    return result


def advance(found: dict[str, Any], name: str, given: argparse.Namespace) -> bool:
    """Do the next training of a task; returns whether there was one left."""
    task = found["tasks"].setdefault(name, {"runs": []})
    done = {(run["seed"], run["mode"]) for run in task["runs"]}
    missing = [
        (seed, mode)
        for seed in range(given.seeds)
        for mode in MODES
        if (seed, mode) not in done
    ]
    if missing:
        seed, mode = missing[0]
        train, test = rows_of(name, given.folder)
        config = SliceConfig(switch_mode=mode, switch_interval=given.interval)
        row = train_once(
            train[: given.train], test[: given.test], config, given.lr, seed, given.epochs
        )
        task["runs"].append({"mode": mode, "seed": seed, **row})
        print(name, task["runs"][-1], flush=True)
    if len(missing) <= 1 and "summary" not in task:
        task["summary"] = compare(task["runs"])
        print(name, json.dumps(task["summary"]), flush=True)
    return bool(missing)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--tasks", nargs="+", default=["movie", "r52"])
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--test", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--interval", type=int, default=15)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    parser.add_argument(
        "--out", type=Path, required=True, help="goes on where this file ends"
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="one training, then exit with 0 if there was any, else 3",
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        k: getattr(given, k) for k in ("train", "test", "epochs", "interval", "lr", "seeds")
    }
    found = (
        json.loads(given.out.read_text())
        if given.out.exists()
        else {"where": where("cpu"), "settings": settings, "tasks": {}}
    )
    if found["settings"] != settings:
        raise SystemExit(
            f"{given.out} was made with {found['settings']}, not {settings}: choose another file"
        )
    for name in given.tasks:
        while advance(found, name, given):
            given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            if given.once:
                return
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.once:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
