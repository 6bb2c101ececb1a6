"""The methods that a comparison knows: what trains, its own rule for the rate, what it costs later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slicefine.config import SliceConfig
from slicefine.model import get_slice_model
from slicefine.optim import SliceAdamW
from slicefine.plan.estimate import Method
from slicefine.training.data import UserError
from slicefine.training.recipe import Recipe

# Full fine-tuning's rate; LoRA's rule is ten times that.
FULL_LR = 1e-4
RANK = 8


@dataclass(frozen=True)
class Way:
    """One method.

    lr: by its own rule, before the factors of the search. options: of peft's configuration, or of
    SliceConfig. overhead: of its inference. missing: why it cannot be run.
    """

    name: str
    kind: str
    lr: float
    options: dict[str, Any]
    overhead: str
    missing: str = ""

    @property
    def slices(self) -> bool:
        return self.kind == "slices"

    def apply(self, model: nn.Module, whole: Sequence[str], task: str, seed: int) -> Any:
        """Put the method on a model, in place; the modules of ``whole`` train beside it."""
        if self.slices:
            config = self.slice_config(seed)
            # else the default, which finds heads by itself
            if whole:
                config.modules_to_save = sorted({*(config.modules_to_save or ()), *whole})
            return get_slice_model(model, config)
        heads = [model.get_submodule(name) for name in whole]
        model.requires_grad_(self.kind == "full")
        if self.kind not in ("full", "frozen"):
            model = _peft_model(self, model, task)
        for head in heads:
            head.requires_grad_(True)
        return model

    def slice_config(self, seed: int) -> SliceConfig:
        return SliceConfig(**{**self.options, "seed": seed})

    def planned(self, task: str) -> Method:
        """For the planner: the method alone, without the head that all have."""

        def prepare(model: nn.Module) -> Any:
            if self.slices:
                config = self.slice_config(0)
                config.modules_to_save = []
                get_slice_model(model, config)
                return SliceAdamW([p for p in model.parameters() if p.requires_grad])
            trained = [p for p in model.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, fused=True) if trained else None

        def on_meta(model: nn.Module) -> Any:
            return model if self.slices else self.apply(model, (), task, 0)

        return Method(self.name, prepare, on_meta=on_meta)


def _peft_model(way: Way, model: Any, task: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(f"{way.name} needs peft: pip install 'slicefine[compare]'") from (
            error
        )
    options = dict(way.options)
    if way.kind == "PromptTuningConfig":
        options["task_type"] = "CAUSAL_LM" if task == "causal-lm" else "SEQ_CLS"
    else:
        options["target_modules"] = "all-linear" if task == "causal-lm" else _body(model)
    return peft.get_peft_model(model, getattr(peft, way.kind)(**options))


def _body(model: nn.Module) -> list[str]:
    """The linear layers below the head: what peft's all-linear would be without a task type."""
    heads = ("classifier", "score")
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.partition(".")[0] not in heads
    ]


def _ways() -> dict[str, Way]:
    lora, merged = 10 * FULL_LR, "none once merged"
    slices = Recipe().lr
    rank = {"r": RANK}
    static = {"r": 16, "switch_interval": None}
    entries = (
        Way("slice", "slices", slices, {}, "none"),
        Way("paca", "slices", slices, static, "none"),
        Way("lora", "LoraConfig", lora, {**rank, "lora_alpha": 2 * RANK}, merged),
        Way(
            "dora",
            "LoraConfig",
            lora,
            {**rank, "lora_alpha": 2 * RANK, "use_dora": True},
            merged,
        ),
        Way("miss", "MissConfig", lora, rank, merged),
        Way("shira", "ShiraConfig", lora, rank, merged),
        # its vectors multiply and start at one
        Way("ia3", "IA3Config", 10 * lora, {"feedforward_modules": []}, merged),
        Way(
            "prompt",
            "PromptTuningConfig",
            30 * lora,
            {"num_virtual_tokens": 20},
            "20 more tokens in every input",
        ),
        Way(
            "adapter",
            "",
            lora,
            {},
            "two small layers in every block",
            "peft has no bottleneck adapters",
        ),
        Way("full", "full", FULL_LR, {}, "none"),
        Way("frozen", "frozen", Recipe().head_lr, {}, "none"),
    )
    return {way.name: way for way in entries}


WAYS = _ways()


def chosen(names: str) -> list[Way]:
    """The methods of a list with commas. Raises UserError for a name that is none."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in WAYS:
            raise UserError(f"--methods {name}: expected some of {', '.join(WAYS)}")
    if len(set(wanted)) < 2 or len(set(wanted)) < len(wanted):
        raise UserError(f"--methods {names}: expected two or more, each of them once")
    return [WAYS[name] for name in wanted]


def optimizer_of(model: nn.Module, heads: Sequence[nn.Parameter], recipe: Recipe) -> Any:
    """AdamW for what is no slice: heads at ``head_lr`` as beside slices, all else at ``lr``."""
    known = {id(p) for p in heads}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in known], "lr": recipe.lr},
        {"params": [p for p in trained if id(p) in known], "lr": recipe.head_lr},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
