"""The advice as an HTML page with plots."""

from __future__ import annotations

from typing import Any

from slicefine.config import SliceConfig
from slicefine.diagnose.html import Page, new_figure
from slicefine.diagnose.report import (
    BLUE,
    GRAY,
    ORANGE,
    energy_section,
    short_name,
    subtitle,
    tangent_section,
    winning_section,
)


def advice_page(found: dict[str, Any]) -> Page:
    """A page of the advice that `slicefine advise` writes as JSON."""
    page = Page(
        f"slicefine advise: {short_name(found.get('model', 'model'))}", subtitle(found)
    )
    page.heading("Recommendation")
    page.text(
        "Ranked by the measured fall of the held-out loss against the alternative; lines without an"
        " effect are rules and costs."
    )
    page.table(
        [
            {
                "": i,
                "setting": line["setting"],
                "use": line["value"],
                "held-out loss": None if line["effect"] is None else -line["effect"],
                "evidence": line["evidence"],
            }
            for i, line in enumerate(found["lines"], 1)
        ]
    )
    for claim in found["claims"]:
        page.text(claim, note=True)
    page.heading("Learning rate")
    figure, (left, right) = new_figure(12, 3.6, ncols=2)
    test = found["range_test"]
    left.plot(test["lrs"], test["losses"], color=GRAY, lw=0.8, label="loss")
    left.plot(test["lrs"], test["smoothed"], color=BLUE, label="smoothed")
    left.axvspan(test["low"], test["high"], color=BLUE, alpha=0.08)
    left.axvline(found["lr"], color=ORANGE, ls="--", label="recommended")
    low, high = min(test["smoothed"]), max(test["smoothed"])
    left.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="loss",
        ylim=(low - 0.3 * (high - low), high + 0.3 * (high - low)),
    )
    left.legend(frameon=False)
    tried = [c for c in found["candidates"] if c["held_loss"] is not None]
    right.barh(
        [c["name"] for c in tried],
        [c["held_loss"] for c in tried],
        color=[ORANGE if i == 0 else BLUE for i in range(len(tried))],
    )
    losses = [c["held_loss"] for c in tried]
    margin = max(max(losses) - min(losses), 1e-3 * max(losses))
    right.set(
        xlabel="held-out loss after a short training",
        xlim=(min(losses) - margin, max(losses) + 0.5 * margin),
    )
    right.invert_yaxis()
    page.figure(
        figure,
        "Left: range test, shaded where the loss falls. Right: candidates at the recommended"
        " learning rate (the axis does not start at 0).",
    )
    page.heading("Configuration")
    page.code(SliceConfig.from_dict(found["config"]).to_json())
    energy_section(page, found["survey"])
    winning_section(page, found["survey"])
    if found["survey"]["tangent"]:
        tangent_section(page, found["survey"])
    return page
