"""What `patch`, `continual` and `capacity` share: models, samples and reports from the command
line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from slicefine.capacity.samples import Samples, joined
from slicefine.training.arguments import device_of as device_of
from slicefine.training.data import Row, UserError, read_rows
from slicefine.training.tasks import TASKS, Columns, ImageClassification, Task

CLASSIFICATION = ("text-classification", "image-classification")


def new_task(name: str, columns: Columns, max_length: int, beside: str) -> Task:
    """A classification task of `slicefine train`; images are found beside the data file."""
    if name not in CLASSIFICATION:
        raise UserError(f"--task {name}: expected one of {', '.join(CLASSIFICATION)}")
    task: Task = TASKS[name](columns, max_length)
    if isinstance(task, ImageClassification):
        task.folder = Path(beside).parent
    return task


def read(path: str, task: Task, what: str, labeled: bool = True) -> list[Row]:
    """Rows with the columns that the task needs; without labels only its input is needed."""
    columns = task.required() if labeled else task.required()[:1]
    return read_rows(path, columns, what)


def encode(task: Task, rows: list[Row]) -> Samples:
    """All rows as one `Samples`; texts are padded on the right to the longest of them, which
    batches cut off again.
    """
    size = 512
    if (tokenizer := getattr(task, "tokenizer", None)) is not None:
        # Texts in one batch: parts padded each to its own longest could not be joined.
        tokenizer.padding_side, size = "right", len(rows)
    parts = []
    for start in range(0, len(rows), size):
        batch = task.batch(rows[start : start + size])
        labels = batch.pop("labels")
        parts.append(
            Samples(
                batch["pixel_values"] if set(batch) == {"pixel_values"} else batch, labels
            )
        )
    return joined(parts)


def trained_classifier(task: Task, model: str) -> nn.Module:
    """A classifier with the head and the label names that it was trained with."""
    from transformers import AutoConfig

    path = Path(model).expanduser()
    try:
        names: Any = AutoConfig.from_pretrained(
            str(path) if path.exists() else model
        ).id2label
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: no configuration there: {error}") from error
    task.labels = [names[i] for i in sorted(names)]
    loaded, new = task.load_trained(model)
    if new:
        raise UserError(
            f"--model {model}: {', '.join(new)} {'is' if len(new) == 1 else 'are'} newly"
            " initialized, so it is no trained classifier; train one with `slicefine train`"
        )
    return loaded.eval()


def unlabeled(task: Task, rows: list[Row]) -> Samples:
    """Inputs of rows whose labels do not matter."""
    return encode(task, [{**row, task.columns.label: task.labels[0]} for row in rows])


def write_json(path: Path, content: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--json {path}: cannot write there ({error.strerror or error})"
        ) from error
