"""One linear layer, forward, backward and update: the methods of benchmarks/layers.py, and row
and block slices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks import layers
from benchmarks.methods import Method
from benchmarks.speed.registry import Case
from benchmarks.speed.turns import DTYPES, Contestant


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    linear = nn.Linear(case.in_features, case.out_features, bias=False).to(device, dtype)
    x = torch.randn(case.tokens, case.in_features, device=device).to(dtype).requires_grad_()
    dy = torch.randn(case.tokens, case.out_features, device=device).to(dtype)

    def build(method: Method) -> Contestant:
        made = layers.LayerStep(method, linear, case.r)
        call: Callable[[], None] = lambda: made.step(x, dy)
        return Contestant(call, made.prepared.trainable)

    return {method.name: build(method) for method in case.methods}


def check(case: Case, device: str, _: dict[str, Contestant]) -> None:
    """The slice trains as the masked baseline does. Raises AssertionError."""
    layers.agreement(
        (case.in_features, case.out_features),
        case.tokens,
        DTYPES[case.dtype],
        case.r,
        device,
    )
