"""Where two deltas differ, weight by weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slicefine.deltas.delta import Delta, WeightDelta
from slicefine.slices import write_slice


@dataclass(frozen=True)
class Difference:
    """One weight or whole parameter that either delta changes. entries, other_entries: numbers of
    entries that each of them changes.

    shared: entries that both change; conflicts: shared entries with different new values; largest:
    the largest absolute difference of new values among them.
    """

    key: str
    entries: int
    other_entries: int
    shared: int
    conflicts: int
    largest: float


def difference(delta: Delta, other: Delta) -> list[Difference]:
    """What two deltas change, by state-dict key in the order of the first. Raises ValueError if a
    weight has two shapes.
    """
    rows = []
    keys = dict.fromkeys([*delta.weights, *delta.whole, *other.weights, *other.whole])
    for key in keys:
        mine, theirs = _dense(delta, key), _dense(other, key)
        if mine is None or theirs is None:
            sizes = [0 if side is None else int(side[1].sum()) for side in (mine, theirs)]
            rows.append(Difference(key, sizes[0], sizes[1], 0, 0, 0.0))
            continue
        (values, changed), (other_values, other_changed) = mine, theirs
        if values.shape != other_values.shape:
            raise ValueError(
                f"{key} is {tuple(values.shape)} in one delta and {tuple(other_values.shape)} in"
                " the other"
            )
        # only here can the two conflict: elsewhere one of them keeps the base's value
        shared = changed & other_changed
        a, b = values[shared], other_values[shared]
        conflicts = a != b
        largest = (
            float((a[conflicts].double() - b[conflicts].double()).abs().max())
            if bool(conflicts.any())
            else 0.0
        )
        rows.append(
            Difference(
                key,
                int(changed.sum()),
                int(other_changed.sum()),
                int(shared.sum()),
                int(conflicts.sum()),
                largest,
            )
        )
    return rows


def _dense(delta: Delta, key: str) -> tuple[Tensor, Tensor] | None:
    """(new values, which entries they are), both of the weight's shape (out, in)."""
    if key in delta.whole:
        new = delta.whole[key].new
        return new, torch.ones_like(new, dtype=torch.bool)
    weight: WeightDelta | None = delta.weights.get(key)
    if weight is None:
        return None
    # (out, in), one weight at a time: rows, columns and blocks are then compared alike
    values, changed = (
        torch.zeros(weight.shape, dtype=weight.dtype),
        torch.zeros(weight.shape, dtype=torch.bool),
    )
    for patch in weight.patches:
        write_slice(values, patch.rows, patch.cols, patch.new)
        write_slice(
            changed, patch.rows, patch.cols, torch.ones_like(patch.new, dtype=torch.bool)
        )
    return values, changed
