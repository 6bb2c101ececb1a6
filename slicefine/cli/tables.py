"""What `slicefine delta` prints: tables for people, JSON for programs."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from slicefine.deltas.delta import Delta
from slicefine.deltas.difference import Difference
from slicefine.deltas.lora import LoraAdapter
from slicefine.deltas.store import Entry


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def show(value: dict[str, Any], as_json: bool, line: str) -> None:
    """JSON, or one line in words."""
    if as_json:
        return print_json(value)
    typer.echo(line)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says about heads that a delta is about to fill in, and its progress
    bars.
    """
    import transformers

    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def entries(rows: list[Entry], head: str) -> None:
    show_table(
        [
            "delta",
            "SHA-256",
            "saved",
            "MiB",
            "base",
            "stage",
            "signed by",
            "last audit",
            "state",
        ],
        [
            [
                e.label,
                e.sha256[:12],
                e.time[:10],
                f"{e.nbytes / 2**20:.1f}",
                str(e.base or "unnamed"),
                " ".join(e.stages),
                " ".join(e.signed_by),
                _audit(e),
                f"revoked: {e.revoked}" if e.revoked else e.note or "",
            ]
            for e in rows
        ],
    )
    typer.echo(f"head of the log {head}")


def _audit(entry: Entry) -> str:
    if not entry.audits:
        return ""
    last = entry.audits[-1]
    return f"{last['metric']} {last['measured']:.4g} {'passed' if last['passed'] else 'FAILED'}"


def delta(content: Delta, entry: Entry | None, label: str, as_json: bool) -> None:
    weights = [
        {
            "key": key,
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "patches": [
                {
                    "rows": _count(p.rows),
                    "columns": _count(p.cols),
                    "entries": p.new.numel(),
                }
                for p in weight.patches
            ],
        }
        for key, weight in content.weights.items()
    ]
    base = {key: value for key, value in content.base.items() if key != "tensors"}
    value = {
        "label": label,
        "sha256": content.sha256,
        "nbytes": content.nbytes,
        "base": base,
        "config": content.config,
        "info": content.info,
        "weights": weights,
        "whole": sorted(content.whole),
        "store": asdict(entry) if entry else None,
    }
    if as_json:
        return print_json(value)
    state = (
        ""
        if entry is None
        else (
            f", revoked: {entry.revoked}"
            if entry.revoked
            else f", stages: {' '.join(entry.stages) or 'none'}"
        )
    )
    typer.echo(
        f"{label}, SHA-256 {content.sha256}, {content.nbytes / 2**20:.1f} MiB{state}"
    )
    typer.echo(
        f"base {base.get('model') or 'unnamed'} ({base.get('class')}), SHA-256 {base.get('sha256')}"
    )
    for key, item in sorted(content.info.items()):
        typer.echo(f"{key} {json.dumps(item)}")
    rows = [
        [
            w["key"],
            "x".join(map(str, w["shape"])),
            w["dtype"],
            "; ".join(_patch(p) for p in w["patches"]),
        ]
        for w in weights
    ]
    show_table(["weight", "shape", "dtype", "changed"], rows)
    if content.whole:
        typer.echo(f"fully trained: {', '.join(sorted(content.whole))}")


def _count(index: Any) -> int | None:
    return None if index is None else len(index)


def _patch(patch: dict[str, Any]) -> str:
    parts = [
        f"{patch[axis]} {axis}" for axis in ("rows", "columns") if patch[axis] is not None
    ]
    return " x ".join(parts)


def differences(
    rows: list[Difference], label: str, other: str, same_base: bool, as_json: bool
) -> None:
    shared, conflicts = sum(r.shared for r in rows), sum(r.conflicts for r in rows)
    if as_json:
        keys = [{**asdict(row)} for row in rows]
        return print_json(
            {"same_base": same_base, "shared": shared, "conflicts": conflicts, "keys": keys}
        )
    show_table(
        [
            "key",
            f"entries of {label}",
            f"entries of {other}",
            "shared",
            "differ",
            "largest difference",
        ],
        [
            [
                r.key,
                f"{r.entries:,d}",
                f"{r.other_entries:,d}",
                f"{r.shared:,d}",
                f"{r.conflicts:,d}",
                f"{r.largest:.3g}",
            ]
            for r in rows
        ],
    )
    bases = "the same base" if same_base else "DIFFERENT bases"
    order = (
        "can be applied in any order"
        if not shared
        else f"share {shared:,d} entries, {conflicts:,d} of them with different values"
    )
    typer.echo(f"{bases}; {order}")


def lineage(rows: list[dict[str, Any]], label: str, as_json: bool) -> None:
    if as_json:
        return print_json(rows)
    for row in rows:
        name = row["label"] or (label if row is rows[0] else "not in the store")
        parents = (
            ", ".join(sha[:12] for sha in row["parents"])
            or f"the base {str(row['base'])[:12]}"
        )
        typer.echo(f"{row['delta'][:12]} {name}, of {parents}")


def adapter(content: LoraAdapter, output: Path, as_json: bool) -> None:
    modules = [asdict(module) for module in content.modules]
    if as_json:
        return print_json(
            {
                "output": str(output),
                "r": content.config["r"],
                "error": content.error,
                "left_out": content.left_out,
                "modules": modules,
            }
        )
    rows = [
        [m.name, str(m.exact_rank), str(m.rank), f"{m.error:.2e}" if m.error else "exact"]
        for m in content.modules
    ]
    show_table(["weight", "features changed", "rank", "relative error"], rows)
    if content.left_out:
        typer.echo(f"left out: {', '.join(content.left_out)}")
    typer.echo(f"LoRA adapter of rank {content.config['r']}: {output}")


def show_table(
    columns: list[str],
    rows: list[list[str]],
    title: str | None = None,
    right: Collection[str] = (),
    lines: bool = False,
) -> None:
    """Print a table that fits the window; where it does not, one block of lines for each row.

    Nothing in it is taken for markup: notes, names and paths may hold brackets.

    Args:
        columns: headings; the first names the row.
        rows: cells, as text.
        title: a line above.
        right: headings of columns of numbers.
        lines: draw lines between rows.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if title is None else Text(title), show_lines=lines)
    for column in columns:
        justify = "right" if column in right else "left"
        table.add_column(Text(column), overflow="fold", justify=justify)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # nobody's window: for grep and files
        console.width = 200
    # what words need at least, side by side
    if (
        console.measure(table).minimum > console.width
        or _widest(columns, rows) > console.width
    ):
        return _show_blocks(columns, rows, title)
    console.print(table)


def _widest(columns: list[str], rows: list[list[str]]) -> int:
    """Width of a table none of whose cells is broken at more than every second word."""
    widths = [
        max(len(column), *(min(len(row[i]), 40) for row in rows), 0)
        for i, column in enumerate(columns)
    ]
    return sum(widths) + 3 * len(widths) + 1


def _show_blocks(columns: list[str], rows: list[list[str]], title: str | None) -> None:
    if title is not None:
        typer.echo(title)
    width = max(len(column) for column in columns[1:])
    for row in rows:
        typer.echo(row[0])
        for column, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                typer.echo(f"  {column:<{width}}  {cell}")
