"""The files of a comparison: rows as JSON, a page with a plot, and a recipe for `slicefine train`."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import torch

from slicefine import __version__, atomic
from slicefine.compare.verdict import Contender, Verdict, shown

ROWS, PAGE, RECIPE, PEFT = "compare.json", "report.html", "recipe.yaml", "peft_results.json"
_WIDTH, _HEIGHT, _MARGIN = 640, 360, 60


def write(verdict: Verdict, folder: Path, json_file: Path | None = None) -> None:
    """Write everything; each file is replaced in one step.

    Args:
        verdict: to be written down.
        folder: of the comparison.
        json_file: one more copy of the rows.
    """
    text = json.dumps(verdict.to_dict(), indent=2) + "\n"
    for path in (folder / ROWS, json_file):
        if path is not None:
            atomic.write_text(path, text)
    atomic.write_text(folder / PAGE, page(verdict))
    note = "# slices with the rate that `slicefine compare` has chosen\n"
    atomic.write_text(folder / RECIPE, note + verdict.recipe.to_yaml())
    results = [result for c in verdict.contenders for result in peft_results(c, verdict)]
    atomic.write_text(folder / PEFT, json.dumps(results, indent=2) + "\n")


def peft_results(contender: Contender, verdict: Verdict) -> list[dict[str, Any]]:
    """A result of each seed in the form of PEFT's method comparison (its ``results/*.json``)."""
    look, recipe = contender.look, verdict.recipe
    return [
        {
            "run_info": {
                "created_at": datetime.now(UTC).isoformat(),
                "total_time": seconds,
                "experiment_name": f"{contender.name}/seed-{seed}",
                "train_config": {
                    "model_id": recipe.model,
                    "lr": contender.lr,
                    "seed": seed,
                },
                "peft_config": None,
                "error_msg": "",
            },
            "train_info": {
                "accelerator_memory_max": look["peak_bytes"],
                "train_time": seconds,
                "file_size": look["file_bytes"],
                "num_trainable_params": look["trainable"],
                "status": "success",
                "metrics": [
                    {f"test {verdict.metric}": shown(verdict.metric, scores.mean())}
                ],
            },
            "meta_info": {
                "package_info": {"slicefine": __version__, "torch": torch.__version__},
                "system_info": {"system": platform.system(), "machine": platform.machine()},
            },
        }
        for seed, seconds, scores in zip(
            contender.seeds, contender.seconds, contender.scores, strict=True
        )
    ]


def table(verdict: Verdict) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) for the terminal and the page, the best method first."""
    columns = [
        "method",
        verdict.metric,
        "against the best",
        "lr",
        "parameters",
        "MiB a step",
        "ms a step",
        "file, KiB",
        "inference",
        "calibration",
        "worse than plain",
        "notes",
    ]
    pairs = {pair.name: pair for pair in verdict.pairs}
    rows = []
    for c in sorted(verdict.contenders, key=lambda c: -c.value):
        pair = pairs.get(c.name)
        against = "best"
        if pair is not None:
            against = "tied" if pair.tied else f"worse (p {pair.corrected:.3f})"
        look = c.look
        rows.append(
            [
                c.name,
                f"{shown(verdict.metric, c.value):.2f}",
                against,
                f"{c.lr:.2g}",
                f"{look['trainable']:,d}",
                f"{look['peak_bytes'] / 2**20:,.0f}",
                f"{look['ms_per_step']:,.0f}",
                f"{look['file_bytes'] / 1024:,.0f}",
                f"{look['overhead']:.2f}",
                "-" if c.calibration is None else f"{c.calibration:.3f}",
                "-" if c.flips is None else f"{100 * c.flips:.1f} %",
                "; ".join(c.gates),
            ]
        )
    for name, reason in verdict.struck.items():
        rows.append([name, *["-"] * (len(columns) - 2), reason])
    return columns, rows


def page(verdict: Verdict) -> str:
    """One HTML file without scripts, which loads nothing from elsewhere."""
    columns, rows = table(verdict)
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    tests = "".join(
        f"<li>{escape(p.name)}: p {p.p:.4f}, corrected {p.corrected:.4f} ({escape(p.test)})</li>"
        for p in verdict.pairs
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>slicefine compare</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
td, th {{ padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #8888 }}
svg text {{ font: 13px system-ui, sans-serif; fill: currentColor }}
</style></head><body>
<h1>Methods on {escape(str(verdict.recipe.data))}</h1>
<p>{escape(verdict.sentence)}</p>
{_plot(verdict)}
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<p>Two-sided tests on the same rows, against {escape(verdict.best)}, corrected by Holm's method:</p>
<ul>{tests}</ul>
<p>Rates are each method's rule times 0.3, 1 and 3, chosen on validation rows by successive halving.
Memory and time are those of one step on the batch of the longest rows.</p>
</body></html>
"""


def _plot(verdict: Verdict) -> str:
    """Score over memory; filled points are not beaten in both (the Pareto front)."""
    points = [
        (c.look["peak_bytes"] / 2**20, shown(verdict.metric, c.value), c)
        for c in verdict.contenders
    ]
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    left, bottom = _MARGIN, _HEIGHT - _MARGIN

    def place(
        value: float,
        values: list[float],
        start: float,
        stop: float,
    ) -> float:
        low, high = min(values), max(values)
        share = 0.5 if high == low else (value - low) / (high - low)
        return start + share * (stop - start)

    marks = []
    for x, y, c in points:
        across = place(x, xs, left + 30, _WIDTH - 100)
        up = place(y, ys, bottom - 20, 30)
        # perplexity falls as the score rises; the score says who is better
        beaten = any(
            o.value >= c.value and ox <= x and (o.value > c.value or ox < x)
            for ox, _, o in points
        )
        fill = "none" if beaten else "currentColor"
        marks.append(
            f'<circle cx="{across:.1f}" cy="{up:.1f}" r="6" fill="{fill}" stroke="currentColor"/>'
            f'<text x="{across + 10:.1f}" y="{up + 4:.1f}">{escape(c.name)} {y:.1f}</text>'
        )
    line = 'stroke="currentColor"'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="score over memory">'
        f'<line x1="{left}" y1="{bottom}" x2="{_WIDTH - 20}" y2="{bottom}" {line}/>'
        f'<line x1="{left}" y1="{bottom}" x2="{left}" y2="20" {line}/>'
        f'<text x="{left}" y="{bottom + 35}">memory of a step: {min(xs):,.0f} to {max(xs):,.0f}'
        f' MiB</text><text x="{left - 50}" y="14">{escape(verdict.metric)}</text>'
        f"{''.join(marks)}</svg>"
    )
