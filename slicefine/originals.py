"""Originals: what stood in every slice before it first became active. Revert, disable and deltas
are made of it.

Values are kept on the host in the weight's dtype and are only ever copied, never computed with:
``(W + D) - D`` differs from W in
11.5 % of entries, a copy in none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slicefine.slices import HOST, SliceSpec, read_slice, write_slice

_LOST = (
    "torch.distributed.checkpoint loads only as much as a new optimizer holds: save the optimizer's"
    " state_dict with torch.save, one file per process, or train with keep_originals=False"
)


@dataclass
class SavedSlice:
    """Values of one slice. rows, cols: (R,), (K,) int64 on the host, None for all; values: (R, K)
    on the host.
    """

    rows: Tensor | None
    cols: Tensor | None
    values: Tensor


class Originals:
    """The originals of the slices of one weight, each entry recorded once, at its first visit.

    spec: the slices that the weight can have. Pieces may share entries (a row crosses a column);
        they agree there.
    """

    def __init__(self, spec: SliceSpec) -> None:
        self.slices: list[SavedSlice] = []
        self._spec = spec
        # until they are joined
        self._most_slices = 16
        self._rows = torch.zeros(spec.out_features, dtype=torch.bool, device=HOST)
        self._cols = torch.zeros(spec.in_features, dtype=torch.bool, device=HOST)
        # blocks: the features of their rows -> (in,) bool, which columns are on record there
        self._blocks: dict[tuple[int, ...], Tensor] = {}
        # Blocks of different rows meet only where r_out does not divide; else each is found by its
        # rows.
        self._rows_overlap = spec.out_features % spec.r_out != 0

    @property
    def nbytes(self) -> int:
        """Host memory of the values, in bytes."""
        return sum(
            saved.values.numel() * saved.values.element_size() for saved in self.slices
        )

    @torch.no_grad()
    def record(self, values: Tensor, rows: Tensor | None, cols: Tensor | None) -> None:
        """Keep ``values`` (R, K), what the weight holds at a slice about to train.

        Entries that are on record already keep what stands there.
        """
        rows, cols = _to_host(rows), _to_host(cols)
        crossing = True
        if rows is not None and cols is not None:
            seen = self._mark(rows, cols)
            if bool(seen.all()):
                return
            crossing = bool(seen.any())
        elif bool(self._rows.all()) or bool(self._cols.all()):
            # the other axis has been everywhere
            return
        elif cols is not None:
            cols, values = _unseen(self._cols, cols, values, 1)
        elif rows is not None:
            rows, values = _unseen(self._rows, rows, values, 0)
        if any(index is not None and not len(index) for index in (rows, cols)):
            # All of it is on record. A process that holds none of the other features of a sharded
            # weight goes on, and records empty values.
            return
        # copy=True: of a tensor on the host `to` alone gives back the caller's, which may go on
        # training
        saved = SavedSlice(rows, cols, values.detach().to("cpu", copy=True))
        for earlier in self.slices if crossing else ():
            # what an earlier slice has changed is not an original any more
            _overlay(saved, earlier, (len(self._rows), len(self._cols)))
        self.slices.append(saved)
        if len(self.slices) > self._most_slices:
            self.join()

    def _mark(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Mark a block as recorded; returns which of its entries were before."""
        seen = self._recorded(rows, cols)
        key = tuple(rows.tolist())
        self._blocks.setdefault(
            key, torch.zeros(len(self._cols), dtype=torch.bool, device=HOST)
        )[cols] = True
        return seen

    def _recorded(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Which entries of a block are on record: (R, K) bool."""
        seen = torch.zeros(len(rows), len(cols), dtype=torch.bool, device=HOST)
        key = tuple(rows.tolist())
        for group, columns in (
            self._blocks.items() if self._rows_overlap else [(key, self._blocks.get(key))]
        ):
            if columns is not None:
                common = (
                    torch.isin(rows, torch.tensor(group, device=HOST))
                    if group != key
                    else torch.ones(len(rows), dtype=torch.bool, device=HOST)
                )
                seen |= common.unsqueeze(1) & columns[cols]
        return seen

    def join(self) -> None:
        """One tensor for all columns, one for all rows, one for all blocks of the same rows: fewer
        and longer copies.
        """
        groups: dict[tuple[int, ...] | str, list[SavedSlice]] = {}
        for saved in self.slices:
            key = (
                "columns"
                if saved.rows is None
                else "rows"
                if saved.cols is None
                else tuple(saved.rows.tolist())
            )
            groups.setdefault(key, []).append(saved)
        self.slices = [_joined(group) for group in groups.values()]
        # As many again: blocks of ever other rows join to nothing, and trying costs a pass over
        # all.
        self._most_slices = 2 * len(self.slices) + 16

    def values(self) -> list[Tensor]:
        return [saved.values for saved in self.slices]

    @torch.no_grad()
    def read(self, weight: Tensor) -> list[Tensor]:
        """What ``weight`` (out, in) holds now at every slice, on the host."""
        return [read_slice(weight, *_on(saved, weight)).to("cpu") for saved in self.slices]

    @torch.no_grad()
    def write(self, weight: Tensor, values: Sequence[Tensor]) -> None:
        """Write one tensor per slice to ``weight`` (out, in)."""
        for saved, value in zip(self.slices, values, strict=True):
            write_slice(weight, *_on(saved, weight), value.to(weight.device))

    def exchange(self, weight: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
        """Write one tensor per slice; returns what stood there, for the way back."""
        before = self.read(weight)
        self.write(weight, values)
        return before

    def holds(self, weight: Tensor) -> bool:
        """Whether ``weight`` (out, in) has the originals at every slice: nothing that trained is in
        it.
        """
        return all(
            same_bits(now, saved.values)
            for now, saved in zip(self.read(weight), self.slices, strict=True)
        )

    def outside(self, weight: Tensor) -> Tensor:
        """A copy of ``weight`` (out, in) with zeros wherever something is on record."""
        rest = weight.detach().clone()
        for saved in self.slices:
            write_slice(rest, *_on(saved, rest), torch.zeros_like(saved.values).to(rest))
        return rest

    def same_outside(self, rest: Tensor, weight: Tensor) -> bool:
        """Whether ``weight`` has the entries of an earlier `outside`, wherever nothing is on record."""
        now = self.outside(weight)
        if now.dtype == rest.dtype:
            return same_bits(now, rest)
        # the coarser of the two dtypes is what they can have in common
        coarse = min(now.dtype, rest.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        return same_bits(now.to(coarse), rest.to(coarse))

    def take(self, weight: Tensor) -> None:
        """From now on the originals are what ``weight`` (out, in) holds."""
        for saved, values in zip(self.slices, self.read(weight), strict=True):
            saved.values = values

    def restored(self, weight: Tensor) -> Tensor:
        """(out, in), on the host: the weight as it was before anything trained."""
        original = weight.detach().to("cpu", copy=True)
        self.write(original, self.values())
        return original

    def cast(self, dtype: torch.dtype) -> None:
        """Follow the weight to another dtype."""
        for saved in self.slices:
            saved.values = saved.values.to(dtype)

    def clear(self) -> None:
        """Forget everything: the weight as it stands is the original."""
        self.slices.clear()
        self._blocks.clear()
        self._rows.zero_()
        self._cols.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and None only, so ``torch.load(weights_only=True)`` takes it."""
        return {
            key: [getattr(saved, key) for saved in self.slices]
            for key in ("rows", "cols", "values")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`. Raises ValueError if slices are missing."""
        check_complete(state)
        self.clear()
        for rows, cols, values in zip(
            state["rows"], state["cols"], state["values"], strict=True
        ):
            rows, cols = _to_host(rows), _to_host(cols)
            self.slices.append(SavedSlice(rows, cols, values.to("cpu")))
            if rows is not None and cols is not None:
                self._mark(rows, cols)
            elif cols is not None:
                self._cols[cols] = True
            elif rows is not None:
                self._rows[rows] = True

    def check_covers(self, visited: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless there are originals for every position visited; visited: axis ->
        bool per position.
        """
        for axis, seen in visited.items():
            for position in seen.nonzero().flatten().tolist():
                rows, cols = self._spec.features(axis, position)
                if rows is not None and cols is not None:
                    known = bool(self._recorded(rows, cols).all())
                elif rows is None:
                    # All rows on record are all entries, whatever the columns; below the other way
                    # round.
                    known = bool(self._cols[cols].all()) or bool(self._rows.all())
                else:
                    known = bool(self._rows[rows].all()) or bool(self._cols.all())
                if not known:
                    raise ValueError(
                        f"the loaded slice state has no originals for {axis} position {position},"
                        f" which has trained. {_LOST}"
                    )


def check_complete(state: Mapping[str, Any]) -> None:
    """Raise ValueError if a state of `Originals` has lost some of them."""
    if len({len(state[key]) for key in ("rows", "cols", "values")}) > 1:
        raise ValueError("the loaded slice state has lost originals. " + _LOST)


def set_version(tensor: Tensor, version: int) -> None:
    """Tell autograd that a tensor is again what it was at an earlier version; true only where every
    bit has been restored.
    """
    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))  # pyright: ignore[reportAttributeAccessIssue]


def _unseen(seen: Tensor, index: Tensor, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The part of a slice that has not been recorded, now marked as recorded."""
    new = ~seen[index]
    seen[index] = True
    if bool(new.all()):
        return index, values
    return index[new], values.index_select(dim, new.nonzero().flatten().to(values.device))


def _overlay(saved: SavedSlice, earlier: SavedSlice, shape: tuple[int, int]) -> None:
    """Put what an earlier slice has of the same entries of a weight (out, in) into another."""
    same_kind = (saved.rows is None) == (earlier.rows is None) and (saved.cols is None) == (
        earlier.cols is None
    )
    if same_kind and (saved.rows is None or saved.cols is None):
        # features are recorded once
        return
    mine_r, theirs_r = _common(saved.rows, earlier.rows, shape[0])
    if not len(mine_r):
        return
    # positions within the two slices, not features of the weight
    mine_c, theirs_c = _common(saved.cols, earlier.cols, shape[1])
    # (R', 1) and (K',) broadcast to the grid of the entries that both hold
    saved.values[mine_r.unsqueeze(1), mine_c] = earlier.values[
        theirs_r.unsqueeze(1), theirs_c
    ]


def _joined(slices: list[SavedSlice]) -> SavedSlice:
    """Pieces of whole columns, of whole rows, or of the same rows, as one; where they share entries
    they agree.
    """
    first, dim = slices[0], 0 if slices[0].cols is None else 1
    if len(slices) == 1:
        return first
    indices: list[Tensor] = [saved.cols if dim else saved.rows for saved in slices]  # pyright: ignore[reportAssignmentType]
    # unique() sorts, as searchsorted below needs it
    union = torch.cat(indices).unique()
    shape = list(first.values.shape)
    shape[dim] = len(union)
    values = first.values.new_empty(shape)
    for saved, index in zip(slices, indices, strict=True):
        values.index_copy_(dim, torch.searchsorted(union, index), saved.values)
    return SavedSlice(first.rows if dim else union, union if dim else None, values)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, on the host: NaN is equal to itself, and -0 is not 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # flat first: a tensor without dimensions cannot be viewed as bytes
    return torch.equal(
        *(x.detach().to("cpu").contiguous().view(-1).view(torch.uint8) for x in (a, b))
    )


def _common(
    mine: Tensor | None, theirs: Tensor | None, features: int
) -> tuple[Tensor, Tensor]:
    """Where two sorted sets of features meet: positions in one and in the other; None stands for
    all features.
    """
    everything = torch.arange(features, device=HOST)
    mine, theirs = (
        everything if mine is None else mine,
        everything if theirs is None else theirs,
    )
    inside = torch.isin(mine, theirs)
    return inside.nonzero().flatten(), torch.searchsorted(theirs, mine[inside])


def _to_host(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.to("cpu", copy=True)


def _on(saved: SavedSlice, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    rows, cols = saved.rows, saved.cols
    return None if rows is None else rows.to(weight.device), (
        None if cols is None else cols.to(weight.device)
    )
