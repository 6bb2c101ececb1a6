"""The same model with packed (quantized) weights, for plans: bytes without values, no library.

A `PackedLinear` has the bytes of the library's layer and unpacks into a temporary as large as the
weight, forward and backward, as bitsandbytes does for more than a few tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicefine.heads import find_heads
from slicefine.modules.quantized import PackedProduct, Packing
from slicefine.plan.estimate import Workload

BASES = ("bf16", "int8", "nf4")
# weights of one scale, and scales of one float32: bitsandbytes with double quantization
_BLOCK, _BLOCKS = 64, 256


class PackedLinear(nn.Linear):
    """A linear layer with the bytes of a packed one.

    Args:
        linear: the layer that it takes the place of; on the meta device.
        kind: "nf4" or "int8".
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packing = Packing(kind, _unpack)
        self.dtype = linear.weight.dtype
        count, device = linear.weight.numel(), linear.weight.device
        if kind == "nf4":
            shape, packed = ((count + 1) // 2, 1), torch.uint8
            blocks = -(-count // _BLOCK)
            scales = torch.empty(blocks, dtype=torch.uint8, device=device)
            of_scales = torch.empty(-(-blocks // _BLOCKS), device=device)
            self.register_buffer("scales_of_scales", of_scales)
        else:
            shape, packed = linear.weight.shape, torch.int8
            scales = torch.empty(self.out_features, device=device)
        weight = torch.empty(shape, dtype=packed, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        # without an overlay, as another method calls it
        if torch.is_grad_enabled() and input.requires_grad:
            product = _KeepsInput if self.packing.kind == "int8" else PackedProduct
            return product.apply(input, self.bias, self)  # type: ignore[return-value]
        return self._multiply(input)

    def packed_forward(self, input: Tensor) -> Tensor:
        """The product with the unpacked weight, for `PackedProduct`."""
        return self._multiply(input)

    def _multiply(self, input: Tensor) -> Tensor:
        weight = self.unpacked(self.dtype)
        return F.linear(input.to(self.dtype), weight, self.bias).to(input.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """A new tensor (out, in)."""
        return _unpack(self, dtype)


class _KeepsInput(PackedProduct):
    """bitsandbytes' own function for 8 bits keeps its input."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        bias: Tensor | None,
        layer: Any,
    ) -> Tensor:
        ctx.save_for_backward(input)
        return PackedProduct.forward(ctx, input, bias, layer)


def _unpack(layer: Any, dtype: torch.dtype) -> Tensor:
    shape = layer.out_features, layer.in_features
    return torch.empty(shape, dtype=dtype, device=layer.weight.device)


def with_base(workload: Workload, base: str) -> Workload:
    """The same with every linear layer packed but the output head, as transformers loads it.

    Args:
        base: "nf4" or "int8"; the workload's own dtype leaves it as it is.

    Raises:
        ValueError: base is something else.
    """
    if base == workload.base:
        return workload
    if base not in BASES[1:]:
        raise ValueError(
            f"base is {base!r}; expected {workload.base}, {' or '.join(BASES[1:])}"
        )

    def build() -> nn.Module:
        model = workload.build()
        heads = find_heads(model)
        for name, module in list(model.named_modules()):
            if type(module) is not nn.Linear:
                continue
            if module is heads.language or heads.holds(name) is not None:
                continue
            model.set_submodule(name, PackedLinear(module, base))
        return model

    return replace(workload, build=build, base=base)
