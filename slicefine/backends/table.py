"""How tensors become the numbers that the compiled modules take: every column named once.

csrc/table.h has the same columns; `mismatch` compares the two when a module is loaded, and the
modules check the length of every row and table that they are given.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slicefine.backends.operands import BLOCK_8BIT, AdamWSlice, AdamWSlice8bit

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class GradientRow(NamedTuple):
    """The operands of one gradient: addresses, strides and sizes in elements."""

    grad_output: int
    stride_grad_output: int
    out_features: int
    input: int
    stride_input: int
    n: int
    rows: int
    R: int
    K: int
    dtype: int
    allow_tf32: int


class SliceRow(NamedTuple):
    """One slice; an address of 0 is a tensor that is not there, or every row or column."""

    weight: int
    out_features: int
    in_features: int
    stride_row: int
    stride_col: int
    dtype: int
    rows: int
    cols: int
    R: int
    K: int
    master: int
    grad: int
    exp_avg: int
    exp_avg_sq: int
    exp_avg_scale: int
    exp_avg_sq_scale: int
    step: int


def mismatch(module: Any) -> str | None:
    """Why a compiled module is not one of this package's sources, or None if it is."""
    expected = {
        "SliceRow": SliceRow._fields,
        "GradientRow": GradientRow._fields,
        "dtypes": {str(dtype).removeprefix("torch."): i for dtype, i in DTYPES.items()},
        "BLOCK_8BIT": BLOCK_8BIT,
    }
    if getattr(module, "layout", None) == expected:
        return None
    return (
        f"{module.__name__} at {module.__file__} was built from other sources than this package;"
        " build it again (pip install --force-reinstall --no-deps .)"
    )


def gradient_row(
    grad_output: Tensor,  # [N, out]
    input: Tensor,  # [N, K]
    rows: Tensor | None,  # [R]
    allow_tf32: bool = False,
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor]]:
    """A `GradientRow`, and the tensors that must outlive the call."""
    (n, out_features), (_, K) = grad_output.shape, input.shape
    stride_grad_output, apart = grad_output.stride()
    # the stride between features says nothing where there is only one of them
    if apart != 1 and out_features > 1:
        grad_output = grad_output.contiguous()
        stride_grad_output = grad_output.stride(0)
    stride_input, apart = input.stride()
    if apart != 1 and K > 1:
        input = input.contiguous()
        stride_input = input.stride(0)
    # a plain tuple in the order of GradientRow: this runs in every backward of a layer
    row = (
        grad_output.data_ptr(),
        stride_grad_output,
        out_features,
        input.data_ptr(),
        stride_input,
        n,
        0 if rows is None else index_address(rows),
        out_features if rows is None else rows.shape[0],
        K,
        DTYPES[grad_output.dtype],
        allow_tf32,
    )
    return row, (grad_output, input)


def slice_row(
    weight: Tensor,  # [out, in]
    rows: Tensor | None,  # [R]
    cols: Tensor | None,  # [K]
    master: Tensor,  # [R, K]
    rest: tuple[int, ...] = (0, 0, 0, 0, 0, 0),
) -> tuple[int, ...]:
    """A `SliceRow`. rest: its columns from ``grad`` on."""
    R, K = master.shape
    out_features, in_features = weight.shape
    stride_row, stride_col = weight.stride()
    # a plain tuple in the order of SliceRow: hundreds of slices are written down at every step
    return (
        weight.data_ptr(),
        out_features,
        in_features,
        stride_row,
        stride_col,
        DTYPES[weight.dtype],
        0 if rows is None else index_address(rows),
        0 if cols is None else index_address(cols),
        R,
        K,
        master.data_ptr(),
        *rest,
    )


def adamw_row(
    s: AdamWSlice | AdamWSlice8bit, grad: Tensor | None, step: Tensor
) -> tuple[int, ...]:
    """The row of an update. grad: contiguous, of the master's dtype. step: float32."""
    master, m, v = s.master, s.exp_avg, s.exp_avg_sq
    # tested without a loop first: this runs for every slice at every step
    if not (master.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
        check_contiguous(master=master, exp_avg=m, exp_avg_sq=v)
    scales = (0, 0)
    if isinstance(s, AdamWSlice8bit):
        check_contiguous(exp_avg_scale=s.exp_avg_scale, exp_avg_sq_scale=s.exp_avg_sq_scale)
        scales = (s.exp_avg_scale.data_ptr(), s.exp_avg_sq_scale.data_ptr())
    address = 0 if grad is None else grad.data_ptr()
    rest = (address, m.data_ptr(), v.data_ptr(), *scales, step.data_ptr())
    return slice_row(s.weight, s.rows, s.cols, master, rest)


def table(rows: Iterable[tuple[int, ...]]) -> array:
    """Rows one after the other, as the modules read many slices."""
    # one buffer of int64, which the module reads without a Python object per number
    return array("q", [number for row in rows for number in row])


def check_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}; expected"
                " contiguous"
            )


def index_address(index: Tensor | None) -> int:
    if index is None:
        return 0
    if not index.is_contiguous():
        raise ValueError(
            f"an index has strides {index.stride()}; expected a contiguous int64 tensor"
        )
    return index.data_ptr()
