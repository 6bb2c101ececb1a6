"""Why a module cannot become a slice, in a sentence that says what to do instead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from slicefine.layer import SliceLayer
from slicefine.matching import some
from slicefine.modules.quantized import packing_of
from slicefine.past import linear_forward, reads_past


def is_linear(module: nn.Module) -> bool:
    """An nn.Linear, or Hugging Face's Conv1D (recognized without importing transformers)."""
    kind = type(module)
    return isinstance(module, nn.Linear) or (
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    )


@dataclass(frozen=True)
class Place:
    """Where a module stands: what may keep it from becoming a slice.

    Attributes:
        name: of the module.
        parent: the module that holds it; None for the model itself.
        tied_to: other modules that use its weight.
        everything: whether "all-linear" found it; else the config names it, and an obstacle is an
            error.
        of_attention: whether it belongs to an nn.MultiheadAttention that becomes slices.
    """

    name: str
    parent: nn.Module | None
    tied_to: list[str]
    everything: bool
    of_attention: bool = False


def why_not(module: nn.Module, place: Place, notes: list[str]) -> str | None:
    """Why a module stays as it is; None if it can become a slice.

    Args:
        module: what the config names.
        place: where it stands.
        notes: gets a sentence on what may go wrong later.

    Raises:
        ValueError: the module cannot become a slice, and the config names it itself, or its weight
            cannot be left aside without a word.
    """
    # an error under "all-linear" too: such a layer left out in silence would be training not done
    if reason := _without_values(module, place.name):
        raise ValueError(reason + ".")
    reason = _other_kind(module, place) or _read_past(module, place, notes)
    if reason is not None and not place.everything:
        raise ValueError(f"{place.name} {reason}.")
    if reason is not None:
        # without the layer's name: one sentence for all layers of one kind
        return f"it {reason}"
    if place.tied_to:
        return (
            f"its weight is tied to {', '.join(place.tied_to)}; untie them, or"
            " tied_weights='share' where all of them are linear layers"
        )
    return None


def _without_values(module: nn.Module, name: str) -> str | None:
    """What is wrong with the weight of a layer, however it was named."""
    if isinstance(module, SliceLayer):
        return f"{name} is a SliceLinear already; call merge_and_unload() before get_slice_model()"
    weight = getattr(module, "weight", None)
    reason = quantized(module)
    if reason and packing_of(module) is None:
        return (
            f"{name} is a {type(module).__name__} with a quantized weight ({reason}); slices train"
            " floating-point weights, and beside those that bitsandbytes (4 and 8 bits) and torchao"
            " (weights only) have packed. Load the model in one of these, or leave the layer out"
            " (exclude_modules)"
        )
    if reason or not is_linear(module):
        return None
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return (
            f"{name} is a {type(module).__name__}, whose weight gets its shape from the first"
            " input; run one batch through the model first"
        )
    if not isinstance(weight, nn.Parameter):
        return (
            f"the weight of {name} is a {type(weight).__name__} and no parameter of its own"
            " (pruned, or parameterized); make it permanent first, or leave the layer out"
            " (exclude_modules)"
        )
    if weight.is_meta:
        return (
            f"{name} has its weight on the meta device, without values; load the weights first (a"
            " device map that offloads keeps them elsewhere: give it more memory)"
        )
    if weight.is_inference():
        return (
            f"{name} was made under torch.inference_mode(), so its weight can never train; make or"
            " load the model outside of it"
        )
    # a device map's is renewed
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
        return (
            f"the forward of {name} has been replaced on the instance, so a slice would never be"
            " called; make slices before whatever replaces it"
        )
    return None


def _other_kind(module: nn.Module, place: Place) -> str | None:
    """Why a module does not compute what a linear layer does, as far as its class tells.

    As is `_read_past`'s, the answer is a sentence that begins after the layer's name.
    """
    name, kind = place.name, type(module)
    if packing_of(module) is not None:
        return None
    if not is_linear(module):
        return f"is a {kind.__name__}; {_what_instead(module, name)}"
    # the class of out_proj in nn.MultiheadAttention
    own = torch.nn.modules.linear.NonDynamicallyQuantizableLinear
    if isinstance(module, own) and not place.of_attention:
        return (
            "belongs to a subclass of nn.MultiheadAttention, which may read its weight"
            " without calling it, so a slice might never train"
        )
    # Conv1D, or a subclass that computes what nn.Linear does
    if not isinstance(module, nn.Linear) or kind.forward is nn.Linear.forward:
        return None
    if linear_forward(module):
        return None
    return (
        f"is a {kind.__name__} with a forward of its own, which a slice would replace, and"
        " on random inputs it computes something else than nn.Linear. Put an nn.Linear with its"
        " weight in its place if that is what you mean, or leave it out (exclude_modules)"
    )


def _read_past(module: nn.Module, place: Place, notes: list[str]) -> str | None:
    """Why a layer might never be called, as far as the code of its parent tells."""
    child = place.name.rpartition(".")[2]
    found = None if place.parent is None else reads_past(place.parent, child)
    if found is None:
        return None
    reader, called = found
    # who names a layer gets it, with a warning; "all-linear" rather leaves it out
    if called and not place.everything:
        notes.append(
            f"{place.name} may train only at times: {reader} also reads its weight without calling"
            " it"
        )
        return None
    if called:
        return f"is not always called: {reader} may read its weight instead, past a slice"
    return f"is not called: {reader} reads its weight itself, so a slice would not train"


_QUANTIZERS = (
    "torchao",
    "bitsandbytes",
    "optimum",
    "gptqmodel",
    "auto_gptq",
    "awq",
    "hqq",
    "quanto",
    "compressed_tensors",
    "aqlm",
)


def quantized(module: nn.Module) -> str | None:
    """How the weight of a linear layer is quantized, found without importing any library that does
    it; None if it is not.
    """
    packing = packing_of(module)
    if packing is not None:
        return packing.kind
    weight = getattr(module, "weight", None)
    # some libraries replace the layer, others only the tensor inside it
    for kind in (type(module), type(weight)):
        if (
            kind.__module__.split(".")[0] in _QUANTIZERS
            and "linear" in type(module).__name__.lower()
        ):
            return f"{kind.__module__}.{kind.__name__}"
        path = kind.__module__.split(".")
        if (
            path[:3] == ["torch", "ao", "nn"]
            and "quantized" in path
            and kind.__name__ in ("Linear", "LinearReLU")
        ):
            return f"{kind.__module__}.{kind.__name__}"
    # GPTQ, AWQ and compressed-tensors keep packed integers under names of their own
    for packed in ("qweight", "weight_packed"):
        if isinstance(getattr(module, packed, None), torch.Tensor):
            return packed
    if (
        is_linear(module)
        and isinstance(weight, torch.Tensor)
        and not weight.dtype.is_floating_point
    ):
        return str(weight.dtype)
    return None


def _what_instead(module: nn.Module, name: str) -> str:
    """What to do with a module that was named and is no linear layer."""
    whole = f"modules_to_save=[{name!r}] trains all of it"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return (
            "an embedding looks rows up and has no slice of columns to train cheaply. Leave it"
            f" frozen, or {whole}"
        )
    if isinstance(module, nn.modules.conv._ConvNd):
        return (
            "convolutions do not become slices (a 1x1 convolution can be written as nn.Linear)."
            f" Leave it frozen, or {whole}"
        )
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return (
            "recurrent layers run in one fused kernel that gives no slice of a gradient. Leave it"
            f" frozen, or {whole}"
        )
    inside = [n for n, m in module.named_modules() if is_linear(m)]
    if inside:
        return (
            "only nn.Linear, nn.MultiheadAttention and Hugging Face's Conv1D become slices. Linear"
            f" layers inside: {some(inside)}"
        )
    return (
        "only nn.Linear, nn.MultiheadAttention and Hugging Face's Conv1D become slices. Leave it"
        f" frozen, or {whole}"
    )
