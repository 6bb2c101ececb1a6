"""The folder of a delta: its file, a configuration that other tools look for, and a model card."""

from __future__ import annotations

import json
import os
from pathlib import Path

from slicefine import atomic
from slicefine.deltas.card import model_card
from slicefine.deltas.delta import CONFIG_FILE, FILE, Delta, DeltaError

CARD = "README.md"
# What says that a folder is a whole model: of transformers, diffusers and sentence-transformers
_OF_MODELS = ("config.json", "modules.json", "model_index.json")


def save_folder(delta: Delta, folder: str | os.PathLike[str], name: str) -> None:
    """Write a delta, its configuration and its card, each atomically.

    Args:
        delta: what to write.
        folder: made if need be; a delta in it is replaced. A README.md of somebody else stays.
        name: title of the card.

    Raises:
        DeltaError: the folder holds a model or another tool's adapter, which would no longer load.
    """
    folder = Path(folder)
    check_no_model(folder)
    delta.save(folder / FILE)
    atomic.write_text(folder / CONFIG_FILE, delta.config_json())
    card = folder / CARD
    if not card.exists() or "library_name: slicefine" in card.read_text(errors="replace"):
        atomic.write_text(card, model_card(delta, name))


def check_no_model(folder: Path) -> None:
    """Raise DeltaError for a folder in which a delta would spoil what is there."""
    if found := next((name for name in _OF_MODELS if (folder / name).exists()), None):
        raise DeltaError(
            f"{folder} holds a model ({found}), which could not be loaded any more with a delta"
            f" beside it; save the delta to another folder, such as {folder / 'delta'}"
        )
    kind = adapter_kind(folder)
    if kind not in (None, "SLICEFINE"):
        raise DeltaError(
            f"{folder} holds an adapter of type {kind}, which a delta would replace; choose another"
            " folder"
        )


def check_no_adapter(folder: Path) -> None:
    """Raise DeltaError for a folder in which a whole model could not be loaded for an adapter."""
    kind = adapter_kind(folder)
    if kind is not None:
        raise DeltaError(
            f"{folder} holds an adapter ({CONFIG_FILE}, type {kind}), which from_pretrained would"
            " look for in place of a model; save the model to another folder, or remove the adapter"
        )


def adapter_kind(folder: Path) -> str | None:
    """What the adapter of a folder calls itself; None where there is none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["peft_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
