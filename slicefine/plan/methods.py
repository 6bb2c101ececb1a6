"""The ways to train that a plan compares: slices, the whole model, a mask on dense gradients, and
nothing.

peft's methods are in `slicefine.plan.peft`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from slicefine.config import SliceConfig
from slicefine.model import get_slice_model
from slicefine.optim import SliceAdamW
from slicefine.plan.estimate import Method
from slicefine.slices import SliceType
from slicefine.targets import find_targets


def floor() -> Method:
    """Nothing trains; gradients reach the output of the embeddings. No method that keeps W dense
    can need less.
    """

    def prepare(model: nn.Module) -> None:
        model.requires_grad_(False)

    return Method("frozen baseline", prepare, targets="-")


def slices(
    r: int,
    slice_type: SliceType = "column",
    in_bwd: bool = False,
    targets: str | list[str] = "all-linear",
) -> Method:
    """slicefine with SliceAdamW."""

    def prepare(model: nn.Module) -> Optimizer:
        # of the slices alone: next to them a head that trains is small, and torch's step for a
        # fully trained module reads values, which planning does not have
        config = SliceConfig(
            r=r, slice_type=slice_type, target_modules=targets, modules_to_save=[]
        )
        get_slice_model(model, config)
        return SliceAdamW(model.parameters(), optimizer_in_bwd=in_bwd)

    name = f"slice {slice_type} r={r}" + (", optimizer_in_bwd" if in_bwd else "")
    return Method(name, prepare, targets=target_name(targets), r=r)


def full() -> Method:
    """Full fine-tuning in the model's dtype, torch.optim.AdamW(fused=True)."""
    return Method(
        "full",
        lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        targets="everything",
    )


def masked(r: int, targets: str | list[str] = "all-linear") -> Method:
    """The masked-gradient baseline: dense gradients of the targets, a mask of columns on them,
    dense AdamW.

    The mask is a vector over the columns, a few KiB: the leanest way to write it.
    """
    masks: list[tuple[Any, Tensor]] = []

    def prepare(model: nn.Module) -> Optimizer:
        found = find_targets(model, SliceConfig(r=r, target_modules=targets))
        model.requires_grad_(False)
        # by identity: a tied weight is updated, and counted, once
        weights: list[Any] = list(
            {id(t.module.weight): t.module.weight for t in found if not t.skipped}.values()
        )
        for weight in weights:
            weight.requires_grad_(True)
        # in place: after_backward holds this very list
        masks[:] = [(w, torch.zeros(w.shape[1], dtype=torch.bool)) for w in weights]
        return torch.optim.AdamW(weights, fused=True)

    def after_backward(model: nn.Module) -> None:
        for weight, mask in masks:
            weight.grad.mul_(mask)

    return Method(
        f"masked r={r}", prepare, after_backward, targets=target_name(targets), r=r
    )


def target_name(targets: str | list[str]) -> str:
    """How a row names its targets."""
    return targets if isinstance(targets, str) else ",".join(targets)
