"""The methods that a comparison trains: what each puts on a model, and the rule for its rate.

Rates are multiplied by `FACTORS`, and a validation split chooses among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from slicefine.config import SliceConfig
from slicefine.model import get_slice_model
from slicefine.training.data import UserError

FACTORS = (0.3, 1.0, 3.0)
# LoRA Without Regret (2025): LoRA's best rate is about ten times that of full fine-tuning
_FULL_RATE = 1e-4
_ADAPTER_RATE = 10 * _FULL_RATE


@dataclass(frozen=True)
class Prepared:
    """A model that a method has been put on.

    Args:
        model: what is trained.
        adapter: whether its file holds an adapter or a delta; else the whole model.
    """

    model: Any
    adapter: bool


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: on the command line.
        rate: its learning rate by rule; 0 where nothing but the head trains.
        put: (model, names of new modules, SliceConfig) -> what is trained.
        language: whether it trains language models too.
        needs: a class of peft's that must be there.
    """

    name: str
    rate: float
    put: Callable[[Any, list[str], SliceConfig], Prepared]
    language: bool = True
    needs: str | None = None


def _slice(model: Any, heads: list[str], config: SliceConfig) -> Prepared:
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *heads}) or None
    return Prepared(get_slice_model(model, config), True)


def _full(model: Any, heads: list[str], config: SliceConfig) -> Prepared:
    model.requires_grad_(True)
    return Prepared(model, False)


def _frozen(model: Any, heads: list[str], config: SliceConfig) -> Prepared:
    model.requires_grad_(False)
    for name in heads:
        model.get_submodule(name).requires_grad_(True)
    return Prepared(model, False)


def _peft(kind: str, **options: Any) -> Callable[[Any, list[str], SliceConfig], Prepared]:
    def put(model: Any, heads: list[str], config: SliceConfig) -> Prepared:
        import peft

        settings = {"target_modules": _targets(model, heads), **options}
        made = getattr(peft, kind)(modules_to_save=heads or None, **settings)
        return Prepared(peft.get_peft_model(model, made), True)

    return put


def _targets(model: nn.Module, heads: list[str]) -> str:
    """The layers that slices take by default, as a regular expression for whole names."""
    import re

    from slicefine.targets import find_targets

    config = SliceConfig(modules_to_save=heads or None)
    names = [
        t.name for t in find_targets(model, config) if not t.skipped and t.parameter is None
    ]
    return "|".join(re.escape(name) for name in names)


def _ia3(model: Any, heads: list[str], config: SliceConfig) -> Prepared:
    import peft

    targets = _targets(model, heads)
    made = peft.IA3Config(
        target_modules=targets, feedforward_modules=[], modules_to_save=heads or None
    )
    return Prepared(peft.get_peft_model(model, made), True)


def _prompt(model: Any, heads: list[str], config: SliceConfig) -> Prepared:
    import peft

    made = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20)
    return Prepared(peft.get_peft_model(model, made), True)


_R8 = {"r": 8, "lora_alpha": 16}
METHODS = {
    method.name: method
    for method in (
        Method("slice", _ADAPTER_RATE, _slice),
        Method("lora", _ADAPTER_RATE, _peft("LoraConfig", **_R8), needs="LoraConfig"),
        Method(
            "dora",
            _ADAPTER_RATE,
            _peft("LoraConfig", use_dora=True, **_R8),
            needs="LoraConfig",
        ),
        Method("miss", _ADAPTER_RATE, _peft("MissConfig", r=8), needs="MissConfig"),
        Method("paca", _ADAPTER_RATE, _peft("PacaConfig", r=16), needs="PacaConfig"),
        Method(
            "shira",
            _ADAPTER_RATE,
            _peft("ShiraConfig", r=8, random_seed=0),
            needs="ShiraConfig",
        ),
        Method("ia3", 5 * _ADAPTER_RATE, _ia3, needs="IA3Config"),
        Method(
            "prompt",
            30 * _ADAPTER_RATE,
            _prompt,
            language=False,
            needs="PromptTuningConfig",
        ),
        Method("full", _FULL_RATE, _full),
        Method("frozen", 0.0, _frozen, language=False),
    )
}


def chosen(names: list[str], task: str) -> list[Method]:
    """The methods of these names.

    Raises:
        UserError: a name that is none, one that stands twice, or none that can run here; with why.
    """
    if "adapter" in names:
        raise UserError(
            "--methods adapter: peft has no bottleneck adapter; leave it out (`ia3` and `lora` are"
            " the nearest)"
        )
    if unknown := [name for name in names if name not in METHODS]:
        raise UserError(f"--methods {unknown[0]}: expected some of {', '.join(METHODS)}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--methods: {twice[0]} stands twice")
    if len(names) < 2:
        raise UserError("--methods: give two or more to compare")
    for name in names:
        if reason := unavailable(METHODS[name], task):
            raise UserError(f"--methods {name}: {reason}")
    return [METHODS[name] for name in names]


def unavailable(method: Method, task: str) -> str | None:
    """Why a method cannot run here, or None."""
    if task == "causal-lm" and not method.language:
        return "it is for classification only; leave it out"
    if method.needs is None:
        return None
    try:
        import peft
    except ImportError:
        return "it is a method of peft, which is not installed: pip install peft"
    if not hasattr(peft, method.needs):
        return f"peft {peft.__version__} has no {method.needs}; install a newer one"
    return None
