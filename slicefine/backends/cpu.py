"""The `cpu` backend: the one place that imports the compiled module, and that turns tensors into
addresses for it.

The module knows nothing of torch, so a build serves every torch release. If it is missing, the
reason is kept in
``unavailable`` and the package works without it.
"""

from __future__ import annotations

import importlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slicefine.backends.operands import AdamWOptions, AdamWSlice, AdamWSlice8bit
from slicefine.backends.reference import accumulation_dtype

unavailable: str | None = None
try:
    _C: Any = importlib.import_module("slicefine._C")
except ImportError as error:
    _C = None
    unavailable = (
        f"the compiled module slicefine._C does not import ({error}); install a C++17 compiler and"
        " reinstall slicefine (pip install --force-reinstall --no-deps .)"
    )

# csrc/numeric.h, DType
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def take_columns(input: Tensor, cols: Tensor) -> Tensor:
    """See `slicefine.backends.reference.take_columns`."""
    width, K = input.shape[-1], cols.shape[0]
    if input.is_contiguous():
        n, stride = input.numel() // width, width
    else:
        input = input.reshape(-1, width)
        input = input if input.stride(1) == 1 or width == 1 else input.contiguous()
        n, stride = input.shape[0], input.stride(0)
    out = input.new_empty((n, K))
    _C.take_columns(
        input.data_ptr(),
        stride,
        _index(cols),
        n,
        K,
        _DTYPES[input.dtype],
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
    arguments, keep = _grad_inputs(grad_output, input, rows)
    height = grad_output.shape[1] if rows is None else rows.shape[0]
    dtype = accumulation_dtype(grad_output.dtype)
    out = grad_output.new_empty((height, input.shape[1]), dtype=dtype)
    _C.slice_grad(arguments, out.data_ptr(), torch.get_num_threads())
    del keep
    return out


def slice_adamw(slices: Sequence[AdamWSlice], options: AdamWOptions) -> None:
    """See `slicefine.backends.reference.slice_adamw`."""
    # one array of numbers for the whole call: a hundred small tuples would take as long to convert
    # as the update itself
    table: list[int] = []
    keep = []
    for p, g, m, v, w, r, c, step in slices:
        assert g is not None
        if g.dtype != p.dtype or not g.is_contiguous():
            g = g.to(p.dtype).contiguous()
            keep.append(g)
        if step.dtype != torch.float32:
            step = step.float()
            keep.append(step)
        if not (p.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
            _check_contiguous(master=p, exp_avg=m, exp_avg_sq=v)
        stride_row, stride_col = w.stride()
        R, K = p.shape
        table += (
            w.data_ptr(),
            stride_row,
            stride_col,
            _index(r),
            _index(c),
            R,
            K,
            _DTYPES[w.dtype],
            p.data_ptr(),
            m.data_ptr(),
            v.data_ptr(),
            g.data_ptr(),
            step.data_ptr(),
        )
    numbers = array("q", table)
    address, _ = numbers.buffer_info()
    _C.slice_adamw(address, len(slices), _numbers(options), torch.get_num_threads())
    del keep


def slice_adamw_8bit(
    slices: Sequence[AdamWSlice8bit],
    codebook: Tensor,  # [2, 256]
    options: AdamWOptions,
) -> None:
    """See `slicefine.backends.reference.slice_adamw_8bit`."""
    grads = [s.grad.to(s.master.dtype).contiguous() for s in slices]
    places = [_slice(s.weight, s.master, s.rows, s.cols) for s in slices]
    states = []
    for s, grad in zip(slices, grads, strict=True):
        tensors = (s.master, s.exp_avg, s.exp_avg_sq, s.exp_avg_scale, s.exp_avg_sq_scale)
        _check_contiguous(**dict(zip(_STATE_8BIT, tensors, strict=True)))
        states.append((*(t.data_ptr() for t in (*tensors, grad)), float(s.step)))
    book = codebook.contiguous()
    _C.slice_adamw_8bit(places, states, book.data_ptr(), _numbers(options), torch.get_num_threads())


_STATE_8BIT = ("master", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")


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
    arguments, keep = _grad_inputs(grad_output, input, active.rows)
    place = _slice(active.weight, active.master, active.rows, active.cols)
    state = _moments(active)
    _C.slice_grad_adamw(arguments, place, state, _numbers(options), torch.get_num_threads())
    del keep


def _numbers(options: AdamWOptions) -> tuple:
    """The options as csrc/bindings.cpp takes them."""
    o = options
    decays = (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay)
    return (*decays, o.maximize, o.seed is not None, o.seed or 0)


def _grad_inputs(grad_output: Tensor, input: Tensor, rows: Tensor | None) -> tuple[tuple, tuple]:
    """The kernel's view of the operands, and the tensors that must outlive the call."""
    (n, out), K = grad_output.shape, input.shape[1]
    if grad_output.stride(1) != 1 and out > 1:
        grad_output = grad_output.contiguous()
    if input.stride(1) != 1 and K > 1:
        input = input.contiguous()
    arguments = (
        grad_output.data_ptr(),
        grad_output.stride(0),
        input.data_ptr(),
        input.stride(0),
        n,
        0 if rows is None else _index(rows),
        out if rows is None else rows.numel(),
        K,
        _DTYPES[grad_output.dtype],
    )
    return arguments, (grad_output, input)


def _slice(weight: Tensor, master: Tensor, rows: Tensor | None, cols: Tensor | None) -> tuple:
    return (
        weight.data_ptr(),
        weight.stride(0),
        weight.stride(1),
        _index(rows),
        _index(cols),
        master.shape[0],
        master.shape[1],
        _DTYPES[weight.dtype],
    )


def _moments(s: AdamWSlice) -> tuple:
    _check_contiguous(master=s.master, exp_avg=s.exp_avg, exp_avg_sq=s.exp_avg_sq)
    addresses = (s.master.data_ptr(), s.exp_avg.data_ptr(), s.exp_avg_sq.data_ptr())
    return (*addresses, 0, float(s.step))


def _check_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}; expected"
                " contiguous"
            )


def _index(index: Tensor | None) -> int:
    if index is None:
        return 0
    if not index.is_contiguous():
        raise ValueError(
            f"an index has strides {index.stride()}; expected a contiguous int64 tensor"
        )
    return index.data_ptr()
