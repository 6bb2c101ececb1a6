"""What the ops of the optimizer take: the tensors of one slice, and the options of one step.

Every backend has the same signatures. Sizes: N tokens, W of shape [out, in], a slice of R rows and
K columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

# Moments in 8 bits that share a scale
BLOCK_8BIT = 256


@dataclass(frozen=True)
class AdamWOptions:
    """The options of one AdamW step, the same for every slice of a call.

    Args:
        lr: Learning rate.
        beta1: Decay of the first moment, from 0 to below 1.
        beta2: Decay of the second moment, from 0 to below 1.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled decay of the master; 0 for none.
        maximize: Ascend instead of descend.
        seed: Round to bfloat16 stochastically, with these random bits; None rounds to nearest.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False
    seed: int | None = None


class AdamWSlice(NamedTuple):
    """The tensors that AdamW reads and writes for one slice of a weight.

    master, grad and moments are float32, or float64 where the weight is float64. ``rows`` and
    ``cols`` say which features the slice holds; None stands for all. ``step`` is the number of this
    update, counted from 1. ``grad`` is None for the op that computes it.
    """

    master: Tensor  # [R, K]
    grad: Tensor | None  # [R, K]
    exp_avg: Tensor  # [R, K]
    exp_avg_sq: Tensor  # [R, K]
    weight: Tensor  # [out, in]
    rows: Tensor | None  # [R] int64
    cols: Tensor | None  # [K] int64
    step: Tensor  # []


class AdamWSlice8bit(NamedTuple):
    """`AdamWSlice` with moments in 8 bits: codes, and one float32 scale per BLOCK_8BIT of them."""

    master: Tensor  # [R, K]
    grad: Tensor  # [R, K]
    exp_avg: Tensor  # [R, K] uint8
    exp_avg_sq: Tensor  # [R, K] uint8
    exp_avg_scale: Tensor  # [ceil(R * K / BLOCK_8BIT)]
    exp_avg_sq_scale: Tensor  # [ceil(R * K / BLOCK_8BIT)]
    weight: Tensor  # [out, in]
    rows: Tensor | None  # [R] int64
    cols: Tensor | None  # [K] int64
    step: Tensor  # []


class SliceWrite(NamedTuple):
    """A slice and the values that its weight is to hold."""

    master: Tensor  # [R, K] float32, or float64 where the weight is float64
    weight: Tensor  # [out, in]
    rows: Tensor | None  # [R] int64
    cols: Tensor | None  # [K] int64
