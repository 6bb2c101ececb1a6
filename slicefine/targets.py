"""What a SliceConfig means in a model: found once, used by everything that makes or counts slices."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from slicefine.config import SliceConfig
from slicefine.heads import find_heads, output_head
from slicefine.matching import Rules, check_entries, named, some
from slicefine.modules.attention import is_attention, projections
from slicefine.modules.experts import is_experts, why_not_experts
from slicefine.modules.parameters import SlicedModule
from slicefine.modules.quantized import packed_shape, packing_of
from slicefine.obstacles import Place, is_linear, quantized, why_not

__all__ = [
    "Target",
    "Targets",
    "find_targets",
    "is_linear",
    "output_head",
    "resolve",
]


@dataclass(frozen=True)
class Target:
    """What the config names: a linear module, or a parameter of another.

    Attributes:
        name: of the module, or of the parameter.
        module: the linear layer, or the module that holds the parameter.
        r: width of its slice; r_out: height of a block.
        skipped: why it stays as it is; None for a slice.
        parameter: name of the parameter in ``module``; None for a linear layer.
        is_head: whether it is skipped as an output head.
    """

    name: str
    module: nn.Module
    r: int
    r_out: int
    skipped: str | None = None
    parameter: str | None = None
    is_head: bool = False

    @property
    def quantized(self) -> str | None:
        """How the weight is packed, such as "nf4"; None in floating point."""
        packing = None if self.parameter else packing_of(self.module)
        return None if packing is None else packing.kind

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features); out_features of experts are those of all of them. (0, 0)
        without a matrix.
        """
        return shape_of(self.module, self.parameter)


def shape_of(module: nn.Module, parameter: str | None = None) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer or of a parameter; (0, 0) without a matrix."""
    weight: Any = getattr(module, parameter or "weight", None)
    if parameter is None and packing_of(module) is not None:
        return packed_shape(module)
    if weight is None or weight.dim() < 2:
        return 0, 0
    shape = weight.shape[:-1].numel(), weight.shape[-1]
    stored_as_linear = parameter is not None or isinstance(module, nn.Linear)
    # Conv1D stores (in, out)
    return shape if stored_as_linear else shape[::-1]


@dataclass(frozen=True)
class Targets:
    """What a config means in a model.

    Attributes:
        layers: the targets in the model's order, those that are skipped too.
        saved: name -> module of what is fully trained.
        unused: sentences to warn with, on entries of the config that change nothing.
        notes: the same, on what a user may not have meant.
    """

    layers: list[Target]
    saved: dict[str, nn.Module]
    unused: list[str]
    notes: list[str]

    def is_saved(self, name: str) -> bool:
        """Whether a module is fully trained, or is inside one that does."""
        return any(f"{name}.".startswith(f"{saved}.") for saved in self.saved)


def find_targets(model: nn.Module, config: SliceConfig) -> list[Target]:
    """The targets of a config in a model, in the model's order, for what reads their weights.

    Entries of the config without effect are warned of. Raises as `resolve` does, and ValueError for
    packed (quantized) weights, which can be trained beside and not read.
    """
    found = resolve(model, config)
    packed = [t for t in found.layers if t.skipped is None and t.quantized]
    if packed:
        raise ValueError(
            f"{some(t.name for t in packed)} {'is' if len(packed) == 1 else 'are'} quantized"
            f" ({packed[0].quantized}), and this reads weights: load the model in floating point, or"
            " leave them out (exclude_modules)"
        )
    for note in found.unused:
        warnings.warn(note, stacklevel=2)
    return found.layers


def resolve(model: nn.Module, config: SliceConfig) -> Targets:
    """Find what a config means in a model.

    Args:
        model: a plain model; it is not changed.
        config: how its layers are to become slices.

    Returns:
        The layers, what is fully trained, and what to warn of.

    Raises:
        ValueError: an entry matches nothing (with the nearest names), a layer that the config
            names cannot train, or no layer is left.
    """
    if is_attention(model) or is_experts(model):
        raise ValueError(
            f"the model is a single {type(model).__name__}, whose parameters become slices within a"
            " model; put it into one"
        )
    _refuse_adapters_of_peft(model)
    return _Search(model, config).result()


def _refuse_adapters_of_peft(model: nn.Module) -> None:
    """Raise ValueError if PEFT has put layers of its own into the model.

    Slices of a layer that PEFT wraps, or of its A and B matrices, would be recorded under PEFT's
    names, and a delta of them loads on no base.
    """
    # by the name of the package, so that PEFT is never imported
    wrapped = [
        n for n, m in model.named_modules() if type(m).__module__.startswith("peft.")
    ]
    if wrapped:
        raise ValueError(
            f"the model carries PEFT's layers ({wrapped[0] or type(model).__name__}"
            f"{f' and {len(wrapped) - 1} more' if len(wrapped) > 1 else ''}): call its"
            " merge_and_unload() (or unload()) first, then make slices of what it returns"
        )


class _Search:
    """One walk over the modules of a model, for one config."""

    def __init__(self, model: nn.Module, config: SliceConfig) -> None:
        self.model, self.config = model, config
        self.modules = dict(model.named_modules())
        self.rules = Rules(config, self.modules)
        if not self.rules.everything:
            check_entries(config.target_modules or [], self.modules)
            self.rules.check_layers()
        self.heads = find_heads(model)
        self.users = _users_of_weights(model)
        self.attentions = {
            name
            for name, module in self.modules.items()
            if is_attention(module) and not self.rules.excluded(name)
        }
        self.notes: list[str] = []

    def result(self) -> Targets:
        saved = self._saved()
        new_heads = self._new_heads()
        targets = [t for name in self.modules for t in self._targets_of(name, new_heads)]
        targets += self._named_parameters({target.name for target in targets})
        if self.config.tied_weights == "share":
            _check_shared(targets, self.model, self.users)
        self._check_something_left(targets)
        names = [target.name for target in targets if target.skipped is None]
        sliceable = (is_linear, quantized, is_attention, is_experts)
        candidates = [
            n for n, m in self.modules.items() if any(is_it(m) for is_it in sliceable)
        ]
        unused = self.rules.without_effect(names, [*candidates, *names])
        self._note_experts()
        if new_heads:
            one = len(new_heads) == 1
            self.notes.append(
                f"{', '.join(new_heads)} {'is' if one else 'are'} fully trained, as a new"
                f" output head needs; modules_to_save={list(new_heads)!r} says so without this"
                " warning, modules_to_save=[] keeps it frozen"
            )
        return Targets(targets, saved | new_heads, unused, self.notes)

    def _saved(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        missing = []
        for entry, pattern in self.rules.saved_by_entry.items():
            inside = {name: m for name, m in self.modules.items() if pattern.match(name)}
            missing += [] if inside else [entry]
            found.update(inside)
        if missing:
            names = ", ".join(name for name, _ in self.model.named_children())
            raise ValueError(
                f"modules_to_save names {', '.join(map(repr, missing))}, which the model does not"
                f" have; its children are: {names}"
            )
        return found

    def _new_heads(self) -> dict[str, nn.Module]:
        """The heads that are fully trained without being asked for."""
        if self.config.modules_to_save is not None or not self.rules.everything:
            return {}
        return {n: m for n, m in self.heads.task.items() if not self.rules.excluded(n)}

    def _targets_of(self, name: str, new_heads: dict[str, nn.Module]) -> list[Target]:
        module, everything = self.modules[name], self.rules.everything
        if name in self.attentions and (everything or self.rules.listed(name)):
            keys = projections(module)
            return [
                self._parameter(f"{name}.{key}", module, key, everything) for key in keys
            ]
        # out_proj is a linear layer of its own, but who names the attention means it too
        parent = name.removesuffix(".out_proj")
        of_attention = name != parent and parent in self.attentions
        if of_attention and not everything and self.rules.listed(parent):
            return [self._layer(name, everything=False, of_attention=True)]
        linear = is_linear(module) or bool(quantized(module))
        if not name or not (linear if everything else self.rules.listed(name)):
            return []
        if self.rules.excluded(name) or (everything and module is self.heads.language):
            return []
        head = self.heads.holds(name) if everything else None
        if head in new_heads:
            return []
        if head is not None:
            reason = (
                "'all-linear' leaves out the head;"
                f" modules_to_save=[{head!r}] trains all of it, as a new head needs"
            )
            r = self._width(shape_of(module))
            return [Target(name, module, r, r, reason, is_head=True)]
        return [self._layer(name, everything, of_attention)]

    def _layer(self, name: str, everything: bool, of_attention: bool) -> Target:
        module = self.modules[name]
        parent = self.modules.get(name.rpartition(".")[0]) if name else None
        weight: Any = getattr(module, "weight", None)
        others = [user for user in self.users.get(weight, ()) if user != name]
        # tied layers share one slice then; `_check_shared` looks at all uses
        if self.config.tied_weights == "share":
            others = []
        place = Place(name, parent, others, everything, of_attention)
        reason = why_not(module, place, self.notes)
        return self._target(name, module, None, reason, everything)

    def _target(
        self,
        name: str,
        module: nn.Module,
        key: str | None,
        skipped: str | None,
        everything: bool,
    ) -> Target:
        of_its_own = self.rules.rank(name)
        r = of_its_own or self._width(shape_of(module, key))
        r_out = self.config.r_out or r
        # "all-linear" means narrow layers too; an r that is written down for a layer is not changed
        if skipped is None and everything and of_its_own is None:
            r, r_out = self._fitting(shape_of(module, key), r, r_out)
        return Target(name, module, r, r_out, skipped, key)

    def _width(self, shape: tuple[int, int]) -> int:
        return self.config.width(*shape)

    def _fitting(self, shape: tuple[int, int], r: int, r_out: int) -> tuple[int, int]:
        """The widths that a layer has room for: all of a layer that is narrower than r."""
        out_features, in_features = shape
        if self.config.slice_type == "column":
            return min(r, in_features), r_out
        if self.config.slice_type == "row":
            return min(r, out_features), r_out
        if self.config.slice_type == "block":
            return min(r, in_features), min(r_out, out_features)
        return min(r, *shape), r_out

    def _named_parameters(self, known: set[str]) -> list[Target]:
        """Targets of target_parameters; what target_modules has found is not repeated."""
        entries = self.config.target_parameters or []
        # not named_parameters, which lists a tied parameter under one of its names only
        owners = {
            f"{name}.{key}" if name else key: (module, key)
            for name, module in self.modules.items()
            for key in module._parameters
        }
        check_entries(entries, owners, "target_parameters", "parameters")
        found = [name for name in owners if entries and named(entries, name)]
        return [
            self._parameter(name, *owners[name], everything=False)
            for name in found
            if name not in known and not self.rules.excluded(name)
        ]

    def _parameter(
        self, name: str, module: nn.Module, key: str, everything: bool
    ) -> Target:
        reason = self._why_not_parameter(name, module, key)
        if reason is not None and not everything:
            raise ValueError(f"{name} cannot become a slice: {reason}.")
        tied = self._tied(name, module, key)
        if reason is None and tied:
            reason = f"its weight is tied to {', '.join(tied)}"
        return self._target(name, module, key, reason, everything)

    def _tied(self, name: str, module: nn.Module, key: str) -> list[str]:
        parameter = module._parameters[key]
        assert parameter is not None
        return [user for user in self.users[parameter] if f"{user}.{key}" != name]

    def _why_not_parameter(self, name: str, module: nn.Module, key: str) -> str | None:
        parameter = module._parameters[key]
        assert parameter is not None
        if is_linear(module) and key == "weight":
            raise ValueError(
                f"{name} is the weight of a linear layer; name the layer in target_modules instead."
            )
        reason = None
        if is_experts(module) and parameter.dim() == 3:
            reason = why_not_experts(module, parameter, self.config.slice_type)
        elif not (is_attention(module) and key in projections(module)):
            reason = (
                f"it is a parameter of shape {tuple(parameter.shape)} of a {type(module).__name__};"
                " only projections of nn.MultiheadAttention and weights of experts (experts, out,"
                " in) of transformers 5 become slices. modules_to_save trains a module whole"
            )
        if reason is not None:
            return reason
        if not parameter.dtype.is_floating_point:
            return f"it is quantized ({parameter.dtype}); load the model unquantized"
        if parameter.is_meta:
            return "it is on the meta device, without values; load the weights first"
        if "forward" in module.__dict__ or isinstance(module, SlicedModule):
            return (
                "the forward of its module has been replaced on the instance; make slices before"
                " dispatching the model"
            )
        if self.config.tied_weights == "share" and (
            others := self._tied(name, module, key)
        ):
            return (
                f"it is tied to {', '.join(others)}, and only linear layers share a slice; use"
                " tied_weights='skip'"
            )
        return None

    def _check_something_left(self, targets: list[Target]) -> None:
        if any(not self.rules.everything or not self.heads.holds(t.name) for t in targets):
            return
        kind = type(self.model).__name__
        if is_linear(self.model):
            raise ValueError(
                f"the model is a single {kind}; use SliceLinear.from_linear(model, config) for it"
            )
        but = ""
        if self.rules.everything and self.heads.task:
            but = (
                f" but its output head ({', '.join(self.heads.task)}): slices are of linear layers,"
                " and the rest of the model has none that can train. A head is better trained"
                " whole, without slices; target_modules=[its name] makes a slice of it all the same"
            )
        linear = some(name for name, module in self.modules.items() if is_linear(module))
        raise ValueError(
            f"target_modules={self.config.target_modules!r} with"
            f" exclude_modules={self.config.exclude_modules!r} leaves no layer of {kind}{but}."
            f" Linear layers there: {linear}"
        )

    def _note_experts(self) -> None:
        """Most of a model's weights may be in experts, which "all-linear" leaves out."""
        if not self.rules.everything:
            return
        entries = self.config.target_parameters or []
        found = {}
        for name, module in self.modules.items():
            if not is_experts(module) or self.rules.excluded(name):
                continue
            for key, parameter in module._parameters.items():
                full = f"{name}.{key}"
                asked_for = bool(entries) and named(entries, full)
                if parameter is None or parameter.dim() != 3 or self.rules.excluded(full):
                    continue
                # keyed by the end of the name: the same suffix serves every decoder layer
                if not asked_for:
                    found[f"{name.rsplit('.', 1)[-1]}.{key}"] = None
        if found:
            self.notes.append(
                "experts stay as they are; to train them too:"
                f" target_parameters=[{', '.join(map(repr, found))}]"
            )


def _check_shared(
    targets: list[Target], model: nn.Module, users: dict[nn.Parameter, list[str]]
) -> None:
    """tied_weights="share": every use of the weight must be a slice, or its share of the gradient
    would be lost.
    """
    sliced, modules = (
        {target.name for target in targets if target.skipped is None},
        dict(model.named_modules()),
    )
    for target in targets:
        weight: Any = getattr(target.module, "weight", None)
        if target.skipped is None and target.parameter is None:
            for other in users.get(weight, ()):
                if other not in sliced and modules[other] is not target.module:
                    raise ValueError(
                        f"the weight of {target.name} is tied to {other}"
                        f" ({type(modules[other]).__name__}), which does not become a slice, so the"
                        " gradient of that use would be lost. Use tied_weights='skip', or untie"
                        " them."
                    )


def _users_of_weights(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Parameter -> the modules that hold it; a module object reachable under two names counts once."""
    users: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(parameter, []).append(name)
    return users
