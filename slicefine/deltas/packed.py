"""Deltas of a packed (quantized) base: what they add stands beside the weights, never in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.deltas.base import base_hashes, tensor_of, weight_hash
from slicefine.deltas.format import DeltaError
from slicefine.deltas.values import WeightDelta
from slicefine.modules.quantized import (
    OVERLAY,
    FrozenPool,
    Pool,
    PoolSlice,
    QuantizedLinear,
    attach,
    packed_shape,
    packing_of,
    quantized_layers,
)


def check(model: nn.Module, key: str, weight: WeightDelta) -> bool:
    """Whether a weight of a model is packed, as the delta says.

    Raises:
        DeltaError: It is and the delta says it is not, or the other way round.
    """
    module = _module_of(model, key)
    packing = packing_of(module) if key.endswith("weight") else None
    if packing is None and not weight.added:
        return False
    here = "not quantized" if packing is None else f"quantized ({packing.kind})"
    if packing is None or not weight.added:
        before = "a quantized base" if weight.added else f"{weight.dtype} weights"
        raise DeltaError(
            f"{key} is {here} in the model; the delta was made for {before}. Load the model as it"
            " was loaded then"
        )
    if packed_shape(module) != weight.shape:
        raise DeltaError(
            f"{key} is {here} of shape {packed_shape(module)} in the model; the delta was made for"
            f" {weight.shape}"
        )
    return True


def layer_sha256(model: nn.Module, key: str) -> str | None:
    """The hash of a packed weight and of all that unpacks it."""
    prefix = key.removesuffix("weight")
    hashes = base_hashes(_module_of(model, key), {f"{prefix}bias"}, prefix=prefix)
    return weight_hash(hashes, key, packed=True)


def plain(model: nn.Module, key: str) -> bool:
    """Whether nothing stands beside a packed weight."""
    return not isinstance(_module_of(model, key), QuantizedLinear)


def columns(model: nn.Module, key: str, features: Tensor | None) -> tuple[Tensor, Tensor]:
    """What stands beside a packed weight, (out, pool), and where features are in the pool.

    Raises:
        DeltaError: A feature is not in the pool.
    """
    module: Any = _module_of(model, key)
    pool: Pool = module.overlay
    try:
        return pool.weight.detach(), pool.places(features)
    except ValueError as error:
        raise DeltaError(
            f"the delta changes columns of {key} that this model's slices cannot hold: {error}. Load"
            " it into the plain quantized model, or make slices with the delta's own SliceConfig"
        ) from error


@torch.no_grad()
def make_room(model: nn.Module, weights: Mapping[str, WeightDelta]) -> None:
    """Let a model hold a delta's values beside its packed weights; so far they are zero.

    Raises:
        DeltaError: Slices train there whose pool has other columns.
    """
    for key, weight in weights.items():
        if not weight.added:
            continue
        module: Any = _module_of(model, key)
        features = [
            torch.arange(weight.shape[1]) if p.cols is None else p.cols
            for p in weight.patches
        ]
        wanted = torch.cat(features).unique()
        if not isinstance(module, QuantizedLinear):
            attach(module, FrozenPool(module, wanted, weight.dtype))
            continue
        before = module.overlay
        if isinstance(before, PoolSlice):
            columns(model, key, wanted)
            continue
        have = before.slice_pool.to("cpu")
        union = torch.cat([have, wanted]).unique()
        if len(union) > len(have):
            wider = FrozenPool(module, union, before.weight.dtype)
            wider.weight.index_copy_(1, wider.places(have), before.weight)
            module._modules[OVERLAY] = wider


@torch.no_grad()
def clear(model: nn.Module) -> None:
    """Packed layers beside which only zeros stand become what they were."""
    for _, module in list(quantized_layers(model)):
        overlay = module.overlay
        if isinstance(overlay, FrozenPool) and not bool(overlay.weight.any()):
            module.restore()


def _module_of(model: nn.Module, key: str) -> nn.Module:
    # for its error, which names what there is
    tensor_of(model, key)
    return model.get_submodule(key.rpartition(".")[0])


# transformers' mark of a model with adapters. Its Trainer trains no quantized model without it; its
# save_pretrained would look for PEFT's adapters.
_MARK = "_hf_peft_config_loaded"


def mark_trainable(model: nn.Module) -> None:
    """Tell transformers' Trainer that something trains beside the packed weights of a model."""
    if hasattr(model, _MARK) and any(True for _ in quantized_layers(model)):
        model.__dict__[_MARK] = True


def unmark(model: nn.Module) -> None:
    """Undo `mark_trainable`."""
    model.__dict__.pop(_MARK, None)


@contextmanager
def as_own_class_saves(model: nn.Module) -> Iterator[None]:
    """Inside, the model's own class saves it as a model without adapters."""
    mark = model.__dict__.pop(_MARK, None)
    try:
        yield
    finally:
        if mark is not None:
            model.__dict__[_MARK] = mark
