"""Swap slices into a model, look at what was swapped, and swap them out again."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn

from slicefine import beside, checkpointing
from slicefine.config import SliceConfig
from slicefine.deltas import adapters, live, packed, unpacking
from slicefine.deltas.adapters import DEFAULT
from slicefine.deltas.changes import WeightChange, changed_since
from slicefine.deltas.delta import Delta
from slicefine.deltas.peft_names import PeftNames
from slicefine.fused import refuse_fused_head
from slicefine.layer import SliceLayer
from slicefine.linear import SliceLinear
from slicefine.matching import some
from slicefine.modules.parameters import restore_parameters
from slicefine.modules.quantized import PoolSlice
from slicefine.notes import notes_on
from slicefine.slices import SliceSpec, planned_coverage
from slicefine.state import ModelState, config_of, set_state, state_of
from slicefine.swapping import (
    count_parameters,
    free_biases,
    free_norms,
    named_slice_layers,
    plain_of,
    renew_hook,
    replace_modules,
    replace_parameters,
    set_trainable,
    share_tied,
    slice_layers,
    slice_of,
    to_convert,
    trainable_names,
    trained_whole,
    working_dtype,
)
from slicefine.targets import Target, resolve

# At run time SliceModel is mixed in front of a model's own class, which is an nn.Module already.
_Module = nn.Module if TYPE_CHECKING else object


def get_slice_model(
    model: nn.Module, config: SliceConfig, adapter_name: str = DEFAULT
) -> SliceModel:
    """Turn the layers that ``config`` means into slices, in place, and freeze the rest.

    The model keeps its class, its state-dict keys and its methods, and gains those of `SliceModel`.
    Build the optimizer afterwards. Nothing is changed if the config does not fit the model.

    Args:
        model: a plain model with its weights loaded.
        config: which layers become slices, and how they train.
        adapter_name: what the slices are called among the model's adapters.

    Returns:
        The same object.

    Raises:
        TypeError: config is no SliceConfig.
        ValueError: an entry of the config matches nothing (with the nearest names), a layer cannot
            train, no layer is left, or the model has slices already.
        DeltaError: there is an adapter of that name.
    """
    if not isinstance(config, SliceConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; expected a SliceConfig (SliceConfig.from_dict"
            " takes a dict)"
        )
    if config_of(model) is not None:
        raise ValueError(
            "the model has slices already; call model.merge_and_unload() first"
        )
    adapters.check_name(model, adapter_name)
    found = resolve(model, config)
    before = state_of(model)
    # a model with loaded deltas is frozen, and gives back what trained before those
    trained_before = trainable_names(model) if before is None else before.trained_before
    layers = _layers_of(model, found.layers, config)
    for note in [
        *found.unused,
        *found.notes,
        *notes_on(model, found.layers, layers, config),
    ]:
        warnings.warn(note, stacklevel=2)

    for layer in layers.values():
        renew_hook(layer)
    set_trainable(model, ())
    replacement: dict[int, nn.Module] = {
        id(t.module): layers[t.name]
        for t in found.layers
        if t.name in layers and t.parameter is None and t.quantized is None
    }
    replace_modules(model, replacement)
    replace_parameters(model, found.layers, layers)
    share_tied(layers)
    for module in found.saved.values():
        module.requires_grad_(True)
    free_biases(model, config.bias)
    free_norms(model, config, layers)
    sliced = _mix_in(model)
    state = sliced._slicefine
    state.config, state.trained_before = config, trained_before
    packed.mark_trainable(model)
    whole = trained_whole(model, found)
    state.saved = frozenset(key for key, in_base in whole.items() if not in_base)
    live.register_slices(model, adapter_name, whole, config.keep_originals)
    _keep_from_ddp(model, [n for n, _ in model.named_buffers() if n.endswith(_POSITIONS)])
    checkpointing.let_inputs_carry_gradients(model)
    return sliced


def _layers_of(
    model: nn.Module, targets: list[Target], config: SliceConfig
) -> dict[str, SliceLayer]:
    """Name -> the slice of every target that is not skipped; the model stays as it is."""
    trainable = trainable_names(model)
    layers, problems = {}, []
    for target in to_convert(targets):
        try:
            layers[target.name] = slice_of(target, config, working_dtype(model))
        except (ValueError, TypeError) as error:
            problems.append(f"{target.name}: {error}")
    if problems:
        set_trainable(model, trainable)
        raise ValueError("\n".join(problems))
    if not layers:
        raise ValueError(
            "every target is skipped:\n"
            + "\n".join(f"  {t.name}: {t.skipped}" for t in targets)
        )
    return layers


class SliceModel(PeftNames, _Module):
    """The methods that a model gains from `get_slice_model`; mixed into its class, as fully_shard
    mixes in FSDPModule.
    """

    _slicefine: ModelState

    def train(self, mode: bool = True) -> Any:
        """As nn.Module's. Raises ValueError if the loss reads a sliced head's weight past it."""
        if mode:
            refuse_fused_head(self)
        return super().train(mode)

    @property
    def slice_config(self) -> SliceConfig:
        """The config of the slices in training."""
        config = self._slicefine.config
        if config is None:
            raise AttributeError("the model has loaded deltas and no slices in training")
        return config

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count parameters.

        Returns:
            (trainable, all). The masters of slices are copies of what the weights hold, so they
            count as trainable and not in all.
        """
        parameters = list(self.parameters())
        slices = {id(layer.slice_weight) for layer in slice_layers(self)}
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        return trainable, count_parameters(self, slices)

    def print_trainable_parameters(self) -> None:
        """Print the counts of `get_nb_trainable_parameters`, in the form of PEFT's line."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%:"
            f" {100 * trainable / total:.4f}"
        )

    def coverage(self) -> dict[str, float]:
        """How much has trained so far.

        Returns:
            Name of a layer -> share of its weight, in [0, 1]; of its pool, where the weight is
            packed (quantized).
        """
        return {name: layer.schedule.coverage() for name, layer in named_slice_layers(self)}

    def changed_since(self, step: int) -> list[WeightChange]:
        """What training has changed after a number of optimizer steps, exactly.

        For an engine that samples or serves with the same weights: bring it up to date with these
        instead of the whole model. Values are absolute, so a change may be applied twice.

        Args:
            step: the optimizer steps after which the other side was up to date last; 0 is the
                start of the training.

        Returns:
            One entry for each part of a tensor: slices that were active, and, whole, what trains
            beside them and weights that were loaded, reverted or written by hand. Each unpacks into
            (name, shape, dtype, values, indices), in checkpoint names.

        Raises:
            ValueError: the slices have not taken that many steps.
            RuntimeError: the slices are disabled.
            DeltaError: a weight is sharded, or a checkpoint holds it in another form.
        """
        return changed_since(self, step)

    def planned_coverage(self, steps: int) -> str:
        """What a number of optimizer steps from the start will cover, in words.

        Args:
            steps: optimizer steps.

        Returns:
            One line for each shape of weight, or of pool beside a packed weight.

        Raises:
            ValueError: steps is no number of steps.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps is {steps!r}; expected a number of optimizer steps")
        every = self.slice_config.switch_interval
        interval = "static" if every is None else f"interval {every:,d}"
        lines: dict[str, int] = {}
        for layer in slice_layers(self):
            positions, share = planned_coverage(layer.schedule, steps)
            plural = "position" if positions == 1 else "positions"
            line = (
                f"{steps:,d} steps, {interval}, r {layer.spec.r}: {positions:,d} {plural},"
                f" {100 * share:.0f} % of each {_size(layer.spec)} {_of_what(layer)}"
            )
            lines[line] = lines.get(line, 0) + 1
        return "\n".join(
            f"{line} ({count} layer{'s' * (count > 1)})" for line, count in lines.items()
        )

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        quantized: Literal["dequantize", "lora"] | None = None,
    ) -> nn.Module:
        """Back to plain linear layers, in place: same weights, bit-equal outputs.

        Adapters that are applied stay in the weights; the others are forgotten. A quantized base
        cannot take in what has trained beside it, so there `quantized` says where it goes.

        Args:
            progressbar: taken for PEFT's sake: the weights hold the slices already, so there is
                nothing to wait for.
            safe_merge: raise instead if a weight that was trained is not finite.
            adapter_names: the adapters to apply before; None leaves those that are applied.
            quantized: "dequantize" makes linear layers in floating point of all packed ones, with
                what has trained added and rounded once; "lora" leaves the quantized base and puts
                an exact LoRA adapter on it.

        Returns:
            The model, in its own class; with "lora" a PeftModel around it.

        Raises:
            RuntimeError: the slices in training are switched off, or `fully_shard` holds the
                layers.
            ValueError: with safe_merge, naming the weights that are not finite; slices have trained
                beside packed weights and `quantized` does not say where they go.
        """
        if adapter_names is not None:
            self.set_adapter(adapter_names)
        if (
            config_of(self) is not None
            and self._adapters.trainable not in self.active_adapters
        ):
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
        if safe_merge:
            self._check_finite()
        unpacking.check_way(self, quantized)
        if quantized == "lora":
            return unpacking.with_lora(self)
        if undo_lean := self.__dict__.get("_undo_lean"):
            undo_lean(self)
        if quantized == "dequantize":
            linear = unpacking.unpacked(self, working_dtype(self))
            for layer in linear.values():
                renew_hook(layer)
            replace_modules(self, linear)
        restore_parameters(self)
        packed.unmark(self)
        plain: dict[int, nn.Module] = {
            id(layer): plain_of(layer)
            for layer in slice_layers(self)
            if isinstance(layer, SliceLinear)
        }
        replace_modules(self, plain)
        state = state_of(self)
        set_state(self, None)
        beside.forget(self)
        _keep_from_ddp(self, [])
        self.__class__ = _own_class(self)
        if state is not None:
            checkpointing.remove_input_hooks(self, keep_transformers=state.input_hooks)
            set_trainable(self, state.trained_before)
        return self

    def _check_finite(self) -> None:
        broken = []
        for name, layer in named_slice_layers(self):
            layer.sync()
            broken += [] if bool(layer.weight.isfinite().all()) else [name]
        if broken:
            raise ValueError(
                f"safe_merge: the weights of {some(broken)} hold values that are not finite; the"
                " training has diverged. unload() gives the base back"
            )

    def unload(self) -> nn.Module:
        """Back to the base, bit for bit, and to plain linear layers; what was trained is given up.

        Returns:
            The model, in its own class.
        """
        self.revert()
        return self.merge_and_unload()

    @classmethod
    def from_pretrained(
        cls, model: Any, path: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """``SliceModel.from_pretrained(base, folder, ...)``: a base model with a delta on it.

        Args:
            model: the base model; it is changed in place.
            path: a folder, a `Delta`, or the name of a repository on the Hugging Face Hub.
            args: as kwargs, in their order.
            kwargs: ``adapter_name="default"``; ``is_trainable=False``: True makes slices by the
                delta's SliceConfig that go on from its values, False freezes the model;
                ``verify=True``: compare all of the base. ``torch_device`` and
                ``low_cpu_mem_usage`` are taken for PEFT's sake: values go where the model's
                weights are, and nothing is made twice.

        Returns:
            The same object.

        Raises:
            DeltaError: the delta is damaged, or was made for another base.
        """
        if cls is not SliceModel:  # a model's own class method, asked of its mixed class
            own: Any = cls._slices_mixed_into  # type: ignore[attr-defined]
            return own.from_pretrained(
                model, *([] if path is None else [path]), *args, **kwargs
            )
        return _with_delta(model, path, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The mixed class cannot be found by name; rebuild it from the model's own.
        return (
            _rebuild,
            (_own_class(self),),
            self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if config_of(self) is not None:
            beside.watch(self, live.record_beside)


def _of_what(layer: SliceLayer) -> str:
    if isinstance(layer, PoolSlice):
        return f"pool beside {layer.full_features:,d}-wide packed weights"
    return "weight"


def _size(spec: SliceSpec) -> str:
    """The part of a weight's shape that decides what steps cover."""
    if spec.slice_type in ("block", "row_column"):
        return f"{spec.out_features:,d} x {spec.in_features:,d}"
    if spec.slice_type == "row":
        return f"{spec.out_features:,d}-high"
    return f"{spec.in_features:,d}-wide"


_POSITIONS = (".slice_rows", ".slice_cols", ".slice_pool")


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
    torch_device: Any = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"SliceModel.from_pretrained got a {type(model).__name__}; expected the base model (an"
            " nn.Module) and a folder"
        )
    if config_of(model) is not None:
        raise ValueError(
            "the model has slices in training; use its load_adapter(folder, name) and"
            " set_adapter(name)"
        )
    delta = path if isinstance(path, Delta) else Delta.load(adapters.local_path(path))
    fresh = state_of(model) is None
    _mix_in(model)
    try:
        if not is_trainable:
            mixed: Any = model
            mixed.load_adapter(delta, adapter_name, verify=verify)
            mixed.set_adapter([*mixed.active_adapters, adapter_name])
            # what trains beside an adapter that is only used would change the base under it
            return mixed.requires_grad_(False)
        delta.check_base(model, everything=verify)
        config = SliceConfig.from_dict(delta.config)
        if config.modules_to_save is None:
            # the heads that trained then, whatever would train by default now
            saved = {
                key.rpartition(".")[0] for key, w in delta.whole.items() if not w.replaces
            }
            config.modules_to_save = sorted(saved)
        get_slice_model(model, config, adapter_name)
        live.resume_from(model, delta)
    except BaseException:
        if config_of(model) is not None:
            sliced: Any = model
            sliced.unload()
        elif fresh:
            set_state(model, None)
            model.__class__ = _own_class(model)
        raise
    return model


def _mix_in(model: nn.Module) -> SliceModel:
    """Give a model its state and the methods of `SliceModel`; one that has them stays as it is."""
    if state_of(model) is None:
        hooks = checkpointing.has_input_hooks(model)
        before = trainable_names(model)
        set_state(
            model, ModelState(live.AdapterRegister(), None, before, input_hooks=hooks)
        )
        model.__class__ = _with_slices(_own_class(model))
    return cast(SliceModel, model)


@functools.cache
def _with_slices(kind: type) -> type:
    # A call of the mixed class, as in type(model)(config), makes an ordinary model: an instance of
    # the mixed class without a state would have methods that cannot work.
    call = {"__call__": lambda cls, *args, **kwargs: kind(*args, **kwargs)}
    meta: Any = type(type(kind).__name__, (type(kind),), call)
    # Hugging Face writes the class name into a checkpoint's config, so it stays what it was.
    body: dict[str, Any] = {
        "_slices_mixed_into": kind,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    # transformers' new name, which its old one calls; overriding both would send them in circles
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if name := next((n for n in names if hasattr(kind, n)), None):
        body[name] = checkpointing.then_let_inputs_carry_gradients(getattr(kind, name))
    if hasattr(kind, "enable_input_require_grads"):
        enable = kind.enable_input_require_grads  # type: ignore[attr-defined]
        body["enable_input_require_grads"] = checkpointing.without_earlier_hooks(enable)
    return meta(kind.__name__, (SliceModel, kind), body)


def _own_class(model: Any) -> type:
    """The class of a model without SliceModel."""
    return getattr(type(model), "_slices_mixed_into", type(model))


def _rebuild(kind: type) -> Any:
    mixed: Any = _with_slices(kind)
    return mixed.__new__(mixed)
