"""Swap slices into a model, look at what was swapped, and swap them out again."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from slicefine.config import SliceConfig
from slicefine.deltas import adapters, live
from slicefine.deltas.adapters import DEFAULT, AdapterModel
from slicefine.deltas.delta import Delta
from slicefine.layer import SliceLayer
from slicefine.linear import SliceLinear
from slicefine.modules.attention import SliceMultiheadAttention, is_attention
from slicefine.modules.experts import SliceExperts
from slicefine.modules.parameters import (
    SlicedModule,
    SliceParameter,
    convert_module,
    restore_parameters,
    swap_parameter,
)
from slicefine.slices import SliceSchedule, SliceSpec, planned_coverage
from slicefine.targets import Target, find_targets, left_out_experts, matches_modules_to_save


def get_slice_model(
    model: nn.Module, config: SliceConfig, adapter_name: str = DEFAULT
) -> nn.Module:
    """Turn the targets of ``config`` into slices, in place, and freeze the rest; returns the same
    object.

    The model keeps its class, its state-dict keys and its methods, and gains those of `SliceModel`:
    ``print_trainable_parameters()``, ``get_nb_trainable_parameters()``, ``coverage()``,
    ``planned_coverage(steps)`` and
    ``merge_and_unload()``; those of `AdapterModel`: ``disable_adapter()``, ``revert()``,
    ``delta()``, ``save_pretrained(folder)``
    and others, to which the slices are an adapter called ``adapter_name``. Build the optimizer
    afterwards. Nothing is changed if the config does not fit the model.
    Raises ValueError naming every target that does not exist, with the nearest names, and every
    layer that cannot train.
    """
    if not isinstance(config, SliceConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; expected a SliceConfig (SliceConfig.from_dict"
            " takes a dict)"
        )
    if "slice_config" in model.__dict__:
        raise ValueError("the model has slices already; call model.merge_and_unload() first")
    adapters.check_name(model, adapter_name)
    targets = find_targets(model, config)
    saved = _modules_to_save(model, config)
    trained_before = {
        name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    layers, problems = {}, []
    for target in _unique(targets):
        try:
            layers[target.name] = _slice_of(target, config)
        except (ValueError, TypeError) as error:
            problems.append(f"{target.name}: {error}")
    if problems:
        _set_trainable(model, trained_before)
        raise ValueError("\n".join(problems))
    if not layers:
        raise ValueError(
            "every target is skipped:\n" + "\n".join(f"  {t.name}: {t.skipped}" for t in targets)
        )
    for target in targets:
        if target.skipped:
            warnings.warn(f"{target.name} stays as it is: {target.skipped}", stacklevel=2)
    if config.fan_in_fan_out and not any(layer.fan_in_fan_out for layer in layers.values()):
        warnings.warn(
            "fan_in_fan_out is True, but no target stores its weight as (in, out); it has no"
            " effect",
            stacklevel=2,
        )

    if experts := left_out_experts(model, config):
        warnings.warn(
            "experts stay as they are; to train them too:"
            f" target_parameters=[{', '.join(map(repr, experts))}]",
            stacklevel=2,
        )

    for layer in layers.values():
        _renew_hook(layer)
    _set_trainable(model, set())
    replacement = {
        id(t.module): layers[t.name] for t in targets if t.name in layers and t.parameter is None
    }
    for parent in list(model.modules()):  # every place that holds the module, however many
        for name, child in list(parent._modules.items()):
            if id(child) in replacement:
                parent._modules[name] = replacement[id(child)]
    _replace_parameters(model, targets, layers)
    _share_tied(layers)
    for module in saved:
        module.requires_grad_(True)
    _free_biases(model, config.bias)
    live.register_slices(model, adapter_name, _trained_whole(model, config), config.keep_originals)
    _keep_from_ddp(model, [n for n, _ in model.named_buffers() if n.endswith(_POSITIONS)])

    model.__dict__["slice_config"] = config
    model.__dict__["_trained_before_slices"] = trained_before
    model.__class__ = _with_slices(_own_class(model))
    if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        _let_inputs_carry_gradients(model)
    return model


@dataclass(frozen=True)
class Match:
    """One row of `list_targets`: a layer, its weight (out, in), its slice, and why it is skipped if
    it is.
    """

    name: str
    out_features: int
    in_features: int
    r: int
    parameters: int
    skipped: str | None


def list_targets(model: nn.Module, config: SliceConfig) -> list[Match]:
    """Dry run of `get_slice_model`: what the config matches. Changes nothing; raises the same
    errors.
    """
    matches = []
    for target in find_targets(model, config):
        parameters = 0
        out_features, in_features = target.shape
        if target.skipped is None:
            try:
                spec = SliceSpec(
                    out_features, in_features, config.slice_type, target.r, config.r_out or target.r
                )
                SliceSchedule(spec, start_position=config.start_position)
            except ValueError as error:
                raise ValueError(f"{target.name}: {error}") from error
            parameters = math.prod(spec.parameter_shape)
        matches.append(
            Match(target.name, out_features, in_features, target.r, parameters, target.skipped)
        )
    return matches


class SliceModel(AdapterModel):
    """The methods that a model gains from `get_slice_model`; mixed into its class, as fully_shard
    mixes in FSDPModule.
    """

    slice_config: SliceConfig
    _trained_before_slices: set[str]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters. The masters of slices are copies, so they count as trainable
        and not twice in all.
        """
        parameters = list(self.parameters())  # type: ignore[attr-defined]
        slices = {id(layer.slice_weight) for layer in slice_layers(self)}
        return sum(p.numel() for p in parameters if p.requires_grad), sum(
            p.numel() for p in parameters if id(p) not in slices
        )

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%:"
            f" {100 * trainable / total:.4f}"
        )

    def coverage(self) -> dict[str, float]:
        """Share of each sliced weight that has trained so far, by module name, in [0, 1]."""
        return {name: layer.schedule.coverage() for name, layer in named_slice_layers(self)}

    def planned_coverage(self, steps: int) -> str:
        """What ``steps`` optimizer steps from the start will cover, in words, one line per shape of
        weight.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps is {steps!r}; expected a number of optimizer steps")
        config = self.slice_config
        lines: dict[str, int] = {}
        for layer in slice_layers(self):
            positions, share = planned_coverage(layer.schedule, steps)
            width = (
                f"{layer.out_features:,d}-high"
                if config.slice_type == "row"
                else f"{layer.in_features:,d}-wide"
            )
            if config.slice_type in ("block", "row_column"):
                width = f"{layer.out_features:,d} x {layer.in_features:,d}"
            interval = (
                "static"
                if config.switch_interval is None
                else f"interval {config.switch_interval:,d}"
            )
            plural = "position" if positions == 1 else "positions"
            line = (
                f"{steps:,d} steps, {interval}, r {layer.spec.r}: {positions:,d} {plural},"
                f" {100 * share:.0f} % of each {width} weight"
            )
            lines[line] = lines.get(line, 0) + 1
        return "\n".join(
            f"{line} ({count} layer{'s' * (count > 1)})" for line, count in lines.items()
        )

    def merge_and_unload(self) -> nn.Module:
        """Back to plain linear layers, in place: same weights, bit-equal outputs. Returns the model
        in its own class.

        Adapters that are applied stay in the weights; the others are forgotten.
        """
        assert isinstance(self, nn.Module)
        if "slice_config" in self.__dict__ and self._adapters.trainable not in self.active_adapters:
            raise RuntimeError(
                "the slices in training are switched off; leave disable_adapter() or set_adapter"
                " them first"
            )
        if any(layer.weight_sharded for layer in slice_layers(self)):
            raise RuntimeError(
                "fully_shard holds the layers of this model; there is nothing to merge (the weights"
                " are up to date): torch.distributed.checkpoint.state_dict.get_model_state_dict"
                " gathers them for a plain model"
            )
        if undo_lean := self.__dict__.get("_undo_lean"):
            undo_lean(self)
        restore_parameters(self)
        plain: dict[int, nn.Module] = {}
        for parent in list(self.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, SliceLinear):
                    parent._modules[name] = plain.setdefault(id(child), _unload(child))
        trained = self.__dict__.pop("_trained_before_slices", None)
        for name in ("slice_config", "_adapters"):
            self.__dict__.pop(name, None)
        _keep_from_ddp(self, [])
        self.__class__ = _own_class(self)
        if trained is not None:
            _set_trainable(self, trained)
        return self

    def unload(self) -> nn.Module:
        """Back to the base, bit for bit, and to plain linear layers; what was trained is given up."""
        self.revert()
        return self.merge_and_unload()

    @classmethod
    def from_pretrained(cls, model: Any, path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """``SliceModel.from_pretrained(base, folder, adapter_name="default", is_trainable=False,
        verify=True)``.

        Loads a delta into a base model, in place, and applies it. is_trainable: makes slices by the
        delta's SliceConfig that go
        on from its values; their originals are those of the base. Returns the same object.
        Raises `DeltaError` if the delta is damaged or was made for another base.
        """
        if cls is not SliceModel:  # a model's own class method, asked of its mixed class
            own: Any = cls._slices_mixed_into  # type: ignore[attr-defined]
            return own.from_pretrained(model, *([] if path is None else [path]), *args, **kwargs)
        return _with_delta(model, path, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The mixed class cannot be found by name; rebuild it from the model's own.
        return (
            _rebuild,
            (_own_class(self),),
            self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__,
        )


_POSITIONS = (".slice_rows", ".slice_cols")


def _keep_from_ddp(model: Any, positions: list[str]) -> None:
    """DDP would send the positions around before every forward, into tensors that an earlier
    forward still needs; every
    process computes the same ones."""
    others = [
        n
        for n in getattr(model, "_ddp_params_and_buffers_to_ignore", [])
        if not n.endswith(_POSITIONS)
    ]
    if others or positions:
        model.__dict__["_ddp_params_and_buffers_to_ignore"] = [*others, *positions]
    else:
        model.__dict__.pop("_ddp_params_and_buffers_to_ignore", None)


def _with_delta(
    model: Any,
    path: Any,
    adapter_name: str = DEFAULT,
    is_trainable: bool = False,
    verify: bool = True,
) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"SliceModel.from_pretrained got a {type(model).__name__}; expected the base model (an"
            " nn.Module) and a folder"
        )
    if "slice_config" in model.__dict__:
        raise ValueError(
            "the model has slices in training; use its load_adapter(folder, name) and"
            " set_adapter(name)"
        )
    delta = path if isinstance(path, Delta) else Delta.load(adapters.local_path(path))
    fresh = "_adapters" not in model.__dict__
    if fresh:
        model.__dict__["_adapters"] = live.AdapterRegister()
        model.__class__ = _with_slices(_own_class(model))
    try:
        if not is_trainable:
            mixed: Any = model
            mixed.load_adapter(delta, adapter_name, verify=verify)
            mixed.set_adapter([*mixed.active_adapters, adapter_name])
            return mixed
        delta.check_base(model, everything=verify)
        config = SliceConfig.from_dict(delta.config)
        get_slice_model(model, config, adapter_name)
        live.resume_from(model, delta)
    except BaseException:
        if "slice_config" in model.__dict__:
            sliced: Any = model
            sliced.unload()
        if fresh and "slice_config" not in model.__dict__:
            model.__dict__.pop("_adapters", None)
            model.__class__ = _own_class(model)
        raise
    return model


def _trained_whole(model: nn.Module, config: SliceConfig) -> dict[str, bool]:
    """State-dict key of everything that changes beside slices -> whether the base model has it too
    (False: modules_to_save).
    """
    slices = {id(layer.slice_weight) for layer in slice_layers(model)}
    parameters = {id(p) for p in model.parameters() if p.requires_grad and id(p) not in slices}
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
        saved = matches_modules_to_save(config, key.rpartition(".")[0])
        if id(value) in parameters or id(value) in running or (saved and key in buffers):
            whole[key] = not saved
    return whole


def slice_layers(model: Any) -> Iterator[SliceLayer]:
    return (module for module in model.modules() if isinstance(module, SliceLayer))


def named_slice_layers(model: Any) -> Iterator[tuple[str, SliceLayer]]:
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, SliceLayer)
    )


@functools.cache
def _with_slices(kind: type) -> type:
    # Hugging Face writes the class name into a checkpoint's config, so it stays what it was.
    body: dict[str, Any] = {
        "_slices_mixed_into": kind,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    # transformers' new name, which its old one calls; overriding both would send them in circles
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if name := next((n for n in names if hasattr(kind, n)), None):
        body[name] = _then_let_inputs_carry_gradients(getattr(kind, name))
    return type(kind.__name__, (SliceModel, kind), body)


def _then_let_inputs_carry_gradients(enable: Callable[..., Any]) -> Callable[..., Any]:
    """Reentrant checkpoints need an input that carries a gradient, and behind frozen embeddings
    there is none.
    """

    @functools.wraps(enable)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = enable(self, *args, **kwargs)
        _let_inputs_carry_gradients(self)
        return result

    return wrapper


def _own_class(model: Any) -> type:
    """The class of a model without SliceModel."""
    return getattr(type(model), "_slices_mixed_into", type(model))


def _rebuild(kind: type) -> Any:
    mixed: Any = _with_slices(kind)
    return mixed.__new__(mixed)


def _unique(targets: list[Target]) -> Iterator[Target]:
    """Targets to convert; a module reachable under several names once."""
    seen: set[tuple[int, str | None]] = set()
    for target in targets:
        if target.skipped is None and (id(target.module), target.parameter) not in seen:
            seen.add((id(target.module), target.parameter))
            yield target


def _slice_of(target: Target, config: SliceConfig) -> SliceLayer:
    if target.parameter is None:
        return SliceLinear.from_linear(target.module, config, target.name, target.r)
    parameter = target.module._parameters[target.parameter]
    assert parameter is not None
    return SliceParameter.from_parameter(parameter, config, target.name, target.r)


def _replace_parameters(
    model: nn.Module, targets: list[Target], layers: dict[str, SliceLayer]
) -> None:
    """Slices of parameters take their places, and every nn.MultiheadAttention calls its layers from
    now on.
    """
    for module in list(model.modules()):
        if is_attention(module):
            convert_module(module, SliceMultiheadAttention)
    for target in _unique(targets):
        layer = layers.get(target.name)
        if target.parameter is not None and isinstance(layer, SliceParameter):
            if not isinstance(target.module, SliceMultiheadAttention):
                convert_module(target.module, SliceExperts)
            swap_parameter(target.module, target.parameter, layer)


def _modules_to_save(model: nn.Module, config: SliceConfig) -> list[nn.Module]:
    found = {
        entry: [
            m
            for n, m in model.named_modules()
            if matches_modules_to_save(SliceConfig(modules_to_save=[entry]), n)
        ]
        for entry in config.modules_to_save or ()
    }
    if missing := [entry for entry, modules in found.items() if not modules]:
        names = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"modules_to_save names {', '.join(map(repr, missing))}, which the model does not have;"
            f" its children are: {names}"
        )
    return [module for modules in found.values() for module in modules]


def _set_trainable(model: nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in names)


def _share_tied(layers: dict[str, SliceLayer]) -> None:
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


def _free_biases(model: nn.Module, mode: str) -> None:
    if mode == "all":
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # in_proj_bias of attention and biases of experts too
                parameter.requires_grad_(True)
    elif mode == "slice_only":
        for layer in slice_layers(model):
            if layer.bias is not None:
                layer.bias.requires_grad_(True)
        for module in model.modules():
            if isinstance(module, SlicedModule):
                module.free_biases()


def _unload(layer: SliceLinear) -> nn.Module:
    plain = layer.to_plain()
    _renew_hook(plain)
    return plain


def _renew_hook(module: nn.Module) -> None:
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


def _let_inputs_carry_gradients(model: Any) -> None:
    enable = getattr(model, "enable_input_require_grads", None)
    if callable(enable):
        enable()
