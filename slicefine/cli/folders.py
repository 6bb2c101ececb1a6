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
from slicefine.training.loading import pretrained

_WEIGHTS = re.compile(r"(model|pytorch_model)([.-].*)?\.(safetensors|bin)(\.index\.json)?")
# tokenizers, processors, templates
_BESIDE = (".json", ".txt", ".model", ".jinja")
# the records of another run
_NOT_BESIDE = ("training.json", "slice_config.json")


def load_for(delta: Delta, model: str) -> nn.Module:
    """A model (folder, .gguf file or hub id) in the class, the dtype and with the head that a delta
    was made for, on the CPU.

    Nothing in the delta chooses code: the class must be one of transformers' own, for models of the
    kind that the folder holds, and of the options only those of a new head are taken.

    Raises UserError if transformers has no such class or cannot load it.
    """

    kind = _class(delta, model)
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


def _class(delta: Delta, model: str) -> Any:
    """The class of transformers that a delta names, if it is one for this model."""
    import transformers

    name = delta.base.get("class") or ""
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    # The name comes from a file: of all that is in the module, only a model's class may be called.
    plain = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    wanted = getattr(getattr(kind, "config_class", None), "model_type", None)
    if not plain or not wanted:
        raise UserError(
            f"the delta was made for a {name or 'model of a class that it does not name'}, which"
            " transformers does not have; load the model yourself and use"
            " SliceModel.from_pretrained(model, delta)"
        )
    config = Path(model).expanduser() / "config.json"
    if config.is_file():
        try:
            found = json.loads(config.read_text(encoding="utf-8")).get("model_type")
            kinds = _kinds(found)
        except (ValueError, AttributeError) as error:
            raise UserError(f"{config} is no JSON object: {error}") from error
        if kinds and wanted not in kinds:
            raise UserError(
                f"the delta was made for a {name}, a model of type {wanted!r}; {model} holds one of"
                f" type {found!r}"
            )
    return kind


def _kinds(model_type: Any) -> set[str]:
    """A type of model, and those of its parts: a text model is loaded of a folder with images too."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return set()
    parts = getattr(CONFIG_MAPPING[model_type], "sub_configs", {}).values()
    return {model_type, *(getattr(part, "model_type", "") for part in parts)}


def check_output(source: str, output: Path, force: bool) -> None:
    """Raise UserError for a folder that `write` would replace and that is not the source.

    force: replace the model in it all the same; what no model is made of stays.
    """
    origin = Path(source).expanduser()
    if not output.exists() or (origin.is_dir() and origin.samefile(output)):
        return
    if not output.is_dir():
        raise UserError(f"--output {output} is a file; choose a folder")
    if not any(output.iterdir()):
        return
    if not (output / "config.json").is_file():
        raise UserError(
            f"--output {output} is there and no model folder; choose another one"
        )
    if not force:
        raise UserError(
            f"--output {output} holds a model already, which is not --model. Choose another folder,"
            " or --force, which replaces the model and leaves other files in it"
        )


def write(model: Any, source: str, output: Path) -> None:
    """Write a model by save_pretrained to a folder, with the tokenizer and what else stands beside
    its source (or in a .gguf file).

    A folder that is there is replaced in one step. What is in it and no part of a model stays: a
    delta, checkpoints, notes.
    """
    origin = _origin(source)
    with atomic.replacing_folder(output) as temporary:
        model.save_pretrained(temporary)
        if source.endswith(".gguf"):
            from transformers import AutoTokenizer

            pretrained(AutoTokenizer, source, None).save_pretrained(temporary)
        # _copy writes over nothing: what save_pretrained has written stays, then the source's small
        # files, then what was in the folder.
        if origin is not None and not (output.exists() and origin.samefile(output)):
            for path in sorted(origin.iterdir()):
                if path.name.endswith(_BESIDE) and path.name not in _NOT_BESIDE:
                    _copy(path, temporary, folders=False)
        for path in sorted(output.iterdir()) if output.exists() else ():
            _copy(path, temporary, folders=True)


def _copy(path: Path, folder: Path, folders: bool) -> None:
    """Copy a file, or a folder, that is not there and no weights of a model."""
    target = folder / path.name
    if target.exists() or _WEIGHTS.fullmatch(path.name):
        return
    if path.is_file():
        shutil.copy2(path, target)
    elif folders and path.is_dir():
        # a link stays a link: what it points to may be large, or gone
        shutil.copytree(path, target, symlinks=True)


def _head(delta: Delta) -> dict[str, Any]:
    """What from_pretrained must be told so that a new head gets its shape: of what the delta
    records only this.
    """
    recorded = delta.info.get("model_config")
    if recorded:
        return _head_options(recorded)
    heads = [
        entry.new.shape[0]
        for entry in delta.whole.values()
        if not entry.replaces and entry.new.dim() == 2
    ]
    # the narrowest of a head's layers is its last
    return {"num_labels": min(heads)} if heads else {}


def _head_options(recorded: Any) -> dict[str, Any]:
    number = lambda value: type(value) is int and 0 <= value < 1 << 31
    text = lambda value: isinstance(value, str)
    allowed = {
        "num_labels": number,
        "pad_token_id": number,
        "problem_type": text,
        "id2label": lambda value: (
            isinstance(value, dict)
            and all(k.isdigit() and text(v) for k, v in value.items())
        ),
        "label2id": lambda value: (
            isinstance(value, dict) and all(map(number, value.values()))
        ),
    }
    if not isinstance(recorded, dict):
        raise UserError(
            f"the delta records {recorded!r} as its model's head; expected an object"
        )
    for key, value in recorded.items():
        if key not in allowed or not allowed[key](value):
            raise UserError(
                f"the delta asks for the model to be loaded with {key}={value!r}. Only"
                f" {', '.join(allowed)} are taken from a delta; load the model yourself and use"
                " SliceModel.from_pretrained(model, delta)"
            )
    return dict(recorded)


def _origin(source: str) -> Path | None:
    """The folder of a model's small files; a .gguf file has none."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return None
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(source, allow_patterns=[f"*{suffix}" for suffix in _BESIDE])
    )


def same_base(delta: Delta, model: nn.Module) -> bool:
    """Whether every tensor of a model is that of the delta's base, by hash."""
    from slicefine.deltas.base import base_hashes, combined_hash

    new = {key for key, entry in delta.whole.items() if not entry.replaces}
    return combined_hash(base_hashes(model, new)) == delta.base.get("sha256")


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, default=str)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
