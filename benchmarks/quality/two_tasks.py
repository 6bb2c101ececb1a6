"""Two real text tasks on one real encoder, one after the other; and a hot-fix of the classifier
that the first one makes.

python -m benchmarks.quality.two_tasks --json FILE        # slicefine continual on MiniLM: movie sentiment,
then authors of tweets
python -m benchmarks.quality.two_tasks --patch --json FILE  # slicefine train on movie sentiment, then
slicefine patch in four ways
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from benchmarks.quality.text_tasks import encoder, rows_of
from benchmarks.record import where
from slicefine.cli.app import app

TRAIN, TEST, KEEP, EDITS = 1_000, 1_000, 400, 8


def write_csv(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def verb(*arguments: object) -> str:
    """Run a verb of the command line in this process; its output, or the error that stopped it."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exit_code:
        raise RuntimeError(result.output) from result.exception
    print(result.output)
    return result.output


def continual(folder: Path) -> dict[str, Any]:
    """Modes attach and same, joint training and each task alone; r = 16, two epochs of 1,000
    sentences, 1,000 to test.
    """
    files = {}
    for name in ("movie", "tweets"):
        train, test = rows_of(name, folder)
        files[name] = (
            write_csv(folder / f"{name}.csv", train[:TRAIN]),
            write_csv(folder / f"{name}-test.csv", test[:TEST]),
        )
    out = folder / "two-tasks.json"
    verb(
        "continual",
        "--model",
        encoder(),
        "--tasks",
        ",".join(f[0] for f in files.values()),
        "--eval-tasks",
        ",".join(f[1] for f in files.values()),
        "--sweep",
        "rank=16",
        "--modes",
        "attach,same",
        "--epochs",
        2,
        "--lr",
        3e-3,
        "--scattered",
        "--max-length",
        64,
        "--alone",
        "--json",
        out,
        "--report",
        folder / "two-tasks.html",
        "--output",
        folder / "task-deltas",
    )
    return json.loads(out.read_text())


def patches(folder: Path) -> dict[str, Any]:
    """Eight of the classifier's wrong test answers are corrected, 400 others kept, 592 more
    watched.
    """
    train, test = rows_of("movie", folder)
    test, model = test[:TEST], folder / "movie-classifier"
    if not (model / "config.json").is_file():
        data = write_csv(folder / "movie.csv", train[:TRAIN])
        verb(
            "train",
            "--model",
            encoder(),
            "--data",
            data,
            "--task",
            "text-classification",
            "--output",
            model,
            "--epochs",
            2,
            "--eval-share",
            0,
            "--max-length",
            64,
            "--lr",
            2e-3,
        )
    wrong = wrong_answers(str(model), test)
    edits, rest = (
        [test[i] for i in wrong[:EDITS]],
        [row for i, row in enumerate(test) if i not in set(wrong[:EDITS])],
    )
    common = [
        "--edits",
        write_csv(folder / "edits.csv", edits),
        "--keep",
        write_csv(folder / "keep.csv", rest[:KEEP]),
        "--held-out",
        write_csv(folder / "held-out.csv", rest[KEEP:]),
        "--model",
        model,
        "--max-length",
        64,
    ]
    rows = {}
    ways = {
        "exact side": ("--mode", "exact"),
        "exact side, 3 layers": ("--mode", "exact", "--layers", 3),
        "trained side": ("--mode", "train", "--method", "side", "--steps", 2000),
        "trained slice": (
            "--mode",
            "train",
            "--method",
            "slice",
            "--size",
            16,
            "--steps",
            60,
        ),
        "trained LoRA": ("--mode", "train", "--method", "lora", "--steps", 60),
    }
    for name, options in ways.items():
        start = time.perf_counter()
        verb(
            "patch",
            *common,
            *options,
            "--json",
            folder / "patch.json",
            "--output",
            folder / f"patch {name}",
        )
        rows[name] = {
            **json.loads((folder / "patch.json").read_text()),
            "seconds": time.perf_counter() - start,
        }
        rows[name].pop("base")
    return {"classifier wrong of 1000": len(wrong), "patches": rows}


def wrong_answers(model: str, rows: list[dict[str, str]]) -> list[int]:
    from slicefine.capacity.samples import predict
    from slicefine.cli.studying import encode, new_task, trained_classifier
    from slicefine.training.tasks import Columns

    task = new_task("text-classification", Columns("text", "label", "image"), 64, "")
    classifier = trained_classifier(task, model)
    samples = encode(task, rows)
    return (
        (predict(classifier, samples.inputs).argmax(1) != samples.labels)
        .nonzero()
        .flatten()
        .tolist()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patch", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("demo"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(exist_ok=True)
    content = (patches if arguments.patch else continual)(arguments.folder)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(
        json.dumps({"where": where("cpu"), **content}, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
