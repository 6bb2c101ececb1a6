"""Budgets of a comparison, and what the planner says before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from slicefine.compare.ways import Way
from slicefine.plan.estimate import estimate
from slicefine.plan.workloads import workload_of
from slicefine.training.data import UserError
from slicefine.training.loading import location
from slicefine.training.recipe import Recipe

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_AUTO = {
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}


def budgets_of(texts: Sequence[str]) -> dict[str, float]:
    """``memory=2GiB``, ``params=500K``, ``seconds=60`` as numbers. Raises UserError for others."""
    found: dict[str, float] = {}
    for text in texts:
        parts = re.fullmatch(
            r"(memory|params|seconds)=([0-9.]+(?:e[0-9]+)?)([KMG]?(?:iB)?)", text, re.I
        )
        try:
            assert parts is not None
            value = float(parts[2]) * _UNITS[parts[3].upper()]
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(
                f"--budget {text}: expected memory=2GiB, params=500K or seconds=60 (of one training)"
            ) from error
        found[parts[1].lower()] = value
    return found


def plan(recipe: Recipe, ways: Sequence[Way], labels: int) -> dict[str, dict[str, Any]]:
    """Of each method {"peak_bytes", "trainable"} of a step without the head that all train, or
    {"unplanned": why} where a method does not run on tensors without values.
    """
    import transformers

    place, extra = location(str(recipe.model))
    config = transformers.AutoConfig.from_pretrained(place, **extra)
    if labels:
        config.num_labels = labels
        config.problem_type = "single_label_classification"
    name = "float32" if recipe.dtype == "auto" else recipe.dtype
    work = workload_of(config, place, getattr(torch, name), _AUTO[str(recipe.task)])
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        if way.kind == "frozen":
            # the head is all that trains: nothing below it is kept for a backward pass
            found[way.name] = {"peak_bytes": _weights(work.build()), "trainable": 0}
            continue
        method = way.planned(str(recipe.task))
        try:
            seen = estimate(work, method, recipe.batch_size, recipe.max_length, whole=True)
        except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
            found[way.name] = {"unplanned": f"{type(error).__name__}: {error}"[:200]}
            continue
        found[way.name] = {"peak_bytes": seen.peak_bytes, "trainable": seen.trainable}
    return found


def _weights(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def struck(
    way: Way,
    planned: dict[str, Any],
    budgets: dict[str, float],
    seconds: float | None = None,
) -> str:
    """Why a method is left out; "" for one that stays."""
    if way.missing:
        return way.missing
    for key, what in (("memory", "peak_bytes"), ("params", "trainable")):
        if key not in budgets:
            continue
        if what not in planned:
            return f"cannot be planned, so {key} is not known ({planned['unplanned']})"
        if planned[what] > budgets[key]:
            return f"plans {planned[what]:,d} of {key}, the budget is {budgets[key]:,.0f}"
    if seconds is not None and seconds > budgets["seconds"]:
        return f"a training would take {seconds:,.0f} s, the budget is {budgets['seconds']:,.0f}"
    return ""
