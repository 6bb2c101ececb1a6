"""Deltas combined into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slicefine.deltas.delta import (
    Delta,
    DeltaError,
    FullDelta,
    SliceValues,
    WeightDelta,
)
from slicefine.deltas.values import meet


def weighted(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """old + sum of weights times (new - old) for every entry that any of the deltas changes, in
    float64, rounded once.

    Entries that one delta alone changes, with weight 1, are copied. Raises DeltaError unless all
    deltas have the same base and whole modules (heads) come from one of them only.
    """
    first = deltas[0]
    for other in deltas[1:]:
        if other.base.get("sha256") != first.base.get("sha256"):
            raise DeltaError(
                "the adapters were made for different base models; they cannot be combined"
            )
    combined = {}
    # dict.fromkeys: a set that keeps its order, so that equal merges make equal files
    for key in dict.fromkeys(key for delta in deltas for key in delta.weights):
        parts = [
            (d.weights[key], w)
            for d, w in zip(deltas, weights, strict=True)
            if key in d.weights
        ]
        combined[key] = _weight(key, parts)
    whole: dict[str, FullDelta] = {}
    for delta, scale in zip(deltas, weights, strict=True):
        for key, entry in delta.whole.items():
            if key in whole:
                raise DeltaError(
                    f"{key} is fully trained in several of the adapters; it can come from one"
                    " of them only"
                )
            whole[key] = (
                entry
                if scale == 1
                else FullDelta(
                    entry.old, _blend(entry.old, [(entry.new, scale)]), entry.replaces
                )
            )
    info = {
        "combined": [
            {"sha256": d.sha256, "weight": w} for d, w in zip(deltas, weights, strict=True)
        ]
    }
    return Delta(combined, whole, first.config, first.base, info)


def _weight(key: str, parts: list[tuple[WeightDelta, float]]) -> WeightDelta:
    first, _ = parts[0]
    for i, (a, _) in enumerate(parts):
        for b, _ in parts[:i]:
            if any(
                meet(p, q) and _strip(p) != _strip(q) for p in a.patches for q in b.patches
            ):
                raise DeltaError(
                    f"two adapters change {key} along different axes (rows of one cross columns of"
                    " another, or blocks overlap in part); only what neither touches is known"
                    " there. Apply them with set_adapter([...], stack=True) instead"
                )
    strips: dict[tuple[int, ...] | str, list[tuple[SliceValues, float]]] = {}
    for weight, scale in parts:
        for patch in weight.patches:
            strips.setdefault(_strip(patch), []).append((patch, scale))
    combined = [_union(same, 0 if strip == "rows" else 1) for strip, same in strips.items()]
    return replace(first, patches=combined)


def _strip(patch: SliceValues) -> tuple[int, ...] | str:
    """What patches must have in common to be one: whole columns, whole rows, or for blocks the same
    rows.
    """
    return (
        "columns"
        if patch.rows is None
        else "rows"
        if patch.cols is None
        else tuple(patch.rows.tolist())
    )


def _union(patches: list[tuple[SliceValues, float]], dim: int) -> SliceValues:
    """Patches of one strip as one, along its columns (dim 1) or rows (dim 0)."""
    indices: list[Tensor] = [p.cols if dim else p.rows for p, _ in patches]  # pyright: ignore[reportAssignmentType]
    union = torch.cat(indices).unique()
    where = [torch.searchsorted(union, index) for index in indices]
    shape = list(patches[0][0].old.shape)
    shape[dim] = len(union)
    old = patches[0][0].old.new_empty(shape)
    for (patch, _), place in zip(patches, where, strict=True):
        # Where patches share features, so they do old values: all are of one base.
        old.index_copy_(dim, place, patch.old)
    new = old.clone()
    count = torch.zeros(len(union), dtype=torch.int64)
    for place in where:
        count[place] += 1
    # alone in its features: nothing to add up
    for (patch, scale), place in zip(patches, where, strict=True):
        alone = count[place] == 1
        values = _blend(patch.old, [(patch.new, scale)])
        new.index_copy_(
            dim, place[alone], values.index_select(dim, alone.nonzero().flatten())
        )
    if bool((count > 1).any()):
        total = old.double()
        for (patch, scale), place in zip(patches, where, strict=True):
            # Only sums go through float64; a patch alone in its features was copied above.
            total.index_add_(dim, place, scale * (patch.new.double() - patch.old.double()))
        # features that several patches have, into the (R, K) values of the union
        shared = (count > 1).nonzero().flatten()
        new.index_copy_(dim, shared, total.index_select(dim, shared).to(new.dtype))
    return SliceValues(
        patches[0][0].rows if dim else union, union if dim else None, old, new
    )


def _blend(old: Tensor, terms: list[tuple[Tensor, float]]) -> Tensor:
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    total = old.double()
    for new, scale in terms:
        total = total + scale * (new.double() - old.double())
    return total.to(old.dtype)
