"""The ledger: what stood in every slice before it first became active. Revert, disable and deltas
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

from slicefine.slices import SliceSpec, read_slice, write_slice

_LOST = (
    "torch.distributed.checkpoint loads only as much as a new optimizer holds: save the optimizer's"
    " state_dict with torch.save, one file per process, or train with keep_originals=False"
)


@dataclass
class Piece:
    """Values of one slice. rows, cols: (R,), (K,) int64 on the host, None for all; values: (R, K)
    on the host.
    """

    rows: Tensor | None
    cols: Tensor | None
    values: Tensor


class Ledger:
    """The originals of the slices of one weight, each entry recorded once, at its first visit.

    spec: the slices that the weight can have. Pieces may share entries (a row crosses a column);
        they agree there.
    """

    def __init__(self, spec: SliceSpec) -> None:
        self.pieces: list[Piece] = []
        self._spec = spec
        self._most_pieces = 16  # until they are joined
        self._rows = torch.zeros(spec.out_features, dtype=torch.bool)
        self._cols = torch.zeros(spec.in_features, dtype=torch.bool)
        # blocks: the features of their rows -> (in,) bool, which columns are on record there
        self._blocks: dict[tuple[int, ...], Tensor] = {}
        self._rows_overlap = spec.out_features % spec.r_out != 0

    @property
    def nbytes(self) -> int:
        """Host memory of the values, in bytes."""
        return sum(piece.values.numel() * piece.values.element_size() for piece in self.pieces)

    @torch.no_grad()
    def record(self, values: Tensor, rows: Tensor | None, cols: Tensor | None) -> None:
        """Keep ``values`` (R, K), what the weight holds at a slice about to train, where the ledger
        has nothing yet.
        """
        rows, cols = _to_host(rows), _to_host(cols)
        crossing = True
        if rows is not None and cols is not None:
            seen = self._mark(rows, cols)
            if bool(seen.all()):
                return
            crossing = bool(seen.any())
        elif bool(self._rows.all()) or bool(self._cols.all()):
            return  # the other axis has been everywhere
        elif cols is not None:
            cols, values = _unseen(self._cols, cols, values, 1)
        elif rows is not None:
            rows, values = _unseen(self._rows, rows, values, 0)
        if any(index is not None and not len(index) for index in (rows, cols)):
            return  # all of it is on record; a process that holds none of the other features records empty values
        piece = Piece(rows, cols, values.detach().to("cpu", copy=True))
        for earlier in self.pieces if crossing else ():
            self._overlay(
                piece, earlier
            )  # what an earlier slice has changed is not an original any more
        self.pieces.append(piece)
        if len(self.pieces) > self._most_pieces:
            self.join()

    def _mark(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Mark a block as recorded; returns which of its entries were before."""
        seen = self._recorded(rows, cols)
        key = tuple(rows.tolist())
        self._blocks.setdefault(key, torch.zeros(len(self._cols), dtype=torch.bool))[cols] = True
        return seen

    def _recorded(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Which entries of a block are on record: (R, K) bool."""
        seen = torch.zeros(len(rows), len(cols), dtype=torch.bool)
        key = tuple(rows.tolist())
        for group, columns in (
            self._blocks.items() if self._rows_overlap else [(key, self._blocks.get(key))]
        ):
            if columns is not None:
                common = (
                    torch.isin(rows, torch.tensor(group))
                    if group != key
                    else torch.ones(len(rows), dtype=torch.bool)
                )
                seen |= common.unsqueeze(1) & columns[cols]
        return seen

    def _overlay(self, piece: Piece, earlier: Piece) -> None:
        same_kind = (piece.rows is None) == (earlier.rows is None) and (piece.cols is None) == (
            earlier.cols is None
        )
        if same_kind and (piece.rows is None or piece.cols is None):
            return  # features are recorded once
        mine_r, theirs_r = _common(piece.rows, earlier.rows, len(self._rows))
        if not len(mine_r):
            return
        mine_c, theirs_c = _common(piece.cols, earlier.cols, len(self._cols))
        piece.values[mine_r.unsqueeze(1), mine_c] = earlier.values[theirs_r.unsqueeze(1), theirs_c]

    def join(self) -> None:
        """One piece for all columns, one for all rows, one for all blocks of the same rows: fewer
        and longer copies.
        """
        groups: dict[tuple[int, ...] | str, list[Piece]] = {}
        for piece in self.pieces:
            key = (
                "columns"
                if piece.rows is None
                else "rows"
                if piece.cols is None
                else tuple(piece.rows.tolist())
            )
            groups.setdefault(key, []).append(piece)
        self.pieces = [_joined(group) for group in groups.values()]
        self._most_pieces = 2 * len(self.pieces) + 16

    def originals(self) -> list[Tensor]:
        return [piece.values for piece in self.pieces]

    @torch.no_grad()
    def read(self, weight: Tensor) -> list[Tensor]:
        """What ``weight`` (out, in) holds now at every piece, on the host."""
        return [read_slice(weight, *_on(piece, weight)).to("cpu") for piece in self.pieces]

    @torch.no_grad()
    def write(self, weight: Tensor, values: Sequence[Tensor]) -> None:
        """Write one tensor per piece to ``weight`` (out, in)."""
        for piece, value in zip(self.pieces, values, strict=True):
            write_slice(weight, *_on(piece, weight), value.to(weight.device))

    def exchange(self, weight: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
        """Write one tensor per piece; returns what stood there, for the way back."""
        before = self.read(weight)
        self.write(weight, values)
        return before

    def holds(self, weight: Tensor) -> bool:
        """Whether ``weight`` (out, in) has the originals at every piece: nothing that trained is in
        it.
        """
        return all(
            same_bits(now, piece.values)
            for now, piece in zip(self.read(weight), self.pieces, strict=True)
        )

    def take(self, weight: Tensor) -> None:
        """From now on the originals are what ``weight`` (out, in) holds."""
        for piece, values in zip(self.pieces, self.read(weight), strict=True):
            piece.values = values

    def restored(self, weight: Tensor) -> Tensor:
        """(out, in), on the host: the weight as it was before anything trained."""
        original = weight.detach().to("cpu", copy=True)
        self.write(original, self.originals())
        return original

    def cast(self, dtype: torch.dtype) -> None:
        """Follow the weight to another dtype."""
        for piece in self.pieces:
            piece.values = piece.values.to(dtype)

    def clear(self) -> None:
        """Forget everything: the weight as it stands is the original."""
        self.pieces.clear()
        self._blocks.clear()
        self._rows.zero_()
        self._cols.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and None only, so ``torch.load(weights_only=True)`` takes it."""
        return {
            key: [getattr(piece, key) for piece in self.pieces]
            for key in ("rows", "cols", "values")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`. Raises ValueError if pieces are missing."""
        if len({len(state[key]) for key in ("rows", "cols", "values")}) > 1:
            raise ValueError("the loaded slice state has lost originals. " + _LOST)
        self.clear()
        for rows, cols, values in zip(state["rows"], state["cols"], state["values"], strict=True):
            rows, cols = _to_host(rows), _to_host(cols)
            self.pieces.append(Piece(rows, cols, values.to("cpu")))
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
                    known = bool(self._cols[cols].all()) or bool(self._rows.all())
                else:
                    known = bool(self._rows[rows].all()) or bool(self._cols.all())
                if not known:
                    raise ValueError(
                        f"the loaded slice state has no originals for {axis} position {position},"
                        f" which has trained. {_LOST}"
                    )


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


def _joined(pieces: list[Piece]) -> Piece:
    """Pieces of whole columns, of whole rows, or of the same rows, as one; where they share entries
    they agree.
    """
    first, dim = pieces[0], 0 if pieces[0].cols is None else 1
    if len(pieces) == 1:
        return first
    indices: list[Tensor] = [piece.cols if dim else piece.rows for piece in pieces]  # pyright: ignore[reportAssignmentType]
    union = torch.cat(indices).unique()
    shape = list(first.values.shape)
    shape[dim] = len(union)
    values = first.values.new_empty(shape)
    for piece, index in zip(pieces, indices, strict=True):
        values.index_copy_(dim, torch.searchsorted(union, index), piece.values)
    return Piece(first.rows if dim else union, union if dim else None, values)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, on the host: NaN is equal to itself, and -0 is not 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(
        *(x.detach().to("cpu").contiguous().view(-1).view(torch.uint8) for x in (a, b))
    )


def _common(mine: Tensor | None, theirs: Tensor | None, features: int) -> tuple[Tensor, Tensor]:
    """Where two sorted sets of features meet: positions in one and in the other; None stands for
    all features.
    """
    everything = torch.arange(features)
    mine, theirs = everything if mine is None else mine, everything if theirs is None else theirs
    inside = torch.isin(mine, theirs)
    return inside.nonzero().flatten(), torch.searchsorted(theirs, mine[inside])


def _to_host(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.to("cpu", copy=True)


def _on(piece: Piece, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    rows, cols = piece.rows, piece.cols
    return None if rows is None else rows.to(weight.device), (
        None if cols is None else cols.to(weight.device)
    )
