"""The `cpu` backend: the one place that imports the compiled module slicefine._C.

The module knows nothing of torch, so a build serves every torch release. If it is missing, the
reason is kept in ``unavailable`` and the package works without it.
"""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slicefine.backends import lean_reference
from slicefine.backends.operands import AdamWOptions, AdamWSlice, AdamWSlice8bit, SliceWrite
from slicefine.backends.reference import accumulation_dtype
from slicefine.backends.table import (
    DTYPES,
    SliceRow,
    adamw_row,
    check_contiguous,
    gradient_row,
    index_address,
    mismatch,
    slice_row,
    table,
)

unavailable: str | None = None
try:
    _C: Any = importlib.import_module("slicefine._C")
    unavailable = mismatch(_C)
except ImportError as error:
    _C = None
    unavailable = (
        f"the compiled module slicefine._C does not import ({error}); install a C++17 compiler and"
        " reinstall slicefine (pip install --force-reinstall --no-deps .)"
    )


def take_columns(
    input: Tensor,  # [..., in]
    cols: Tensor,  # [K] int64
) -> Tensor:  # [N, K]
    """See `slicefine.backends.reference.take_columns`."""
    width, K = input.shape[-1], cols.shape[0]
    # the common case needs no reshape, which would be an op of its own
    if input.is_contiguous() and width:
        n, stride = input.numel() // width, width
    else:
        input = input.reshape(-1, width) if width else input.new_empty((0, 1))
        # the module takes one stride, from token to token; features must lie side by side
        input = input if input.stride(1) == 1 or width == 1 else input.contiguous()
        n, stride = input.shape[0], input.stride(0)
    out = input.new_empty((n, K))
    _C.take_columns(
        input.data_ptr(),
        stride,
        width,
        index_address(cols),
        n,
        K,
        DTYPES[input.dtype],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def slice_grad(
    grad_output: Tensor,  # [N, out]
    input: Tensor,  # [N, K]
    rows: Tensor | None = None,  # [R] int64
) -> Tensor:  # [R, K]
    """See `slicefine.backends.reference.slice_grad`."""
    # _keep: the row holds addresses only, and a copy must live until the call returns
    row, _keep = gradient_row(grad_output, input, rows)
    dtype = accumulation_dtype(grad_output.dtype)
    # row[7], row[8]: R and K
    if dtype is grad_output.dtype:
        # a keyword costs as much as the rest of the call
        out = grad_output.new_empty((row[7], row[8]))
    else:
        out = grad_output.new_empty((row[7], row[8]), dtype=dtype)
    _C.slice_grad(row, out.data_ptr(), torch.get_num_threads())
    return out


def slice_adamw(slices: Sequence[AdamWSlice], options: AdamWOptions) -> None:
    """See `slicefine.backends.reference.slice_adamw`."""
    numbers, _keep = adamw_table(slices)
    adamw_of_table(numbers, options)


def slice_adamw_8bit(
    slices: Sequence[AdamWSlice8bit],
    codebook: Tensor,  # [2, 256]
    options: AdamWOptions,
) -> None:
    """See `slicefine.backends.reference.slice_adamw_8bit`."""
    numbers, _keep = adamw_table(slices)
    adamw_8bit_of_table(numbers, codebook, options)


def slice_grad_adamw(
    grad_output: Tensor,  # [N, out]
    input: Tensor,  # [N, K]
    active: AdamWSlice,
    options: AdamWOptions,
) -> None:
    """See `slicefine.backends.reference.slice_grad_adamw`; the gradient stays in registers."""
    if accumulation_dtype(grad_output.dtype) != active.master.dtype:
        raise TypeError(
            f"slice_grad_adamw: grad_output is {grad_output.dtype}, which accumulates in"
            f" {accumulation_dtype(grad_output.dtype)}, but the master is {active.master.dtype};"
            " expected them to agree"
        )
    gradient, _keep = gradient_row(grad_output, input, active.rows)
    # kept in a variable: the row holds its address
    step = active.step.float()
    place = adamw_row(active, None, step)
    _C.slice_grad_adamw(gradient, place, options, torch.get_num_threads())


def write_slices(slices: Sequence[SliceWrite]) -> None:
    """See `slicefine.backends.reference.write_slices`."""
    write_table(write_rows(slices))


# What a lean model keeps less for


def rms_norm(
    x: Tensor,  # [..., d]
    weight: Tensor,  # [d]
    eps: float,
    offset: float,
    late_cast: bool,
    internal: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [..., d], [..., 1]
    """See `slicefine.backends.lean_reference.rms_norm`; one pass over x."""
    # names keep the copies alive until the call returns
    flat, scale = _rows(x), weight.contiguous()
    y = x.new_empty(x.shape)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=internal)
    _C.rms_norm(
        _norm_numbers(flat, scale, internal),
        eps,
        offset,
        late_cast,
        y.data_ptr(),
        rstd.data_ptr(),
        torch.get_num_threads(),
    )
    return y, rstd


def rms_norm_backward(
    grad: Tensor,  # [..., d]
    x: Tensor,  # [..., d]
    rstd: Tensor,  # [..., 1]
    weight: Tensor,  # [d]
    offset: float,
) -> Tensor:  # [..., d]
    """See `slicefine.backends.lean_reference.rms_norm_backward`."""
    scale, rstd = weight.contiguous(), rstd.contiguous()
    flat, above = _rows(x), _rows(grad)
    out = x.new_empty(x.shape)
    _C.rms_norm_backward(
        _norm_numbers(flat, scale, rstd.dtype),
        offset,
        above.data_ptr(),
        above.stride(0),
        rstd.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """See `slicefine.backends.lean_reference.gated_activation`; gate, up (..., m)."""
    # torch has a vectorized erf, which the C library has not
    if kind not in _GATES:
        return lean_reference.gated_activation(gate, up, kind)
    held = _rows(gate), _rows(up)
    out = gate.new_empty(gate.shape)
    _C.gated_activation(
        _gate_numbers(*held, None, kind), out.data_ptr(), torch.get_num_threads()
    )
    return out


def gated_activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """See `slicefine.backends.lean_reference.gated_activation_backward`."""
    if kind not in _GATES:
        return lean_reference.gated_activation_backward(grad, gate, up, kind)
    held = _rows(gate), _rows(up), _rows(grad)
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _C.gated_activation_backward(
        _gate_numbers(*held, kind),
        grad_gate.data_ptr(),
        grad_up.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_gate, grad_up


# csrc/ops.h numbers them alike
_GATES = {"silu": 0, "gelu_tanh": 1}


def _rows(x: Tensor) -> Tensor:
    """(n, d) with the features of a token side by side; a copy only where they are not."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _norm_numbers(flat: Tensor, weight: Tensor, internal: torch.dtype) -> tuple[int, ...]:
    n, d = flat.shape
    dtypes = DTYPES[flat.dtype], DTYPES[internal]
    return flat.data_ptr(), flat.stride(0), weight.data_ptr(), n, d, *dtypes


def _gate_numbers(
    gate: Tensor, up: Tensor, grad: Tensor | None, kind: str
) -> tuple[int, ...]:
    above = (0, 0) if grad is None else (grad.data_ptr(), grad.stride(0))
    places = gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), *above
    return *places, *gate.shape, DTYPES[gate.dtype], _GATES[kind]


# Tables that the caller may keep: `slicefine.ops.PreparedSlices`


def adamw_table(
    slices: Sequence[AdamWSlice] | Sequence[AdamWSlice8bit],
) -> tuple[array, list[Tensor]]:
    """The table of an update, and copies that must outlive it: gradients that are not contiguous or
    of another dtype, step counts that are not float32.
    """
    rows, keep = [], []
    for s in slices:
        grad, step = s.grad, s.step
        # the loops read contiguous gradients of the master's dtype and nothing else
        if grad is not None and (grad.dtype != s.master.dtype or not grad.is_contiguous()):
            grad = grad.to(s.master.dtype).contiguous()
            keep.append(grad)
        if step.dtype != torch.float32:
            step = step.float()
            keep.append(step)
        rows.append(adamw_row(s, grad, step))
    return table(rows), keep


def write_rows(slices: Sequence[SliceWrite]) -> array:
    for s in slices:
        check_contiguous(master=s.master)
    return table(slice_row(s.weight, s.rows, s.cols, s.master) for s in slices)


def set_gradients(numbers: array, addresses: list[int]) -> None:
    """Point the table of an update at other gradients, contiguous and of the masters' dtype."""
    # one strided assignment in place of a Python loop over hundreds of slices
    numbers[_GRAD :: len(SliceRow._fields)] = array("q", addresses)


_GRAD = SliceRow._fields.index("grad")


def adamw_of_table(numbers: array, options: AdamWOptions) -> None:
    _C.slice_adamw(numbers, options, torch.get_num_threads())


def adamw_8bit_of_table(numbers: array, codebook: Tensor, options: AdamWOptions) -> None:
    # a name keeps the copy alive during the call
    book = codebook.contiguous()
    _C.slice_adamw_8bit(numbers, book.data_ptr(), options, torch.get_num_threads())


def write_table(numbers: array) -> None:
    _C.write_slices(numbers, torch.get_num_threads())


if _C is not None and not hasattr(_C, "rms_norm"):
    # a build from before these ops: where they are asked for, the next backend runs
    del rms_norm, rms_norm_backward, gated_activation, gated_activation_backward
