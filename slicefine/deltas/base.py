"""The base model of a delta: its tensors by their keys, and the hashes that tell it from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from slicefine.atomic import tensor_sha256
from slicefine.deltas.format import DeltaError
from slicefine.sharding import is_sharded


def base_hashes(
    model: nn.Module,
    leave_out: set[str],
    original: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, str]:
    """SHA-256 by key of everything in a model's state dict but ``leave_out``.

    original: (key, tensor in the model) -> what stands for it; asked one by one, so that no second
        model is in memory.
    """
    return {
        key: tensor_sha256(key, original(key, value) if original else value)
        for key, value in whole_state(model).items()
        if key not in leave_out and isinstance(value, Tensor)
    }


def whole_state(model: nn.Module) -> dict[str, Any]:
    """The state dict of a model of one process. Raises DeltaError if its tensors are spread over
    several.
    """
    state = model.state_dict()
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
