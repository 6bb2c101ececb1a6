"""Put slices into the places of a model's layers and parameters, and find them there."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from slicefine.config import SliceConfig
from slicefine.layer import SliceLayer
from slicefine.linear import SliceLinear
from slicefine.matching import means_everything
from slicefine.modules.attention import SliceMultiheadAttention, is_attention
from slicefine.modules.experts import SliceExperts
from slicefine.modules.parameters import (
    SlicedModule,
    SliceParameter,
    convert_module,
    swap_parameter,
)
from slicefine.modules.quantized import (
    OVERLAY,
    PoolSlice,
    attach,
    packed_shape,
    packing_of,
)
from slicefine.targets import Target, Targets


def slice_layers(model: Any) -> Iterator[SliceLayer]:
    return (module for module in model.modules() if isinstance(module, SliceLayer))


def named_slice_layers(model: Any) -> Iterator[tuple[str, SliceLayer]]:
    """Layers with slices by name; one beside a packed weight by the packed layer's."""
    for name, module in model.named_modules():
        if isinstance(module, SliceLayer):
            beside = isinstance(module, PoolSlice)
            yield name.removesuffix(f".{OVERLAY}") if beside else name, module


_REGISTRIES = frozenset(nn.Module().__dict__)


def replace_modules(model: nn.Module, replacement: dict[int, nn.Module]) -> None:
    """Put modules into every place that holds another: children, and plain attributes and lists."""
    for parent in list(model.modules()):
        _replace_in(parent._modules, replacement)
        for key, value in parent.__dict__.items():
            # some forwards walk a plain list that was filled beside the registered children
            if isinstance(value, (list, dict)) and key not in _REGISTRIES:
                _replace_in(value, replacement)
            elif isinstance(value, nn.Module) and id(value) in replacement:
                parent.__dict__[key] = replacement[id(value)]


def _replace_in(holder: Any, replacement: dict[int, nn.Module]) -> None:
    entries = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in list(entries):
        if isinstance(value, nn.Module) and id(value) in replacement:
            holder[key] = replacement[id(value)]


def replace_parameters(
    model: nn.Module, targets: list[Target], layers: dict[str, SliceLayer]
) -> None:
    """Slices of parameters take their places, and every nn.MultiheadAttention calls its layers from
    now on.
    """
    for module in list(model.modules()):
        if is_attention(module):
            convert_module(module, SliceMultiheadAttention)
    for target in to_convert(targets):
        layer = layers.get(target.name)
        if target.parameter is not None and isinstance(layer, SliceParameter):
            if not isinstance(target.module, SliceMultiheadAttention):
                convert_module(target.module, SliceExperts)
            swap_parameter(target.module, target.parameter, layer)
        elif isinstance(layer, PoolSlice):
            attach(target.module, layer)
            renew_hook(target.module)


def to_convert(targets: list[Target]) -> Iterator[Target]:
    """Targets to convert; a module reachable under several names once."""
    seen: set[tuple[int, str | None]] = set()
    for target in targets:
        if target.skipped is None and (id(target.module), target.parameter) not in seen:
            seen.add((id(target.module), target.parameter))
            yield target


def share_tied(layers: dict[str, SliceLayer]) -> None:
    """Layers with one weight get one slice and one schedule."""
    first: dict[int, SliceLayer] = {}
    for layer in layers.values():
        owner = first.setdefault(id(layer.weight), layer)
        if owner is layer:
            continue
        if owner.spec.parameter_shape != layer.spec.parameter_shape:
            raise ValueError(
                f"two layers share one weight of shape ({layer.out_features}, {layer.in_features})"
                f" and would have slices of r {owner.spec.r} and {layer.spec.r}: give them the same"
                " r in rank_pattern"
            )
        layer.slice_weight, layer.spec, layer.schedule = (
            owner.slice_weight,
            owner.spec,
            owner.schedule,
        )
        layer.originals = owner.originals
        layer.select_slice()


def slice_of(target: Target, config: SliceConfig, dtype: torch.dtype) -> SliceLayer:
    """The slice of a target; dtype: of what is kept beside a packed weight."""
    if config.slice_type == "block":
        config = replace(config, r_out=target.r_out)
    if target.quantized:
        return PoolSlice.from_packed(target.module, config, target.name, target.r, dtype)
    if target.parameter is None:
        return SliceLinear.from_linear(target.module, config, target.name, target.r)
    parameter = target.module._parameters[target.parameter]
    assert parameter is not None
    return SliceParameter.from_parameter(parameter, config, target.name, target.r)


def trainable_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that require a gradient, every name of a shared one."""
    parameters = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, p in parameters if p.requires_grad)


def set_trainable(model: nn.Module, names: Iterable[str]) -> None:
    names = set(names)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in names)


def trained_whole(model: nn.Module, found: Targets) -> dict[str, bool]:
    """State-dict key of everything that changes beside slices -> whether the base model has it too
    (False: modules_to_save).
    """
    slices = {id(layer.slice_weight) for layer in slice_layers(model)}
    parameters = {
        id(p) for p in model.parameters() if p.requires_grad and id(p) not in slices
    }
    # running statistics change in training mode, whether asked to or not
    running = {
        id(b)
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._NormBase)
        for b in m.buffers()
    }
    buffers = dict(model.named_buffers(remove_duplicate=False))
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **buffers}
    whole = {}
    for key in (
        k for k in model.state_dict() if k in tensors
    ):  # by name: a state-dict hook may hand out copies
        value = tensors[key]
        saved = found.is_saved(key.rpartition(".")[0])
        if id(value) in parameters or id(value) in running or (saved and key in buffers):
            whole[key] = not saved
    return whole


def free_norms(model: nn.Module, config: SliceConfig, sliced: Iterable[str]) -> None:
    """Let norms train: in a numbered block where it holds a slice, elsewhere where the config means
    all linear layers. A norm below the first slice would lengthen the backward pass for nothing.
    """
    if config.norms == "none":
        return
    chosen = is_norm if config.norms == "all" else is_torch_norm
    blocks = {_block_of(name) for name in sliced}
    if means_everything(config):
        blocks.add("")
    for name, module in model.named_modules():
        if _block_of(name) in blocks and chosen(module):
            for parameter in module._parameters.values():
                # torch's GradScaler takes no gradients in float16
                half = parameter is not None and parameter.dtype == torch.float16
                if parameter is not None and not (half and config.norms == "torch"):
                    parameter.requires_grad_(True)


def _block_of(name: str) -> str:
    """The numbered module that a module is in, such as "encoder.layer.3"; "" outside of all."""
    found = re.match(r"(?:.*\.)?\d+(?=\.)", name)
    return "" if found is None else found.group()


def is_torch_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization of torch.nn, or inherits its forward pass."""
    return isinstance(module, _TORCH_NORMS)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization, by its class: of torch.nn, or with vectors alone and
    "norm" in its name.
    """
    own = [p for p in module._parameters.values() if p is not None]
    return is_torch_norm(module) or (
        bool(own)
        and all(p.dim() == 1 for p in own)
        and "norm" in type(module).__name__.lower()
    )


_TORCH_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)


def free_biases(model: nn.Module, mode: str) -> None:
    if mode == "all":
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # in_proj_bias of attention and biases of experts too
                parameter.requires_grad_(True)
    elif mode == "slice_only":
        for layer in slice_layers(model):
            if layer.bias is not None and layer.bias.dtype != torch.float16:
                layer.bias.requires_grad_(True)
        for module in model.modules():
            if not isinstance(module, SlicedModule):
                continue
            tensors = [p for p in module._parameters.values() if p is not None]
            if not any(p.dtype == torch.float16 for p in tensors):
                module.free_biases()


def plain_of(layer: SliceLinear) -> nn.Module:
    plain = layer.to_plain()
    renew_hook(plain)
    return plain


def renew_hook(module: nn.Module) -> None:
    """Bind a device map's hook to a module that has taken over another one's attributes.

    Accelerate's hook works by a ``forward`` on the instance, which would go on calling the module
    that it was made for.
    """
    hook = module.__dict__.pop("_hf_hook", None)
    if hook is None:
        return
    for name in ("_old_forward", "forward"):
        module.__dict__.pop(name, None)
    # whoever put the hook there has loaded the library
    sys.modules["accelerate.hooks"].add_hook_to_module(module, hook)


def count_parameters(model: nn.Module, without: Collection[int] = ()) -> int:
    """Parameters of a model, those of packed weights counted as they unpack.

    Args:
        model: any model.
        without: ids of parameters that do not count.
    """
    packed = {
        id(m.weight): math.prod(packed_shape(m))
        for m in model.modules()
        if isinstance(getattr(m, "weight", None), nn.Parameter) and packing_of(m)
    }
    return sum(
        packed.get(id(p), p.numel()) for p in model.parameters() if id(p) not in without
    )


def working_dtype(model: nn.Module) -> torch.dtype:
    """The precision in which a model with packed weights works: of its first other parameter."""
    floating = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    return next(floating, torch.get_default_dtype())
