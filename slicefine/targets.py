"""Which modules a SliceConfig names: PEFT's matching rules, and what to say when nothing matches.

A list of target_modules matches whole names or suffixes (``name == entry or name.endswith("." + entry)``), a string is a
regular expression for the whole name (``re.fullmatch``), and "all-linear" is every linear layer except the output head.
Checked against peft 0.21 in tests/test_targets.py.
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
from slicefine.linear import SliceLinear

_HEAD_NAMES = ("score", "classifier")  # PEFT's SEQ_CLS_HEAD_NAMES


@dataclass(frozen=True)
class Target:
    """A module that the config names. skipped: why it stays as it is, or None if it becomes a slice."""

    name: str
    module: nn.Module
    r: int
    skipped: str | None = None


def is_linear(module: nn.Module) -> bool:
    """An nn.Linear, or Hugging Face's Conv1D (recognised without importing transformers)."""
    kind = type(module)
    return isinstance(module, nn.Linear) or (kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."))


def find_targets(model: nn.Module, config: SliceConfig) -> list[Target]:
    """The targets of a config in a model, in the model's order.

    Raises ValueError naming every entry that matches nothing, with the nearest module names.
    """
    everything = config.target_modules is None or (
        isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    )
    names = dict(model.named_modules())
    if not everything:
        _check_entries(config, names)
    _warn_of_unused(config, names)
    head = output_head(model)
    users = _users_of_weights(model)
    targets = []
    for name, module in names.items():
        if not name or _excluded(config, name) or not (is_linear(module) if everything else _listed(config, name)):
            continue
        if everything and module is head:
            if name in _HEAD_NAMES:  # a language model's head is pretrained; this one may be new
                reason = (
                    f"'all-linear' leaves out the head; modules_to_save=[{name!r}] trains it whole, as a new head needs"
                )
                targets.append(Target(name, module, config.r, reason))
            continue
        targets.append(Target(name, module, _rank(config, name), _obstacle(module, name, users, config, everything)))
    if not any(target.module is not head for target in targets):
        if is_linear(model):
            raise ValueError(
                f"the model is a single {type(model).__name__}; use SliceLinear.from_linear(model, config) for it"
            )
        raise ValueError(
            f"target_modules={config.target_modules!r} with exclude_modules={config.exclude_modules!r} leaves no layer of "
            f"{type(model).__name__}. Linear layers there: {_some(n for n, m in names.items() if is_linear(m))}"
        )
    return targets


def output_head(model: nn.Module) -> nn.Module | None:
    """What "all-linear" leaves out: the output embedding of a language model, else a module called score or classifier."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head: Any = None
    with contextlib.suppress(NotImplementedError):  # transformers' answer for a model without one
        head = get() if callable(get) else None
    if head is None:
        head = next((m for n in _HEAD_NAMES if (m := getattr(model, n, None)) is not None), None)
    return head


def matches_modules_to_save(config: SliceConfig, name: str) -> bool:
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", name) for entry in config.modules_to_save or ())


def _named(entries: list[str] | str, name: str) -> bool:
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return name in entries or any(name.endswith(f".{entry}") for entry in entries)


def _excluded(config: SliceConfig, name: str) -> bool:
    return bool(config.exclude_modules and _named(config.exclude_modules, name)) or matches_modules_to_save(
        config, name
    )


def _listed(config: SliceConfig, name: str) -> bool:
    entries = config.target_modules
    assert entries is not None
    if not _named(entries, name):
        return False
    layers = config.layers_to_transform
    if isinstance(entries, str) or name in entries or layers is None or layers == []:
        return True
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    regexes = (
        [rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(?P<index>\d+)\."]
    )
    found = next((m for regex in regexes if (m := re.match(regex, name))), None)
    return found is not None and int(found["index"]) in ([layers] if isinstance(layers, int) else layers)


def _rank(config: SliceConfig, name: str) -> int:
    for pattern, r in config.rank_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return r
    return config.r


def _obstacle(
    module: nn.Module, name: str, users: dict[nn.Parameter, list[str]], config: SliceConfig, everything: bool
) -> str | None:
    """Why a named module cannot become a slice; raised unless the config named everything."""
    if isinstance(module, SliceLinear):
        raise ValueError(f"{name} is a SliceLinear already; call merge_and_unload() before get_slice_model()")
    weight = getattr(module, "weight", None)
    if not is_linear(module):
        return _refuse(
            everything, f"{name} is a {type(module).__name__}; only nn.Linear and Hugging Face's Conv1D become slices"
        )
    if not isinstance(weight, nn.Parameter):
        return _refuse(
            False,
            f"the weight of {name} is a {type(weight).__name__} and no parameter of its own (pruned, or parametrised); make it "
            "permanent first, or leave the layer out (exclude_modules)",
        )
    if not weight.dtype.is_floating_point:
        return _refuse(
            False,
            f"{name} is a {type(module).__name__} with a quantised weight ({weight.dtype}); slices "
            "train floating-point weights. Load the model unquantised, or leave the layer out (exclude_modules)",
        )
    if weight.is_meta:
        return _refuse(
            False,
            f"{name} has its weight on the meta device, without values; load the weights first (a device map that offloads keeps them elsewhere: give it more memory)",
        )
    if isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return _refuse(
            everything,
            f"{name} belongs to nn.MultiheadAttention, which reads its weight without calling it, so a slice would never train",
        )
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return _refuse(
            everything, f"{name} is a {type(module).__name__} with a forward of its own, which a slice would replace"
        )
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:  # a device map's is renewed
        return _refuse(
            False,
            f"the forward of {name} has been replaced on the instance, so a slice would never be called; make slices before whatever "
            "replaces it",
        )
    others = [user for user in users[weight] if user != name]
    if others and config.tied_weights == "skip":
        return f"its weight is tied to {', '.join(others)}"
    return None


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


def _check_entries(config: SliceConfig, names: Iterable[str]) -> None:
    names = [name for name in names if name]
    targets = config.target_modules
    entries = [targets] if isinstance(targets, str) else targets or []
    unmatched = [
        e for e in entries if not any(_named(targets if isinstance(targets, str) else [e], name) for name in names)
    ]
    if not unmatched:
        return
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in names} | set(names))
    lines = []
    for entry in unmatched:
        near = difflib.get_close_matches(entry, suffixes, n=3, cutoff=0.5)
        lines.append(f"  {entry!r}: nothing matches" + (f"; nearest names: {', '.join(near)}" if near else ""))
    raise ValueError("target_modules names modules that the model does not have:\n" + "\n".join(lines))


def _warn_of_unused(config: SliceConfig, names: Iterable[str]) -> None:
    """Entries of exclude_modules and rank_pattern that match no module have no effect: most likely a typing error."""
    names = list(names)
    exclude = config.exclude_modules or []
    for entry in [exclude] if isinstance(exclude, str) else exclude:
        if not any(_named(exclude if isinstance(exclude, str) else [entry], name) for name in names):
            warnings.warn(f"exclude_modules names {entry!r}, which matches no module", stacklevel=4)
    for pattern in config.rank_pattern:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            warnings.warn(f"rank_pattern names {pattern!r}, which matches no module", stacklevel=4)


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return (", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")) or "none"
