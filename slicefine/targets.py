"""Which modules a SliceConfig names: PEFT's matching rules, and what to say when nothing matches.

A list of target_modules matches whole names or suffixes (``name == entry or name.endswith("." +
entry)``), a string is a
regular expression for the whole name (``re.fullmatch``), and "all-linear" is every linear layer
except the output head.
Checked against peft 0.21 in tests/core/test_targets.py.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slicefine.config import SliceConfig
from slicefine.layer import SliceLayer
from slicefine.modules.attention import is_attention, projections
from slicefine.modules.experts import is_experts, why_not_experts
from slicefine.modules.parameters import SlicedModule

_HEAD_NAMES = ("score", "classifier")  # PEFT's SEQ_CLS_HEAD_NAMES


@dataclass(frozen=True)
class Target:
    """What the config names: a linear module, or a parameter of another. skipped: why it stays as
    it is; None for a slice.
    """

    name: str
    module: nn.Module
    r: int
    skipped: str | None = None
    parameter: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features); out_features of experts are those of all of them. (0, 0)
        without a matrix.
        """
        weight: Any = getattr(self.module, self.parameter or "weight", None)
        if weight is None or weight.dim() < 2:
            return 0, 0
        shape = weight.shape[:-1].numel(), weight.shape[-1]
        return (
            shape if self.parameter or isinstance(self.module, nn.Linear) else shape[::-1]
        )  # Conv1D


def is_linear(module: nn.Module) -> bool:
    """An nn.Linear, or Hugging Face's Conv1D (recognised without importing transformers)."""
    kind = type(module)
    return isinstance(module, nn.Linear) or (
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
    )


def find_targets(model: nn.Module, config: SliceConfig) -> list[Target]:
    """The targets of a config in a model, in the model's order.

    Raises ValueError naming every entry that matches nothing, with the nearest module names.
    """
    everything = _means_everything(config)
    names = dict(model.named_modules())
    if is_attention(model) or is_experts(model):
        raise ValueError(
            f"the model is a single {type(model).__name__}, whose parameters become slices within a"
            " model; put it into one"
        )
    if not everything:
        _check_entries(config.target_modules or [], names)
        _check_layers(config, names)
    _warn_of_unused(config, names)
    head = output_head(model)
    users = _users_of_weights(model)
    attentions = {n: m for n, m in names.items() if is_attention(m) and not _excluded(config, n)}
    targets = []
    for name, module in names.items():
        parent = name.removesuffix(".out_proj")
        if name in attentions and (everything or _listed(config, name)):
            for key in projections(attentions[name]):
                targets.append(
                    _parameter_target(f"{name}.{key}", module, key, users, config, everything)
                )
            continue
        if name != parent and parent in attentions and not everything and _listed(config, parent):
            targets.append(
                Target(
                    name,
                    module,
                    _rank(config, name),
                    _obstacle(module, name, users, config, False, True),
                )
            )
            continue
        if (
            not name
            or _excluded(config, name)
            or not (
                is_linear(module) or _quantised(module) if everything else _listed(config, name)
            )
        ):
            continue
        if everything and module is head:
            if name in _HEAD_NAMES:  # a language model's head is pretrained; this one may be new
                reason = (
                    f"'all-linear' leaves out the head; modules_to_save=[{name!r}] trains it whole,"
                    " as a new head needs"
                )
                targets.append(Target(name, module, config.r, reason))
            continue
        targets.append(
            Target(
                name,
                module,
                _rank(config, name),
                _obstacle(module, name, users, config, everything, parent in attentions),
            )
        )
    targets += _named_parameters(model, config, users, {target.name for target in targets})
    if config.tied_weights == "share":
        _check_shared(targets, model, users)
    if not any(target.module is not head for target in targets):
        if is_linear(model):
            raise ValueError(
                f"the model is a single {type(model).__name__}; use SliceLinear.from_linear(model,"
                " config) for it"
            )
        raise ValueError(
            f"target_modules={config.target_modules!r} with"
            f" exclude_modules={config.exclude_modules!r} leaves no layer of"
            f" {type(model).__name__}. Linear layers there:"
            f" {_some(n for n, m in names.items() if is_linear(m))}"
        )
    _warn_of_idle_ranks(config, names, [target.name for target in targets])
    return targets


def _means_everything(config: SliceConfig) -> bool:
    targets = config.target_modules
    return targets is None or (isinstance(targets, str) and targets.lower() == "all-linear")


def output_head(model: nn.Module) -> nn.Module | None:
    """What "all-linear" leaves out: the output embedding of a language model, else a module called
    score or classifier.
    """
    get: Any = getattr(model, "get_output_embeddings", None)
    head: Any = None
    with contextlib.suppress(NotImplementedError):  # transformers' answer for a model without one
        head = get() if callable(get) else None
    if head is None:
        head = next((m for n in _HEAD_NAMES if (m := getattr(model, n, None)) is not None), None)
    return head


def matches_modules_to_save(config: SliceConfig, name: str) -> bool:
    return any(_saves(entry, name) for entry in config.modules_to_save or ())


def _saves(entry: str, name: str) -> bool:
    # a name may hold what means something in a pattern, so it is compared as a name first
    if f".{entry}." in f".{name}.":
        return True
    return re.match(rf"(^|.*\.){entry}($|\..*)", name) is not None


def _named(entries: list[str] | str, name: str) -> bool:
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return name in entries or any(name.endswith(f".{entry}") for entry in entries)


def _excluded(config: SliceConfig, name: str) -> bool:
    return bool(
        config.exclude_modules and _named(config.exclude_modules, name)
    ) or matches_modules_to_save(config, name)


def _listed(config: SliceConfig, name: str) -> bool:
    entries = config.target_modules
    assert entries is not None
    if not _named(entries, name):
        return False
    wanted = _wanted_layers(config)
    if isinstance(entries, str) or name in entries or wanted is None:
        return True
    return _layer_index(config, name) in wanted


def _wanted_layers(config: SliceConfig) -> list[int] | None:
    layers = config.layers_to_transform
    if layers is None or isinstance(layers, int):
        return None if layers is None else [layers]
    return list(layers) or None


def _layer_index(config: SliceConfig, name: str) -> int | None:
    """Number of the layer that a module is in, by layers_pattern; also of a list at the root."""
    patterns = config.layers_pattern
    if isinstance(patterns, str):
        patterns = [patterns]
    regexes = [rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in patterns or ()]
    regexes = regexes or [r"(?:.*?\.)?[^.]*\.(?P<index>\d+)\."]
    found = next((m for regex in regexes if (m := re.match(regex, name))), None)
    return None if found is None else int(found["index"])


def _check_layers(config: SliceConfig, names: Iterable[str]) -> None:
    """Raise ValueError for an entry of layers_to_transform that is the number of no layer."""
    entries, wanted = config.target_modules, _wanted_layers(config)
    if wanted is None or entries is None or isinstance(entries, str):
        return
    listed = [n for n in names if n not in entries and _named(entries, n)]
    found = sorted({i for n in listed if (i := _layer_index(config, n)) is not None})
    missing = [i for i in wanted if i not in found]
    if missing and listed:
        raise ValueError(
            f"layers_to_transform={wanted} names layer {', '.join(map(str, missing))}, which"
            f" target_modules={entries!r} are not in. They are in layers"
            f" {', '.join(map(str, found)) or 'that have no number'}; layers are counted from 0, and"
            " layers_pattern names the list that they stand in"
        )


def _rank(config: SliceConfig, name: str) -> int:
    for pattern, r in config.rank_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return r
    return config.r


def _obstacle(
    module: nn.Module,
    name: str,
    users: dict[nn.Parameter, list[str]],
    config: SliceConfig,
    everything: bool,
    of_attention: bool = False,
) -> str | None:
    """Why a named module cannot become a slice; raised unless the config named everything."""
    if isinstance(module, SliceLayer):
        raise ValueError(
            f"{name} is a SliceLinear already; call merge_and_unload() before get_slice_model()"
        )
    weight = getattr(module, "weight", None)
    if reason := _quantised(module):
        return _refuse(
            False,
            f"{name} is a {type(module).__name__} with a quantised weight ({reason}); slices train"
            " floating-point weights. Load the model unquantised, or leave the layer out"
            " (exclude_modules)",
        )
    if not is_linear(module):
        return _refuse(
            everything, f"{name} is a {type(module).__name__}; {_what_instead(module, name)}"
        )
    if not isinstance(weight, nn.Parameter):
        return _refuse(
            False,
            f"the weight of {name} is a {type(weight).__name__} and no parameter of its own"
            " (pruned, or parametrised); make it permanent first, or leave the layer out"
            " (exclude_modules)",
        )
    if weight.is_meta:
        return _refuse(
            False,
            f"{name} has its weight on the meta device, without values; load the weights first (a"
            " device map that offloads keeps them elsewhere: give it more memory)",
        )
    if (
        isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)
        and not of_attention
    ):
        return _refuse(
            everything,
            f"{name} belongs to a subclass of nn.MultiheadAttention, which may read its weight"
            " without calling it, so a slice might never train",
        )
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return _refuse(
            everything,
            f"{name} is a {type(module).__name__} with a forward of its own, which a slice would"
            " replace",
        )
    if (
        "forward" in module.__dict__ and "_hf_hook" not in module.__dict__
    ):  # a device map's is renewed
        return _refuse(
            False,
            f"the forward of {name} has been replaced on the instance, so a slice would never be"
            " called; make slices before whatever replaces it",
        )
    others = [user for user in users[weight] if user != name]
    if others and config.tied_weights == "skip":
        return (
            f"its weight is tied to {', '.join(others)}; untie them, or tied_weights='share' where"
            " all of them are linear layers"
        )
    return None


_QUANTISERS = (
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


def _quantised(module: nn.Module) -> str | None:
    """How the weight of a linear layer is quantised, found without importing any library that does
    it; None if it is not.
    """
    weight = getattr(module, "weight", None)
    for kind in (type(module), type(weight)):
        if (
            kind.__module__.split(".")[0] in _QUANTISERS
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
    whole = f"modules_to_save=[{name!r}] trains it whole"
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
            f" layers inside: {_some(inside)}"
        )
    return (
        "only nn.Linear, nn.MultiheadAttention and Hugging Face's Conv1D become slices. Leave it"
        f" frozen, or {whole}"
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


def _named_parameters(
    model: nn.Module, config: SliceConfig, users: dict[nn.Parameter, list[str]], known: set[str]
) -> list[Target]:
    """Targets of ``target_parameters``; those that target_modules has found already are not
    repeated.
    """
    entries = config.target_parameters or []
    owners = {
        f"{n}.{key}" if n else key: (m, key)
        for n, m in model.named_modules()
        for key in m._parameters
    }
    _check_entries(entries, owners, "target_parameters", "parameters")
    found = [name for name in owners if entries and _named(entries, name) and name not in known]
    return [
        _parameter_target(name, *owners[name], users, config, False)
        for name in found
        if not _excluded(config, name)
    ]


def _parameter_target(
    name: str,
    module: nn.Module,
    key: str,
    users: dict[nn.Parameter, list[str]],
    config: SliceConfig,
    everything: bool,
) -> Target:
    parameter = module._parameters[key]
    assert parameter is not None
    target = lambda skipped: Target(name, module, _rank(config, name), skipped, key)
    if is_linear(module) and key == "weight":
        raise ValueError(
            f"{name} is the weight of a linear layer; name the layer in target_modules instead."
        )
    kind, shape = type(module).__name__, tuple(parameter.shape)
    if is_attention(module) and key in projections(module):
        reason = None
    elif is_experts(module) and parameter.dim() == 3:
        reason = why_not_experts(module, parameter, config.slice_type)
    else:
        reason = (
            f"it is a parameter of shape {shape} of a {kind}; only projections of"
            " nn.MultiheadAttention and weights of experts (experts, out, in) of transformers 5"
            " become slices. modules_to_save trains a module whole"
        )
    if reason is None and not parameter.dtype.is_floating_point:
        reason = f"it is quantised ({parameter.dtype}); load the model unquantised"
    if reason is None and parameter.is_meta:
        reason = "it is on the meta device, without values; load the weights first"
    if reason is None and ("forward" in module.__dict__ or isinstance(module, SlicedModule)):
        reason = (
            "the forward of its module has been replaced on the instance; make slices before"
            " dispatching the model"
        )
    others = [user for user in users[parameter] if f"{user}.{key}" != name]
    if reason is None and others and config.tied_weights == "skip":
        return target(f"its weight is tied to {', '.join(others)}")
    if reason is None and others:
        reason = (
            f"it is tied to {', '.join(others)}, and only linear layers share a slice; use"
            " tied_weights='skip'"
        )
    return target(
        _refuse(everything, f"{name} cannot become a slice: {reason}") if reason else None
    )


def left_out_experts(model: nn.Module, config: SliceConfig) -> list[str]:
    """Suffixes of weights of experts that "all-linear" leaves out: most of a model's weights may be
    there.
    """
    entries = config.target_parameters or []
    if not _means_everything(config):
        return []
    found = {}
    for name, module in model.named_modules():
        if not is_experts(module) or _excluded(config, name):
            continue
        for key, parameter in module._parameters.items():
            full = f"{name}.{key}"
            named = bool(entries and _named(entries, full)) or _excluded(config, full)
            if parameter is not None and parameter.dim() == 3 and not named:
                found[f"{name.rsplit('.', 1)[-1]}.{key}"] = None
    return list(found)


def _refuse(quietly: bool, reason: str) -> str:
    if not quietly:
        raise ValueError(reason + ".")
    return reason


def _users_of_weights(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Parameter -> the modules that hold it; a module object reachable under two names counts once."""
    users: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(parameter, []).append(name)
    return users


def _check_entries(
    entries: list[str] | str,
    names: Iterable[str],
    field: str = "target_modules",
    what: str = "modules",
) -> None:
    names = [name for name in names if name]
    listed = [entries] if isinstance(entries, str) else entries
    unmatched = [
        e
        for e in listed
        if not any(_named(e if isinstance(entries, str) else [e], name) for name in names)
    ]
    if not unmatched:
        return
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in names} | set(names))
    lines = []
    for entry in unmatched:
        near = difflib.get_close_matches(entry, suffixes, n=3, cutoff=0.5)
        lines.append(
            f"  {entry!r}: nothing matches"
            + (f"; nearest names: {', '.join(near)}" if near else "")
        )
    raise ValueError(f"{field} names {what} that the model does not have:\n" + "\n".join(lines))


def _warn_of_unused(config: SliceConfig, names: Iterable[str]) -> None:
    """Entries of exclude_modules and rank_pattern that match no module have no effect: most likely
    a typing error.
    """
    names = list(names)
    exclude = config.exclude_modules or []
    for entry in [exclude] if isinstance(exclude, str) else exclude:
        if not any(
            _named(exclude if isinstance(exclude, str) else [entry], name) for name in names
        ):
            warnings.warn(f"exclude_modules names {entry!r}, which matches no module", stacklevel=4)
    for pattern in config.rank_pattern:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            warnings.warn(f"rank_pattern names {pattern!r}, which matches no module", stacklevel=4)


def _warn_of_idle_ranks(config: SliceConfig, names: Iterable[str], targets: list[str]) -> None:
    """An entry of rank_pattern whose modules are no targets has no effect either."""
    names = list(names)
    for pattern in config.rank_pattern:
        matched = [n for n in names if re.match(rf"(.*\.)?({pattern})$", n)]
        if matched and not any(re.match(rf"(.*\.)?({pattern})$", n) for n in targets):
            warnings.warn(
                f"rank_pattern names {pattern!r}, and {_some(matched)} is no target: it has no"
                " effect",
                stacklevel=4,
            )


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return (
        ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    ) or "none"
