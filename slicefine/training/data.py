"""Rows from a CSV, a JSON-lines file or a hub data set, checked before any model is loaded."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class UserError(Exception):
    """Something the user can mend; the command prints it without a traceback and exits with 2."""


def read_rows(data: str, columns: list[str], what: str = "--data") -> list[Row]:
    """All rows, each with at least the given columns, none of them empty.

    Raises UserError naming the file, the row and what was expected.
    """
    path = Path(data)
    if path.suffix.lower() in (".csv", ".jsonl", ".json") or path.exists():
        rows = _read_file(path, what)
    else:
        rows = _read_hub(data, what)
    if not rows:
        raise UserError(f"{what} {data}: no rows in it")
    for column in columns:
        if column not in rows[0]:
            raise UserError(
                f"{what} {data}: no column {column!r}; it has {', '.join(map(repr, rows[0]))}. Name"
                " another with --text-column, --label-column or --image-column"
            )
        for number, row in enumerate(rows, 1):
            if row.get(column) is None or row[column] == "":
                raise UserError(f"{what} {data}: row {number} has no value in column {column!r}")
    return rows


def _read_file(path: Path, what: str) -> list[Row]:
    if not path.is_file():
        raise UserError(f"{what} {path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{what} {path}: the file is empty")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path}: not UTF-8 text ({error})") from error
    if path.suffix.lower() == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if path.suffix.lower() in (".jsonl", ".json"):
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{what} {path}, line {number}: not JSON ({error}); expected one object per"
                    " line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"{what} {path}, line {number}: a {type(row).__name__}; expected one object per"
                    " line"
                )
            rows.append(row)
        return rows
    raise UserError(f"{what} {path}: expected a .csv or .jsonl file")


def _read_hub(name: str, what: str) -> list[Row]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{what} {name}: no such file; to read it from the hub, pip install datasets"
        ) from error
    try:
        return [dict(row) for row in datasets.load_dataset(name, split="train")]
    except Exception as error:
        raise UserError(
            f"{what} {name}: neither a file here nor a data set that could be loaded"
            f" ({type(error).__name__}: {error})"
        ) from error


def labels_of(rows: list[Row], column: str) -> list[str]:
    """The distinct labels, sorted; at least two."""
    labels = sorted({str(row[column]) for row in rows})
    if len(labels) < 2:
        raise UserError(
            f"column {column!r} has one value only ({labels[0]!r}); a classification needs at least"
            " two labels"
        )
    return labels


def split_rows(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, evaluation), shuffled by the seed."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held = round(share * len(rows))
    if share > 0 and not 1 <= held < len(rows):
        raise UserError(
            f"--eval-share {share} of {len(rows)} rows leaves {held} to evaluate and"
            f" {len(rows) - held} to train on; give --eval-data or more rows"
        )
    return [rows[i] for i in order[held:]], [rows[i] for i in order[:held]]


def chunks(rows: list[Row], size: int) -> list[list[Row]]:
    """The rows in lists of ``size``; the last one may be shorter."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]
