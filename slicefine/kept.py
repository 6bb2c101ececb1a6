"""What is made for the slices of an optimizer and kept from step to step.

To write down the operands of hundreds of small slices takes longer than their update. They stay the
same until a slice moves or one of their tensors is replaced; both are seen here, by the tensors
themselves and where their memory is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from slicefine import ops
from slicefine.agreement import mark_synced
from slicefine.backends.operands import SliceWrite
from slicefine.layer import SliceLayer

_Made = TypeVar("_Made")
# each slice parameter with a layer that uses it
Slices = Sequence[tuple[Tensor, SliceLayer]]


class _Seen(NamedTuple):
    """A slice as it was when something was made for it.

    state: the entries of its optimizer state, in order. views: the tensors that views have been
    made of, and where their memory was; ``.data`` changes it, and a view would not follow.
    """

    parameter: Tensor
    weight: Tensor
    rows: Tensor
    cols: Tensor
    axis: str
    place: int
    weight_place: int
    dtypes: tuple[torch.dtype, torch.dtype]
    stride: tuple[int, ...]
    state: tuple[Any, ...]
    views: tuple[tuple[Tensor, int], ...]


class Kept(Generic[_Made]):
    """What ``make`` has returned for slices, for as long as it is right for them.

    It is made anew for other slices, after a move, and where a tensor has been replaced or has got
    other memory. Nothing is kept for tensors without memory of their own (DTensor, fake tensors),
    and nothing keeps a layer alive.

    Attributes:
        times_made: how often it has been made.
    """

    def __init__(self, make: Callable[[Slices], _Made]) -> None:
        self._make = make
        self._made: _Made | None = None
        self._seen: list[_Seen] = []
        self._alive: list[weakref.ref[SliceLayer]] = []
        self.times_made = 0

    def of(self, slices: Slices, states: Mapping[Tensor, dict[str, Any]]) -> _Made:
        """What has been made for these slices.

        Args:
            slices: at least one.
            states: the optimizer's, whose tensors ``make`` may use.
        """
        if self._made is not None and self._right(slices, states):
            return self._made
        self.drop()
        made = self._make(slices)
        self.times_made += 1
        seen = [_see(p, layer, states.get(p, _NONE)) for p, layer in slices]
        ordinary = [one for one in seen if one is not None]
        if len(ordinary) == len(seen):
            self._made, self._seen = made, ordinary
            # an optimizer that outlives its model must not keep its weights in memory
            gone = _dropping(weakref.ref(self))
            self._alive = [weakref.ref(layer, gone) for _, layer in slices]
        return made

    def drop(self) -> None:
        self._made, self._seen, self._alive = None, [], []

    def _right(self, slices: Slices, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        if len(slices) != len(self._seen):
            return False
        # this runs for every slice at every step: no call and no look-up that can be spared
        for (parameter, layer), seen in zip(slices, self._seen, strict=True):
            (
                known,
                weight,
                rows,
                cols,
                axis,
                at,
                weight_at,
                dtypes,
                stride,
                entries,
                views,
            ) = seen
            buffers = layer._buffers
            if (
                parameter is not known
                or layer._parameters.get("weight") is not weight
                or layer.axis != axis
                or buffers["slice_rows"] is not rows
                or buffers["slice_cols"] is not cols
                or parameter.data_ptr() != at
                or weight.data_ptr() != weight_at
                or (parameter.dtype, weight.dtype) != dtypes
                # a square weight that has been transposed in place has nothing else to show
                or weight.stride() != stride
            ):
                return False
            state = states.get(parameter, _NONE)
            if len(state) != len(entries) or not all(map(is_, state.values(), entries)):
                return False
            if views and any(tensor.data_ptr() != place for tensor, place in views):
                return False
        return True


_NONE: dict[str, Any] = {}


def _dropping(reference: weakref.ref[Kept[Any]]) -> Callable[[Any], None]:
    def drop(_: Any) -> None:
        kept = reference()
        if kept is not None:
            kept.drop()

    return drop


def _see(parameter: Tensor, layer: SliceLayer, state: dict[str, Any]) -> _Seen | None:
    weight, buffers = layer._parameters.get("weight"), layer._buffers
    rows, cols = buffers["slice_rows"], buffers["slice_cols"]
    own = tuple(state.values())
    # a parametrized weight is computed anew at each use
    if weight is None or rows is None or cols is None:
        return None
    tensors = (parameter, weight, rows, cols, *(v for v in own if isinstance(v, Tensor)))
    if any(type(t) is not Tensor and type(t) is not torch.nn.Parameter for t in tensors):
        return None
    viewed = tensors[4:] if layer.active(parameter) is not parameter else ()
    return _Seen(
        parameter,
        weight,
        rows,
        cols,
        layer.axis,
        parameter.data_ptr(),
        weight.data_ptr(),
        (parameter.dtype, weight.dtype),
        weight.stride(),
        own,
        tuple((t, t.data_ptr()) for t in viewed),
    )


def by_device(slices: Slices) -> dict[torch.device, list[int]]:
    """Places in a list of slices, by where they are: one call of an op works on one device."""
    places: dict[torch.device, list[int]] = {}
    for place, (parameter, _) in enumerate(slices):
        places.setdefault(parameter.device, []).append(place)
    return places


def prepared_writes(slices: Slices) -> list[ops.PreparedWrites]:
    """What writes all slices through to their weights: one per device."""
    operands = [
        SliceWrite(layer.active(parameter), layer.weight_matrix, layer.rows, layer.cols)
        for parameter, layer in slices
    ]
    places = by_device(slices).values()
    return [ops.PreparedWrites([operands[i] for i in some]) for some in places]


class WriteThrough(Kept[list[ops.PreparedWrites]]):
    """`SliceLayer.write_through` of many slices in one call."""

    def __init__(self) -> None:
        super().__init__(prepared_writes)

    @torch.no_grad()
    def write(self, slices: Slices) -> None:
        """Write every master to its weight; slices: each parameter with all layers that use it."""
        for _, layer in slices:
            layer.require_enabled("an optimizer step")
        for writes in self.of(slices, {}) if slices else ():
            writes.write()
        mark_synced(layer for _, layer in slices)
