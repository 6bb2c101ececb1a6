"""Launch configurations: pure functions of shape, element size and target, so that a test can list and compile them all.

The figures come from ahead-of-time compilation (registers and spills, `tests/test_kernels_aot.py`); none has been timed on
a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GradConfig:
    """Tiles of `slice_grad` and `slice_grad_adamw`: BLOCK_T tokens by BLOCK_R output by BLOCK_K input features."""

    BLOCK_R: int
    BLOCK_K: int
    BLOCK_T: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AdamWConfig:
    """Elements per program of `slice_adamw`."""

    BLOCK: int
    num_warps: int


def _tile(features: int, largest: int) -> int:
    """Smallest power of two that holds the features, between 16 (the least `tl.dot` takes) and the largest."""
    return min(largest, max(16, 1 << (features - 1).bit_length())) if features > 0 else 16


def grad_config(R: int, K: int, element_size: int) -> GradConfig:
    """R output by K input features; element_size: bytes of dY's and X's type."""
    wide_k = K > R
    block_r = _tile(R, 32 if wide_k else 64)
    block_k = _tile(K, 64 if wide_k else 32)
    return GradConfig(block_r, block_k, BLOCK_T=64 if element_size <= 2 else 32, num_warps=4, num_stages=3)


def token_splits(tokens: int, tiles: int, processors: int, block_t: int) -> int:
    """How many programs share the tokens of one tile: enough to fill the device, each with at least four blocks of tokens."""
    wanted = -(-2 * processors // max(tiles, 1))
    return max(1, min(wanted, tokens // (4 * block_t), 64))


def adamw_config() -> AdamWConfig:
    return AdamWConfig(BLOCK=1024, num_warps=4)
