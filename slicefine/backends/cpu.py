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

_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
}  # csrc/numeric.h, DType


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


def slice_grad(grad_output: Tensor, input: Tensor, rows: Tensor | None = None) -> Tensor:
    """See `slicefine.backends.reference.slice_grad`."""
    arguments, keep = _grad_inputs(grad_output, input, rows)
    out = grad_output.new_empty(arguments[6:8], dtype=accumulation_dtype(grad_output.dtype))
    _C.slice_grad(arguments, out.data_ptr(), torch.get_num_threads())
    del keep
    return out


def slice_adamw(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weights: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    seed: int | None,
) -> None:
    """See `slicefine.backends.reference.slice_adamw`."""
    # one array of numbers for the whole call: a hundred small tuples would take as long to convert
    # as the update itself
    table: list[int] = []
    keep = []
    for p, g, m, v, w, r, c, step in zip(
        masters, grads, exp_avgs, exp_avg_sqs, weights, rows, cols, steps, strict=True
    ):
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
            0 if r is None else _index(r),
            0 if c is None else _index(c),
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
    options = (lr, beta1, beta2, eps, weight_decay, maximize, seed is not None, seed or 0)
    _C.slice_adamw(numbers.buffer_info()[0], len(masters), options, torch.get_num_threads())
    del keep


def slice_adamw_8bit(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    codebook: Tensor,
    weights: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    seed: int | None,
) -> None:
    """See `slicefine.backends.reference.slice_adamw_8bit`."""
    grads = [g.to(p.dtype).contiguous() for g, p in zip(grads, masters, strict=True)]
    slices = [_slice(*args) for args in zip(weights, masters, rows, cols, strict=True)]
    states = []
    for p, m, v, ms, vs, g, step in zip(
        masters, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, grads, steps, strict=True
    ):
        _check_contiguous(master=p, exp_avg=m, exp_avg_sq=v, exp_avg_scale=ms, exp_avg_sq_scale=vs)
        states.append((*(t.data_ptr() for t in (p, m, v, ms, vs, g)), float(step)))
    options = (lr, beta1, beta2, eps, weight_decay, maximize, seed is not None, seed or 0)
    _C.slice_adamw_8bit(
        slices, states, codebook.contiguous().data_ptr(), options, torch.get_num_threads()
    )


def slice_grad_adamw(
    grad_output: Tensor,
    input: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    seed: int | None,
) -> None:
    """See `slicefine.backends.reference.slice_grad_adamw`; the gradient stays in registers."""
    if accumulation_dtype(grad_output.dtype) != master.dtype:
        raise TypeError(
            f"slice_grad_adamw: grad_output is {grad_output.dtype}, which accumulates in"
            f" {accumulation_dtype(grad_output.dtype)}, but the master is {master.dtype}; expected"
            " them to agree"
        )
    arguments, keep = _grad_inputs(grad_output, input, rows)
    options = (lr, beta1, beta2, eps, weight_decay, maximize, seed is not None, seed or 0)
    state = _moments(master, exp_avg, exp_avg_sq, step, None)
    _C.slice_grad_adamw(
        arguments, _slice(weight, master, rows, cols), state, options, torch.get_num_threads()
    )
    del keep


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


def _moments(
    master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, grad: Tensor | None
) -> tuple:
    _check_contiguous(master=master, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    return (
        master.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        float(step),
    )


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
