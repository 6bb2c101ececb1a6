"""Models whose linear layers are packed, for the tests of a quantized base."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slicefine import SliceAdamW

# the last two have no test without torchao
KINDS = ("nf4", "int8", "torchao int8", "torchao int4")


def available(kind: str) -> str | None:
    """Why a kind of packing cannot be made here; None if it can."""
    library = "torchao" if kind.startswith("torchao") else "bitsandbytes"
    try:
        __import__(library)
    except ImportError as error:
        return f"{library} is not installed ({error})"
    return None


def pack_linear(linear: nn.Linear, kind: str) -> nn.Module:
    """The layer with its weight packed, as the library itself does it."""
    if kind.startswith("torchao"):
        import torchao.quantization as quantization

        config = {
            "torchao int8": quantization.Int8WeightOnlyConfig,
            "torchao int4": lambda: quantization.IntxWeightOnlyConfig(
                torch.int4, quantization.PerGroup(32)
            ),
        }[kind]()
        holder = nn.Sequential(linear)
        quantization.quantize_(holder, config)
        return holder[0]
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if kind == "int8":
        packed = layers.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
        packed.weight = layers.Int8Params(
            linear.weight.data, requires_grad=False, has_fp16_weights=False
        )
    else:
        packed = layers.Linear4bit(*sizes, bias=bias, compute_dtype=linear.weight.dtype)
        packed.weight = layers.Params4bit(
            linear.weight.data, requires_grad=False, quant_type=kind, module=packed
        )
    if bias:
        packed.bias = linear.bias
    return packed.to("cpu")


def pack(model: nn.Module, kind: str, skip: tuple[str, ...] = ("head",)) -> Any:
    """Pack every linear layer of a model in place but those whose names end so."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not name.endswith(skip):
            model.set_submodule(name, pack_linear(module, kind))
    return model


class Body(nn.Module):
    """Two packed layers and a head, in bfloat16."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 96, bias=bias)
        self.second = nn.Linear(96, 64, bias=bias)
        self.head = nn.Linear(64, 8, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.second(torch.relu(self.first(x))))


def train(model: Any, steps: int = 12, lr: float = 1e-2, seed: int = 0) -> None:
    """Steps of SliceAdamW towards a fixed target."""
    optimizer = SliceAdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 64, generator=generator).to(model.head.weight.dtype)
        (model(x).float() - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
