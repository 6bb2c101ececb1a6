"""The base model of a delta: its tensors by their keys, and the hashes that tell it from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from slicefine.atomic import tensor_sha256
from slicefine.deltas.format import DeltaError
from slicefine.modules.quantized import overlay_keys
from slicefine.sharding import is_sharded


def base_hashes(
    model: nn.Module,
    leave_out: set[str],
    original: Callable[[str, Tensor], Tensor] | None = None,
    prefix: str = "",
) -> dict[str, str]:
    """SHA-256 by key of everything in a model's state dict but ``leave_out``.

    prefix: of the keys, where the model is a part of another.

    original: (key, tensor in the model) -> what stands for it; asked one by one, so that no second
        model is in memory.
    """
    return {
        part: tensor_sha256(part, tensor)
        for key, value in _prefixed(whole_state(model), prefix)
        if key not in leave_out and isinstance(value, Tensor)
        for part, tensor in _parts(key, original(key, value) if original else value)
    }


def _prefixed(state: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    return ((prefix + key, value) for key, value in state.items())


def _parts(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor by its key; a quantized one of torchao by its parts and the rule that joins them."""
    if not is_traceable_wrapper_subclass(value):
        yield key, value
        return
    names, rule = value.__tensor_flatten__()
    for name in names:
        yield from _parts(f"{key}.{name}", getattr(value, name))
    text = f"{type(value).__name__} {rule!r}".encode()
    yield f"{key}.rule", torch.frombuffer(bytearray(text), dtype=torch.uint8)


def weight_hash(hashes: Mapping[str, str], key: str, packed: bool) -> str | None:
    """The hash of one weight of a base; of a packed one with all that unpacks it, without the bias.

    Args:
        hashes: by key, as `base_hashes` gives them.
        key: of the weight.
        packed: whether the weight is quantized.
    """
    if not packed:
        return hashes.get(key)
    prefix = key.removesuffix("weight")
    own = {
        name: value
        for name, value in hashes.items()
        if name.startswith(prefix) and name != f"{prefix}bias"
    }
    return combined_hash(own)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model of one process, without what stands beside packed weights. Raises DeltaError if its tensors are spread over
    several.
    """
    added = overlay_keys(model)
    state = {key: v for key, v in model.state_dict().items() if key not in added}
    if sharded := [key for key, value in state.items() if is_sharded(value)]:
        raise DeltaError(
            f"{sharded[0]} and {len(sharded) - 1} others are sharded over processes; deltas are"
            " made of whole tensors. Gather them"
            " (torch.distributed.checkpoint.state_dict.get_model_state_dict with"
            " full_state_dict=True) and load them into a model of one process"
        )
    return state


def combined_hash(hashes: Mapping[str, str]) -> str:
    """One SHA-256 over the hashes of all tensors, in the order of their keys."""
    # sorted: a state dict is in the order in which the modules were made
    return hashlib.sha256(
        "".join(f"{key} {hashes[key]}\n" for key in sorted(hashes)).encode()
    ).hexdigest()


def tensor_of(model: nn.Module, key: str) -> Tensor:
    path, _, name = key.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(path), name)
    except AttributeError as error:
        near = ", ".join(k for k in model.state_dict() if k.endswith(name))[:200]
        raise DeltaError(
            f"the model has no {key}, which the delta changes; it has"
            f" {near or 'nothing of that name'}"
        ) from error
    # a parameter that a module uses itself and that is sliced now is a module of its name
    if isinstance(tensor, nn.Module):
        tensor = getattr(tensor, "weight", tensor)
    if not isinstance(tensor, Tensor):
        raise DeltaError(
            f"{key}, which the delta changes, is a {type(tensor).__name__} in the model; expected a"
            " tensor"
        )
    return tensor
