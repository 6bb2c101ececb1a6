"""Rows of text, labels, images or chats from files, folders and the hub, checked before any model
is loaded.

Text formats are read here, strictly, and not by pandas as in ``datasets``, which turns a text like
"NA" into no text and does not mind a row of the wrong length.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FORMATS = ".csv, .tsv, .jsonl, .json, .txt (each also as .gz), .parquet or .arrow"
_TRAIN, _HELD = ("train",), ("test", "valid", "val", "dev", "eval")


class UserError(Exception):
    """Something the user can mend; the command prints it without a traceback and exits with 2."""


def read_rows(data: str, columns: list[str], what: str = "--data") -> list[Row]:
    """All rows, each with at least the given columns, none of them empty.

    Args:
        data: a file (csv, tsv, jsonl, json, txt with a text a line, parquet, arrow), a folder of such files, of images or
            of ``datasets.save_to_disk``, or a data set of the hub: ``id``, ``id@config``,
            ``id:split``.
        columns: that every row must have.
        what: the option that named the data, for messages.

    Returns:
        The rows in the order of the data.

    Raises:
        UserError: naming the file, the row and what was expected.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        rows = _read_folder(path, what)
    elif path.exists() or _kind(path) is not None or _looks_like_a_path(data):
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
                raise UserError(
                    f"{what} {data}: row {number} has no value in column {column!r}"
                )
    return rows


def _looks_like_a_path(data: str) -> bool:
    return data.startswith((".", "/", "~")) or "\\" in data


# Files


def _kind(path: Path) -> str | None:
    """The reader of a file by its name; None for a name that says nothing."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def _read_file(path: Path, what: str) -> list[Row]:
    place = f"{what} {path}"
    if not path.is_file():
        raise UserError(f"{place}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{place}: the file is empty")
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{place}: expected a file that ends in {FORMATS}")
    return _READERS[kind](path, place)


def _text_of(path: Path, place: str) -> str:
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        # -sig: spreadsheets write a byte order mark, which would begin the first column's name
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text ({error})") from error
    except (OSError, EOFError) as error:
        raise UserError(f"{place}: cannot be read ({error})") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv refuses fields above 131,072 characters unless told; the limit is that of the process."""
    # a C long, which has 32 bits on Windows
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_csv(path: Path, place: str, delimiter: str = ",") -> list[Row]:
    # newline="": csv itself tells a line break within quotes from the end of a row
    text = io.StringIO(_text_of(path, place), newline="")
    # strict: else a quote that is never closed takes in all rows behind it, without a word
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    rows: list[Row] = []
    header: list[str] | None = None
    try:
        with _long_fields():
            for values in reader:
                if not values:
                    continue
                if header is None:
                    header = values
                    _check_header(header, place)
                    continue
                rows.append(_row_of(header, values, place, len(rows) + 1))
    except csv.Error as error:
        raise UserError(
            f"{place}, row {len(rows) + 1} (up to line {reader.line_num}): {error}. A quote is"
            " opened and not closed where it should be; quotes inside a quoted value are doubled"
        ) from error
    return rows


def _check_header(header: list[str], place: str) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(
            f"{place}: the header has {twice[0]!r} more than once; rename one of them"
        )


def _row_of(
    header: list[str],
    values: list[str],
    place: str,
    number: int,
) -> Row:
    if len(values) != len(header):
        raise UserError(
            f"{place}: row {number} has {len(values)} values for {len(header)} columns; a value"
            " with a comma, a quote or a line break in it must stand in quotes"
        )
    return dict(zip(header, values, strict=True))


def _read_tsv(path: Path, place: str) -> list[Row]:
    return _read_csv(path, place, "\t")


def _read_txt(path: Path, place: str) -> list[Row]:
    """A text a line."""
    lines = _text_of(path, place).split("\n")
    return [{"text": line.rstrip("\r")} for line in lines if line.strip()]


def _read_json(path: Path, place: str) -> list[Row]:
    """JSON Lines, or one array of objects."""
    text = _text_of(path, place)
    if text.lstrip().startswith("["):
        content = _parsed(text, place)
        return [_object(row, f"{place}, row {i}") for i, row in enumerate(content, 1)]
    rows = []
    # not splitlines(): a JSON string may hold U+2028 and others as they are
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{place}, line {number}"
            rows.append(_object(_parsed(line, where), where))
    return rows


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not JSON ({error}); expected one object per line, or one array of objects"
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} stands twice in one object")
        found[key] = value
    return found


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: a {type(row).__name__}; expected one object per line or entry"
        )
    return row


def _read_parquet(path: Path, place: str) -> list[Row]:
    datasets = _datasets(place)
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    try:
        # not load_dataset, whose cache may hold the rows of an earlier file of that name
        table = pyarrow.parquet.read_table(path)
        return list(datasets.Dataset(datasets.table.InMemoryTable(table)))
    except Exception as error:
        raise UserError(f"{place}: not readable as Parquet ({error})") from error


def _read_arrow(path: Path, place: str) -> list[Row]:
    datasets = _datasets(place)
    try:
        return list(datasets.Dataset.from_file(str(path)))
    except Exception as error:
        raise UserError(f"{place}: not readable as an Arrow stream ({error})") from error


_READERS: dict[str, Callable[[Path, str], list[Row]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_txt,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


# Folders and the hub


def _datasets(place: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{place}: no such file here, or one that needs pip install datasets"
        ) from (error)
    return datasets


def _read_folder(path: Path, what: str) -> list[Row]:
    """A folder of save_to_disk, of data files in one format, or of images in folders by label."""
    place = f"{what} {path}"
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _read_saved(path, place)
    files = sorted(f for f in path.rglob("*") if f.is_file() and _kind(f) is not None)
    if any(f.name.startswith("metadata.") for f in files) or not files:
        return _read_images(path, place)
    chosen = _training_files(files, path, place)
    kinds = sorted({str(_kind(f)) for f in chosen})
    if len(kinds) > 1:
        raise UserError(
            f"{place}: files of several formats ({', '.join(kinds)}); name one file"
        )
    return [row for file in chosen for row in _read_file(file, what)]


def _training_files(files: list[Path], folder: Path, place: str) -> list[Path]:
    """Those that are not of another split by their names."""
    words = {
        f: set(re.split(r"[^a-z]+", str(f.relative_to(folder)).lower())) for f in files
    }
    training = [f for f in files if words[f].intersection(_TRAIN)]
    if training:
        return training
    held = [f for f in files if words[f].intersection(_HELD)]
    if held and len(held) < len(files):
        raise UserError(
            f"{place}: {held[0].name} seems to be there for an evaluation; name the file to train"
            " on, and the other one with --eval-data"
        )
    return files


def _read_saved(path: Path, place: str) -> list[Row]:
    datasets = _datasets(place)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{place}: not readable as a saved data set ({error})") from error
    return list(_split_of(loaded, "train", place))


def _split_of(loaded: Any, split: str, place: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split in loaded:
        return loaded[split]
    raise UserError(f"{place}: no split {split!r}; it has {', '.join(map(repr, loaded))}")


def _read_images(path: Path, place: str) -> list[Row]:
    datasets = _datasets(place)
    try:
        loaded = datasets.load_dataset("imagefolder", data_dir=str(path))
    except Exception as error:
        raise UserError(
            f"{place}: no file in it that ends in {FORMATS}, and no folder of images by label"
            f" ({type(error).__name__}: {error})"
        ) from error
    return list(_split_of(loaded, "train", place))


_HUB = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<config>[\w.-]+))?(:(?P<split>[^:]+))?")


def _read_hub(name: str, what: str) -> list[Row]:
    place = f"{what} {name}"
    parts = _HUB.fullmatch(name)
    if parts is None:
        raise UserError(
            f"{place}: no such file, and no hub data set as id, id@config or id:split"
        )
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{place}: no such file; to read it from the hub, pip install datasets"
        ) from error
    options: Any = {"name": parts["config"]} if parts["config"] else {}
    try:
        split = parts["split"] or "train"
        return list(datasets.load_dataset(parts["id"], split=split, **options))
    except Exception as error:
        raise UserError(
            f"{place}: neither a file here nor a data set that could be loaded"
            f" ({type(error).__name__}: {error})"
        ) from error


# Values


def text_in(row: Row, column: str, where: str) -> str:
    """The text in a column. Raises UserError for anything that is no string."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    raise UserError(
        f"{where}: column {column!r} holds {_described(value)}, expected a text. Numbers and lists"
        " are not turned into text here; write them as you want them read"
    )


def check_texts(rows: list[Row], column: str, what: str = "--data") -> None:
    """Raise UserError for the first row whose column holds no string, or an empty one."""
    for number, row in enumerate(rows, 1):
        if not text_in(row, column, f"{what}: row {number}").strip():
            raise UserError(f"{what}: row {number} has no value in column {column!r}")


def _described(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def label_name(value: Any, where: str = "") -> str:
    """The name of a class: a text as it is, a whole number or a truth value as text.

    Raises:
        UserError: for anything else: no label, NaN, numbers with a point, lists.
    """
    if isinstance(value, bool | str | int):
        if isinstance(value, int) and not isinstance(value, bool) and value < 0:
            raise UserError(
                f"{where}label {value}: data sets mark rows without a label so; leave them out"
            )
        return str(value)
    kind = "not a number (NaN)" if isinstance(value, float) and math.isnan(value) else None
    raise UserError(
        f"{where}the label is {kind or _described(value)}; expected a text or a whole number"
    )


def labels_of(rows: list[Row], column: str) -> list[str]:
    """The distinct labels, at least two: whole numbers in their order, other names sorted.

    Raises:
        UserError: naming the row, for labels of several kinds, or that differ in blanks only.
    """
    first: dict[str, int] = {}
    kind_of_first: type | None = None
    for number, row in enumerate(rows, 1):
        name = label_name(row[column], f"row {number}, column {column!r}: ")
        kind = type(row[column])
        kind_of_first = kind_of_first or kind
        if kind is not kind_of_first:
            raise UserError(
                f"row {number}, column {column!r}: the label is {_described(row[column])}, and"
                f" {_described(rows[0][column])} in row 1; write all labels in one way"
            )
        first.setdefault(name, number)
    _refuse_blanks(first, column)
    if len(first) < 2:
        raise UserError(
            f"column {column!r} has one value only ({next(iter(first))!r}); a classification needs"
            " at least two labels"
        )
    if all(re.fullmatch(r"0|[1-9]\d*", name) for name in first):
        # as texts, 10 would stand before 2
        return sorted(first, key=int)
    return sorted(first)


def _refuse_blanks(first: dict[str, int], column: str) -> None:
    seen: dict[str, str] = {}
    for name, number in first.items():
        other = seen.setdefault(name.strip(), name)
        if other != name:
            raise UserError(
                f"column {column!r}: the labels {other!r} (row {first[other]}) and {name!r} (row"
                f" {number}) differ in blanks only; make them one"
            )


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
