"""The survey as an HTML page with plots."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from slicefine.diagnose.html import Page, new_figure
from slicefine.diagnose.survey import kind_of

BLUE, ORANGE, GRAY = "#1f5fa8", "#d9772b", "#9aa4b2"

# title, what the color is, layer row -> value, logarithmic
QUANTITIES: list[tuple[str, Callable[[dict[str, Any]], float | None], bool]] = [
    (
        "k(0.9) of the features",
        lambda row: row["energy"] and row["energy"]["k"]["0.9"],
        True,
    ),
    (
        "k(0.9) over the same with random weights",
        lambda row: (
            row["energy"] and row["energy"]["k"]["0.9"] / row["random_energy"]["k"]["0.9"]
        ),
        True,
    ),
    ("gradient norm", lambda row: row["gradient_norm"], True),
    ("spread of the gradient over positions (CV)", lambda row: row["share_cv"], False),
    (
        "energy ratio, input features",
        lambda row: row["balance"].get("column", {}).get("energy_ratio"),
        True,
    ),
    (
        "energy ratio, output features",
        lambda row: row["balance"].get("row", {}).get("energy_ratio"),
        True,
    ),
    (
        "profile ratio, input features",
        lambda row: row["balance"].get("column", {}).get("profile_ratio"),
        True,
    ),
    (
        "profile ratio, output features",
        lambda row: row["balance"].get("row", {}).get("profile_ratio"),
        True,
    ),
]


def survey_page(result: dict[str, Any]) -> Page:
    """A page of a `slicefine.diagnose.survey` with ``model``, ``data`` and ``task`` added to it."""
    page = Page(
        f"slicefine diagnose: {short_name(result.get('model', 'model'))}", subtitle(result)
    )
    page.heading("In short")
    for line in summary(result):
        page.text(line)
    page.heading("Layer by quantity")
    page.text(
        "One panel per quantity, one row per kind of layer, one column per depth; brighter is more,"
        " each panel on its own scale. Empty cells: not measured."
    )
    page.figure(
        _heat_map(result["layers"]),
        "Every layer, every quantity. Logarithmic color scales but for the spread.",
    )
    energy_section(page, result)
    winning_section(page, result)
    if result["tangent"]:
        tangent_section(page, result)
    balance_section(page, result)
    coverage_section(page, result["coverage"])
    page.heading("How it was measured")
    page.text(
        f"{result['examples']:,d} examples; seconds by part: "
        + ", ".join(f"{k} {v:.0f}" for k, v in result["seconds"].items())
        + ". Bound of the memory beyond the model and one pass of one batch:"
        f" {result['bound_bytes'] / 2**20:,.0f} MiB."
    )
    page.table([{"option": k, "value": v} for k, v in result["options"].items()])
    return page


def subtitle(result: dict[str, Any]) -> str:
    return ", ".join(
        str(result[key]) for key in ("data", "task", "machine") if result.get(key)
    )


def summary(result: dict[str, Any]) -> list[str]:
    """What a reader must know, in sentences; also printed by the command line."""
    measured = [row for row in result["layers"] if row["energy"]]
    k = sorted(row["energy"]["k"]["0.9"] for row in measured)
    null = sorted(row["random_energy"]["k"]["0.9"] for row in measured)
    narrower = sum(
        row["energy"]["k"]["0.9"] < row["random_energy"]["k"]["0.9"] for row in measured
    )
    flagged = {axis: _flagged(result, axis) for axis in ("row", "column")}
    lines = [
        f"{len(result['layers'])} linear layers, {len(measured)} of them used on this data"
        + (f"; never called: {_some(result['unused'])}." if result["unused"] else "."),
        (
            f"Directions that the features span, k(0.9): {k[0]} to {k[-1]}, median"
            f" {k[len(k) // 2]}; with random weights {null[0]} to {null[-1]}, median"
            f" {null[len(null) // 2]}. Narrower than random in {narrower} of {len(measured)}"
            " layers."
        ),
        (
            f"Layers with blocks of the weight unlike the rest: {len(flagged['column'])} among"
            f" input features, {len(flagged['row'])} among output features."
        ),
    ]
    if narrow := [row["name"] for row in measured if row["energy"]["k"]["0.9"] <= 2]:
        lines.append(
            f"In {_some(narrow)} one or two directions hold nine tenths of the variance: a few"
            " tokens with massive activations, not a simple task."
        )
    trials = [t for w in result["winning"] for t in w["trials"]]
    if trials:
        fell = sum(t["drop"] > 0 for t in trials)
        spreads = [w["drop_cv"] for w in result["winning"] if w["drop_cv"] is not None]
        lines.append(
            f"Slices of r = {result['options']['r']} trained alone at random positions: the loss"
            f" fell in {fell} of {len(trials)} trials in {len(spreads)} layers; spread of the drop"
            f" over positions (CV) {min(spreads):.2f} to {max(spreads):.2f}."
        )
    named = sum(bool(w["exceptions"]) for w in result["winning"])
    lines.append(f"Layers with an exception named below: {named}.")
    for row in result["tangent"][-1:]:
        lines.append(
            f"Slice tangents, {row['name']}: rank {row['rank']} at {row['tolerance']:g} on"
            f" {row['examples']} examples"
            + (" (the pool bounds it)" if row["saturated"] else "")
            + f", effective rank {row['effective_rank']:.1f}."
        )
    return lines


def _flagged(result: dict[str, Any], axis: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        (r["name"], f)
        for r in result["layers"]
        if axis in r["balance"]
        for f in r["balance"][axis]["flagged"][:1]
    ]


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )


def _heat_map(layers: list[dict[str, Any]]) -> Any:
    import numpy as np
    from matplotlib.colors import LogNorm

    places = {row["name"]: kind_of(row["name"]) for row in layers}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    depths = sorted({depth for _, depth in places.values()})
    height = 1.0 + 0.24 * len(kinds)
    figure, axes = new_figure(12, height * 4, nrows=4, ncols=2, sharex=True, sharey=True)
    for ax, (title, value, logarithmic) in zip(axes.flat, QUANTITIES, strict=True):
        grid = np.full((len(kinds), len(depths)), np.nan)
        for row in layers:
            found = value(row)
            if found is not None and (found > 0 or not logarithmic):
                kind, depth = places[row["name"]]
                grid[kinds.index(kind), depths.index(depth)] = found
        finite = grid[np.isfinite(grid)]
        norm = (
            LogNorm(finite.min(), max(finite.max(), finite.min() * 1.01))
            if logarithmic and finite.size
            else None
        )
        image = ax.imshow(
            np.ma.masked_invalid(grid),
            aspect="auto",
            cmap="viridis",
            norm=norm,
            interpolation="nearest",
        )
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_yticks(range(len(kinds)), kinds, fontsize=8)
        step = max(1, len(depths) // 12)
        ax.set_xticks(
            range(0, len(depths), step),
            [d if d >= 0 else "–" for d in depths[::step]],
            fontsize=8,
        )
        if finite.size:
            bar = figure.colorbar(image, ax=ax, pad=0.01)
            low, high = float(finite.min()), float(finite.max())
            middle = math.sqrt(low * high) if logarithmic else (low + high) / 2
            bar.set_ticks(
                [low, middle, high],
                labels=[f"{v:.3g}" for v in (low, middle, high)],
                minor=False,
            )
            bar.ax.minorticks_off()
            bar.ax.tick_params(labelsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("depth")
    return figure


def plain_ticks(ax: Any, axis: str) -> None:
    """Numbers as people write them on a logarithmic axis of few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    which = getattr(ax, f"{axis}axis")
    low, high = getattr(ax, f"get_{axis}lim")()
    which.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,))
    )
    which.set_minor_locator(NullLocator())
    which.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def energy_section(page: Page, result: dict[str, Any]) -> None:
    """Curves of explained variance with their null, and the table of k."""
    rows = [row for row in result["layers"] if row["energy"]]
    page.heading("Task energy")
    page.text(result["notes"]["energy"])
    figure, (left, right) = new_figure(12, 4, ncols=2)
    groups = [("energy", "pretrained", BLUE), ("random_energy", "random weights", GRAY)]
    for key, label, color in groups:
        for i, row in enumerate(rows):
            curve = row[key]["curve"]
            left.plot(
                range(1, len(curve) + 1),
                curve,
                color=color,
                alpha=max(0.08, 3 / len(rows)),
                lw=1,
                label=label if i == 0 else None,
            )
        right.plot(
            [row[key]["k"]["0.9"] for row in rows],
            ".",
            color=color,
            label=f"k(0.9), {label}",
            ms=5,
        )
    left.set(xscale="log", xlabel="components", ylabel="explained variance", ylim=(0, 1.02))
    left.axhline(0.9, color=ORANGE, lw=0.8, ls="--")
    right.set(yscale="log", xlabel="layer, in the model's order", ylabel="components")
    plain_ticks(right, "y")
    if any(row["energy"]["aligned_k"] for row in rows):
        right.plot(
            [
                row["energy"]["aligned_k"]["0.9"]
                if row["energy"]["aligned_k"]
                else math.nan
                for row in rows
            ],
            "+",
            color=ORANGE,
            label="label-aligned",
            ms=5,
        )
    for ax in (left, right):
        legend = ax.legend(frameon=False)
        for handle in legend.legend_handles:
            handle.set_alpha(1)
    page.figure(
        figure,
        "Left: explained variance of the features at every layer's input (dashed: 0.9). Right: the"
        " components that it takes.",
    )
    page.table(
        [
            {
                "layer": row["name"],
                "width": row["in_features"],
                "k(0.9)": row["energy"]["k"]["0.9"],
                "k(0.95)": row["energy"]["k"]["0.95"],
                "k(0.99)": row["energy"]["k"]["0.99"],
                "random k(0.9)": row["random_energy"]["k"]["0.9"],
                "random k(0.99)": row["random_energy"]["k"]["0.99"],
                "aligned k(0.9)": row["energy"]["aligned_k"]
                and row["energy"]["aligned_k"]["0.9"],
                "effective rank": row["energy"]["effective_rank"],
                "constant": row["energy"]["dead"],
            }
            for row in rows
        ],
        f"Features at the inputs of layers; {rows[0]['energy']['samples']:,d} rows each",
    )


def winning_section(page: Page, result: dict[str, Any]) -> None:
    """Trials at random positions, and the exceptions."""
    page.heading("Winning slices")
    page.text(result["notes"]["winning"])
    tried = [w for w in result["winning"] if w["trials"]]
    if tried:
        figure, (left, right) = new_figure(
            12, 0.9 + 0.42 * len(tried), ncols=2, sharey=True
        )
        for i, w in enumerate(tried):
            left.plot(
                [t["drop"] for t in w["trials"]],
                [i] * len(w["trials"]),
                "o",
                color=BLUE,
                alpha=0.5,
                ms=6,
            )
            right.plot(
                [s / w["expected"] for s in w["shares"]],
                [i] * len(w["shares"]),
                "|",
                color=BLUE,
                alpha=0.5,
                ms=11,
            )
        left.axvline(0, color=GRAY, lw=0.8)
        right.axvline(1, color=GRAY, lw=0.8)
        left.set_yticks(range(len(tried)), [w["name"] for w in tried], fontsize=8)
        left.set_xlabel(
            f"fall of the loss after {result['options']['steps']} steps, one dot per position"
        )
        right.set(
            xscale="log", xlabel="share of the gradient over r/d, one mark per position"
        )
        left.invert_yaxis()
        page.figure(
            figure,
            f"Slices of r = {result['options']['r']} trained alone, one at a time, at random"
            " positions.",
        )
        page.table(
            [
                {
                    "layer": w["name"],
                    "positions": len(w["trials"]),
                    "loss before": w["trials"][0]["before"],
                    "least drop": min(t["drop"] for t in w["trials"]),
                    "largest drop": max(t["drop"] for t in w["trials"]),
                    "CV of the drop": w["drop_cv"],
                    "CV after one step": w["one_step_cv"],
                    "CV of the share": w["share_cv"],
                    "winners": w["winners"],
                }
                for w in tried
            ]
        )
    named = [
        {"layer": w["name"], "exceptions": "; ".join(w["exceptions"])}
        for w in result["winning"]
        if w["exceptions"]
    ]
    if named:
        page.heading("Exceptions", level=3)
        page.table(named)
    else:
        page.text(
            "No exceptions: no dead inputs, no flagged blocks, no position with a tenth or five"
            " times its share of the gradient."
        )


def tangent_section(page: Page, result: dict[str, Any]) -> None:
    """Spectra of the slice tangents and what training sets of growing size leave invisible."""
    page.heading("Slice tangents and examples")
    page.text(result["notes"]["tangent"])
    figure, (left, right) = new_figure(12, 4, ncols=2)
    for row in result["tangent"]:
        together = row is result["tangent"][-1] and len(result["tangent"]) > 1
        style = {
            "color": ORANGE if together else BLUE,
            "lw": 2 if together else 1,
            "alpha": 1 if together else 0.5,
        }
        left.plot(
            range(1, len(row["spectrum"]) + 1),
            [max(v, 1e-9) for v in row["spectrum"]],
            **style,
        )
        curve = row["invisible_by_examples"]
        right.plot(
            [int(n) for n in curve],
            list(curve.values()),
            marker=".",
            label="all together" if together else None,
            **style,
        )
    left.set(yscale="log", xlabel="singular value", ylabel="relative to the largest")
    right.set(
        xlabel="training examples",
        ylabel="invisible share of the pool's tangent",
        ylim=(0, 1.02),
    )
    right.legend(frameon=False)
    page.figure(
        figure,
        "Left: spectrum of the slices' Jacobian on the pool. Right: what training sets of growing"
        " size leave invisible.",
    )
    page.table(
        [
            {
                "slices": row["name"],
                "parameters": row["parameters"],
                "pool": row["examples"],
                "C": row["outputs"],
                "rank (1e-6)": row["rank"],
                "rank (1e-3)": row["rank_1e-3"],
                "pool bounds R": row["saturated"],
                "effective rank": row["effective_rank"],
                "top five": row["top_share"],
                "aligned with labels": row["label_alignment"],
                "n_min": row["n_min"],
                "2 R": row["advised"],
                "invisible": row["invisible"],
            }
            for row in result["tangent"]
        ],
        "R: rank on the pool; invisible: share of the pool's tangent outside the span of as many"
        " training examples",
    )


def balance_section(page: Page, result: dict[str, Any]) -> None:
    """Flagged blocks and the table of ratios with both nulls."""
    page.heading("Spectral balance")
    page.text(result["notes"]["balance"], note=True)
    flagged = [
        {
            "layer": row["name"],
            "axis": axis,
            "features": f"{f['start']} to {f['stop'] - 1}",
            "why": f["why"],
        }
        for row in result["layers"]
        for axis, found in row["balance"].items()
        for f in found["flagged"]
    ]
    figure, axes = new_figure(12, 3.4, ncols=2)
    for ax, axis, title in zip(
        axes, ("column", "row"), ("input features", "output features"), strict=True
    ):
        rows = [row["balance"][axis] for row in result["layers"] if axis in row["balance"]]
        for i, found in enumerate(rows):
            middle = sorted(found["energies"])[len(found["energies"]) // 2]
            ax.plot(
                [i] * len(found["energies"]),
                [e / middle for e in found["energies"]],
                "_",
                color=BLUE,
                alpha=0.5,
                ms=4,
            )
        ax.plot(
            [i for i, f in enumerate(rows) for _ in f["flagged"]],
            [
                f["energies"][g["group"]] / sorted(f["energies"])[len(f["energies"]) // 2]
                for f in rows
                for g in f["flagged"]
            ],
            "o",
            mfc="none",
            color=ORANGE,
            ms=6,
        )
        ax.set(
            yscale="log",
            xlabel="layer, in the model's order",
            title=title,
            ylabel="energy over the median group's",
        )
        plain_ticks(ax, "y")
    page.figure(
        figure,
        "Energy of each contiguous group of features; circles: flagged (by energy or by profile).",
    )
    if flagged:
        page.table(
            flagged, "Blocks where a contiguous slice would behave unlike the others"
        )
    else:
        page.text("No block is flagged.")
    page.table(
        [
            {
                "layer": row["name"],
                "axis": axis,
                "groups": b["groups"],
                "energy ratio": b["energy_ratio"],
                "shuffled": b["permutation"]["energy_ratio"]["mean"],
                "Gaussian": b["gaussian"]["energy_ratio"]["mean"],
                "profile ratio": b["profile_ratio"],
                "shuffled ": b["permutation"]["profile_ratio"]["mean"],
                "Gaussian ": b["gaussian"]["profile_ratio"]["mean"],
                "effective ranks": (
                    f"{b['effective_rank_min']:.1f} to {b['effective_rank_max']:.1f}"
                ),
            }
            for row in result["layers"]
            for axis, b in row["balance"].items()
        ],
        "Ratios between contiguous groups beside their means under both nulls",
    )


def coverage_section(page: Page, found: dict[str, Any]) -> None:
    """How much of the weights a training would reach."""
    page.heading("Coverage")
    figure, ax = new_figure(12, 3)
    ax.step([0, *found["steps"]], [0, *found["share"]], where="post", color=BLUE)
    ax.set(
        xlabel="optimizer steps",
        ylabel="share of the weights",
        ylim=(0, 1.02),
        xlim=(0, found["total_steps"] * 1.02),
    )
    page.figure(
        figure,
        f"r = {found['r']}, a move every {found['interval']} steps: {found['share'][-1]:.0%} of the"
        f" weights' entries after {found['total_steps']:,d} steps.",
    )


def short_name(model: str) -> str:
    """The last two parts of a path; a hub id as it is."""
    return "/".join(model.rstrip("/").split("/")[-2:])
