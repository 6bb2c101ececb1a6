"""A layer's weight and the master of its slice: whether they agree, and how the master follows.

Both are tensors that anybody may write to, assign or move. A layer notes their version counters
whenever they agree (`mark_agreed`); from these its `State` follows.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from slicefine.registry import layers_of
from slicefine.slices import SliceSchedule, SliceSpec, read_slice, rounds_to


class Sliced(Protocol):
    """What is asked of a `SliceLayer` here."""

    weight: nn.Parameter
    slice_weight: nn.Parameter
    slice_rows: Tensor
    slice_cols: Tensor
    spec: SliceSpec
    schedule: SliceSchedule
    axis: str
    _parameters: dict[str, nn.Parameter | None]
    _buffers: dict[str, Any]

    @property
    def weight_matrix(self) -> Tensor: ...

    @property
    def rows(self) -> Tensor | None: ...

    @property
    def cols(self) -> Tensor | None: ...

    @property
    def disabled(self) -> bool: ...

    def active(self, flat: Tensor) -> Tensor: ...


class State(enum.Enum):
    """How the weight of a layer and the master of its slice stand to each other."""

    AGREED = "neither has been written to since they agreed"
    OFF = "the slices are disabled: the weight has its original values, the master the trained"
    STAND_IN = "another tensor is in the place of one of them, for reading only"
    APART = "one of them is on its way to another device"
    UNCHECKED = (
        "slice state was loaded, and whether the weight belongs to it is not known yet"
    )
    WEIGHT_WRITTEN = "the weight has been written to, perhaps the master too"
    MASTER_WRITTEN = "the master has been written to"


class Agreement(NamedTuple):
    """Weight and master as they were when they last agreed.

    A version of -1 stands for a tensor that has been assigned since. ``unchecked``: see
    `State.UNCHECKED`.
    """

    weight: Tensor | None
    weight_version: int
    master: Tensor | None
    master_version: int
    unchecked: bool = False

    @classmethod
    def now(cls, layer: Sliced, unchecked: bool = False) -> Agreement:
        weight, master = _pair(layer)
        return cls(weight, weight._version, master, master._version, unchecked)

    def state(self, layer: Sliced) -> State:
        parameters = layer._parameters
        weight, master = parameters.get("weight"), parameters.get("slice_weight")
        same = weight is self.weight and master is self.master and weight is not None
        if same and weight._version == self.weight_version:  # type: ignore[union-attr]
            unwritten = master._version == self.master_version  # type: ignore[union-attr]
            if unwritten and not self.unchecked:
                return State.AGREED
        if layer.disabled:
            return State.OFF
        # torch.func.functional_call, FSDP2's gathered weights, replicas of nn.DataParallel and
        # parametrizations: all of them change what the names stand for without assigning it here
        if not same:
            return State.STAND_IN
        if layer.slice_weight.device != layer.slice_rows.device:
            return State.APART
        if self.unchecked:
            return State.UNCHECKED
        # the weight wins where both were written to, as by weight averaging, which knows nothing of
        # positions
        if weight._version != self.weight_version:  # type: ignore[union-attr]
            return State.WEIGHT_WRITTEN
        return State.MASTER_WRITTEN


def mark_synced(layers: Iterable[Sliced]) -> None:
    """Note that weight and master of these layers agree; they are all that share the two."""
    for layer in layers:
        # nn.Module's __setattr__ takes longer than the update of a small slice
        layer.__dict__["agreement"] = Agreement.now(layer)


def mark_agreed(layer: Any) -> None:
    """Note that weight and master agree, for every layer that shares them."""
    mark_synced({layer, *layers_of(layer.slice_weight)})


def after_assignment(agreement: Agreement, name: str, value: Any) -> Agreement:
    """The agreement after a parameter has been replaced by assignment."""
    if name == "weight":
        if value is agreement.weight:
            return agreement
        return agreement._replace(weight=value, weight_version=-1)
    if value is agreement.master:
        return agreement
    return agreement._replace(master=value, master_version=-1)


def _pair(layer: Sliced) -> tuple[Tensor, Tensor]:
    weight, master = layer._parameters.get("weight"), layer._parameters.get("slice_weight")
    if weight is None or master is None:
        # replicas of nn.DataParallel and parametrized weights keep theirs elsewhere
        return layer.weight, layer.slice_weight
    return weight, master


def check_belongs(layer: Sliced) -> None:
    """Raise RuntimeError unless the weight is the one that loaded slice state was saved with."""
    truth = read_slice(layer.weight_matrix, layer.rows, layer.cols)
    master = layer.active(layer.slice_weight).detach()
    if not bool((rounds_to(master, truth) | (master.isnan() & truth.isnan())).all()):
        raise RuntimeError(
            "the loaded slice state does not belong to the weights in the model: the saved"
            " master of the active slice differs from the weight. Load the model's state dict"
            " of the same checkpoint too."
        )
    mark_agreed(layer)


def convert_master(layer: Sliced) -> None:
    """Follow the weight to its device, precision and shared memory."""
    master, weight = layer.slice_weight, layer.weight
    precise = master_dtype(weight.dtype)
    if weight.is_meta or master.is_meta:
        # no Parameter can go from or to the meta device and stay the same object
        values = torch.zeros(master.shape, dtype=precise, device=weight.device)
        fresh = nn.Parameter(values, requires_grad=master.requires_grad)
        for other in {layer, *layers_of(master)}:
            other.slice_weight = fresh
        return
    master.data = master.data.to(weight.device, precise)
    if weight.device.type == "cpu" and weight.is_shared():
        master.data.share_memory_()
    if master.grad is None:
        return
    # optimizer_in_bwd leaves a gradient without values
    applied = type(master.grad) is not Tensor
    master.grad = None if applied else master.grad.to(master.device, master.dtype)


def convert_indices(layer: Sliced) -> None:
    """Follow the weight to its device; the schedule knows the positions that a meta tensor lost."""
    device = layer.weight.device
    if layer.slice_rows.device == device:
        return
    rows, cols = layer.spec.features(layer.axis, layer.schedule.position[layer.axis])
    for name, index in (("slice_rows", rows), ("slice_cols", cols)):
        buffer = layer._buffers[name]
        if index is None or len(index) != len(buffer):
            index = torch.zeros(len(buffer), dtype=torch.int64)
        layer._buffers[name] = index.to(device)


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
