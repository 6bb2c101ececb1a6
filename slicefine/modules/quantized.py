"""Slices beside a packed weight: the quantized base stays as it is, what trains is added to it.

``y = Wq x + D x[pool]``. The pool is a bounded set of input features in which the slice moves; D
(out, pool) starts at zero and is the weight of a `PoolSlice`, a child of the packed layer. To
optimizers, moves and deltas that child is a `SliceLayer` like any other. Nothing is quantized again:
a step is far smaller than one unit of a 4 bit grid, and rounding would swallow it.

No library is imported here: whoever made the packed layer has imported its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slicefine import ops
from slicefine.config import SliceConfig
from slicefine.function import slice_linear
from slicefine.layer import SliceLayer
from slicefine.modules.parameters import SlicedModule, convert_module
from slicefine.slices import pool_features

# the name of the child beside a packed weight, and so a part of state-dict keys
OVERLAY = "overlay"
# input features of a pool that the config does not size: 2 * 128 / in_features bytes for each
# weight, 16 % of an nf4 weight that is 3,072 wide
DEFAULT_POOL = 128


class Packing(NamedTuple):
    """How a library keeps the weight of a linear layer.

    kind: for users, "nf4". dequantize: (the layer, a dtype) -> its weight (out, in), a new tensor;
        None where the library only multiplies.
    """

    kind: str
    dequantize: Callable[[Any, torch.dtype], Tensor] | None


def packing_of(module: nn.Module) -> Packing | None:
    """How the weight of a linear layer is packed, if slices can train beside it.

    A layer of another library may say so itself, by an attribute ``packing``.
    """
    own = module.__dict__.get("packing")
    if isinstance(own, Packing):
        return own
    names = {kind.__name__ for kind in type(module).__mro__}
    weight: Any = getattr(module, "weight", None)
    if "Linear4bit" in names and getattr(weight, "bnb_quantized", False):
        return Packing(weight.quant_type, _bnb_4bit)
    if "Linear8bitLt" in names and getattr(weight, "dtype", None) == torch.int8:
        return Packing("int8", _bnb_8bit)
    if _is_torchao(weight) and _only_weights(weight):
        return Packing(_torchao_kind(weight), _torchao)
    qweight = getattr(module, "qweight", None)
    if isinstance(qweight, Tensor) and hasattr(module, "in_features"):
        return Packing(_forward_only_kind(module), None)
    return None


def packed_shape(module: Any) -> tuple[int, int]:
    """(out_features, in_features) of a packed layer, whose weight has another shape."""
    return module.out_features, module.in_features


def _is_torchao(weight: Any) -> bool:
    named = type(weight).__module__.split(".")[0] == "torchao"
    return named and weight.dim() == 2 and hasattr(weight, "dequantize")


def _only_weights(weight: Any) -> bool:
    # quantized activations give a product whose gradient is not that of the unpacked weight
    names = ("act_quant_kwargs", "activation_quantization")
    return all(getattr(weight, name, None) is None for name in names)


def _torchao_kind(weight: Any) -> str:
    bits = getattr(weight, "target_dtype", None)
    if bits is not None:
        return f"torchao {str(bits).removeprefix('torch.')}"
    name = type(weight).__name__.removesuffix("Tensor").lower()
    return f"torchao {name}"


def _forward_only_kind(module: nn.Module) -> str:
    name = type(module).__name__
    found = (kind for kind in ("gptq", "awq") if kind in f"{type(module)}".lower())
    return next(found, name)


def _bnb_4bit(module: Any, dtype: torch.dtype) -> Tensor:
    weight = module.weight
    functional = sys.modules["bitsandbytes"].functional
    # FSDP replaces the parameter; the layer keeps the state of quantization too
    state = getattr(weight, "quant_state", None) or module.quant_state
    return functional.dequantize_4bit(weight.data, state).to(dtype)


def _bnb_8bit(module: Any, dtype: torch.dtype) -> Tensor:
    weight, state = module.weight, module.state
    scale = weight.SCB if weight.SCB is not None else state.SCB
    # the formula of the library's own backward pass; every int8 is a number of any of the dtypes
    return weight.data.to(dtype).mul_(scale.unsqueeze(1).mul(1.0 / 127.0))


def _torchao(module: Any, dtype: torch.dtype) -> Tensor:
    return module.weight.dequantize().to(dtype)


# The product with the packed weight


class PackedProduct(torch.autograd.Function):
    """The packed layer's own product. It keeps nothing: backward unpacks the weight again.

    The libraries' own functions keep the whole input (8 bits) or the unpacked weight (torchao).
    """

    @staticmethod
    def forward(ctx, input, bias, layer):
        ctx.layer, ctx.shape = layer, input.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        output = layer.packed_forward(input)
        if not torch.compiler.is_compiling() and output._is_view():
            # as in `SliceLinearFunction`: outputs that are views allow no in-place operation
            output = torch.ops.aten._unsafe_view(output, output.shape)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        needs_input, needs_bias, _ = ctx.needs_input_grad
        grad_input = grad_bias = None
        flat = grad_output.reshape(-1, grad_output.shape[-1])
        if needs_input:
            grad_input = flat.mm(ctx.layer.unpacked(flat.dtype)).view(ctx.shape)
        if needs_bias:
            grad_bias = flat.sum(0, dtype=ctx.bias_dtype)
        return grad_input, grad_bias, None


class QuantizedLinear(SlicedModule):
    """Mixed into the class of a packed linear layer that has an overlay."""

    _packing: Packing

    @property
    def overlay(self) -> PoolSlice | FrozenPool:
        """What is added to the packed weight's product."""
        overlay = self._modules[OVERLAY]
        assert isinstance(overlay, (PoolSlice, FrozenPool))
        return overlay

    def forward(self, input: Tensor) -> Tensor:
        overlay = self.overlay
        output = self._product(input)
        # not even a zero is added to what the base gives
        if overlay.disabled:
            return output
        return output + overlay(input).to(output.dtype)

    def _product(self, input: Tensor) -> Tensor:
        bias: Any = self._parameters.get("bias")
        trains = input.requires_grad or (bias is not None and bias.requires_grad)
        unpacks = self._packing.dequantize is not None
        if not (trains and unpacks and torch.is_grad_enabled()):
            return self.packed_forward(input)
        return PackedProduct.apply(input, bias, self)  # type: ignore[return-value]

    def packed_forward(self, input: Tensor) -> Tensor:
        """The library's own forward, with the bias."""
        return self._held_class.forward(self, input)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The packed weight in floating point, (out, in); a new tensor."""
        dequantize = self._packing.dequantize
        if dequantize is None:
            raise TypeError(
                f"{type(self).__name__} ({self._packing.kind}) only multiplies: its library gives no"
                " way to unpack the weight"
            )
        return dequantize(self, dtype)

    def free_biases(self) -> None:
        """Let the bias train."""
        bias = self._parameters.get("bias")
        if bias is not None:
            bias.requires_grad_(True)

    def restore(self) -> None:
        """Turn the module into what it was; the overlay goes, and what it holds is lost."""
        del self._modules[OVERLAY]
        del self.__dict__["_packing"]
        if (repacks := self.__dict__.pop("_repacks", None)) is not None:
            self.__dict__[_REPACKS] = repacks
        super().restore()


# bitsandbytes repacks a 4 bit weight for evaluation on some CPUs, rounds its scales to bfloat16 on
# the way, and its product then gives no gradient
_REPACKS = "support_avx512bf16_for_cpu"


def attach(module: nn.Module, overlay: PoolSlice | FrozenPool) -> None:
    """Give a packed layer its overlay, in place."""
    packing = packing_of(module)
    assert packing is not None, "the caller has asked `packing_of`"
    convert_module(module, QuantizedLinear)
    module.__dict__["_packing"] = packing
    if _REPACKS in module.__dict__:
        module.__dict__["_repacks"] = module.__dict__[_REPACKS]
        module.__dict__[_REPACKS] = False
    module._modules[OVERLAY] = overlay


# What is added


class Pool(nn.Module):
    """Columns beside a packed weight: a matrix D (out, pool) of certain input features.

    weight: D. slice_pool: (pool,) int64, ascending, the features. full_features: of the layer.
    """

    weight: nn.Parameter
    slice_pool: Tensor
    full_features: int

    def columns(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., pool), in the precision of D unless autocast says which."""
        taken = input.index_select(-1, self.slice_pool)
        if ops.autocast_enabled(input.device.type):
            return taken
        return taken.to(self._parameters["weight"].dtype)  # type: ignore[union-attr]

    def places(self, features: Tensor | None) -> Tensor:
        """(k,) where features of the layer stand in the pool; None asks for all of them.

        Raises:
            ValueError: A feature is not in the pool.
        """
        pool = self.slice_pool
        if features is None:
            features = torch.arange(self.full_features)
        features = features.to(pool.device)
        places = torch.searchsorted(pool, features).clamp(max=len(pool) - 1)
        outside = features[pool[places] != features]
        if len(outside):
            raise ValueError(
                f"input feature {int(outside[0])} and {len(outside) - 1} others are not among the"
                f" {len(pool)} of the pool"
            )
        return places

    def features(self, places: Tensor | None) -> Tensor:
        """(k,) on the host: features of the layer at places of the pool."""
        pool = self.slice_pool.to("cpu")
        return pool if places is None else pool[places.to("cpu")]

    def _apply(self, fn, recurse: bool = True) -> Any:
        # positions are no floating-point numbers, whatever model.type(dtype) says
        pool = self._buffers.pop("slice_pool")
        assert pool is not None
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers["slice_pool"] = pool
        weight = self._parameters["weight"]
        if weight is not None and not weight.is_meta:
            self._buffers["slice_pool"] = pool.to(weight.device)
        return self


class PoolSlice(Pool, SliceLayer):
    """The moving slice beside a packed weight; its weight is D, its input features are the pool's."""

    @classmethod
    def from_packed(
        cls,
        module: nn.Module,
        config: SliceConfig,
        name: str,
        r: int,
        dtype: torch.dtype,
    ) -> PoolSlice:
        """A slice for a packed layer, which stays as it is; `attach` puts the two together.

        Args:
            module: the packed layer.
            config: what the slice is.
            name: where the layer is in its model.
            r: width of the slice.
            dtype: of D where the packed weight does not say its own.

        Raises:
            ValueError: the slice cannot be of that kind, or the pool is too small for it.
        """
        packing = packing_of(module)
        assert packing is not None, "the caller has asked `packing_of`"
        _check(module, packing, config)
        out_features, in_features = packed_shape(module)
        device = next(t.device for t in (*module.parameters(), *module.buffers()))
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        pool = pool_size(config, in_features, r)
        weight = torch.zeros(
            out_features, pool, dtype=dtype_of(module) or dtype, device=device
        )
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.register_parameter("bias", None)
        layer.out_features, layer.in_features = out_features, pool
        layer.full_features = in_features
        layer.make_slice(config, name, r)
        features = pool_features(in_features, pool, config.contiguous, layer.spec.seed)
        layer.register_buffer("slice_pool", features.to(device), persistent=False)
        return layer

    def state_key(self, name: str) -> str:
        """The state-dict key of the packed weight that the slice of that name is beside."""
        return f"{name.removesuffix(f'.{OVERLAY}')}.weight"

    def forward(self, input: Tensor) -> Tensor:
        """D x[pool]. input: (..., in)."""
        taken, layer = self.prepare_input(self.columns(input))
        return slice_linear(
            taken, self.weight_matrix, None, self.master, self.rows, self.cols, layer
        )

    def extra_repr(self) -> str:
        return f"pool={self.in_features} of {self.full_features}, r={self.spec.r}"


class FrozenPool(Pool):
    """Columns that a delta has put beside a packed weight; nothing trains."""

    disabled = False

    def __init__(self, module: nn.Module, features: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        out_features, self.full_features = packed_shape(module)
        device = next(t.device for t in (*module.parameters(), *module.buffers()))
        weight = torch.zeros(out_features, len(features), dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("slice_pool", features.to(device), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """D x[pool]. input: (..., in)."""
        return F.linear(self.columns(input), self.weight)


def pool_size(config: SliceConfig, in_features: int, r: int) -> int:
    """How many input features the pool of a layer has.

    Raises:
        ValueError: the pool is narrower than its slice.
    """
    if config.pool is not None and config.pool < r:
        raise ValueError(
            f"pool is {config.pool}, and its slice is {r} wide (r): choose pool >= {r}"
        )
    return min(config.pool or max(DEFAULT_POOL, r), in_features)


def _check(module: Any, packing: Packing, config: SliceConfig) -> None:
    """Raise ValueError, in words that follow the layer's name, unless a slice can train beside it."""
    kind = f"quantized ({packing.kind})"
    if config.slice_type != "column":
        raise ValueError(
            f"it is {kind}, and slice_type is {config.slice_type!r}: beside a packed weight only"
            " 'column' slices train"
        )
    if config.switch_mode == "magnitude":
        raise ValueError(
            f"it is {kind}, and switch_mode='magnitude' ranks columns by trained weights, which"
            " start at zero beside a packed weight; use 'ascending', 'random' or 'gradient'"
        )
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked its weight for evaluation on this CPU, which rounds its"
            " scales: load the model anew, and make slices before its first call in eval mode"
        )
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
        raise ValueError("its forward has been replaced on the instance; undo that first")
    if packing.dequantize is None:
        _check_gradient(module, kind)


def _check_gradient(module: Any, kind: str) -> None:
    """Raise ValueError unless a kernel that only multiplies gives a gradient for its input."""
    device = module.qweight.device
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    problem = "it gives no gradient for its input"
    for dtype in dtypes:
        x = torch.ones(1, module.in_features, dtype=dtype, device=device).requires_grad_()
        try:
            with torch.enable_grad():
                output = module(x)
                if output.requires_grad:
                    (gradient,) = torch.autograd.grad(output.float().sum(), x)
                    if bool(gradient.isfinite().all()):
                        return
        except (RuntimeError, NotImplementedError, ValueError) as error:
            # a kernel may take one precision only
            problem = f"{type(error).__name__}: {error}"
    raise ValueError(
        f"it is {kind}, and its kernel cannot train what lies before it ({problem}). Load the model"
        " with a backend that has a backward pass, or leave the layer out (exclude_modules)"
    )


def dtype_of(module: Any) -> torch.dtype | None:
    """The precision that a packed weight unpacks to, where the layer says so."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return state.dtype
    if _is_torchao(weight):
        return weight.dtype  # pyright: ignore[reportOptionalMemberAccess]
    return None


def overlay_keys(model: nn.Module) -> set[str]:
    """State-dict keys of what stands beside packed weights."""
    return {
        f"{name}.{OVERLAY}.weight".removeprefix(".") for name, _ in quantized_layers(model)
    }


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Packed layers of a model with an overlay, by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module
