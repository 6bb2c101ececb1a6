"""Model folders: a base model loaded in the class that a delta was made for, and a merged one
written whole or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicefine import atomic
from slicefine.deltas.delta import Delta
from slicefine.training.data import UserError
from slicefine.training.tasks import pretrained

_WEIGHTS = re.compile(r"(model|pytorch_model)([.-].*)?\.(safetensors|bin)(\.index\.json)?")
_BESIDE = (".json", ".txt", ".model", ".jinja")  # tokenizers, processors, templates
_NOT_BESIDE = ("training.json", "slice_config.json")  # what another run says of itself


def load_for(delta: Delta, model: str) -> nn.Module:
    """A model (folder, .gguf file or hub id) in the class, the dtype and with the head that a delta
    was made for, on the CPU.

    Raises UserError if transformers has no such class or cannot load it.
    """
    import transformers

    name = delta.base.get("class")
    kind = getattr(transformers, name or "", None)
    if kind is None:
        raise UserError(
            f"the delta was made for a {name or 'model of a class that it does not name'}, which"
            " transformers does not have; load the model yourself and use"
            " SliceModel.from_pretrained(model, delta)"
        )
    dtypes = {weight.dtype for weight in delta.weights.values()}
    if len(dtypes) != 1:
        raise UserError(
            f"the delta has weights in {', '.join(sorted(map(str, dtypes))) or 'no dtype'}; a model"
            " folder can be loaded in one dtype only. Load the model yourself and use"
            " SliceModel.from_pretrained(model, delta)"
        )
    options = _head(delta)
    if options:
        options["ignore_mismatched_sizes"] = True
    return pretrained(kind, model, dtypes.pop(), **options)


def write(model: Any, source: str, output: Path) -> None:
    """Write a model by save_pretrained to a folder, with the tokenizer and what else stands beside
    its source (or in a .gguf file).

    A folder that is there is replaced in one step. Where it is the source itself, everything but
    its weights stays in it.
    """
    origin = _origin(source)
    if output.exists() and not (output / "config.json").is_file() and any(output.iterdir()):
        raise UserError(f"--output {output} is there and no model folder; choose another one")
    in_place = origin is not None and output.exists() and origin.samefile(output)
    with atomic.replacing_folder(output) as temporary:
        model.save_pretrained(temporary)
        if source.endswith(".gguf"):
            from transformers import AutoTokenizer

            pretrained(AutoTokenizer, source, None).save_pretrained(temporary)
        for path in sorted(origin.iterdir()) if origin is not None else ():
            target = temporary / path.name
            if target.exists() or _WEIGHTS.fullmatch(path.name):
                continue
            if path.is_dir() and in_place:
                shutil.copytree(path, target, symlinks=True)
            elif path.is_file() and (
                in_place or (path.name.endswith(_BESIDE) and path.name not in _NOT_BESIDE)
            ):
                shutil.copy2(path, target)


def _head(delta: Delta) -> dict[str, Any]:
    """What from_pretrained must be told so that a new head gets its shape."""
    recorded = delta.info.get("model_config")
    if recorded:
        return dict(recorded)
    heads = [
        entry.new.shape[0]
        for entry in delta.whole.values()
        if not entry.replaces and entry.new.dim() == 2
    ]
    return (
        {"num_labels": min(heads)} if heads else {}
    )  # the narrowest of a head's layers is its last


def _origin(source: str) -> Path | None:
    """The folder of a model's small files; a .gguf file has none."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return None
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=[f"*{suffix}" for suffix in _BESIDE]))


def same_base(delta: Delta, model: nn.Module) -> bool:
    """Whether every tensor of a model is that of the delta's base, by hash."""
    from slicefine.deltas.delta import base_hashes, combined_hash

    new = {key for key, entry in delta.whole.items() if not entry.replaces}
    return combined_hash(base_hashes(model, new)) == delta.base.get("sha256")


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
