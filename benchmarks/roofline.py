"""Bytes and operations that an op cannot do without: the formulas of kernels/README.md, for shares
of a measured bandwidth.

n tokens, a slice of R rows and K columns, e bytes per element of dY, X and W; masters, moments and
gradients are float32.
"""

from __future__ import annotations

OPS = ("slice_grad", "slice_adamw", "slice_adamw_8bit", "slice_grad_adamw", "write_slices")


def op_bytes(op: str, n: int, R: int, K: int, e: int) -> float:
    """Each operand read once, each result written once."""
    if op == "slice_grad":
        return e * n * (R + K) + 4 * R * K
    if op == "slice_adamw":
        return R * K * (28 + e)
    if op == "slice_adamw_8bit":
        return R * K * (16 + e + 1 / 16)
    if op == "slice_grad_adamw":
        return e * n * (R + K) + R * K * (24 + e)
    if op == "write_slices":
        return R * K * (4 + e)
    raise ValueError(f"no op {op!r}; expected one of {', '.join(OPS)}")


def op_flops(op: str, n: int, R: int, K: int) -> int:
    """A multiplication and an addition count as two; AdamW as 14 per entry."""
    if op == "slice_grad":
        return 2 * n * R * K
    if op == "slice_adamw":
        return 14 * R * K
    if op == "slice_adamw_8bit":
        return 36 * R * K
    if op == "slice_grad_adamw":
        return 2 * n * R * K + 14 * R * K
    if op == "write_slices":
        return 0
    raise ValueError(f"no op {op!r}; expected one of {', '.join(OPS)}")
