"""Draws time-and-memory-light.svg and time-and-memory-dark.svg, the plot in the README, from the
rows of a benchmark.

python docs/img/time_and_memory.py
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "benchmarks" / "results" / "bench-amd-epyc-d76c81f65.json"
CASE = "encoder-fp32"
# method of the benchmark -> (its name in the plot, where the name stands beside the point)
METHODS = {
    "frozen floor": ("nothing trained", (2, 26)),
    "slice column": ("slicefine", (-4, -14)),
    "LoRA": ("LoRA", (12, 4)),
    "LoRA-FA": ("LoRA-FA", (12, 4)),
    "MiSS": ("MiSS", (-6, 21)),
    "IA3": ("IA3", (12, 4)),
    "DoRA": ("DoRA", (12, 4)),
    "SHiRA": ("SHiRA", (12, 4)),
    "VeRA": ("VeRA", (-14, -12)),
    "dense AdamW": ("dense AdamW", (12, 8)),
    "masked gradient": ("masked gradient", (12, -5)),
}
LEFT, TOP, WIDTH, HEIGHT = 70, 56, 640, 300
TIMES, MEMORY = (0.95, 2.0), (225.0, 600.0)
# text, muted text, grid, other methods, slicefine
COLORS = {
    "light": ("#1f2328", "#59636e", "#d1d9e0", "#8c959f", "#1f6feb"),
    "dark": ("#f0f6fc", "#9198a1", "#3d444d", "#768390", "#58a6ff"),
}


def points() -> dict[str, tuple[float, float]]:
    """Name in the plot -> (time of a step as a multiple of the frozen baseline's, peak MiB)."""
    rows = json.loads(ROWS.read_text(encoding="utf-8"))["rows"]
    found = {row["method"]: row for row in rows if row["case"] == CASE}
    return {
        name: (found[method]["ratio_to_floor"], found[method]["peak_bytes"] / 2**20)
        for method, (name, _) in METHODS.items()
    }


def draw(theme: str) -> str:
    """The plot: time to the right, memory upwards, so the best corner is the lower left."""
    text, muted, grid, other, ours = COLORS[theme]
    width, height = LEFT + WIDTH + 30, TOP + HEIGHT + 62
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" role="img"'
        ' font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>Time and peak memory of a training step, by method</title>",
        label(20, 26, 16, text, "One training step of a small encoder: less is better"),
    ]
    for mib in range(300, 601, 100):
        y = across(mib, MEMORY, TOP + HEIGHT, TOP)
        parts.append(line(LEFT, y, LEFT + WIDTH, y, grid))
        parts.append(label(LEFT - 8, y + 4, 12, muted, f"{mib}", "end"))
    for ratio in (1.0, 1.25, 1.5, 1.75, 2.0):
        x = across(ratio, TIMES, LEFT, LEFT + WIDTH)
        parts.append(line(x, TOP, x, TOP + HEIGHT, grid))
        parts.append(label(x, TOP + HEIGHT + 20, 12, muted, f"{ratio:g}", "middle"))
    parts.append(label(LEFT - 8, TOP - 10, 12, muted, "peak MiB", "end"))
    words = "time of a step, as a multiple of a step that trains nothing"
    parts.append(label(LEFT + WIDTH, TOP + HEIGHT + 44, 12, muted, words, "end"))
    places = dict(METHODS.values())
    for name, (ratio, mib) in points().items():
        x = across(ratio, TIMES, LEFT, LEFT + WIDTH)
        y = across(mib, MEMORY, TOP + HEIGHT, TOP)
        mine = name == "slicefine"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{8 if mine else 6}"'
            f' fill="{ours if mine else other}"/>'
        )
        right, down = places[name]
        parts.append(
            label(x + right, y + down, 15 if mine else 13, ours if mine else text, name)
        )
    return "\n".join([*parts, "</svg>", ""])


def across(value: float, ends: tuple[float, float], first: float, last: float) -> float:
    """Where a value lies between two pixels."""
    return first + (value - ends[0]) / (ends[1] - ends[0]) * (last - first)


def line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'
    )


def label(
    x: float, y: float, size: int, color: str, words: str, anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}"'
        f' text-anchor="{anchor}">{words}</text>'
    )


if __name__ == "__main__":
    for theme in COLORS:
        Path(__file__).with_name(f"time-and-memory-{theme}.svg").write_text(
            draw(theme), encoding="utf-8"
        )
