"""The report of a run of `python -m benchmarks.bench`: Markdown and plots from its JSON.

python -m benchmarks.speed.report benchmarks/results/bench-....json [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FLOOR_BAR, LORA_BAR = 1.05, 1.2
COLUMN, FLOOR = "slice column", "frozen floor"
# in the weights' dtype; peft's default beside weights of another
LORAS = (
    "LoRA",
    "LoRA, float32 adapters",
)
OURS = (COLUMN, "slice column, optimizer_in_bwd")
AXES = {"r": "r", "tokens": "tokens", "width": "width of the model"}
# what a method does less of than a column slice, where it comes out ahead of it
WHY = {
    "slice row": "a row slice keeps a layer's whole input, but copies no columns of it out",
    "slice block": "a block trains r x r entries of a layer, a column slice r x out",
    "IA3": "IA3 trains one vector per layer and has no product for a weight's gradient",
    "VeRA": "VeRA trains two vectors per layer",
    "LoRA-FA": (
        "LoRA-FA keeps n x r values of a layer's input, as the column slice does; in bfloat16 its"
        " adapters and moments are bfloat16, a slice's float32"
    ),
    "MiSS": (
        "MiSS keeps n x r values of a layer's input, as the column slice does; in bfloat16 its"
        " adapters and moments are bfloat16, a slice's float32"
    ),
    "masked gradient": (
        "that is dense arithmetic, which no slice should lose to: within the noise of this run or a"
        " fault"
    ),
    "dense AdamW": (
        "that is dense arithmetic, which no slice should lose to: within the noise of this run or a"
        " fault"
    ),
}


def mib(value: float) -> str:
    return f"{value / 2**20:.1f}"


def spread(row: Row, key: str, digits: int = 2) -> str:
    """The median with its 20th and 80th percentile; "-" where there is none."""
    if row.get(key) is None:
        return "-"
    return f"{row[key]:.{digits}f} ({row[key + '_p20']:.{digits}f}-{row[key + '_p80']:.{digits}f})"


def time_of(row: Row) -> str:
    digits = 3 if row["p50_ms"] < 10 else 1
    return f"{row['p50_ms']:.{digits}f} ({row['p20_ms']:.{digits}f}-{row['p80_ms']:.{digits}f})"


def table(heads: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    heads = list(heads)
    out = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    return "\n".join(
        out + ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    )


def cases(rows: list[Row], **wanted: Any) -> dict[str, dict[str, Row]]:
    """case -> method -> row, of the rows that have these values."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if all(row.get(key) == value for key, value in wanted.items()):
            found.setdefault(row["case"], {})[row["method"]] = row
    return found


def steps(rows: list[Row]) -> dict[str, dict[str, Row]]:
    return cases(rows, part="models", axis="")


# The bar and the verdict


def bar(rows: list[Row]) -> str:
    lines = []
    for name, methods in steps(rows).items():
        column = methods.get(COLUMN)
        if column is not None:
            lines.append(
                [
                    f"{name}: column r={column['r']} / frozen floor",
                    f"<= {FLOOR_BAR}",
                    *both(column, "ratio_to_floor"),
                    met(column, "ratio_to_floor", lambda v: v <= FLOOR_BAR),
                ]
            )
        for lora in (methods[method] for method in LORAS if method in methods):
            lines.append(
                [
                    f"{name}: LoRA r={lora['r']} ({adapters(lora)}) / column",
                    f">= {LORA_BAR}",
                    *both(lora, "ratio_to_column"),
                    met(lora, "ratio_to_column", lambda v: v >= LORA_BAR),
                ]
            )
    return table(("step time", "bar", "wall clock", "time on the core", "reached"), lines)


def adapters(lora: Row) -> str:
    """Which LoRA it is: peft keeps adapters in float32 unless told not to."""
    if lora["dtype"] == "fp32" or lora["method"] != LORAS[0]:
        return "float32 adapters, peft's default"
    return {"bf16": "bfloat16", "fp16": "float16"}[
        lora["dtype"]
    ] + " adapters, the faster choice"


def both(row: Row, key: str) -> list[str]:
    return [spread(row, key, 3), spread(row, f"cpu_{key}", 3)]


def met(row: Row, key: str, passes: Any) -> str:
    """Both clocks' verdicts; where neither says no the bar is reached."""
    answers = {
        name: passes(row[k])
        for name, k in (("wall", key), ("core", f"cpu_{key}"))
        if row.get(k) is not None
    }
    if len(set(answers.values())) == 1:
        return "yes" if next(iter(answers.values())) else "**no**"
    return ", ".join(
        f"{name}: {'yes' if good else '**no**'}" for name, good in answers.items()
    )


def shortfalls(rows: list[Row]) -> list[str]:
    """Where the bar is missed: what the time beyond the floor is."""
    lines = []
    for name, methods in steps(rows).items():
        column, floor = methods.get(COLUMN), methods.get(FLOOR)
        if column is None or floor is None:
            continue
        clock = "cpu_" if column.get("cpu_p50_ms") is not None else ""
        if (
            max(column["ratio_to_floor"], column.get("cpu_ratio_to_floor") or 0.0)
            > FLOOR_BAR
        ):
            extra = column[f"{clock}p50_ms"] - floor[f"{clock}p50_ms"]
            lines.append(
                f"{name}: the column slice takes {extra:.1f} ms more than the floor's"
                f" {floor[f'{clock}p50_ms']:.1f} ms: gathering X[:, S], the slice gradients, the"
                " update and SliceLinear's own Python. The tables of layers, ops and moves below"
                " split it."
            )
    return lines


def verdict(rows: list[Row]) -> list[str]:
    """Whether the column slice is the fastest and the leanest trained method, or which is and why."""
    lines = []
    for name, methods in steps(rows).items():
        trained = [row for row in methods.values() if row["method"] != FLOOR]
        if not any(row["method"] in OURS for row in trained):
            continue
        questions = {
            "fastest, by time on the core": "cpu_ratio_to_floor",
            "fastest, by wall clock": "ratio_to_floor",
        }
        questions["leanest"] = "peak_bytes"
        lines += [
            ranking([row for row in trained if row.get(key) is not None], name, what, key)
            for what, key in questions.items()
            if methods.get(COLUMN, {}).get(key) is not None
        ]
    return lines


def ranking(rows: list[Row], case: str, what: str, key: str) -> str:
    """One line: where the column slice stands by a key of the rows, and the reason where another
    method is ahead.
    """

    def shown(row: Row) -> str:
        return f"{mib(row[key])} MiB" if key == "peak_bytes" else spread(row, key, 3)

    order = sorted(rows, key=lambda row: row[key])
    column = next(row for row in order if row["method"] == COLUMN)
    ahead = [row for row in order if row[key] < column[key]]
    others = [row for row in ahead if row["method"] not in OURS]
    if not others:
        second = next(row for row in order if row["method"] not in OURS)
        own = f" ({ahead[0]['method']}: {shown(ahead[0])})" if ahead else ""
        return (
            f"* {case}, {what}: **yes**, slice column {shown(column)}{own}; next is"
            f" {second['method']}, {shown(second)}."
        )
    reasons = "; ".join(
        f"{row['method']} {shown(row)}, {row['trainable']:,d} parameters"
        + (f" ({WHY[row['method']]})" if row["method"] in WHY else "")
        for row in others
    )
    return (
        f"* {case}, {what}: **no**, slice column {shown(column)} ({column['trainable']:,d}"
        f" parameters). Ahead: {reasons}."
    )


# Tables


def step_table(methods: dict[str, Row]) -> str:
    floor = methods[FLOOR]
    lines = []
    for row in methods.values():
        over = (
            "-" if not row["peak_bytes"] else mib(row["peak_bytes"] - floor["peak_bytes"])
        )
        lines.append(
            [
                row["method"],
                row["r"] or "-",
                row["equal"],
                f"{row['trainable']:,d}",
                time_of(row),
                spread(row, "ratio_to_floor", 3),
                spread(row, "cpu_ratio_to_floor", 3),
                spread(row, "ratio_to_masked"),
                spread(row, "ratio_to_column"),
                mib(row["peak_bytes"]) if row["peak_bytes"] else "-",
                over,
            ]
        )
    heads = (
        "method",
        "r",
        "equal to column r=16 in",
        "trained",
        "ms per step",
        "/ floor",
        "/ floor, core",
        "/ masked",
        "/ column",
        "peak MiB",
        "over floor",
    )
    return table(heads, lines)


def growth_series(rows: list[Row], axis: str) -> dict[str, list[tuple[int, Row, Row]]]:
    """method -> [(value of the axis, row, the floor's row)], ascending."""
    series: dict[str, list[tuple[int, Row, Row]]] = {}
    for methods in cases(rows, part="models", axis=axis).values():
        for name, row in methods.items():
            value = int(row["case"].removesuffix("-quick").removeprefix(f"growth-{axis}"))
            series.setdefault(name, []).append((value, row, methods[FLOOR]))
    return {name: sorted(points, key=lambda p: p[0]) for name, points in series.items()}


def exponent(points: list[tuple[float, float]]) -> str:
    """k of cost ~ x^k between the first and the last point."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    if x0 == x1 or y0 <= 0 or y1 <= 0:
        return "-"
    return f"{math.log(y1 / y0) / math.log(x1 / x0):.2f}"


def growth_table(rows: list[Row], axis: str) -> str:
    lines = []
    for name, points in growth_series(rows, axis).items():
        clock = "cpu_p50_ms" if points[0][1].get("cpu_p50_ms") is not None else "p50_ms"
        times = [(x, row[clock]) for x, row, _ in points]
        peaks = [(x, row["peak_bytes"]) for x, row, _ in points]
        over = [
            "-" if name == FLOOR else f"{mib(row['peak_bytes'] - floor['peak_bytes'])}"
            for _, row, floor in points
        ]
        ratio = [
            "-" if name == FLOOR else f"{row['ratio_to_floor']:.2f}"
            for _, row, floor in points
        ]
        lines.append(
            [
                name,
                ", ".join(f"{t:.0f}" for _, t in times),
                exponent(times),
                ", ".join(ratio),
                ", ".join(mib(p) for _, p in peaks),
                exponent(peaks),
                ", ".join(over),
            ]
        )
    at = ", ".join(str(x) for x, _, _ in points)
    heads = (
        f"at {axis} = {at}",
        "ms, on the core",
        "time ~ x^",
        "/ floor, wall",
        "peak MiB",
        "memory ~ x^",
        "MiB over floor",
    )
    return table(heads, lines)


def small_tables(rows: list[Row]) -> list[str]:
    out = []
    layers = cases(rows, part="layers")
    if layers:
        names = [m for m in next(iter(layers.values())) if m != FLOOR]
        lines = [
            [
                case,
                time_of(methods[FLOOR]),
                *(
                    spread(
                        methods[n],
                        "cpu_ratio_to_floor"
                        if methods[n].get("cpu_p50_ms")
                        else "ratio_to_floor",
                    )
                    for n in names
                ),
            ]
            for case, methods in layers.items()
        ]
        out += [
            (
                "## Layers\n\nForward, backward and update of one layer, 1,280 tokens, r = 16; each"
                " method's time on the core / the floor's.\n"
            ),
            table(("layer (in x out)", "floor, ms", *names), lines),
        ]
    moves = cases(rows, part="moves")
    if moves:
        lines = [
            [n, time_of(r), spread(r, "cpu_ratio_to_base")]
            for n, r in next(iter(moves.values())).items()
        ]
        out += [
            f"## Moves\n\n{rows_measure(moves)}.\n",
            table(("interval", "ms per step", "/ static, core"), lines),
        ]
    ops = cases(rows, part="ops")
    if ops:
        lines = []
        for case, methods in ops.items():
            ours, torchs = methods["slicefine"], methods["torch"]
            share = (
                "-"
                if ours["roofline_share"] is None
                else f"{100 * ours['roofline_share']:.0f} %"
            )
            speed = spread(torchs, "ratio_to_base"), spread(ours, "ratio_to_base")
            lines.append(
                [
                    case,
                    time_of(torchs),
                    time_of(ours),
                    speed[1],
                    spread(ours, "cpu_ratio_to_base"),
                    share,
                ]
            )
        out += [
            (
                "## Ops\n\nA column slice of a 2048 x 1024 (out x in) weight, 1,280 tokens;"
                ' `slice_adamw` updates eight. Caches are emptied before each call. "torch" is the'
                " same work in plain PyTorch. The share is (bytes / bandwidth or flops / rate, the"
                " longer) / time, with this run's own bandwidth of a copy and rate of a matrix"
                " product.\n"
            ),
            table(
                (
                    "op",
                    "torch, ms",
                    "slicefine, ms",
                    "slicefine / torch",
                    "on the core",
                    "share of roofline",
                ),
                lines,
            ),
        ]
    return out


def rows_measure(found: dict[str, dict[str, Row]]) -> str:
    return next(iter(next(iter(found.values())).values()))["measures"]


# Plots


def draw_growth(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(AXES), figsize=(11, 6), squeeze=False)
    for i, (axis, label) in enumerate(AXES.items()):
        for name, points in growth_series(rows, axis).items():
            x = [p[0] for p in points]
            style = (
                {"color": "black", "linestyle": "--"}
                if name == FLOOR
                else {"marker": "o", "markersize": 3}
            )
            clock = "cpu_" if points[0][1].get("cpu_p50_ms") is not None else ""
            (line,) = axes[0, i].plot(
                x, [p[1][f"{clock}p50_ms"] for p in points], label=name, **style
            )
            low, high = ([p[1][f"{clock}{q}_ms"] for p in points] for q in ("p20", "p80"))
            axes[0, i].fill_between(x, low, high, alpha=0.15, color=line.get_color())
            axes[1, i].plot(
                x, [p[1]["peak_bytes"] / 2**20 for p in points], label=name, **style
            )
        for ax, unit in ((axes[0, i], "ms per step"), (axes[1, i], "peak MiB")):
            ax.set(xlabel=label, ylabel=unit, ylim=(0, None))
            ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_steps(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = steps(rows)
    figure, axes = plt.subplots(
        len(found), 2, figsize=(11, 0.8 + 3.4 * len(found)), squeeze=False
    )
    for i, (case, methods) in enumerate(found.items()):
        names = list(methods)[::-1]
        colors = [
            "tab:blue" if n.startswith("slice") else "black" if n == FLOOR else "tab:gray"
            for n in names
        ]
        clock = "cpu_" if methods[FLOOR].get("cpu_p50_ms") is not None else ""
        key = f"{clock}ratio_to_floor"
        middle = [methods[n][key] for n in names]
        whiskers = [
            [m - methods[n][key + "_p20"] for m, n in zip(middle, names, strict=True)],
            [methods[n][key + "_p80"] - m for m, n in zip(middle, names, strict=True)],
        ]
        axes[i, 0].barh(names, middle, color=colors, xerr=whiskers, ecolor="tab:orange")
        axes[i, 0].axvline(FLOOR_BAR, color="tab:red", linewidth=0.8)
        axes[i, 0].set(
            xlabel="step time / frozen floor (red: the bar)", title=case, xlim=(0.8, None)
        )
        axes[i, 1].barh(
            names, [(methods[n]["peak_bytes"] or 0) / 2**20 for n in names], color=colors
        )
        axes[i, 1].set(xlabel="peak MiB")
        axes[i, 1].tick_params(labelleft=False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


# The page


def write(report: dict[str, Any], stem: str, folder: Path, pictures: Path) -> Path:
    """The Markdown page of a run in `folder`, its plots in `pictures`.

    Plots are named for the kind of device and not for the run, so that a page which shows the
    latest run need not change.
    """
    rows, where = report["rows"], report["where"]
    plots = {}
    for name, draw in (("steps", draw_steps), ("growth", draw_growth)):
        path = pictures / f"benchmarks-{where['device_type']}-{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, path)
        plots[name] = f"![{name}]({os.path.relpath(path, folder)})"
    clock = (
        'Wall clock; "core" is the time that the process had its core, which other programs do not'
        " lengthen."
        if where["device_type"] == "cpu"
        else "Times are the GPU's own, between events."
    )
    parts = [
        f"# Benchmarks: {where['device']}, commit {where['commit']}",
        (
            f"`{report['command']}`, {report['seconds']:.0f} s, {where['date']}. {where['threads']}"
            f" thread(s), torch {where['torch']}, Triton {where['triton']}, peft {where['peft']},"
            f" Python {where['python']}, backend `{where['backend']}`, eager mode. Load average (1,"
            f" 5, 15 minutes) before: {report['load_before']}, after: {report['load_after']}, on"
            f" {report['cores']} cores. {clock} A figure is the median over the rounds with the"
            " 20th and 80th percentile in brackets; a ratio is the median of the rounds' ratios."
        ),
        "## The bar",
        bar(rows),
        *shortfalls(rows),
        "## Is the column slice the fastest and the leanest trained method?",
        "\n".join(verdict(rows)),
    ]
    for case, methods in steps(rows).items():
        first = next(iter(methods.values()))
        parts += [
            f"## {case}: {first['measures']}, {first['rounds']} rounds",
            step_table(methods),
        ]
    parts += [plots["steps"], "## How cost grows", plots["growth"]]
    for axis in AXES:
        found = cases(rows, part="models", axis=axis)
        if found:
            first = next(iter(next(iter(found.values())).values()))
            fixed = f"{first['tokens']} tokens, " if axis != "tokens" else ""
            fixed += "r = 16" if axis != "r" else f"width {first['width'] or 384}"
            parts += [
                f"{rows_measure(found)}, against {AXES[axis]} ({fixed}):",
                growth_table(rows, axis),
            ]
    parts += small_tables(rows)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path)
    parser.add_argument(
        "--out", type=Path, help="folder of the page; default: beside the JSON"
    )
    parser.add_argument("--pictures", type=Path, default=Path("docs/img"))
    options = parser.parse_args()
    report = json.loads(options.json.read_text(encoding="utf-8"))
    folder = options.out or options.json.parent
    print(write(report, options.json.stem, folder, options.pictures))


if __name__ == "__main__":
    main()
