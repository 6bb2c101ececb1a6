"""Pretrained models by path or id, in a dtype, and what of their heads is new."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slicefine.training.data import UserError

# "auto": that of the checkpoint
Dtype = torch.dtype | str


def location(model: str) -> tuple[str, dict[str, Any]]:
    """A path or id, and what from_pretrained needs to read a single GGUF file."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--model {model}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if (
        model.startswith((".", "/", "~")) or "\\" in model
    ) and not path.expanduser().exists():
        raise UserError(
            f"--model {model}: no such folder; give a folder with config.json and weights, a .gguf"
            " file, or a hub id"
        )
    return str(path.expanduser()) if path.expanduser().exists() else model, {}


def pretrained(kind: Any, model: str, dtype: Dtype | None, **options: Any) -> Any:
    """``from_pretrained`` of an auto class. dtype: "auto" is the checkpoint's own; a GGUF file holds
    packed weights, which have none, and become float32.
    """
    place, extra = location(model)
    if dtype is not None:
        packed = "gguf_file" in extra
        extra["dtype"] = torch.float32 if packed and dtype == "auto" else dtype
        if packed:
            import transformers

            # from transformers 5 on, weights may stay packed otherwise
            if hasattr(transformers, "GgufConfig"):
                extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        return kind.from_pretrained(place, **extra, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"--model {model}: {kind.__name__} cannot load it: {error}"
        ) from error


def packing(
    base: str | None,
    dtype: Dtype,
    device: Any,
    model: str,
) -> dict[str, Any]:
    """What from_pretrained needs to pack a model's weights while it reads them.

    Args:
        base: "nf4", "int8", or None for nothing.
        dtype: in which the model works; "auto" is bfloat16 there.
        device: where the packed weights go; they cannot be moved as others.
        model: its path or id.

    Raises:
        UserError: bitsandbytes is not installed, or the model is a GGUF file.
    """
    if base is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"--quantize {base} needs bitsandbytes: pip install 'slicefine[quantized]'"
        )
    if Path(model).suffix == ".gguf":
        raise UserError(
            f"--quantize {base}: {model} holds packed weights of another kind; load it with"
            " transformers (GgufConfig(dequantize=True)), save it as a folder, and give that"
        )
    import transformers

    works_in = torch.bfloat16 if dtype == "auto" else dtype
    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": base,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": works_in,
    }
    options: dict[str, Any] = {"load_in_8bit": True} if base == "int8" else four
    return {
        "quantization_config": transformers.BitsAndBytesConfig(**options),
        "device_map": {"": str(device)},
    }


def numbering(labels: list[str], model: str) -> list[str]:
    """The labels in the order of the checkpoint's classes where it has the same ones: a trained
    head goes on meaning what it meant.
    """
    from transformers import AutoConfig

    place, extra = location(model)
    try:
        names: Any = AutoConfig.from_pretrained(place, **extra).id2label
        known = [str(names[i]) for i in sorted(names, key=int)]
    except (OSError, ValueError, AttributeError, TypeError):
        # whether the model can be loaded is said where it is loaded
        return labels
    same = len(set(known)) == len(known) and set(known) == set(labels)
    return known if same else labels


def new_modules(info: dict[str, Any]) -> list[str]:
    """Modules whose weights the checkpoint did not have."""
    keys = {
        *info.get("missing_keys", ()),
        *(
            # some versions of transformers put the two shapes behind the key
            k[0] if isinstance(k, (tuple, list)) else k
            for k in info.get("mismatched_keys", ())
        ),
    }
    return sorted({key.rsplit(".", 1)[0] for key in keys if "." in key})


def with_head(model: nn.Module, modules: list[str]) -> list[str]:
    """A classification head is fully trained also where the checkpoint has one: its labels need not
    be these.
    """
    return sorted(
        {
            *modules,
            *(
                name
                for name in ("score", "classifier")
                if getattr(model, name, None) is not None
            ),
        }
    )
