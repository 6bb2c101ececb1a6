"""A layer's weight and the master of its slice: whether they agree, and how the master follows.

Both are tensors that anybody may write to, assign or move. A layer notes their version counters
whenever they agree (`mark_agreed`); from these its `State` follows.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import Parameter

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
    agreement: Agreement
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
    TOUCHED = "somebody has taken the weight, and may have written to it through .data"
    WEIGHT_WRITTEN = "the weight has been written to, perhaps the master too"
    MASTER_WRITTEN = "the master has been written to"
    MASTER_CAST = (
        "the master has been cast to another precision, as TRL does on quantized models"
    )


class Agreement(NamedTuple):
    """Weight and master as they were when they last agreed.

    A version of -1 stands for a tensor that has been assigned since. ``unchecked``: State.UNCHECKED,
    with what ``sample`` of the weight is expected, or State.TOUCHED; else None.
    """

    weight: Tensor | None
    weight_version: int
    master: Tensor | None
    master_version: int
    unchecked: State | None = None
    sample: Tensor | None = None
    pointer: int = 0

    @classmethod
    def now(cls, layer: Sliced) -> Agreement:
        weight, master = _pair(layer)
        versions = weight._version, master._version
        return cls(weight, versions[0], master, versions[1], None, None, _pointer(master))

    def state(self, layer: Sliced) -> State:
        parameters = layer._parameters
        weight, master = parameters.get("weight"), parameters.get("slice_weight")
        same = weight is self.weight and master is self.master and weight is not None
        if same and weight._version == self.weight_version:  # type: ignore[union-attr]
            unwritten = master._version == self.master_version  # type: ignore[union-attr]
            unwritten = unwritten and _pointer(master) == self.pointer
            if unwritten and self.unchecked is None:
                return State.AGREED
        if layer.disabled:
            return State.OFF
        # torch.func.functional_call, FSDP2's gathered weights, replicas of nn.DataParallel and
        # parametrizations: all of them change what the names stand for without assigning it here
        if not same:
            return State.STAND_IN
        if layer.slice_weight.device != layer.slice_rows.device:
            return State.APART
        if master.dtype is not master_dtype(weight.dtype):  # type: ignore[union-attr]
            return State.MASTER_CAST
        if self.unchecked is State.UNCHECKED:
            return State.UNCHECKED
        # the weight wins where both were written to, as by weight averaging, which knows nothing of
        # positions
        if weight._version != self.weight_version:  # type: ignore[union-attr]
            return State.WEIGHT_WRITTEN
        written = master._version != self.master_version  # type: ignore[union-attr]
        if written or _pointer(master) != self.pointer or self.unchecked is None:
            return State.MASTER_WRITTEN
        return State.TOUCHED


def agreed(layer: Sliced) -> bool:
    """Whether weight and master are the layer's own, whole, and as they were when they agreed: then
    there is nothing more to find out before they are used.
    """
    parameters = layer._parameters
    weight, master = parameters.get("weight"), parameters.get("slice_weight")
    (
        known,
        version,
        known_master,
        master_version,
        unchecked,
        _,
        pointer,
    ) = layer.agreement
    return (
        weight is known
        and master is known_master
        # shards, fake tensors and FSDP1's views of a flat parameter are of other types
        and type(weight) is Parameter
        and type(master) is Parameter
        and weight._version == version
        and master._version == master_version
        and master.data_ptr() == pointer
        and unchecked is None
    )


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


def _pointer(tensor: Any) -> int:
    """Where a parameter's values are: ``parameter.data = other`` changes nothing else."""
    # shards and fake tensors are of other types, and have no memory of their own
    return tensor.data_ptr() if type(tensor) is nn.Parameter else 0


def note_taken(layer: Any) -> None:
    """Somebody has taken the weight of a layer by its name: what ``.data`` writes, no counter sees."""
    agreement = layer.__dict__.get("agreement")
    weight = layer._parameters.get("weight")
    # shards, and what has no values: the meta device, and fake tensors, which are of another type
    if type(weight) is not nn.Parameter or weight.is_meta:
        return
    # a graph that is captured cannot wait for an answer
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if agreement is not None and agreement.unchecked is None:
        layer.__dict__["agreement"] = agreement._replace(unchecked=State.TOUCHED)
        _TAKEN.add(layer)


def follow_taken() -> None:
    """Let the masters of weights that were taken follow them, before an optimizer writes."""
    while _TAKEN:
        layer = _TAKEN.pop()
        if layer.agreement.unchecked is State.TOUCHED and not layer.weight_sharded:
            layer.sync()


# layers whose weight somebody has taken since the last step of an optimizer
_TAKEN: weakref.WeakSet[Any] = weakref.WeakSet()


def equal(layer: Sliced) -> bool:
    """Whether the weight holds what the master says, to nearest."""
    if is_fake(layer.slice_weight):
        # planned memory has no values
        return True
    truth = read_slice(layer.weight_matrix, layer.rows, layer.cols)
    master = layer.active(layer.slice_weight).detach()
    return bool((rounds_to(master, truth) | (master.isnan() & truth.isnan())).all())


def sample_visited(layer: Sliced) -> Tensor:
    """A few entries of the weight in places that have trained, the same ones for one schedule.

    Right after a move the active slice is untouched, so that only these tell whether a weight is
    the one that a state of slices was saved with.
    """
    taken = []
    for axis, visited in layer.schedule.visited.items():
        positions = visited.nonzero().flatten().tolist()
        for position in positions[:: max(1, len(positions) // 4)][:4]:
            rows, cols = layer.spec.features(axis, position)
            device = layer.weight_matrix.device
            places = [None if i is None else i.to(device) for i in (rows, cols)]
            values = read_slice(layer.weight_matrix, *places).flatten()
            taken.append(values[:: max(1, len(values) // 16)][:16])
    return torch.cat(taken) if taken else layer.weight_matrix.new_empty(0)


def check_belongs(layer: Any) -> None:
    """Raise RuntimeError unless the weight is the one that loaded slice state was saved with."""
    saved = layer.agreement.sample
    if not (equal(layer) and (saved is None or _same(saved, sample_visited(layer)))):
        raise RuntimeError(
            "the loaded slice state does not belong to the weights in the model: the saved values"
            " of its slices differ from the weight. Load the model's state dict of the same"
            " checkpoint too."
        )
    mark_agreed(layer)


def _same(saved: Tensor, now: Tensor) -> bool:
    saved = saved.to(now.device)
    # the coarser of the two dtypes is what they can have in common
    coarse = min(saved.dtype, now.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    return torch.allclose(saved.to(coarse), now.to(coarse), rtol=0, atol=0, equal_nan=True)


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
