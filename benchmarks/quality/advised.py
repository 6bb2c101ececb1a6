"""Is what `slicefine advise` recommends better than the default? Three tasks, three seeds, one
recipe; the answer as it comes out.

    python -m benchmarks.quality.advised --out benchmarks/results/advised.json

Per task: advice from the training rows alone (seed 0), then three arms with seeds 0, 1, 2: the
default `SliceConfig()` at `slicefine train`'s default learning rate, the same at the advised
learning rate, and the advised configuration at the advised learning rate. The third against the
first is what a user gets, the third against the second what the slices' part of the advice is
worth.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.text_tasks import NAMES, encoder, rows_of, train_once
from benchmarks.record import where
from slicefine import SliceConfig
from slicefine.cli.diagnose import write_json

# of slicefine train
DEFAULT_LR = 1e-3


def advised(
    rows: list[dict[str, str]], given: argparse.Namespace, max_length: int
) -> dict[str, Any]:
    """The advice from these rows alone, as `slicefine advise` gives it."""
    from slicefine.cli.advise import advice_for
    from slicefine.cli.diagnose import load_subject
    from slicefine.training.tasks import Columns

    path = given.folder / f"advised-{len(rows)}-{zlib.crc32(rows[0]['text'].encode())}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    subject = load_subject(
        encoder(),
        str(path),
        None,
        Columns("text", "label", "image"),
        96,
        max_length,
        0,
        "cpu",
    )
    return advice_for(
        subject,
        "MiniLM",
        r=16,
        epochs=given.epochs,
        batch_size=32,
        max_length=max_length,
        trial_steps=given.trial_steps,
        held=given.held,
        bf16=True,
        seed=0,
        tried=0,
    )


def summary(task: dict[str, Any]) -> dict[str, Any]:
    """Mean accuracy and peak of each arm; whether the advised one is at least as accurate with no
    more memory.
    """
    arms = {}
    for name in ("default", "default, advised lr", "advised"):
        runs = [run for run in task["runs"] if run["arm"] == name]
        if not runs:
            continue
        arms[name] = {
            "mean": sum(run["accuracy"] for run in runs) / len(runs),
            "accuracies": [round(run["accuracy"], 2) for run in runs],
            "peak_bytes": max(run["peak_bytes"] for run in runs),
            "trainable": runs[0]["trainable"],
        }
    first, last = arms["default"], arms["advised"]
    return {
        **arms,
        "as_accurate": last["mean"] >= first["mean"],
        "no_more_memory": last["peak_bytes"] <= first["peak_bytes"],
    }


def arms_of(advice: dict[str, Any]) -> dict[str, tuple[SliceConfig, float]]:
    """arm -> (slices, learning rate)."""
    config = SliceConfig.from_dict(advice["config"])
    return {
        "default": (SliceConfig(), DEFAULT_LR),
        "default, advised lr": (SliceConfig(), advice["lr"]),
        "advised": (config, advice["lr"]),
    }


def advance(found: dict[str, Any], name: str, given: argparse.Namespace) -> bool:
    """Do the next piece of a task, the advice or one training; returns whether there was any left."""
    train, test = rows_of(name, given.folder)
    train, test = train[: given.train], test[: given.test]
    task = found["tasks"].setdefault(name, {"runs": []})
    if "advice" not in task:
        start = time.perf_counter()
        advice = advised(train, given, 64)
        advice.pop("survey")
        task["advice_settings"] = {"trial_steps": given.trial_steps, "held": given.held}
        task.update(advice=advice, advice_seconds=time.perf_counter() - start)
        return True
    arms, done = (
        arms_of(task["advice"]),
        {(run["seed"], run["arm"]) for run in task["runs"]},
    )
    # says where a difference comes from; last, for a run that is cut short
    middle = "default, advised lr"
    order = [(seed, arm) for seed in range(given.seeds) for arm in arms if arm != middle]
    order += [(seed, middle) for seed in range(given.seeds)]
    missing = [pair for pair in order if pair not in done]
    if missing:
        seed, arm = missing[0]
        slices, lr = arms[arm]
        task["runs"].append(
            {
                "arm": arm,
                "seed": seed,
                "lr": lr,
                **train_once(train, test, slices, lr, seed, given.epochs),
            }
        )
        print(name, task["runs"][-1], flush=True)
    if len(missing) <= 1 or missing[0] == order[-given.seeds - 1]:
        task["summary"] = summary(task)
        print(name, json.dumps(task["summary"]), flush=True)
    return bool(missing)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--tasks", nargs="+", default=list(NAMES))
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trial-steps", type=int, default=40, help="of the advice")
    parser.add_argument("--held", type=int, default=256, help="of the advice")
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    parser.add_argument(
        "--out", type=Path, required=True, help="goes on where this file ends"
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="one piece of work, then exit with 0 if there was any, else 3",
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = {k: getattr(given, k) for k in ("train", "test", "epochs", "seeds")}
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
            write_json(found, given.out)
            if given.once:
                return
    write_json(found, given.out)
    if given.once:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
