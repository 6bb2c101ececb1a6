"""From the scores of the methods to one sentence, gates and rows."""

from __future__ import annotations

import statistics
from typing import Any

import numpy

from slicefine.compare.statistics import ALPHA, compare, holm

# A fine-tune whose loss on the original data grew by more than this share is not recommended.
FORGETTING = 0.1


def judge(
    finals: dict[str, list[dict[str, Any]]],
    plans: dict[str, dict[str, Any]],
    binary: bool,
    seed: int,
) -> dict[str, Any]:
    """The leader, what is tied with it, which tied method is cheapest, and the sentence.

    Cheapest by planned memory, then by trained parameters: times are noisy, and the verdict is to be
    the same when run again.

    Args:
        finals: of each method its whole trainings, one a seed, scored on the test rows.
    """
    failed = {n: r for n, r in finals.items() if any("failed" in x for x in r)}
    kept = {n: r for n, r in finals.items() if n not in failed}
    if not kept:
        return {"verdict": "No method trained with a finite loss.", "recommended": None}
    rows = {n: numpy.array([x["test"]["rows"] for x in r]) for n, r in kept.items()}
    means = {n: statistics.fmean(x["test"]["metric"] for x in r) for n, r in kept.items()}
    cost = {n: _cost(n, kept[n], plans) for n in kept}
    leader = min(kept, key=lambda n: (-means[n], *cost[n]))
    found = {n: compare(rows[leader], rows[n], binary, seed) for n in kept if n != leader}
    corrected = holm({n: d.p for n, d in found.items()})
    tied = [n for n in kept if n == leader or corrected[n] >= ALPHA]
    gates = {n: _gates(n, kept, failed) for n in finals}
    able = [n for n in tied if all(g["passed"] for g in gates[n])]
    recommended = min(able, key=lambda n: cost[n]) if able else None
    return {
        "leader": leader,
        "tied": sorted(tied),
        "recommended": recommended,
        "means": means,
        "gates": gates,
        "differences": {
            n: {**d.__dict__, "p_holm": corrected[n]} for n, d in found.items()
        },
        "verdict": _sentence(leader, recommended, tied, means, found, corrected),
    }


def _cost(name: str, results: list[dict[str, Any]], plans: dict[str, Any]) -> Any:
    # one that cannot be planned is the dearest: what is not known is not recommended as cheap
    peak = plans[name].get("peak_bytes", float("inf"))
    return peak, results[0]["trainable"], name


def _gates(name: str, kept: dict[str, Any], failed: dict[str, Any]) -> list[dict[str, Any]]:
    if name in failed:
        reason = next(x["failed"] for x in failed[name] if "failed" in x)
        return [{"gate": "finite loss", "passed": False, "reason": reason}]
    gates = [{"gate": "finite loss", "passed": True, "reason": "in every training"}]
    if "frozen" in kept and "original" in kept[name][0]:
        mine, base = (
            statistics.fmean(x["original"]["loss"] for x in kept[n])
            for n in (name, "frozen")
        )
        gates.append(
            {
                "gate": "original data",
                "passed": mine <= base * (1 + FORGETTING),
                "reason": f"loss {mine:.4g}, with the base frozen {base:.4g}",
            }
        )
    return gates


def _sentence(
    leader: str,
    recommended: str | None,
    tied: list[str],
    means: dict[str, float],
    found: dict[str, Any],
    corrected: dict[str, float],
) -> str:
    others = [n for n in tied if n != leader]
    if not others:
        beaten = min(found.values(), key=lambda d: d.mean) if found else None
        margin = (
            f", ahead of the next by {beaten.mean:.3g} (95 % {beaten.low:.3g} to"
            f" {beaten.high:.3g}; p = {max(corrected.values()):.2g} after Holm)"
            if beaten
            else ""
        )
        head = f"{leader} is best ({means[leader]:.4g}){margin}"
    else:
        widest = max(found[n].high for n in others)
        head = (
            f"{leader} ({means[leader]:.4g}) and {', '.join(others)} are tied: this test set does"
            f" not tell them apart (differences up to {widest:.3g} are within 95 %)"
        )
    if recommended is None:
        return f"{head}; none of them passes its gates, so none is recommended."
    return f"{head}; recommended, as the cheapest that passes its gates: {recommended}."
