"""Draws moving-slice-light.svg and moving-slice-dark.svg, the picture at the top of the README.

python docs/img/moving_slice.py
"""

from __future__ import annotations

from pathlib import Path

COLUMNS, WIDTH, ROWS, CELL = 12, 3, 8, 14
FRAMES = ["steps 0 to 99", "100 to 199", "200 to 299", "300 to 399"]
LEFT, TOP, GAP = 20, 70, 44
# text, muted text, frozen cell, cell that a slice has trained, cell that trains now
COLORS = {
    "light": ("#1f2328", "#59636e", "#d1d9e0", "#9ec5f4", "#1f6feb"),
    "dark": ("#f0f6fc", "#9198a1", "#3d444d", "#1f4b86", "#58a6ff"),
}


def draw(theme: str) -> str:
    """One picture: a weight in four phases, and what its colors mean."""
    text, muted, frozen, trained, active = COLORS[theme]
    side = COLUMNS * CELL
    width = 2 * LEFT + len(FRAMES) * side + (len(FRAMES) - 1) * GAP
    height = TOP + ROWS * CELL + 62
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" role="img"'
        ' font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>A slice of a weight trains for a while, then the next one does</title>",
        label(
            LEFT,
            26,
            16,
            text,
            "One weight W (out x in) of the model, while it is fine-tuned",
        ),
    ]
    for frame, steps in enumerate(FRAMES):
        x = LEFT + frame * (side + GAP)
        parts.append(label(x, TOP - 14, 13, muted, steps))
        first = frame * WIDTH
        for column in range(COLUMNS):
            color = frozen
            if column < first:
                color = trained
            elif column < first + WIDTH:
                color = active
            parts += cells(x + column * CELL, color)
        if frame:
            parts.append(label(x - GAP / 2 - 6, TOP + ROWS * CELL / 2 + 5, 18, muted, "→"))
    y = TOP + ROWS * CELL + 34
    legend = [
        (active, "trains: the only values with a gradient and optimizer state"),
        (trained, "has trained, keeps what it learned"),
        (frozen, "pretrained"),
    ]
    x = LEFT
    for color, meaning in legend:
        parts.append(
            f'<rect x="{x}" y="{y - 10}" width="12" height="12" rx="2" fill="{color}"/>'
        )
        parts.append(label(x + 18, y, 13, text, meaning))
        x += 40 + 6.6 * len(meaning)
    return "\n".join([*parts, "</svg>", ""])


def cells(x: float, color: str) -> list[str]:
    """One column of the weight."""
    size = CELL - 2
    return [
        f'<rect x="{x}" y="{TOP + row * CELL}" width="{size}" height="{size}" rx="2"'
        f' fill="{color}"/>'
        for row in range(ROWS)
    ]


def label(x: float, y: float, size: int, color: str, words: str) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}">{words}</text>'


if __name__ == "__main__":
    for theme in COLORS:
        Path(__file__).with_name(f"moving-slice-{theme}.svg").write_text(
            draw(theme), encoding="utf-8"
        )
