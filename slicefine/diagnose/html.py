"""A report as one HTML file that needs nothing else: text, tables, matplotlib figures as inline
SVG.

page = Page("Title", "one line under it") page.heading("A section") page.text("A paragraph.")
page.table([{"layer": "encoder.0", "share": 0.25}], "what the rows are") page.figure(fig, "what the
figure shows") page.write("report.html")
"""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light; --ink: #1d2430; --soft: #5a6475; --line: #dfe4ec; --accent: #1f5fa8; --wash: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 32px 80px; background: #fff; min-height: 100vh; border: solid var(--line); border-width: 0 1px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; }
.subtitle { color: var(--soft); margin: 0 0 28px; }
h2 { font-size: 1.3rem; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 28px 0 8px; }
p { margin: 8px 0; max-width: 46em; }
.note { border-left: 4px solid var(--accent); background: var(--wash); padding: 10px 14px; margin: 14px 0; max-width: none; }
figure { margin: 18px 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption, caption { color: var(--soft); font-size: .88rem; text-align: left; padding: 6px 0; }
caption { caption-side: top; }
.scroll { overflow-x: auto; max-height: 560px; overflow-y: auto; margin: 14px 0; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-size: .82rem; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: #fff; color: var(--soft); font-weight: 600; text-align: left; box-shadow: inset 0 -2px var(--line); }
th, td { padding: 4px 14px 4px 0; vertical-align: top; }
tbody tr:nth-child(even) { background: var(--wash); }
td { border-top: 1px solid var(--line); }
td:not(.number) { min-width: 5em; }
td:last-child:not(.number) { min-width: 16em; }
th { vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; }
pre { background: var(--wash); border: 1px solid var(--line); padding: 12px 14px; overflow-x: auto; font-size: .85rem; }
nav { font-size: .9rem; margin-bottom: 20px; display: flex; flex-wrap: wrap; }
nav a { color: var(--accent); margin-right: 18px; text-decoration: none; white-space: nowrap; }
@media print { main { border: 0; max-width: none; } .scroll { max-height: none; } }
"""


class Page:
    """One report. Every method but `write` adds a piece and returns None; text is escaped.

    title: of the document. subtitle: one line under it, such as model, data and machine.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []
        self._sections: list[tuple[str, str]] = []
        self._figures: list[Any] = []

    def heading(self, text: str, level: int = 2) -> None:
        """A section (level 2, also listed at the top) or a part of one (level 3)."""
        if level not in (2, 3):
            raise ValueError(
                f"level is {level}; expected 2 for a section or 3 for a part of one"
            )
        anchor = f"s{len(self._parts)}"
        if level == 2:
            self._sections.append((anchor, text))
        self._parts.append(f'<h{level} id="{anchor}">{html.escape(text)}</h{level}>')

    def text(self, paragraph: str, note: bool = False) -> None:
        """A paragraph; ``note`` sets it apart, for what a reader must not miss."""
        self._parts.append(
            f"<p{' class=note' if note else ''}>{html.escape(paragraph)}</p>"
        )

    def code(self, text: str) -> None:
        """Text as it is: a command, a configuration."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str = "") -> None:
        """One row per mapping, columns in the order in which keys first occur; floats in four
        significant digits.
        """
        columns = list(dict.fromkeys(key for row in rows for key in row))
        numeric = {
            c
            for c in columns
            if all(
                isinstance(r.get(c), (int, float, type(None)))
                and not isinstance(r.get(c), bool)
                for r in rows
            )
        }
        mark = lambda c: ' class="number"' if c in numeric else ""
        head = "".join(f"<th{mark(c)}>{html.escape(c)}</th>" for c in columns)
        body = "".join(
            "<tr>"
            + "".join(f"<td{mark(c)}>{html.escape(cell(row.get(c)))}</td>" for c in columns)
            + "</tr>"
            for row in rows
        )
        title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._parts.append(
            "<div"
            f' class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def figure(self, fig: Any, caption: str = "") -> None:
        """A `matplotlib.figure.Figure` as inline SVG; build it with `new_figure` and no GUI is ever
        asked for.
        """
        self._figures.append(fig)
        title = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        self._parts.append(
            f"<figure>{_svg(fig, f'f{len(self._figures)}', caption)}{title}</figure>"
        )

    def html(self) -> str:
        """The whole document."""
        links = "".join(
            f'<a href="#{anchor}">{html.escape(text)}</a>'
            for anchor, text in self._sections
        )
        subtitle = (
            f'<p class="subtitle">{html.escape(self.subtitle)}</p>' if self.subtitle else ""
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta'
            f' charset="utf-8"><title>{html.escape(self.title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon"'
            ' href="data:,">'
            f"<style>{_STYLE}</style></head><body><main><h1>{html.escape(self.title)}</h1>{subtitle}<nav>{links}</nav>"
            + "\n".join(self._parts)
            + "</main></body></html>\n"
        )

    def write_figures(
        self, folder: str | os.PathLike[str], stem: str, dpi: int = 110
    ) -> list[Path]:
        """The figures as PNG files ``stem-1.png``, ``stem-2.png`` and so on, for documents that
        cannot hold the page."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{stem}-{i}.png" for i in range(1, len(self._figures) + 1)]
        for figure, path in zip(self._figures, paths, strict=True):
            figure.savefig(path, dpi=dpi, metadata={"Software": None})
        return paths

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the document to a file, making its folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")


def new_figure(width: float = 10.0, height: float = 4.0, **grid: Any) -> tuple[Any, Any]:
    """(figure, axes) of matplotlib in inches, outside of pyplot; grid: rows and columns as for
    `plt.subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(**grid)
    for ax in getattr(axes, "flat", [axes]):
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def cell(value: Any) -> str:
    """How a value is printed in a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,d}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value))
    return str(value)


def _svg(fig: Any, prefix: str, label: str) -> str:
    """The figure as an <svg> element whose ids are unique in the page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.hashsalt": prefix, "svg.fonttype": "none", "font.size": 10}
    ):
        fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href|href)="#', rf'\1="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    return svg.replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(label, quote=True)}"', 1
    )
