"""Out of slices beside packed weights: into floating point, or into a LoRA adapter on the same base."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn

from slicefine.deltas.delta import DeltaError
from slicefine.deltas.lora import to_lora
from slicefine.modules.quantized import (
    QuantizedLinear,
    dtype_of,
    packing_of,
    quantized_layers,
)

WAYS = ("dequantize", "lora")


def check_way(model: nn.Module, way: str | None) -> None:
    """Refuse to merge what a packed weight cannot take in, unless it is said how.

    Args:
        model: its slices are applied.
        way: None, or one of `WAYS`.

    Raises:
        ValueError: way is something else, or None where something has trained beside packed weights;
            or the model has none, or none that its library can unpack.
    """
    if way is not None and way not in WAYS:
        raise ValueError(f"quantized is {way!r}; expected None, 'dequantize' or 'lora'")
    packings = {n: p for n, m in model.named_modules() if (p := packing_of(m))}
    filled = next(
        (n for n, m in quantized_layers(model) if bool(m.overlay.weight.any())), None
    )
    if way is None and filled is not None:
        raise ValueError(
            f"{filled} is quantized ({packings[filled].kind}), and what has trained cannot go into"
            " its weight without quantizing it again, which would round most of it away. Choose:"
            " merge_and_unload(quantized='dequantize') gives a model in floating point,"
            " merge_and_unload(quantized='lora') the quantized base with an exact LoRA adapter on it"
            " (PEFT). unload() gives the base back; save_pretrained(folder) writes the delta"
        )
    if way is not None and not packings:
        raise ValueError(
            f"quantized is {way!r}, and no layer of the model is quantized; leave it out"
        )
    closed = [f"{n} ({p.kind})" for n, p in packings.items() if p.dequantize is None]
    if way == "dequantize" and closed:
        raise ValueError(
            f"{closed[0]} cannot be unpacked: its library only multiplies."
            " merge_and_unload(quantized='lora') keeps the quantized base"
        )


@torch.no_grad()
def unpacked(model: nn.Module, dtype: torch.dtype) -> dict[int, nn.Module]:
    """A linear layer for every packed one, by the id of that, with what is beside it added.

    Args:
        model: its marks of a quantized model go.
        dtype: of weights whose packing does not say its own.
    """
    replacement: dict[int, nn.Module] = {}
    for module in model.modules():
        packing = packing_of(module)
        if packing is None or packing.dequantize is None:
            continue
        # the sum is rounded once
        weight = packing.dequantize(module, torch.float32)
        if isinstance(module, QuantizedLinear):
            added = module.overlay
            weight.index_add_(1, added.slice_pool, added.weight.to(torch.float32))
        out_features, in_features = weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        kept = weight.to(dtype_of(module) or dtype)
        linear.weight = nn.Parameter(kept, requires_grad=False)
        linear.register_parameter("bias", module._parameters.get("bias"))
        linear.train(module.training)
        if (hook := module.__dict__.get("_hf_hook")) is not None:
            linear.__dict__["_hf_hook"] = hook
        replacement[id(module)] = linear
    for name in _MARKS:
        model.__dict__.pop(name, None)
    getattr(model, "config", model).__dict__.pop("quantization_config", None)
    return replacement


# what transformers notes in a model that it has quantized
_MARKS = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "_weight_conversions",
)


def with_lora(model: Any) -> Any:
    """The base of a model with its one adapter as a LoRA on it, in PEFT's class.

    Raises:
        ImportError: PEFT is not installed.
        DeltaError: Several adapters are applied, or it is no LoRA.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "merge_and_unload(quantized='lora') makes a model of PEFT: pip install peft"
        ) from error
    if len(model.active_adapters) > 1:
        raise DeltaError(
            f"{model.active_adapters} are applied, and an adapter of PEFT is made of one; set_adapter"
            " that one, or add_weighted_adapter them"
        )
    adapter, training = to_lora(model.delta()), model.training
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        lora = peft.PeftModel.from_pretrained(model.unload(), folder)
    # PEFT gives it for inference, where bitsandbytes multiplies otherwise
    return lora.train(training)
