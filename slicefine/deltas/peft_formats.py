"""PEFT's adapters that replace entries of the base weights: PaCA (columns) and SHiRA (single entries).

Both are a delta under another name. Reading gives the values that PEFT computes with; writing says
how exact it is. PaCA: arXiv 2503.01905, in PEFT since 0.22; SHiRA:
arXiv 2406.13175.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slicefine import atomic
from slicefine.deltas import container
from slicefine.deltas.base import base_hashes, combined_hash, tensor_of
from slicefine.deltas.delta import Delta, FullDelta, SliceValues, WeightDelta
from slicefine.deltas.folder import adapter_kind
from slicefine.deltas.format import CONFIG_FILE, FILE, DeltaError
from slicefine.slices import write_slice

# PeftModel holds a tuner as base_model, and that one the model as model
_PREFIX = "base_model.model."
_READABLE = ("PACA", "SHIRA")


def read_adapter(folder: str | os.PathLike[str], model: nn.Module) -> Delta:
    """A PaCA or SHiRA adapter as a delta on its base model.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: the base, in the dtype that the adapter was trained on; it is not changed.

    Returns:
        The delta. A SHiRA adapter changes entries all over a weight, so its delta holds the weight
        whole.

    Raises:
        DeltaError: an adapter of another type, or one that does not fit the model.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    config = read_config(folder)
    kind = config["peft_type"]
    tensors = container.read(folder / FILE).tensors
    by_module: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        module, _, last = name.rpartition(".")
        if last.startswith(kind.lower() + "_"):
            by_module.setdefault(module, {})[last] = tensor
        else:
            saved[name] = tensor
    read = _paca_weight if kind == "PACA" else _shira_weight
    weights = {
        f"{name}.weight": read(name, parts, model, config)
        for name, parts in by_module.items()
    }
    if not weights:
        raise DeltaError(f"{folder / FILE} holds no {kind} values")
    whole = {key: _whole(model, key, value) for key, value in saved.items()}
    hashes = base_hashes(model, set(whole))
    for key, weight in weights.items():
        weight.base_sha256 = hashes[key]
    base = {
        "sha256": combined_hash(hashes),
        "model": config.get("base_model_name_or_path"),
        "class": type(model).__name__,
        "tensors": {key: value[:16] for key, value in hashes.items()},
    }
    return Delta(weights, whole, base=base, info={"from": f"PEFT {kind}"})


def read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise DeltaError(
            f"{folder / CONFIG_FILE} is no configuration of PEFT: {error}"
        ) from error
    if kind not in _READABLE:
        raise DeltaError(
            f"{folder} holds a {kind} adapter; {' and '.join(_READABLE)} adapters are changes of"
            " base weights. Merge any other one with PEFT first (merge_and_unload)"
        )
    return config


def _part(name: str, parts: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in parts:
        raise DeltaError(
            f"{name} has {', '.join(parts)} in the adapter; expected {key} too"
        )
    return parts[key]


def _matrix(model: nn.Module, name: str) -> tuple[Tensor, bool]:
    """(out, in) of a linear layer's weight on the host, and whether it is stored (in, out)."""
    weight = tensor_of(model, f"{name}.weight").detach().to("cpu")
    if weight.dim() != 2:
        raise DeltaError(
            f"{name}.weight has shape {tuple(weight.shape)}; expected a matrix"
        )
    transposed = type(model.get_submodule(name)).__name__ == "Conv1D"
    return (weight.t() if transposed else weight), transposed


def _paca_weight(
    name: str, parts: Mapping[str, Tensor], model: nn.Module, config: Mapping[str, Any]
) -> WeightDelta:
    weight, transposed = _matrix(model, name)
    values, cols = _part(name, parts, "paca_delta"), _part(name, parts, "paca_indices")
    cols = cols.to(torch.int64)
    if tuple(values.shape) != (weight.shape[0], len(cols)):
        raise DeltaError(
            f"{name}: {tuple(values.shape)} values for {len(cols)} columns of a weight of shape"
            f" {tuple(weight.shape)}"
        )
    _check_positions(name, cols, weight.shape[1])
    order = cols.argsort()
    cols, values = cols[order], values[:, order]
    old = weight.index_select(1, cols)
    new = torch.empty_like(old)
    # as PEFT does: added in the wider of the two dtypes, then rounded to the weight's
    torch.add(old, values, alpha=config["paca_alpha"] / config["r"], out=new)
    return WeightDelta(
        (weight.shape[0], weight.shape[1]),
        transposed,
        "",
        [SliceValues(None, cols, old, new)],
    )


def _shira_weight(
    name: str, parts: Mapping[str, Tensor], model: nn.Module, config: Mapping[str, Any]
) -> WeightDelta:
    weight, transposed = _matrix(model, name)
    values, indices = (
        _part(name, parts, "shira_weight"),
        _part(name, parts, "shira_indices"),
    )
    # float32 where it was saved on Windows
    indices = indices.to(torch.int64)
    if tuple(indices.shape) != (2, len(values)) or values.dim() != 1:
        raise DeltaError(
            f"{name}: positions of shape {tuple(indices.shape)} for {tuple(values.shape)} values;"
            " expected (2, n) and (n,)"
        )
    for index, size in zip(indices, weight.shape, strict=True):
        _check_positions(name, index, size)
    old = weight.clone()
    new = old.clone()
    # as PEFT does: a sparse sum in the weight's dtype
    # positions have been checked above
    new += torch.sparse_coo_tensor(
        indices, values, tuple(weight.shape), check_invariants=False
    )
    shape = (weight.shape[0], weight.shape[1])
    return WeightDelta(shape, transposed, "", [SliceValues(None, None, old, new)])


def _check_positions(name: str, index: Tensor, size: int) -> None:
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise DeltaError(
            f"{name}: positions {int(index.min())} to {int(index.max())} of {size} features"
        )


def _whole(model: nn.Module, key: str, value: Tensor) -> FullDelta:
    """A tensor of modules_to_save; a head is new, so it replaces nothing of the base."""
    old = tensor_of(model, key).detach().to("cpu", copy=True)
    if old.shape != value.shape:
        raise DeltaError(
            f"{key} is {tuple(value.shape)} in the adapter and {tuple(old.shape)} in the model"
        )
    return FullDelta(old, value.to(old.dtype), False)


@dataclass
class SparseAdapter:
    """A PaCA or SHiRA adapter in PEFT's format.

    Args:
        tensors: by PEFT's names.
        config: what adapter_config.json says.
        error: the largest absolute difference of a weight with the adapter from the delta's; 0 for
            weights in bfloat16 and float16, at most a rounding of float32 otherwise.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    error: float

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write adapter_model.safetensors and adapter_config.json, the configuration last.

        Raises:
            DeltaError: the folder holds a delta.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if adapter_kind(folder) == "SLICEFINE":
            raise DeltaError(
                f"{folder} holds a slicefine delta; export the adapter to another folder"
            )
        with atomic.replacing(folder / FILE) as temporary:
            save_file(self.tensors, temporary, {"format": "pt"})
        atomic.write_text(folder / CONFIG_FILE, json.dumps(self.config, indent=2) + "\n")


def to_paca(delta: Delta) -> SparseAdapter:
    """A delta of column slices as a PaCA adapter, which PEFT 0.22 and newer load.

    Args:
        delta: as many columns in every weight: of a training that never moved, or that moved
            everywhere alike.

    Returns:
        The adapter, and how exact it is.

    Raises:
        DeltaError: it has other slices than columns, different numbers of them, or biases.
    """
    tensors: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    errors = []
    for key, weight in delta.weights.items():
        name = _module(key)
        if weight.transposed:
            raise DeltaError(f"{key} is stored (in, out); PaCA takes nn.Linear only")
        cols, values, error = _columns(key, weight)
        errors.append(error)
        widths[name] = len(cols)
        tensors[f"{_PREFIX}{name}.paca_delta"] = values
        tensors[f"{_PREFIX}{name}.paca_indices"] = cols
    if len(set(widths.values())) != 1:
        narrow, wide = (f(widths, key=lambda n: widths[n]) for f in (min, max))
        raise DeltaError(
            f"PaCA has one r for all layers; {narrow} has {widths[narrow]} columns and {wide}"
            f" {widths[wide]}. Export the delta as LoRA"
        )
    r = next(iter(widths.values()))
    tensors.update(_heads(delta))
    config = {"paca_alpha": r, "r": r, "random_seed": None, "init_weights": True}
    return SparseAdapter(tensors, _config(delta, "PACA", config), max(errors))


def _columns(key: str, weight: WeightDelta) -> tuple[Tensor, Tensor, float]:
    """Columns of a weight delta, their differences in float32, and how far those miss."""
    if any(patch.rows is not None or patch.cols is None for patch in weight.patches):
        raise DeltaError(f"{key} has rows or blocks; PaCA holds whole columns. Export LoRA")
    cols = torch.cat([p.cols for p in weight.patches if p.cols is not None])
    order = cols.argsort()
    old = torch.cat([patch.old for patch in weight.patches], 1)[:, order]
    new = torch.cat([patch.new for patch in weight.patches], 1)[:, order]
    if len(cols.unique()) < len(cols):
        raise DeltaError(f"{key} has columns in two of its patches")
    return cols[order], *_difference(old, new)


def _difference(old: Tensor, new: Tensor) -> tuple[Tensor, float]:
    """float32 values whose rounded sum with ``old`` is ``new``, and how far the worst one misses.

    For bfloat16 and float16 none misses. For float32 a sum may miss where the new value is much
    smaller than the difference: the finer bits of the one do not exist in the other.
    """
    near = (new.double() - old.double()).float()
    best, misses = near, _misses(old, near, new)
    for side in (-math.inf, math.inf):
        other = torch.nextafter(near, torch.full_like(near, side))
        closer = (found := _misses(old, other, new)) < misses
        best, misses = torch.where(closer, other, best), torch.where(closer, found, misses)
    return best.contiguous(), float(misses.max()) if misses.numel() else 0.0


def _misses(old: Tensor, values: Tensor, new: Tensor) -> Tensor:
    sums = torch.empty_like(old)
    torch.add(old, values, out=sums)
    return (sums.double() - new.double()).abs()


def to_shira(delta: Delta) -> SparseAdapter:
    """A delta as a SHiRA adapter: single entries of each weight.

    Args:
        delta: of any slices. SHiRA counts r * (out + in) entries in a weight, so entries that did
            not change fill up to it, with zero.

    Returns:
        The adapter, and how exact it is.

    Raises:
        DeltaError: so many entries changed that no r fits, biases changed, or a weight is not in
            float32, in which PEFT adds SHiRA's values to the weight.
    """
    changed: dict[str, Tensor] = {}
    errors = []
    for key, weight in delta.weights.items():
        if weight.transposed:
            raise DeltaError(
                f"{key} is stored (in, out); SHiRA is written for nn.Linear only"
            )
        changed[key], error = _dense_difference(key, weight)
        errors.append(error)
    ranks = [math.ceil(int((D != 0).sum()) / sum(D.shape)) for D in changed.values()]
    r = max(1, *ranks)
    tensors: dict[str, Tensor] = {}
    for key, D in changed.items():
        count = r * sum(D.shape)
        if count > D.numel():
            raise DeltaError(
                f"SHiRA with r={r} has {count} entries, {key} has {D.numel()}: too much has"
                " changed. Export LoRA or the merged model"
            )
        flat = D.flatten()
        # those that changed first, in order; then others
        order = torch.argsort((flat == 0).to(torch.int8), stable=True)[:count].sort().values
        rows, cols = order // D.shape[1], order % D.shape[1]
        name = _PREFIX + _module(key)
        tensors[f"{name}.shira_weight"] = flat[order].contiguous()
        tensors[f"{name}.shira_indices"] = torch.stack([rows, cols]).to(torch.int32)
    tensors.update(_heads(delta))
    config = {"r": r, "mask_type": "random", "random_seed": 0, "fan_in_fan_out": False}
    return SparseAdapter(tensors, _config(delta, "SHIRA", config), max(errors))


def _dense_difference(key: str, weight: WeightDelta) -> tuple[Tensor, float]:
    """(out, in) float32, zero outside the delta, and how far it misses."""
    if weight.dtype != torch.float32:
        raise DeltaError(
            f"{key} is {weight.dtype}; PEFT adds SHiRA's values in the weight's dtype, which is"
            " exact for float32 only. Export LoRA"
        )
    dense, worst = torch.zeros(weight.shape), 0.0
    for patch in weight.patches:
        values, error = _difference(patch.old, patch.new)
        write_slice(dense, patch.rows, patch.cols, values)
        worst = max(worst, error)
    return dense, worst


def _module(key: str) -> str:
    module, _, last = key.rpartition(".")
    if last != "weight":
        raise DeltaError(f"{key} is not the weight of a linear layer, which PEFT adapts")
    return module


def _heads(delta: Delta) -> dict[str, Tensor]:
    """Tensors of new heads, as modules_to_save holds them."""
    if biases := [key for key, entry in delta.whole.items() if entry.replaces]:
        raise DeltaError(
            f"{len(biases)} tensors of the base have trained beside the slices, such as"
            f" {biases[0]}, and this format cannot hold them: export the merged model"
        )
    return {_PREFIX + key: entry.new.contiguous() for key, entry in delta.whole.items()}


def _config(delta: Delta, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    names = "|".join(re.escape(_module(key)) for key in delta.weights)
    return {
        "peft_type": kind,
        "base_model_name_or_path": delta.base.get("model"),
        "task_type": None,
        "inference_mode": True,
        # as a regular expression PEFT compares it with whole names
        "target_modules": names,
        "modules_to_save": sorted({key.rpartition(".")[0] for key in delta.whole}) or None,
        **fields,
    }
