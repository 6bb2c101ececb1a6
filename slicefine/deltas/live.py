"""The slices in training as one of a model's adapters: their delta, and the way off and on.

What they have changed is made of the original values that every layer keeps and of what stands in
the weights now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from slicefine import beside
from slicefine.deltas import packed
from slicefine.deltas.base import (
    base_hashes,
    combined_hash,
    tensor_of,
    weight_hash,
    whole_state,
)
from slicefine.deltas.delta import (
    Delta,
    DeltaError,
    FullDelta,
    WeightDelta,
)
from slicefine.deltas.values import slice_values
from slicefine.layer import SliceLayer
from slicefine.modules.quantized import PoolSlice
from slicefine.originals import same_bits, set_version
from slicefine.sharding import is_sharded
from slicefine.state import state_of

_LOADED = (
    "trains beside the slices and was loaded from a checkpoint after they were made, so that the"
    " value of the base is not known"
)


@dataclass
class AdapterRegister:
    """What a model knows of its adapters.

    Args:
        deltas: loaded ones, by name.
        trainable: name of the slices in training, None where there are none.
        full: what is fully trained beside them, by state-dict key; ``new`` is up to date while they
            are off.
        versions: version counters of those tensors before they were taken off.
        stack: applied adapters, the lowest first, each with the values that it has overwritten.
        lost: why the value that the base had is not known, by key of what trains beside slices.
        parents: the delta that the slices in training resumed from.
        disabled: what `disable_adapters` took off, None where it was not called.
        counting: whether an optimizer has taken a step with this model.
        resumes: whether the slices in training started from a delta.
    """

    deltas: dict[str, Delta] = field(default_factory=dict)
    trainable: str | None = None
    full: dict[str, FullDelta] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    stack: list[tuple[str, Delta | None]] = field(default_factory=list)
    parents: list[dict[str, Any]] = field(default_factory=list)
    disabled: list[str] | None = None
    counting: bool = False
    resumes: bool = False

    @property
    def active(self) -> list[str]:
        return [name for name, _ in self.stack]


def register_slices(
    model: Any, name: str, full: dict[str, bool], keep_originals: bool
) -> None:
    """Register the slices in training as an adapter.

    Args:
        model: a model whose slices have just been made.
        name: of the adapter.
        full: state-dict key of what is fully trained -> whether the base model has it too.
        keep_originals: whether their values are kept for the way back.
    """
    register: AdapterRegister = model._adapters
    register.trainable = name
    register.full, register.parents, register.resumes = {}, [], False
    for key, replaces in full.items() if keep_originals else ():
        value = tensor_of(model, key).detach().to("cpu", copy=True)
        # one tensor for both, until a snapshot puts another in the place of `new`
        register.full[key] = FullDelta(value, value, replaces)
    # None: every layer keeps what it has overwritten itself, as its originals
    register.stack.append((name, None))
    register.lost = {}
    state = state_of(model)
    assert state is not None, "a model of a mixed class has its state"
    tensors = [(k, v) for k, v in model.state_dict().items() if isinstance(v, Tensor)]
    state.base = {key: (tuple(value.shape), value._version) for key, value in tensors}
    beside.watch(model, record_beside)


def record_beside(model: Any, trained: set[int]) -> None:
    """Keep the values of parameters that train beside the slices without the config's saying so.

    Args:
        model: a model with slices.
        trained: ids of the parameters that an optimizer is about to change for the first time.
    """
    register: AdapterRegister = model._adapters
    state = state_of(model)
    if state is None or state.config is None or not state.config.keep_originals:
        return
    layers = list(layers_of(model))
    names = ("weight", "slice_weight")
    sliced = {id(layer._parameters.get(name)) for layer in layers for name in names}
    mine = [
        (key, p)
        for key, p in model.named_parameters(remove_duplicate=False)
        if id(p) in trained
    ]
    resumed = any(layer.schedule.steps for layer in layers) and not register.counting
    # weights that were loaded after the slices were made, and before anything trained, are the base
    fresh = not (register.counting or resumed or register.resumes)
    register.counting = register.counting or bool(mine)
    for key, parameter in mine:
        entry = register.full.get(key)
        if fresh and entry is not None and entry.replaces and not is_sharded(parameter):
            value = parameter.detach().to("cpu", copy=True)
            register.full[key] = FullDelta(value, value, True)
        known = id(parameter) in sliced or entry is not None or key in register.lost
        if known or is_sharded(parameter):
            continue
        shape, version = state.base.get(key, (None, 0))
        if resumed and shape is not None and version != parameter._version:
            register.lost[key] = _LOADED
            continue
        value = parameter.detach().to("cpu", copy=True)
        register.full[key] = FullDelta(value, value, replaces=shape is not None)


@torch.no_grad()
def resume_from(model: Any, delta: Delta) -> None:
    """Initialize new slices from a delta; its old values are their originals.

    Raises:
        DeltaError: the delta changes a weight that has no slices here.
    """
    register: AdapterRegister = model._adapters
    register.resumes = True
    layers = {layer.state_key(name): layer for name, layer in named_layers(model)}
    if missing := delta.weights.keys() - layers.keys():
        raise DeltaError(
            f"the delta changes {', '.join(sorted(missing)[:3])}, which its own SliceConfig does"
            " not train here"
        )
    for key, weight in delta.weights.items():
        # Before the new values are written: first come, first recorded, and an original stays.
        layer = layers[key]
        originals = layer.required_originals("resume from a delta")
        for patch in weight.patches:
            cols = patch.cols
            if isinstance(layer, PoolSlice):
                _, cols = packed.columns(model, key, cols)
            originals.record(patch.old, patch.rows, cols)
    for key, entry in delta.whole.items():
        tensor_of(model, key).copy_(entry.new)
        # A new head is initialized at random: the delta's own start is its original, not ours.
        # What was unfrozen by hand may be so again, or stays as it is now: it is not the base's.
        if key not in register.full or not entry.replaces:
            register.full[key] = FullDelta(entry.old, entry.old, entry.replaces)
    for key, weight in delta.weights.items():
        delta.write_one(model, key, weight, "new")
        # else the next step would write the master's values over those of the delta
        layers[key].refresh_master()
    register.parents = [{"name": register.trainable, "sha256": delta.sha256}]


# Off and on


def switch_on(model: Any) -> None:
    """Put what the slices have trained back into the model."""
    register: AdapterRegister = model._adapters
    for layer in layers_of(model):
        layer.enable()
    _write_full(model, "new")
    for key, version in register.versions.items():
        # The bits are those of that version again: what autograd saved before stays valid.
        set_version(tensor_of(model, key), version)


def switch_off(model: Any) -> None:
    """Take what the slices have trained out of the model, down to the original values.

    Raises:
        DeltaError: the base is not known any more; the slices stay on.
    """
    _check_base(model, {key: tensor_of(model, key) for key in model._adapters.full})
    # before the old values are written over what has trained
    snapshot_full(model)
    try:
        for layer in layers_of(model):
            layer.disable()
        _write_full(model, "old")
    except BaseException:
        switch_on(model)
        raise


def _check_base(model: Any, tensors: Mapping[str, Any]) -> None:
    """Raise DeltaError where tensors have another shape than when slices were made, or were lost."""
    register: AdapterRegister = model._adapters
    state = state_of(model)
    base = {} if state is None else state.base
    wrong = []
    for key, tensor in tensors.items():
        then = base.get(key, (None, 0))[0]
        now = tuple(tensor.shape) if isinstance(tensor, Tensor) else then
        if then is not None and then != now:
            wrong.append(
                f"{key} had the shape {then} when slices were made, and has {now} now"
            )
    wrong += [f"{key} {reason}" for key, reason in register.lost.items()]
    if wrong:
        raise DeltaError(
            f"the base of these slices cannot be restored: {'; '.join(wrong[:4])}."
            " Resize embeddings and replace heads before get_slice_model, and name what trains"
            " beside slices in modules_to_save. save_pretrained(..., whole_model=True) saves the"
            " model as it is"
        )


def restart_from_base(model: Any) -> None:
    """Give up what the slices have trained; the model's values are their originals from here on."""
    register: AdapterRegister = model._adapters
    for layer in layers_of(model):
        layer.set_aside = None
        # also where it trained on top of an adapter
        layer.required_originals("be reverted").take(layer.weight_matrix)
        layer.refresh_master()
    for entry in register.full.values():
        # so that switching on writes the values of the base, here too
        entry.new = entry.old
    register.versions.clear()


def check_originals(model: Any, below: list[str]) -> None:
    """Raise DeltaError unless the model holds the values that the slices started from.

    Slices may have moved to entries of an adapter below them: then they only make sense on top of
    it.
    """
    wrong = []
    for name, layer in named_layers(model):
        if not layer.required_originals("be switched on").holds(layer.weight_matrix):
            wrong.append(name)
    for key, entry in model._adapters.full.items():
        now = tensor_of(model, key)
        if not same_bits(now, entry.old.to(now.dtype)):
            wrong.append(key)
    if wrong:
        raise DeltaError(
            f"the slices in training of {', '.join(wrong[:3])} started from other values than are"
            f" there with {below or 'no adapter'} below them: apply the adapters that they were"
            " trained on, and no others"
        )


def snapshot_full(model: Any) -> None:
    """Note the present values of what is fully trained."""
    register: AdapterRegister = model._adapters
    for key, entry in register.full.items():
        tensor = tensor_of(model, key)
        # a model that was cast: its originals follow, as those of slices do
        entry.old = entry.old.to(tensor.dtype)
        entry.new = tensor.detach().to("cpu", copy=True)
        register.versions[key] = tensor._version


@torch.no_grad()
def _write_full(model: Any, which: str) -> None:
    for key, entry in model._adapters.full.items():
        tensor_of(model, key).copy_(getattr(entry, which))


# Their delta


def trained_delta(model: Any, info: dict[str, Any]) -> Delta:
    """What the slices in training have changed so far.

    Args:
        model: a model with slices that are applied.
        info: JSON to store with the delta.

    Returns:
        The delta; its base is hashed with the originals in their places.

    Raises:
        DeltaError: the slices are off, or spread over processes.
        RuntimeError: originals were not kept.
    """
    register: AdapterRegister = model._adapters
    if register.trainable not in register.active:
        raise DeltaError(
            f"the slices in training ({register.trainable!r}) are not applied;"
            f" set_adapter({register.trainable!r}) first"
        )
    # for its error alone: refuse sharded tensors before anything is gathered or hashed
    _check_base(model, whole_state(model))
    layers = _one_layer_per_weight(model)
    weights = {key: _weight_delta(layer) for key, layer in layers.items()}
    snapshot_full(model)
    full = {
        key: replace(entry)
        for key, entry in register.full.items()
        # A bias that did not move is in the base; a new head is not, moved or not.
        if not (entry.replaces and same_bits(entry.old, entry.new))
    }
    new_keys = {key for key, entry in full.items() if not entry.replaces}
    hashes = base_hashes(model, new_keys, _original_values(model, layers.values(), full))
    for key, weight in weights.items():
        # left open by _weight_delta: one pass hashes sliced weights and all others
        weight.base_sha256 = weight_hash(hashes, key, weight.added) or ""
    # all but the last: the slices in training are the top of the stack
    below = [{"name": n, "sha256": register.deltas[n].sha256} for n in register.active[:-1]]
    base = _base(model, hashes)
    if below:
        # the model that these slices started from is the base with those applied
        base["on"] = below
    content = _progress(model)
    if parents := [*register.parents, *below]:
        content["parents"] = parents
    return Delta(weights, full, model.slice_config.to_dict(), base, {**content, **info})


def _one_layer_per_weight(model: Any) -> dict[str, SliceLayer]:
    """Layers by state-dict key; of layers that share a weight the first."""
    layers: dict[int, tuple[str, SliceLayer]] = {}
    for name, layer in named_layers(model):
        # by identity: tied layers share one parameter, and one set of slices
        layers.setdefault(id(layer.weight), (layer.state_key(name), layer))
    return dict(layers.values())


def _weight_delta(layer: SliceLayer) -> WeightDelta:
    layer.sync()
    originals = layer.required_originals("be saved as a delta")
    # fewer, longer tensors in the file: one of all columns, one of all rows
    originals.join()
    values = slice_values(originals.slices, originals.read(layer.weight_matrix))
    shape = (layer.out_features, layer.in_features)
    if isinstance(layer, PoolSlice):
        values = [replace(v, cols=layer.features(v.cols)) for v in values]
        shape = (layer.out_features, layer.full_features)
        return WeightDelta(shape, False, "", values, added=True)
    return WeightDelta(shape, layer.fan_in_fan_out, "", values)


def _original_values(
    model: Any, layers: Iterable[SliceLayer], full: dict[str, FullDelta]
) -> Callable[[str, Tensor], Tensor]:
    """(state-dict key, tensor in the model) -> the value that it had in the base."""
    # beside a packed weight nothing has changed in it
    layers = [layer for layer in layers if not isinstance(layer, PoolSlice)]
    by_weight = {id(layer.weight): layer for layer in layers}
    # A tied weight is in the state dict under each of its names; each must give the original.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parameters.update(
        {
            layer.state_key(name): layer.weight
            for name, layer in named_layers(model)
            if not isinstance(layer, PoolSlice)
        }
    )

    def original(key: str, value: Tensor) -> Tensor:
        if key in full:
            return full[key].old
        layer = by_weight.get(id(parameters.get(key)))
        if layer is None:
            return value
        restored = layer.required_originals("be saved").restored(layer.weight_matrix)
        # hashed as it is stored, (in, out)
        if layer.fan_in_fan_out:
            restored = restored.t()
        return restored.reshape(layer.weight.shape)

    return original


def _base(model: Any, hashes: dict[str, str]) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {
        "sha256": combined_hash(hashes),
        "model": getattr(config, "_name_or_path", None) or None,
        "class": type(model).__name__,
        # to name tensors that differ; what proves that none does is the combined hash
        "tensors": {key: value[:16] for key, value in hashes.items()},
    }


def _progress(model: Any) -> dict[str, Any]:
    """Steps taken, and the share of the sliced weights' entries that has trained."""
    layers = list(layers_of(model))
    entries = sum(layer.weight.numel() for layer in layers)
    covered = sum(layer.weight.numel() * layer.schedule.coverage() for layer in layers)
    steps = max((layer.schedule.steps for layer in layers), default=0)
    return {"steps": steps, "coverage": covered / max(1, entries)}


def named_layers(model: nn.Module) -> Iterator[tuple[str, SliceLayer]]:
    """Layers with slices, by module name."""
    for name, module in model.named_modules():
        if isinstance(module, SliceLayer):
            yield name, module


def layers_of(model: nn.Module) -> Iterator[SliceLayer]:
    return (layer for _, layer in named_layers(model))
