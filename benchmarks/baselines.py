"""The methods that slicefine is compared with, written the way one would write them without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


class MaskedGradient:
    """The masked-gradient baseline: full weights, full dW, a mask on it, dense Adam; the slice
    moves by moving the mask.

    names: linear layers to train. features: (name, move) -> (rows, cols) of the slice after that
        many moves, None for all.
    interval: optimizer steps between moves (None: never); dense moments are reset at a move. Build
        the optimizer from
    ``parameters()`` with weight_decay=0 (dense decay would reach the frozen entries) and call
    ``mask()`` after backward and
    ``after_step(optimizer)`` after the step.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        features: Callable[[str, int], tuple[Tensor | None, Tensor | None]],
        interval: int | None,
        also: tuple[str, ...] = (),
    ) -> None:
        self.weights = {name: model.get_submodule(name).weight for name in names}
        self.features, self.interval, self.steps, self.moves = features, interval, 0, 0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(name.startswith(prefix) for prefix in also))
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.others = [
            p
            for n, p in model.named_parameters()
            if p.requires_grad and not any(p is w for w in self.weights.values())
        ]
        self._set_masks()

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.weights.values()
        yield from self.others

    def _set_masks(self) -> None:
        self.masks = {}
        for name, weight in self.weights.items():
            rows, cols = self.features(name, self.moves)
            mask = torch.zeros_like(weight, dtype=torch.bool)
            mask[
                (slice(None) if rows is None else rows.unsqueeze(1)),
                (slice(None) if cols is None else cols),
            ] = True
            self.masks[name] = mask

    @torch.no_grad()
    def mask(self) -> None:
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.mul_(self.masks[name])

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        if self.interval is not None and self.steps % self.interval == 0:
            self.moves += 1
            self._set_masks()
            for weight in self.weights.values():
                optimizer.state.pop(weight, None)
