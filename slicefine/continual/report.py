"""The page and plots of continual learning, in the style of `slicefine diagnose`."""

from __future__ import annotations

from typing import Any

from slicefine.continual.metrics import FORMULAS
from slicefine.continual.sweep import ATTACHED, Sweep
from slicefine.diagnose.html import Page, new_figure


def continual_page(sweep: Sweep, title: str, subtitle: str) -> Page:
    """Matrices, measures, drifts, fits and gains of a sweep."""
    page = Page(title, subtitle)
    page.heading("Measures")
    page.text(
        "a[i][t] is the accuracy on task t after training on task i, of T. "
        + ". ".join(FORMULAS)
        + "."
    )
    page.text(
        f"Tasks, in order: {', '.join(sweep.tasks)}. Sizes are the {sweep.over} of"
        f" {'the slices' if sweep.over == 'rank' else 'the model'}."
    )
    rows = []
    for mode in sweep.modes:
        for size in sweep.sizes(mode):
            mean = sweep.mean(mode, size)
            kept = {
                k: mean[k]
                for k in (
                    "AA",
                    "AF",
                    "LA",
                    "BWT",
                    "JA",
                    "AF_by_LA",
                    "base_drop",
                    "weight_drift",
                )
            }
            if not sweep.forgets(mode, size):
                # what was never learned has nothing to forget: a 0 would read as a success
                kept.update(AF=None, BWT=None, AF_by_LA=None)
            rows.append(
                {
                    "mode": mode,
                    sweep.over: size,
                    **kept,
                    "output drift": mean["output_drift"]["mean"],
                    "trained": mean["parameters"],
                }
            )
    page.table(
        rows,
        "means over seeds; JA: joint training on all tasks; drifts: of logits (L2) and of weights"
        " (relative)",
    )
    for warning in sweep.warnings():
        page.text(warning, note=True)
    if "attach" in sweep.modes:
        page.text(ATTACHED + ".", note=True)
    _trend_figure(page, sweep)
    page.heading("Accuracy matrices")
    for mode in sweep.modes:
        _matrices(page, sweep, mode)
    page.heading("Trends over sizes")
    for mode in sweep.modes:
        _trends(page, sweep, mode)
    return page


def _trend_figure(page: Page, sweep: Sweep) -> None:
    figure, axes = new_figure(10, 3.4, ncols=3)
    for ax, key in zip(axes, ("AA", "AF", "LA"), strict=True):
        for mode in sweep.modes:
            sizes = sweep.sizes(mode)
            ax.plot(
                sizes, [sweep.mean(mode, s)[key] for s in sizes], marker="o", label=mode
            )
        ax.set(title=key, xlabel=sweep.over, xscale="log")
        ax.set_xticks(
            sweep.sizes(sweep.modes[0]), [str(s) for s in sweep.sizes(sweep.modes[0])]
        )
        ax.minorticks_off()
    axes[0].legend(frameon=False)
    page.figure(
        figure, f"average accuracy, forgetting and learning accuracy by {sweep.over}"
    )


def _matrices(page: Page, sweep: Sweep, mode: str) -> None:
    sizes = sweep.sizes(mode)
    figure, axes = new_figure(3.4 * len(sizes) + 0.6, 3.2, ncols=len(sizes), squeeze=False)
    for ax, size in zip(axes[0], sizes, strict=True):
        matrix = sweep.mean(mode, size)["matrix"]
        ax.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
        if len(matrix) <= 6:
            for i, row in enumerate(matrix):
                for t, value in enumerate(row):
                    ax.text(
                        t,
                        i,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        color="w" if value > 0.6 else "k",
                        fontsize=8,
                    )
        ticks = range(len(matrix))
        ax.set_xticks(ticks, [str(t + 1) for t in ticks])
        ax.set_yticks(ticks, [str(t + 1) for t in ticks])
        ax.set(
            title=f"{mode}, {sweep.over} {size}",
            xlabel="tested on task",
            ylabel="trained up to task",
        )
    page.figure(figure, f"mode {mode}")


def _trends(page: Page, sweep: Sweep, mode: str) -> None:
    trends = sweep.trends(mode)
    if not trends:
        page.text(f"{mode}: one size only, no trend.")
        return
    page.heading(mode, level=3)
    for key, what in (("weight_drift", "relative weight drift"), ("AF", "AF")):
        law: dict[str, Any] | None = trends[key]
        if law is not None:
            page.text(
                f"{what} = {law['gamma']:.3g} {sweep.over}^{-law['beta']:+.3g}, R² {law['r2']:.3f}"
                f" over {law['points']} sizes"
            )
    page.table(trends["gains_AA"], "what AA gains by each step to the next size")
    page.table(trends["gains_less_forgetting"], "by how much AF falls")
    page.text(f"Knee: {sweep.over} {trends['knee']} ({trends['knee_is']}).", note=True)
