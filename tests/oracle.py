"""The oracle: an ordinary model, the full gradient, a mask, dense Adam. Nothing here imports
slicefine.

It knows what a slice is only by the index sets that a test hands it, and keeps Adam's moments for
every entry of every weight, so the three policies are three ways to treat dense moments at a move:
zero them, carry them from the old slice to the new one, or put them away by slice and take them out
again when the slice comes back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Features = tuple[Tensor | None, Tensor | None]


def mask_of(weight: Tensor, features: Features) -> Tensor:
    rows, cols = features
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    row_mask = (
        torch.ones(weight.shape[0], dtype=torch.bool)
        if rows is None
        else torch.zeros(weight.shape[0], dtype=torch.bool).index_fill(0, rows, True)
    )
    col_mask = (
        torch.ones(weight.shape[1], dtype=torch.bool)
        if cols is None
        else torch.zeros(weight.shape[1], dtype=torch.bool).index_fill(0, cols, True)
    )
    mask |= row_mask[:, None] & col_mask[None, :]
    return mask


class DenseOracle:
    """Trains the weights of ``layers`` (name -> nn.Linear) by masked dense AdamW.

    features(name, move) -> the slice after so many moves.
    """

    def __init__(
        self,
        layers: dict[str, nn.Linear],
        features: Callable[[str, int], Features],
        interval: int | None,
        policy: str = "reset",
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.weights = {name: layer.weight for name, layer in layers.items()}
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.features, self.interval, self.policy = features, interval, policy
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        # the precise copy of the active slice that low-precision weights lose; equal to the weight
        # elsewhere
        precise = (
            torch.float64
            if next(iter(self.weights.values())).dtype == torch.float64
            else torch.float32
        )
        self.master = {name: w.detach().to(precise) for name, w in self.weights.items()}
        self.m = {name: torch.zeros_like(w) for name, w in self.master.items()}
        self.v = {name: torch.zeros_like(w) for name, w in self.master.items()}
        self.t = {
            name: torch.zeros_like(w) for name, w in self.master.items()
        }  # updates seen, entry by entry
        self.put_away: dict[tuple[str, str, str], Tensor] = {}
        self.steps = self.moves = 0

    @torch.no_grad()
    def step(self) -> None:
        b1, b2 = self.betas
        for name, weight in self.weights.items():
            mask = mask_of(weight, self.features(name, self.moves))
            grad = torch.where(mask, weight.grad.to(self.master[name].dtype), 0.0)
            m, v, t, p = self.m[name], self.v[name], self.t[name], self.master[name]
            m.copy_(torch.where(mask, b1 * m + (1 - b1) * grad, m))
            v.copy_(torch.where(mask, b2 * v + (1 - b2) * grad * grad, v))
            t.copy_(torch.where(mask, t + 1, t))
            m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
            new = p * (1 - self.lr * self.weight_decay) - self.lr * m_hat / (
                v_hat.sqrt() + self.eps
            )
            p.copy_(torch.where(mask, new, p))
            weight.copy_(torch.where(mask, p.to(weight.dtype), weight))
            weight.grad = None
        self.steps += 1
        if self.interval is not None and self.steps % self.interval == 0:
            self._move()

    def _move(self) -> None:
        for name, weight in self.weights.items():
            before, after = (
                self.features(name, self.moves),
                self.features(name, self.moves + 1),
            )
            if str(before) == str(after):
                continue  # a slice that stays keeps everything
            if self.policy == "keep":
                for dense in (self.m[name], self.v[name], self.t[name]):
                    carried = _take(dense, before)
                    dense.zero_()
                    _put(dense, after, carried)
            else:
                for kind, dense in (
                    ("m", self.m[name]),
                    ("v", self.v[name]),
                    ("t", self.t[name]),
                ):
                    if self.policy == "remember":
                        self.put_away[name, kind, str(before)] = _take(dense, before)
                    dense.zero_()
                    if (name, kind, str(after)) in self.put_away:
                        _put(dense, after, self.put_away.pop((name, kind, str(after))))
            # a slice that becomes active starts from what the weight holds
            self.master[name].copy_(weight.detach())
        self.moves += 1


def _grid(dense: Tensor, features: Features) -> tuple[Tensor, Tensor]:
    rows = torch.arange(dense.shape[0]) if features[0] is None else features[0]
    cols = torch.arange(dense.shape[1]) if features[1] is None else features[1]
    return rows[:, None], cols[None, :]


def _take(dense: Tensor, features: Features) -> Tensor:
    return dense[_grid(dense, features)].clone()


def _put(dense: Tensor, features: Features, values: Tensor) -> None:
    dense[_grid(dense, features)] = values
