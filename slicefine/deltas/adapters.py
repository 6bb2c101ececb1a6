"""Several deltas on one base: load, switch, disable, merge and save them. The names are PEFT's.

Applied adapters form a stack. Each one keeps what it has written over, so taking them off in
reverse order restores every bit;
disjoint ones may be stacked in any order, overlapping ones only if asked for. The slices in
training are an adapter too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slicefine import atomic
from slicefine.deltas.delta import (
    CONFIG_FILE,
    FILE,
    Delta,
    DeltaError,
    WeightDelta,
    WholeDelta,
    base_hashes,
    combined_hash,
    patches_of,
    tensor_of,
    whole_state,
)
from slicefine.deltas.format import SUFFIX
from slicefine.linear import SliceLinear
from slicefine.originals import same_bits, set_version

DEFAULT = "default"
# arguments of PreTrainedModel.save_pretrained and PeftModel.save_pretrained that change nothing
# about a delta
_OF_WHOLE_MODELS = {
    "safe_serialization",
    "save_function",
    "max_shard_size",
    "variant",
    "token",
    "save_peft_format",
    "save_embedding_layers",
}


class _Adapters:
    """What a model knows of its adapters. stack: applied ones, the lowest first, each with what it
    has written over.
    """

    def __init__(self) -> None:
        self.deltas: dict[str, Delta] = {}
        self.live: str | None = None  # the name of the slices in training
        self.whole: dict[
            str, WholeDelta
        ] = {}  # what trains whole beside them; ``new`` is current while they are off
        self.versions: dict[str, int] = {}  # of what trains whole, before it was taken off
        self.stack: list[tuple[str, Delta | None]] = []
        self.parents: list[
            dict[str, Any]
        ] = []  # the delta that the slices in training went on from

    @property
    def active(self) -> list[str]:
        return [name for name, _ in self.stack]


class AdapterModel:
    """Mixed into the class of a model that has slices or loaded deltas."""

    _adapters: _Adapters

    # What there is

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are applied, the lowest of the stack first."""
        return self._adapters.active

    @property
    def active_adapter(self) -> str | None:
        """The topmost applied adapter."""
        return self._adapters.active[-1] if self._adapters.active else None

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters, applied or not."""
        live = [self._adapters.live] if self._adapters.live is not None else []
        return [*live, *self._adapters.deltas]

    def delta(self, adapter_name: str | None = None, info: dict[str, Any] | None = None) -> Delta:
        """A loaded adapter, or what the slices in training have changed so far (the default, where
        there are slices).

        info: JSON to store with it, such as metrics. Raises RuntimeError if originals were not
            kept.
        """
        adapters = self._adapters
        name = adapter_name or adapters.live or self.active_adapter
        if name is not None and name == adapters.live:
            return _live_delta(self, info or {})
        delta = self._adapters.deltas[self._known(name)]
        return replace(delta, info={**delta.info, **info}, sha256=None) if info else delta

    # On and off

    def load_adapter(
        self,
        path: str | os.PathLike[str] | Delta,
        adapter_name: str = DEFAULT,
        *,
        verify: bool = True,
    ) -> None:
        """Read a delta (folder, file or hub id) and check it against the base; `set_adapter`
        applies it.

        verify: hash the whole base model; False compares only the entries that the delta replaces.
        Raises DeltaError for a damaged file, another base, a name that is taken, or a delta that
        was trained on top of others
        which are not loaded.
        """
        check_name(_module(self), adapter_name)
        delta = path if isinstance(path, Delta) else Delta.load(local_path(path))
        below = self._below(delta)
        with self.disable_adapter():
            for name in below:
                self._apply_one(name)
            delta.check_base(_module(self), everything=verify)
        self._adapters.deltas[adapter_name] = delta

    def set_adapter(self, adapter_name: str | list[str], *, stack: bool = False) -> None:
        """Apply these adapters and take the others off; bit-exact. An empty list leaves the base.

        stack: let later ones write over earlier ones where they overlap. Raises DeltaError where
            they overlap otherwise.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._known(name)
        if len(set(names)) < len(names):
            raise DeltaError(f"an adapter is named twice: {names}")
        self._check_stack(names, stack)
        before = self.active_adapters
        try:
            self._unapply_all()
            for name in names:
                if name == self._adapters.live:
                    _check_originals(self, names[:-1])
                self._apply_one(name)
        except BaseException:
            self._unapply_all()
            for name in before:
                self._apply_one(name)
            raise

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off if it is applied, and forget it. Raises DeltaError where slices have
        trained on top of its values.
        """
        if self._known(adapter_name) == self._adapters.live:
            raise DeltaError(
                f"{adapter_name!r} are the slices in training; revert() or merge_and_unload() ends"
                " them"
            )
        rest = [name for name in self.active_adapters if name != adapter_name]
        if rest != self.active_adapters:
            self.set_adapter(rest, stack=True)
        del self._adapters.deltas[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model, bit for bit, inside the block; slices get no gradient there and an
        optimizer step raises.
        """
        names = self.active_adapters
        self._unapply_all()
        try:
            yield
        finally:
            self._unapply_all()
            for name in names:
                if name in self.adapters:  # else deleted inside the block
                    self._apply_one(name)

    def revert(self) -> None:
        """Take the model back to its base, bit for bit: adapters off, slices and whole modules at
        their original values.

        Slices may go on training from there; their optimizer still holds its moments.
        """
        self._unapply_all()
        adapters = self._adapters
        if adapters.live is not None:
            for layer in _layers(self):
                layer._trained = None  # what was trained is given up
                # the base's values are the originals from here on, also where it trained on top of
                # an adapter
                layer.required_ledger("be reverted").take(layer.weight_matrix)
                layer.read_back()
            for whole in adapters.whole.values():
                whole.new = whole.old
            adapters.versions.clear()
            adapters.stack.append((adapters.live, None))

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """A new adapter: old + sum of weights times (new - old), in float64, rounded once.
        combination_type: "linear".

        Where one adapter alone changes an entry with weight 1 its value is copied, so disjoint
        deltas merge without rounding.
        """
        from slicefine.deltas.merging import weighted

        check_name(_module(self), adapter_name)
        if combination_type != "linear":
            raise ValueError(
                f"combination_type is {combination_type!r}; expected 'linear', the only one for"
                " deltas"
            )
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(
                f"{len(adapters)} adapters and {len(weights)} weights; expected as many of each, at"
                " least one"
            )
        self._adapters.deltas[adapter_name] = weighted(
            [self.delta(name) for name in adapters], weights
        )

    # Files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        selected_adapters: list[str] | None = None,
        info: dict[str, Any] | None = None,
        whole_model: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write adapters as deltas, with config and model card, atomically: ``default`` to the
        folder, others to folders in it.

        selected_adapters: those to write; default: the slices in training, else what is applied.
            info: JSON to store.
        whole_model: write the whole model instead, as its class does. So do calls with
            ``state_dict=``, which is how Trainer and
        Accelerate write checkpoints. kwargs: is_main_process (False writes nothing); what only a
        whole model needs is ignored.
        """
        if whole_model or "state_dict" in kwargs:
            return _whole_save(self, save_directory, kwargs)
        if unknown := kwargs.keys() - _OF_WHOLE_MODELS - {"is_main_process"}:
            raise TypeError(
                f"save_pretrained got {', '.join(sorted(unknown))}, which a delta has no use for:"
                " push_to_hub(repo_id) uploads it, whole_model=True saves the model as its class"
                " does"
            )
        if not kwargs.get("is_main_process", True):
            return None
        names = selected_adapters or (
            [self._adapters.live] if self._adapters.live else self.active_adapters
        )
        if not names:
            raise DeltaError(
                "no adapter is applied: nothing to save. set_adapter one, or name it in"
                " selected_adapters"
            )
        from slicefine.deltas.card import model_card

        for name in names:
            folder = Path(save_directory) if name == DEFAULT else Path(save_directory) / name
            delta = self.delta(name, info)
            delta.save(folder / FILE)
            atomic.write_text(folder / CONFIG_FILE, delta.config_json())
            atomic.write_text(folder / "README.md", model_card(delta, name))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Write the delta as `save_pretrained` does and upload it; returns the address. kwargs:
        HfApi.create_repo's.
        """
        from slicefine.deltas.hub import push

        return push(self, repo_id, **kwargs)

    # Inside

    def _known(self, name: str | None) -> str:
        if name is None or name not in self.adapters:
            raise DeltaError(
                f"no adapter {name!r}; there are {', '.join(map(repr, self.adapters)) or 'none'}"
            )
        return name

    def _check_stack(self, names: list[str], stack: bool) -> None:
        """Refuse overlaps. Slices in training are not looked at: they may lie over adapters that
        they started from.
        """
        live, deltas = self._adapters.live, self._adapters.deltas
        if live in names and names[-1] != live:
            raise DeltaError(
                f"{live!r} are the slices in training; they must be the last of {names}"
            )
        loaded = [name for name in names if name != live]
        for i, upper in enumerate(loaded):
            below = self._below(deltas[upper])
            if below != [name for name in loaded[:i] if name in below]:
                raise DeltaError(
                    f"adapter {upper!r} was trained on top of {', '.join(map(repr, below))}:"
                    f" set_adapter({[*below, upper]})"
                )
            for lower in loaded[:i] if not stack else ():
                if lower not in below and (common := deltas[upper].overlap(deltas[lower])):
                    raise DeltaError(
                        f"adapters {lower!r} and {upper!r} change the same entries of"
                        f" {', '.join(common[:3])}. stack=True lets the later one win."
                    )

    def _below(self, delta: Delta) -> list[str]:
        """The adapters that a delta was trained on top of, by the names that they have here, the
        lowest first.
        """
        here = {other.sha256: name for name, other in self._adapters.deltas.items() if other.sha256}
        wanted = delta.base.get("on", [])
        if missing := [entry["name"] for entry in wanted if entry["sha256"] not in here]:
            raise DeltaError(
                f"the delta was trained on top of {', '.join(map(repr, missing))}, which"
                f" {'is' if len(missing) == 1 else 'are'} not loaded: load_adapter them first"
            )
        return [here[entry["sha256"]] for entry in wanted]

    def _apply_one(self, name: str) -> None:
        adapters = self._adapters
        if name == adapters.live:
            for layer in _layers(self):
                layer.enable()
            _write_whole(self, "new")
            for key, version in adapters.versions.items():
                set_version(tensor_of(_module(self), key), version)
            adapters.stack.append((name, None))
            return
        delta = adapters.deltas[name]
        covered = delta.read(_module(self))
        delta.write(_module(self), "new")
        adapters.stack.append((name, covered))

    def _unapply_all(self) -> None:
        adapters = self._adapters
        while adapters.stack:
            _, covered = adapters.stack[-1]
            if covered is None:
                _note_whole(self)
                for layer in _layers(self):
                    layer.disable()
                _write_whole(self, "old")
            else:
                covered.write(_module(self), "new")
            adapters.stack.pop()


# The slices in training


def check_name(model: nn.Module, name: str) -> None:
    """Raise DeltaError if an adapter has this name already, or it cannot be the name of a folder,
    which it will be.
    """
    if (
        not name
        or name.startswith(".")
        or name.endswith(SUFFIX)
        or any(c in name for c in "/\\:\0")
    ):
        raise DeltaError(
            f"an adapter cannot be called {name!r}: a folder of that name is made when it is saved"
        )
    known: _Adapters | None = model.__dict__.get("_adapters")
    if known is not None and (name == known.live or name in known.deltas):
        raise DeltaError(
            f"there is an adapter {name!r} already; choose another adapter_name, or"
            " delete_adapter it"
        )


def begin(model: Any, name: str, whole: dict[str, bool], keep: bool) -> None:
    """Make the slices of a model an adapter. whole: key of what trains whole -> whether it is part
    of the base.
    """
    adapters = model.__dict__.setdefault("_adapters", _Adapters())
    adapters.live = name
    adapters.whole, adapters.parents = {}, []
    for key, replaces in whole.items() if keep else ():
        value = tensor_of(model, key).detach().to("cpu", copy=True)
        adapters.whole[key] = WholeDelta(value, value, replaces)
    adapters.stack.append((name, None))


def new_register() -> _Adapters:
    return _Adapters()


@torch.no_grad()
def go_on_from(model: Any, delta: Delta) -> None:
    """Give slices that have just been made the values of a delta, and its old values as their
    originals.
    """
    layers = {layer.state_key(name): layer for name, layer in _named_layers(model)}
    if missing := delta.weights.keys() - layers.keys():
        raise DeltaError(
            f"the delta changes {', '.join(sorted(missing)[:3])}, which its own SliceConfig does"
            " not train here"
        )
    for key, weight in delta.weights.items():
        layer = layers[key]
        ledger = layer.required_ledger("go on from a delta")
        for patch in weight.patches:
            ledger.record(patch.old, patch.rows, patch.cols)
    for key, whole in delta.whole.items():
        tensor_of(model, key).copy_(whole.new)
        if not whole.replaces and key in model._adapters.whole:
            model._adapters.whole[key] = WholeDelta(whole.old, whole.old, False)
    for key, weight in delta.weights.items():
        delta.write_one(model, key, weight, "new")
        layers[key].read_back()
    model._adapters.parents = [{"name": model._adapters.live, "sha256": delta.sha256}]


def _module(model: Any) -> nn.Module:
    return model


def _named_layers(model: Any) -> Iterator[tuple[str, SliceLinear]]:
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, SliceLinear)
    )


def _layers(model: Any) -> Iterator[SliceLinear]:
    return (layer for _, layer in _named_layers(model))


def _check_originals(model: Any, below: list[str]) -> None:
    """Slices may have moved to entries of an adapter below them: then they only make sense on top
    of it.
    """
    wrong = [
        name
        for name, layer in _named_layers(model)
        if not layer.required_ledger("be switched on").holds(layer.weight_matrix)
    ]
    for key, whole in model._adapters.whole.items():
        now = tensor_of(model, key)
        wrong += [] if same_bits(now, whole.old.to(now.dtype)) else [key]
    if wrong:
        raise DeltaError(
            f"the slices in training of {', '.join(wrong[:3])} started from other values than are"
            f" there with {below or 'no adapter'} below them: apply the adapters that they were"
            " trained on, and no others"
        )


def _note_whole(model: Any) -> None:
    for key, whole in model._adapters.whole.items():
        tensor = tensor_of(model, key)
        whole.new = tensor.detach().to("cpu", copy=True)
        model._adapters.versions[key] = tensor._version


@torch.no_grad()
def _write_whole(model: Any, which: str) -> None:
    for key, whole in model._adapters.whole.items():
        tensor_of(model, key).copy_(getattr(whole, which))


def _live_delta(model: Any, info: dict[str, Any]) -> Delta:
    """Made of the ledgers and what stands in the weights; the base is hashed with the originals in
    their places.
    """
    adapters: _Adapters = model._adapters
    if adapters.live not in adapters.active:
        raise DeltaError(
            f"the slices in training ({adapters.live!r}) are not applied;"
            f" set_adapter({adapters.live!r}) first"
        )
    whole_state(model)
    weights: dict[str, WeightDelta] = {}
    layers: dict[int, SliceLinear] = {}
    for name, layer in _named_layers(model):
        if id(layer.weight) in layers:
            continue
        layers[id(layer.weight)] = layer
        layer.synchronise()
        ledger = layer.required_ledger("be saved as a delta")
        ledger.join()
        weights[layer.state_key(name)] = WeightDelta(
            (layer.out_features, layer.in_features),
            layer.fan_in_fan_out,
            "",
            patches_of(ledger.pieces, ledger.read(layer.weight_matrix)),
        )
    _note_whole(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parameters.update({layer.state_key(name): layer.weight for name, layer in _named_layers(model)})
    whole = {
        key: replace(w)
        for key, w in adapters.whole.items()
        if not (w.replaces and same_bits(w.old, w.new))
    }

    def original(key: str, value: Tensor) -> Tensor:
        if key in whole:
            return whole[key].old
        layer = layers.get(id(parameters.get(key)))
        if layer is None:
            return value
        restored = layer.required_ledger("be saved").restored(layer.weight_matrix)
        return (restored.t() if layer.fan_in_fan_out else restored).reshape(layer.weight.shape)

    hashes = base_hashes(model, {key for key, w in whole.items() if not w.replaces}, original)
    for key, weight in weights.items():
        weight.base_sha256 = hashes[key]
    base = {
        "sha256": combined_hash(hashes),
        "model": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "class": type(model).__name__,
        "tensors": {key: value[:16] for key, value in hashes.items()},
    }
    config = model.slice_config.to_dict()
    progress = {
        "steps": max((layer.schedule.steps for layer in _layers(model)), default=0),
        "coverage": _mean_coverage(model),
    }
    below = [{"name": n, "sha256": adapters.deltas[n].sha256} for n in adapters.active[:-1]]
    parents = [*adapters.parents, *below]
    if below:
        base["on"] = (
            below  # the model that these slices started from is the base with those applied
        )
    return Delta(
        weights,
        whole,
        config,
        base,
        {**progress, **({"parents": parents} if parents else {}), **info},
    )


def _mean_coverage(model: Any) -> float:
    """Share of the sliced weights' entries that has trained."""
    sizes = [(layer.weight.numel(), layer.schedule.coverage()) for layer in _layers(model)]
    return sum(n * share for n, share in sizes) / max(1, sum(n for n, _ in sizes))


def _whole_save(model: Any, folder: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
    save = getattr(super(AdapterModel, model), "save_pretrained", None)
    if save is None:
        raise TypeError(
            f"{type(model).__name__} has no save_pretrained of its own;"
            " torch.save(model.state_dict(), ...) writes the whole model"
        )
    save(folder, **kwargs)


def local_path(path: str | os.PathLike[str]) -> Path:
    if (
        Path(path).exists()
        or not isinstance(path, str)
        or path.count("/") != 1
        or path.startswith((".", "/"))
    ):
        return Path(path)
    from slicefine.deltas.hub import pull

    return pull(path)
