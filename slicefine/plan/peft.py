"""peft's methods beside slicefine's, for plans and benchmarks."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from slicefine.plan.estimate import Method

_CONFIGS = {
    "LoRA": (peft.LoraConfig, {}),
    "DoRA": (peft.LoraConfig, {"use_dora": True}),
    "LoRA-FA": (peft.LoraConfig, {}),
    "MiSS": (peft.MissConfig, {}),
    "VeRA": (peft.VeraConfig, {}),
    "IA3": (peft.IA3Config, {}),
}


def method(
    name: str, r: int, targets: str | list[str] = "all-linear", float32: bool = True
) -> Method:
    """One of peft's methods with torch.optim.AdamW(fused=True).

    name: LoRA, DoRA, LoRA-FA, MiSS, VeRA or IA3 (SHiRA trains through sparse tensors, whose
        gradients fake tensors do not have). float32: adapters in float32, peft's default; else in
        the model's dtype.
    """
    if name not in _CONFIGS:
        raise ValueError(f"no method {name!r}; expected one of {', '.join(_CONFIGS)}")
    kind, options = _CONFIGS[name]

    def on_meta(model: nn.Module) -> nn.Module:
        dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
        made: Any = peft.get_peft_model(
            model, _config(kind, r, targets, options), autocast_adapter_dtype=float32
        )
        for parameter in made.parameters() if not float32 else ():
            # beside packed weights peft leaves them in float32, and TRL casts them
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        return made

    def prepare(model: Any) -> Optimizer:
        # A stays as it was drawn
        if name == "LoRA-FA":
            for key, parameter in model.named_parameters():
                if "lora_A" in key:
                    parameter.requires_grad_(False)
        return torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], fused=True
        )

    shown = targets if isinstance(targets, str) else ",".join(targets)
    title = f"{name} r={r}" if name != "IA3" else name
    return Method(
        title + ("" if float32 else ", low precision"),
        prepare,
        on_meta=on_meta,
        targets=shown,
        r=r,
    )


def _config(
    kind: Any,
    r: int,
    targets: str | list[str],
    options: dict[str, Any],
) -> Any:
    arguments: dict[str, Any] = {"target_modules": targets, **options}
    if kind is not peft.IA3Config:
        arguments["r"] = r
    if kind is peft.LoraConfig:
        arguments["lora_alpha"] = r
    if kind is peft.IA3Config:
        arguments["feedforward_modules"] = []
    return kind(**arguments)
