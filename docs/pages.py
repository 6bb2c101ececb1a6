"""Writes the generated part of docs/config.md from SliceConfig, and helps `make docs`.

python docs/pages.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
BEGIN = "<!-- fields: written by python docs/pages.py -->"
END = "<!-- end of fields -->"


def meanings(docstring: str, names: list[str]) -> dict[str, str]:
    """What the docstring says of each field: ``name: meaning`` or ``name, name: meaning``.

    Args:
        docstring: Of SliceConfig, with or without a heading above its fields.
        names: The fields.

    Returns:
        The meaning of every field that the docstring names, as one paragraph.
    """
    text = re.sub(r"\s+", " ", re.split(r"\bRaises\b", docstring)[0])
    one = "|".join(names)
    starts = list(
        re.finditer(rf"(?:^|(?<=[.:] )|(?<=\) ))((?:{one})(?:, (?:{one}))*): ", text)
    )
    found = {}
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        end = following.start() if following else len(text)
        for name in start[1].split(", "):
            found[name] = text[start.end() : end].strip()
    return found


def choices(hint: Any) -> str:
    """A type as a reader knows it; a Literal by its values."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value!r}`" for value in typing.get_args(hint))
    text = getattr(hint, "__name__", None) if isinstance(hint, type) else None
    return f"`{text if text and not typing.get_args(hint) else str(hint).replace('typing.', '')}`"


def config_fields() -> str:
    """The table of docs/config.md: field, type, default, meaning."""
    from slicefine import SliceConfig

    fields = dataclasses.fields(SliceConfig)
    said = meanings(inspect.getdoc(SliceConfig) or "", [f.name for f in fields])
    hints = typing.get_type_hints(SliceConfig)
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for f in fields:
        made = f.default_factory is not dataclasses.MISSING
        default = f.default_factory() if made else f.default
        cells = [f"`{f.name}`", choices(hints[f.name]), f"`{default!r}`", said[f.name]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    page = DOCS / "config.md"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{config_fields()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
