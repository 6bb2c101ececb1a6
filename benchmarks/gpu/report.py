"""The suite's results as Markdown, and as one line per part."""

from __future__ import annotations

from typing import Any

# too many rows to read; those that failed are shown
SUMMARizED = (
    "gradients",
    "gradients_cuda",
    "updates",
    "updates_cuda",
)


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " x ".join(map(cell, value))
    text = str(value).strip().replace("|", "\\|")
    return text.splitlines()[-1][:200] if text else ""


def table(rows: list[dict[str, Any]]) -> str:
    """A column for every key of any row, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [
        f"| {' | '.join(cell(row[c]) if row.get(c) is not None else '' for c in columns)} |"
        for row in rows
    ]
    return "\n".join(lines)


def compared(parts: dict[str, dict[str, Any]]) -> str:
    """Every figure that has a bar, beside it."""
    bars = [b for part in parts.values() for b in part.get("bars", ())]
    if not bars:
        return "No figure to compare was measured.\n"
    rows = [
        {
            "figure": b["name"],
            "measured": b["value"],
            "bar": f"{'at most' if b['most'] else 'at least'} {b['limit']:g}",
            "met": b["met"],
        }
        for b in bars
    ]
    return table(rows) + "\n"


def markdown(report: dict[str, Any], rows: bool = True) -> str:
    """rows: with the tables of every part."""
    place, parts = report["where"], report["parts"]
    lines = [f"# {place['device']}, commit {place['commit']}, {place['date']}", ""]
    lines += [
        ", ".join(
            f"{key} {value}"
            for key, value in place.items()
            if key not in ("device", "commit", "date")
        ),
        "",
    ]
    if place.get("device_type") == "none":
        lines += ["**Nothing ran**: there was no GPU.", ""]
    elif place.get("device_type") != "cuda":
        lines += [
            "**Not a GPU**: tiny shapes through Triton's interpreter; the times mean nothing.",
            "",
        ]
    lines += ["## Beside the bar", "", compared(parts), "## Parts", ""]
    lines += [
        table(
            [
                {
                    "part": name,
                    "status": part["status"],
                    "rows": len(part["rows"]),
                    "seconds": float(part["seconds"]),
                    "notes": "; ".join(part["notes"]),
                }
                for name, part in parts.items()
            ]
        ),
        "",
    ]
    for name, part in parts.items() if rows else ():
        shown = part["rows"]
        if name in SUMMARizED:
            shown = [row for row in shown if row.get("ok") is not True]
        if "error" in part or shown:
            lines += [f"## {name}", ""]
        if "error" in part:
            lines += ["```", part["error"].strip(), "```", ""]
        if shown:
            lines += [table(shown), ""]
    return "\n".join(lines)


def summary(name: str, part: dict[str, Any]) -> str:
    """A line, and what failed."""
    wrong = [row for row in part["rows"] if row.get("ok") is False]
    lines = [
        f"{name:<15} {part['status']:<8} {len(part['rows']):>4} rows {part['seconds']:7.1f} s"
    ]
    lines += [f"    {note}" for note in part["notes"]]
    lines += [f"    {row}" for row in wrong[:5]]
    if "error" in part:
        lines += [f"    {line}" for line in part["error"].strip().splitlines()[-12:]]
    return "\n".join(lines)
