"""A side network as a folder like a delta's: adapter_model.safetensors, which names its own
SHA-256, and adapter_config.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from slicefine.atomic import write_text
from slicefine.capacity.exact import Bumps, Zigzags
from slicefine.capacity.side import AdditiveSide, _linears
from slicefine.deltas.base import base_hashes, combined_hash
from slicefine.deltas.format import CONFIG_FILE, FILE, read_file, write_file

# name and version of the format
KIND = ("slicefine-side", 1)
_EXACT = {"Bumps": Bumps, "Zigzags": Zigzags}


def base_sha256(model: nn.Module) -> str:
    """One hash over every tensor of a model's state dict."""
    return combined_hash(base_hashes(model, set()))


def save_side(
    side: AdditiveSide,
    folder: str | os.PathLike[str],
    base: dict[str, Any],
    info: dict[str, Any],
) -> str:
    """Write a side network, atomically; base: ``{"model": name, "sha256": base_sha256(model)}``.
    Returns the file's identity.

    Raises ValueError for a side whose features come from a callable, which no file can hold.
    """
    if not isinstance(side.feature, str):
        raise ValueError(
            "this side takes its features from a callable, which a file cannot hold; name a module"
            " instead"
        )
    folder = Path(folder)
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in side.network.state_dict().items()
    }
    kind = type(side.network).__name__ if side.exact else "ReLU"
    network = {
        "kind": kind,
        "layers": side.layers,
        "neurons": side.neurons,
        "stored": side.stored,
    }
    manifest = {
        "base": base,
        "info": info,
        "network": network,
        "feature": side.feature,
        "output": side.output,
    }
    identity = write_file(folder / FILE, manifest, tensors, KIND)
    config = {
        "peft_type": "ADDITIVE_SIDE",
        "base_model_name_or_path": base.get("model"),
        "base_model_sha256": base["sha256"],
        "delta_sha256": identity,
        "feature": side.feature,
        "output": side.output,
        "network": network,
    }
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    return identity


def load_side(folder: str | os.PathLike[str]) -> tuple[AdditiveSide, dict[str, Any]]:
    """(side, manifest), every byte checked. Raises DeltaError for a damaged file,
    FileNotFoundError.
    """
    manifest, tensors = read_file(Path(folder) / FILE, KIND)
    kind = manifest["network"]["kind"]
    if kind in _EXACT:
        network: nn.Module = _EXACT[kind](*(tensors[n] for n in _BUFFERS[kind]))
        return AdditiveSide.of(network, manifest["feature"], manifest["output"]), manifest
    weights = [t for n, t in tensors.items() if n.endswith("weight")]
    # in the network's order, whatever the order in the file
    weights.sort(
        key=lambda t: next(
            int(n.split(".")[0]) for n, other in tensors.items() if other is t
        )
    )
    width = sum(w.shape[0] for w in weights[:-1])
    side = AdditiveSide(
        weights[0].shape[1],
        weights[-1].shape[0],
        len(weights),
        width,
        feature=manifest["feature"],
        output=manifest["output"],
    )
    side.network.load_state_dict(tensors)
    assert len(_linears(side.network)) == len(weights)
    return side, manifest


_BUFFERS = {
    "Bumps": ("direction", "knots", "at", "slopes"),
    "Zigzags": ("direction", "edges", "heights", "readout"),
}
