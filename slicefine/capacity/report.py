"""Pages and plots of patches, capacity and continual learning, in the style of `slicefine
diagnose`.
"""

from __future__ import annotations

from slicefine.capacity.patching import Patch
from slicefine.diagnose.html import Page, new_figure


def patch_page(patch: Patch, title: str, subtitle: str) -> Page:
    """What a hot-fix did: the three numbers, and what to know about it."""
    assert patch.report is not None
    report = patch.report
    page = Page(title, subtitle)
    page.heading("Efficacy, locality, generality")
    page.text(
        "Efficacy: share of the edits answered as asked. Locality: share of the listed other"
        " answers that stayed, and beside it how many answers changed that nothing listed."
        " Generality: share of slightly perturbed edits answered as asked."
    )
    rows = [
        {"number": "efficacy", "share": report.efficacy, "of": report.edits},
        {"number": "locality (kept answers)", "share": report.locality, "of": report.kept},
        {
            "number": "kept, logits equal to the bit",
            "share": report.kept_bit_equal,
            "of": report.kept,
        },
        {
            "number": "held-out flips (fewer is better)",
            "share": report.held_out_flips,
            "of": report.held_out,
        },
        {"number": "generality", "share": report.generality, "of": report.perturbed},
        {
            "number": "the same before the patch",
            "share": report.generality_before,
            "of": report.perturbed,
        },
    ]
    page.table(rows)
    figure, ax = new_figure(8, 2.8)
    shown = [r for r in rows if r["share"] is not None]
    ax.barh([r["number"] for r in shown], [r["share"] for r in shown], color="C0")
    ax.set(xlim=(0, 1), xlabel="share")
    ax.invert_yaxis()
    page.figure(
        figure, f"mode {patch.mode}, method {patch.method}, {patch.parameters:,d} numbers"
    )
    page.heading("What to know")
    for line in patch.warnings:
        page.text(line[0].upper() + line[1:] + ".", note=True)
    return page
