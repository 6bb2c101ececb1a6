"""What training has changed since a step, exactly: for an engine that samples or serves with the
same weights and need not receive all of them again.

Slices know where they have been, so no second copy of the model is kept and nothing is compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from slicefine import sharding
from slicefine.deltas.base import tensor_of
from slicefine.deltas.format import DeltaError
from slicefine.deltas.live import named_layers
from slicefine.layer import SliceLayer
from slicefine.modules.quantized import PoolSlice
from slicefine.slices import HOST, read_slice, write_slice

_FORMAT = "slicefine-changes"


@dataclass(frozen=True)
class WeightChange:
    """New values of a part of one tensor of a checkpoint.

    Unpacks into (name, shape, dtype, values, indices), the fields of vLLM's
    `CheckpointWeightPatch`, which ``CheckpointWeightPatch(*change)`` makes.

    Args:
        name: of the tensor in the model's checkpoint.
        shape: of the whole tensor.
        dtype: of the tensor.
        part: (R, K) the new values, on the model's device; for a whole tensor, its shape.
        rows: (R,) int64 on the host, ascending, which rows; None for all.
        cols: (K,) int64 on the host, ascending, which columns; None for all.

    A tensor of more than two dimensions counts as a matrix of its last one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: Tensor
    rows: Tensor | None = None
    cols: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether every value of the tensor is sent."""
        return self.rows is None and self.cols is None

    @property
    def values(self) -> Tensor:
        """(n,) the new values, in the order of `indices`."""
        return self.part.reshape(-1)

    @property
    def indices(self) -> Tensor | None:
        """(n,) int64 where the values belong in the flattened tensor; None for all of it."""
        if self.whole:
            return None
        width = self.shape[-1]
        cols = torch.arange(width, device=HOST) if self.cols is None else self.cols
        rows = self.rows
        if rows is None:
            rows = torch.arange(self.part.shape[0], device=HOST)
        flat = rows.unsqueeze(1) * width + cols
        return flat.reshape(-1).to(self.part.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the values and of the positions, as `pack_changes` writes them."""
        tensors = [t for t in (self.part, self.rows, self.cols) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.name, self.shape, self.dtype, self.values, self.indices))

    @torch.no_grad()
    def apply(self, tensor: Tensor) -> None:
        """Write the values into ``tensor``, which has the shape of the whole one.

        Raises:
            DeltaError: the tensor has another shape or dtype.
        """
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise DeltaError(
                f"{self.name} is {tuple(tensor.shape)} {tensor.dtype} in the model; the change is"
                f" of a tensor of shape {self.shape} and {self.dtype}"
            )
        part = self.part.to(tensor.device)
        if self.whole:
            tensor.copy_(part)
            return
        matrix = tensor.view(-1, self.shape[-1])
        rows, cols = (
            None if index is None else index.to(tensor.device)
            for index in (self.rows, self.cols)
        )
        write_slice(matrix, rows, cols, part)


def changed_since(model: Any, step: int) -> list[WeightChange]:
    """See `slicefine.model.SliceModel.changed_since`."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(
            f"step is {step!r}; expected a number of optimizer steps, 0 or more"
        )
    seen: set[int] = set()
    changes: list[WeightChange] = []
    layers = dict(named_layers(model))
    now = max((layer.schedule.steps for layer in layers.values()), default=0)
    if step > now:
        raise ValueError(f"step is {step}; the slices have taken {now} steps")
    for name, layer in layers.items():
        # layers that share a weight share its slices
        if id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            changes += _changes_of(layer.state_key(name), layer, step)
    if now > step:
        slices = {id(layer.slice_weight) for layer in layers.values()}
        changes += _whole_tensors(model, seen | slices)
    return _in_checkpoint_names(model, changes)


def _changes_of(key: str, layer: SliceLayer, step: int) -> list[WeightChange]:
    if layer.weight_sharded:
        raise DeltaError(
            f"{key} is sharded over processes; changes are made of whole tensors. Send the weights"
            " that torch.distributed.checkpoint.state_dict.get_model_state_dict gathers"
        )
    if isinstance(layer, PoolSlice):
        raise DeltaError(
            f"{key} is quantized, and what has trained stands beside it, which no tensor of its"
            " checkpoint holds: export the delta as LoRA (slicefine.deltas.lora.to_lora)"
        )
    layer.require_enabled("sending what has changed")
    layer.sync()
    shape, dtype = tuple(layer.weight.shape), layer.weight.dtype
    if layer.schedule.rewritten > step:
        return [WeightChange(key, shape, dtype, layer.weight.detach().clone())]
    matrix = layer.weight_matrix
    changes = []
    for rows, cols in _parts(layer, step):
        part = read_slice(matrix, _beside(rows, matrix), _beside(cols, matrix))
        if layer.fan_in_fan_out:
            # stored (in, out)
            part, rows, cols = part.t().contiguous(), cols, rows
        changes.append(WeightChange(key, shape, dtype, part, rows, cols))
    return changes


def _parts(layer: SliceLayer, step: int) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Rows and columns that have trained after ``step``, features of one axis together."""
    for axis, positions in layer.schedule.trained_after(step).items():
        features = [layer.spec.features(axis, position) for position in positions]
        if axis == "block":
            # blocks of other rows have other columns
            yield from features
            continue
        dim = 0 if axis == "row" else 1
        union = [index for pair in features if (index := pair[dim]) is not None]
        if union:
            # unique() sorts
            joined = torch.cat(union).unique()
            yield (joined, None) if axis == "row" else (None, joined)


def _beside(index: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if index is None else index.to(weight.device)


def _whole_tensors(model: nn.Module, slices: set[int]) -> list[WeightChange]:
    """What trains beside the slices, and the running statistics of batch norms."""
    found: dict[str, Tensor] = {
        key: parameter
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in slices
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
            buffers = module._buffers.items()
            found.update(
                {f"{name}.{key}".lstrip("."): b for key, b in buffers if b is not None}
            )
    for key, tensor in found.items():
        if sharding.is_sharded(tensor):
            raise DeltaError(f"{key} is sharded over processes; gather it before")
    return [
        WeightChange(key, tuple(t.shape), t.dtype, t.detach().clone())
        for key, t in found.items()
    ]


def _in_checkpoint_names(model: Any, changes: list[WeightChange]) -> list[WeightChange]:
    """The changes under the names that save_pretrained gives their tensors."""
    renamed = []
    for change in changes:
        name = _checkpoint_name(model, change.name, change.shape)
        if name is None:
            raise DeltaError(
                f"{change.name} has another form in a checkpoint of this model: transformers splits"
                " or joins it there, so its changes have no positions. Save the model whole, or"
                " leave such weights out (exclude_modules, target_parameters=[])"
            )
        renamed.append(replace(change, name=name))
    return renamed


def _checkpoint_name(model: Any, key: str, shape: tuple[int, ...]) -> str | None:
    """What a checkpoint calls a tensor; None where it holds it in another form."""
    # asked of a library that is there already: the core imports torch alone
    loading = sys.modules.get("transformers.core_model_loading")
    revert = getattr(loading, "revert_weight_conversion", None)
    if revert is None or not hasattr(model, "save_pretrained"):
        return key
    found = revert(model, {key: torch.empty(shape, device="meta")})
    same_form = [tuple(t.shape) for t in found.values()] == [shape]
    return next(iter(found)) if same_form else None


def pack_changes(changes: Iterable[WeightChange]) -> bytes:
    """Changes as bytes in the format of safetensors, for a socket, a queue or a file.

    Args:
        changes: what ``model.changed_since(step)`` gave.

    Returns:
        Bytes for `unpack_changes`.
    """
    tensors: dict[str, Tensor] = {}
    entries = []
    for number, change in enumerate(changes):
        entries.append({"name": change.name, "shape": change.shape})
        parts = {"part": change.part, "rows": change.rows, "cols": change.cols}
        for key, tensor in parts.items():
            if tensor is not None:
                # int32 halves the positions; no tensor has that many rows
                small = tensor if key == "part" else tensor.to(torch.int32)
                tensors[f"{number}.{key}"] = small.to("cpu").contiguous()
    return save(tensors, {_FORMAT: json.dumps(entries)})


def unpack_changes(data: bytes) -> list[WeightChange]:
    """Changes from the bytes of `pack_changes`.

    Raises:
        DeltaError: the bytes are something else.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_FORMAT])
        tensors = load(data)
        return [_unpacked(tensors, number, entry) for number, entry in enumerate(entries)]
    except Exception as error:
        raise DeltaError(
            f"these {len(data)} bytes are no changes of pack_changes: {error}"
        ) from error


def _unpacked(
    tensors: dict[str, Tensor], number: int, entry: dict[str, Any]
) -> WeightChange:
    part = tensors[f"{number}.part"]
    shape = tuple(int(size) for size in entry["shape"])
    rows, cols = (
        None if (index := tensors.get(f"{number}.{key}")) is None else index.to(torch.int64)
        for key in ("rows", "cols")
    )
    change = WeightChange(str(entry["name"]), shape, part.dtype, part, rows, cols)
    expected = shape
    if not change.whole:
        height = part.shape[0] if rows is None else len(rows)
        expected = (height, shape[-1] if cols is None else len(cols))
        bounds = ((rows, torch.Size(shape[:-1]).numel()), (cols, shape[-1]))
        for index, size in bounds:
            if index is not None and len(index):
                low, high = int(index.min()), int(index.max())
                if low < 0 or high >= size:
                    raise ValueError(f"{change.name}: position {high} of {size}")
    if tuple(part.shape) != expected:
        raise ValueError(f"{change.name}: {tuple(part.shape)} values for {expected}")
    return change


def apply_changes(model: nn.Module, changes: Iterable[WeightChange]) -> None:
    """Write changes into a model of the same class, as a second process holds it.

    Args:
        model: a plain model, or one with slices, with the weights of the step asked for.
        changes: what ``changed_since`` gave there; all are checked before one is written.

    Raises:
        DeltaError: the model has no tensor of a name, or one of another shape or dtype.
    """
    changes = list(changes)
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    names = {_checkpoint_name(model, key, shape): key for key, shape in shapes.items()}
    targets = [tensor_of(model, names.get(change.name, change.name)) for change in changes]
    for change, tensor in zip(changes, targets, strict=True):
        if tuple(tensor.shape) != change.shape or tensor.dtype != change.dtype:
            # raises, before anything is written
            change.apply(tensor)
    for change, tensor in zip(changes, targets, strict=True):
        change.apply(tensor.detach())
