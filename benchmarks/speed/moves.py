"""What moves cost: SliceAdamW.step() alone, over as many steps as the longest interval has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.methods import Method
from benchmarks.speed.registry import MOVES_STEPS, Case
from benchmarks.speed.turns import DTYPES, Contestant
from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.model import slice_layers

# (in, out), of one layer of the encoder
SHAPES = ((384, 384),) * 4 + ((384, 1536), (1536, 384))


class Stepper:
    """The encoder's linear layers with a gradient that stays; ``run()`` makes MOVES_STEPS optimizer
    steps.
    """

    def __init__(self, case: Case, method: Method, device: str) -> None:
        torch.manual_seed(0)
        linears = (
            nn.Linear(i, o, bias=False) for _ in range(case.depth) for i, o in SHAPES
        )
        self.interval = None if method.kind == "static" else int(method.name.split()[-1])
        # in a row, so that what has not been visited can be looked at as one part
        config = SliceConfig(
            r=case.r,
            contiguous=True,
            switch_interval=self.interval,
            target_modules=r"\d+",
        )
        self.model: Any = get_slice_model(
            nn.Sequential(*linears).to(device, DTYPES[case.dtype]), config
        )
        self.optimizer = SliceAdamW(self.model.parameters(), lr=1e-4)
        for layer in slice_layers(self.model):
            layer.slice_weight.grad = torch.randn_like(layer.slice_weight)
        self.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def run(self) -> None:
        for _ in range(MOVES_STEPS):
            self.optimizer.step()


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    made = {}
    for method in case.methods:
        stepper = Stepper(case, method, device)
        made[method.name] = Contestant(stepper.run, stepper.trainable, repeats=MOVES_STEPS)
    return made


def check(case: Case, device: str, made: dict[str, Contestant]) -> None:
    """As many moves as the interval says, and what has not been visited is untouched. Raises
    AssertionError.
    """
    for name, contestant in made.items():
        stepper: Stepper = contestant.step.__self__  # type: ignore[attr-defined]
        before = [layer.weight.clone() for layer in slice_layers(stepper.model)]
        stepper.run()
        for layer, weight in zip(slice_layers(stepper.model), before, strict=True):
            expected = MOVES_STEPS // stepper.interval if stepper.interval else 0
            assert layer.schedule.moves == expected, (
                f"{name}: {layer.schedule.moves} moves, not {expected}"
            )
            seen = case.r * (1 + expected)
            assert torch.equal(layer.weight[:, seen:], weight[:, seen:]), (
                f"{name} wrote outside its slices"
            )
