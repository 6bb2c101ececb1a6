"""The evaluation of a fine-tune: measured, recorded in its delta, and measured again from the
record.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicefine.deltas.delta import Delta
from slicefine.training.data import Row, UserError, chunks, read_rows, split_rows
from slicefine.training.tasks import TASKS, CausalLM, Columns, ImageClassification, Task


@dataclass
class Evaluation:
    """What was measured on which rows, and all that is needed to do it again.

    data: file or hub data set; data_sha256: of its content. images: folder that its image paths
        start from. share: part of its rows
    that was held out by ``seed``; None: all rows.
    """

    task: str
    metric: str
    value: float
    rows: int
    model: str
    data: str
    data_sha256: str
    images: str | None
    share: float | None
    seed: int
    labels: list[str]
    columns: dict[str, str]
    max_length: int
    batch_size: int
    bf16: bool
    # since 0.2: how rows of a language model are read, and what the weights are
    dtype: str = "float32"
    form: str | None = None
    answers_only: bool = True
    chat_template: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, delta: Delta) -> Evaluation:
        """The evaluation recorded in a delta. Raises UserError if there is none that this slicefine
        can read.
        """
        content = delta.info.get("evaluation")
        if not isinstance(content, dict):
            raise UserError(
                "the delta has no evaluation to repeat; `slicefine train` records one where it has"
                " rows to evaluate on (--eval-data or --eval-share)"
            )
        wanted = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not needed <= content.keys() <= wanted or str(content["task"]) not in TASKS:
            raise UserError(
                f"the delta's evaluation has {sorted(content)}, of task {content.get('task')!r};"
                f" this slicefine repeats evaluations with {sorted(wanted)} of {', '.join(TASKS)}"
            )
        if wrong := [name for name, value in content.items() if not _FORMS[name](value)]:
            raise UserError(
                f"the delta's evaluation has {wrong[0]} {content[wrong[0]]!r}, which `slicefine"
                " train` does not write"
            )
        return cls(**content)

    def new_task(self) -> Task:
        """The task, as it read the rows."""
        task = TASKS[self.task](Columns(**self.columns), self.max_length)
        task.labels = self.labels
        if isinstance(task, CausalLM):
            task.form, task.answers_only = self.form, self.answers_only
            task.chat_template = self.chat_template
        return task


def _is(*kinds: type) -> Callable[[Any], bool]:
    # not isinstance, for which true is a whole number
    return lambda value: type(value) in kinds


def _words(value: Any) -> bool:
    return all(isinstance(word, str) for word in value)


_NONE = type(None)
_COLUMNS = {field.name for field in fields(Columns)}
# What a delta may say of its evaluation: its file is somebody else's
_FORMS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("task", "metric", "model", "data", "data_sha256"), _is(str)),
    **dict.fromkeys(("images", "form", "chat_template"), _is(str, _NONE)),
    **dict.fromkeys(("bf16", "answers_only"), _is(bool)),
    "value": lambda value: type(value) in (int, float) and math.isfinite(value),
    "rows": lambda value: type(value) is int and value > 0,
    "max_length": lambda value: type(value) is int and value > 0,
    "batch_size": lambda value: type(value) is int and value > 0,
    "seed": _is(int),
    "share": lambda value: value is None or (type(value) in (int, float) and 0 < value < 1),
    "labels": lambda value: isinstance(value, list) and _words(value),
    "columns": lambda value: (
        isinstance(value, dict) and value.keys() <= _COLUMNS and _words(value.values())
    ),
    "dtype": lambda value: value in ("float32", "bfloat16", "float16"),
}


def planned(
    task: Task,
    model: str,
    data: str,
    rows: list[Row],
    evaluated: list[Row],
    share: float | None,
    seed: int,
    batch_size: int,
    bf16: bool,
    dtype: str = "float32",
) -> Evaluation:
    """An evaluation on ``evaluated``, all ``rows`` or the ``share`` of them that the seed holds
    out, before it is made.
    """
    language: dict[str, Any] = {}
    if isinstance(task, CausalLM):
        language = {
            "form": task.form,
            "answers_only": task.answers_only,
            "chat_template": task.chat_template,
        }
    name = next(name for name, kind in TASKS.items() if type(task) is kind)
    images = str(task.folder) if isinstance(task, ImageClassification) else None
    return Evaluation(
        name,
        task.metric,
        math.nan,
        len(evaluated),
        model,
        data,
        data_sha256(data, rows, evaluated, task),
        images,
        share,
        seed,
        task.labels,
        asdict(task.columns),
        task.max_length,
        batch_size,
        bf16,
        dtype,
        **language,
    )


def measure(
    model: nn.Module,
    task: Task,
    rows: list[Row],
    batch_size: int,
    bf16: bool,
    device: torch.device,
) -> float:
    """The task's metric. Rows are sorted by length, so the same rows make the same batches."""
    autocast: Callable[[], Any] = lambda: (
        torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
    )
    return task.evaluate(
        model, chunks(sorted(rows, key=task.length), batch_size), autocast, device
    )


def file_sha256(data: str, rows: list[Row]) -> str:
    """SHA-256 of a data file, as sha256sum gives it; of all its rows as JSON for a folder or a hub
    data set.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return rows_sha256(rows)


def rows_sha256(rows: list[Row]) -> str:
    """SHA-256 of rows as JSON, images by their pixels."""
    digest = hashlib.sha256()
    for row in rows:
        # sort_keys: two readers may give the columns of a row in different orders
        digest.update(json.dumps(row, default=_as_text, sort_keys=True).encode())
    return digest.hexdigest()


def _as_text(value: Any) -> str:
    # an image's own text has its address in memory
    return (
        hashlib.sha256(value.tobytes()).hexdigest()
        if hasattr(value, "tobytes")
        else str(value)
    )


def data_sha256(
    data: str,
    rows: list[Row],
    evaluated: list[Row],
    task: Task,
) -> str:
    """`file_sha256`; for images the SHA-256 of it with the bytes of the evaluated images behind it."""
    own = file_sha256(data, rows)
    if not isinstance(task, ImageClassification):
        return own
    digest = hashlib.sha256(own.encode())
    for row in evaluated:
        image = row[task.columns.image]
        if isinstance(image, str):
            digest.update((task.folder / image).read_bytes())
    return digest.hexdigest()


def repeat(
    delta: Delta, model: str | None, data: str | None, device: torch.device
) -> tuple[Evaluation, float]:
    """Load the base model, apply the delta, evaluate on the recorded rows; returns (the record, the
    value measured now).

    model, data: where they are now, if not where they were. Raises UserError for data that are not
        those recorded, DeltaError for
    another base model.
    """
    recorded = Evaluation.of(delta)
    task = recorded.new_task()
    source = data or recorded.data
    if isinstance(task, ImageClassification):
        task.folder = (
            Path(source).parent
            if data or recorded.images is None
            else Path(recorded.images)
        )
    rows = read_rows(source, task.required())
    evaluated = (
        rows
        if recorded.share is None
        else split_rows(rows, recorded.share, recorded.seed)[1]
    )
    if (found := data_sha256(source, rows, evaluated, task)) != recorded.data_sha256:
        raise UserError(
            f"--data {source} has SHA-256 {found}; the evaluation was on {recorded.data} with"
            f" {recorded.data_sha256}. Give the same data"
        )
    # the record's numbering stays, whatever the base model calls its own classes
    loaded, _ = task.load(model or recorded.model, getattr(torch, recorded.dtype))
    task.labels = recorded.labels
    delta.apply_to(loaded)
    value = measure(
        loaded.to(device), task, evaluated, recorded.batch_size, recorded.bf16, device
    )
    return recorded, value
