"""What a delta holds for each key: values before and after, of slices or of a whole tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from slicefine.originals import SavedSlice


@dataclass
class SliceValues:
    """Entries ``weight[rows][:, cols]``, before and after. rows, cols: int64, ascending, None for
    all; old, new: (R, K).
    """

    rows: Tensor | None
    cols: Tensor | None
    old: Tensor
    new: Tensor


@dataclass
class WeightDelta:
    """What changed in one weight. shape: (out, in); transposed: stored as (in, out), as Conv1D's.

    base_sha256: of the whole weight before anything changed. added: the weight is packed
        (quantized); the values are added to what it unpacks to, and their old ones are zero.
    """

    shape: tuple[int, int]
    transposed: bool
    base_sha256: str
    patches: list[SliceValues]
    added: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.patches[0].new.dtype

    def check(self, key: str) -> None:
        """Raise ValueError unless every patch has values of its own shape and all have one dtype."""
        # type, not isinstance: true and false of a manifest are ints to Python
        sizes = [type(n) is int and n > 0 for n in self.shape]
        if len(sizes) != 2 or not all(sizes) or type(self.transposed) is not bool:
            raise ValueError(
                f"{key} has shape {self.shape!r}, transposed {self.transposed!r}"
            )
        if type(self.added) is not bool or (self.added and self.transposed):
            raise ValueError(f"{key} has added {self.added!r}")
        if not isinstance(self.base_sha256, str):
            raise ValueError(
                f"{key} has base_sha256 {self.base_sha256!r}; expected a string"
            )
        if not self.patches:
            raise ValueError(f"{key} has no patches")
        for patch in self.patches:
            features = zip((patch.rows, patch.cols), self.shape, strict=True)
            shape = tuple(_index_length(key, index, n) for index, n in features)
            if not tuple(patch.old.shape) == tuple(patch.new.shape) == shape:
                raise ValueError(
                    f"{key} has values of shape {tuple(patch.old.shape)} and"
                    f" {tuple(patch.new.shape)} for {shape}"
                )
            if not patch.old.dtype == patch.new.dtype == self.dtype:
                raise ValueError(f"{key} has values of several dtypes")


def _index_length(key: str, index: Tensor | None, features: int) -> int:
    """How many features an index names. Raises ValueError unless they ascend within a weight."""
    if index is None:
        return features
    if index.dtype != torch.int64 or index.dim() != 1 or not len(index):
        raise ValueError(f"{key} has features {index!r}; expected a vector of int64")
    # With a feature named twice, index_copy_ leaves open which of the two values stays.
    if int(index[0]) < 0 or int(index[-1]) >= features or bool((index.diff() < 1).any()):
        raise ValueError(f"{key} has features that do not ascend from 0 to {features - 1}")
    return len(index)


@dataclass
class FullDelta:
    """A parameter or buffer that is fully trained: of a new head (``replaces`` nothing of the
    base), a bias.
    """

    old: Tensor
    new: Tensor
    replaces: bool

    def check(self, key: str) -> None:
        """Raise ValueError unless both values have one shape and dtype."""
        if (self.old.shape, self.old.dtype) != (self.new.shape, self.new.dtype):
            raise ValueError(f"{key} has old and new values of different shape or dtype")
        if type(self.replaces) is not bool:
            raise ValueError(
                f"{key} has replaces {self.replaces!r}; expected true or false"
            )


def meet(a: SliceValues, b: SliceValues) -> bool:
    # Two slices share an entry exactly where they share a row and a column.
    return all(
        x is None or y is None or bool(torch.isin(x, y).any())
        for x, y in ((a.rows, b.rows), (a.cols, b.cols))
    )


def slice_values(
    saved: Iterable[SavedSlice], current: Iterable[Tensor]
) -> list[SliceValues]:
    """The values of saved slices and what stands there now."""
    return [
        SliceValues(p.rows, p.cols, p.values, new)
        for p, new in zip(saved, current, strict=True)
    ]
