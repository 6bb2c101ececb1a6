"""Do positions chosen by a score beat an order that knows nothing? Accuracy and training loss of the switch modes, seed by seed.

    python -m benchmarks.switch_modes --out benchmarks/results/switch-modes.json

gradient: the position with the largest Frobenius norm of the slice's gradient in the step before the move. magnitude: the largest norm of its weights. Both visit each position once a sweep, as random and ascending do.
Everything else is equal: rows, batches, head, learning rate, interval. The first position is the same for all.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import where
from benchmarks.text_tasks import rows_of, train_once
from slicefine import SliceConfig

MODES = ("random", "ascending", "gradient", "magnitude")


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Against random, over seeds: mean difference of accuracy and its standard error; "beats" needs more than two of them."""
    by = {(run["mode"], run["seed"]): run["accuracy"] for run in runs}
    seeds = sorted({seed for _, seed in by})
    result = {}
    for mode in MODES:
        accuracies = [by[mode, seed] for seed in seeds]
        differences = [by[mode, seed] - by["random", seed] for seed in seeds]
        mean = sum(differences) / len(seeds)
        error = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(1, len(seeds) - 1) / len(seeds))
        result[mode] = {
            "mean": sum(accuracies) / len(seeds), "accuracies": [round(a, 2) for a in accuracies], "against_random": mean, "standard_error": error,
            "beats_random": mode != "random" and mean > 2 * error,
        }  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", nargs="+", default=["movie", "r52"])
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--test", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--interval", type=int, default=15)
    parser.add_argument("--lr", type=float, default=2e-3)
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
        runs = []
        for seed in range(given.seeds):
            for mode in MODES:
                config = SliceConfig(switch_mode=mode, switch_interval=given.interval)
                row = train_once(train[: given.train], test[: given.test], config, given.lr, seed, given.epochs)
                runs.append({"mode": mode, "seed": seed, **row})
                print(name, runs[-1], flush=True)
        found["tasks"][name] = {"runs": runs, "summary": compare(runs)}
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(found["tasks"][name]["summary"]), flush=True)


if __name__ == "__main__":
    main()
