"""What every op asks of its operands before a backend sees them: an address of another type, shape
or device would be a memory fault. The values of indices are checked by the backend that reads them
on the host; on a GPU that would wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slicefine.backends.operands import BLOCK_8BIT, AdamWSlice, AdamWSlice8bit, SliceWrite


def check_operands(
    op: str, grad_output: Tensor, input: Tensor, rows: Tensor | None
) -> None:
    shape, other = grad_output.shape, input.shape
    if len(shape) != 2 or len(other) != 2 or shape[0] != other[0]:
        raise ValueError(
            f"{op}: grad_output has shape {tuple(shape)} and input {tuple(other)}; expected (n,"
            " out) and (n, K) with the same n"
        )
    if grad_output.dtype != input.dtype:
        raise TypeError(
            f"{op}: grad_output is {grad_output.dtype} and input {input.dtype}; expected one dtype"
        )
    if grad_output.device != input.device:
        raise ValueError(
            f"{op}: grad_output is on {grad_output.device}, the input on {input.device}; expected"
            " one device"
        )
    if rows is not None:
        check_index(op, "rows", rows, grad_output.device)


def check_index(op: str, name: str, index: Tensor, device: torch.device) -> None:
    if index.dtype != torch.int64 or index.dim() != 1 or index.device != device:
        raise TypeError(
            f"{op}: {name} is {index.dtype} of shape {tuple(index.shape)} on {index.device};"
            f" expected (features,) int64 on {device}"
        )


def check_slice(
    op: str, s: AdamWSlice | AdamWSlice8bit | SliceWrite, states: tuple[Tensor, ...] = ()
) -> None:
    """states: gradient and moments that have the master's dtype."""
    weight, rows, cols = s.weight, s.rows, s.cols
    if weight.dim() != 2:
        raise ValueError(
            f"{op}: the weight has shape {tuple(weight.shape)}; expected (out, in)"
        )
    shape = (
        weight.shape[0] if rows is None else rows.numel(),
        weight.shape[1] if cols is None else cols.numel(),
    )
    # masters of 16-bit weights are float32: an update below a 16-bit step would vanish otherwise
    expected = torch.float64 if weight.dtype == torch.float64 else torch.float32
    device = weight.device
    if rows is not None:
        check_index(op, "rows", rows, device)
    if cols is not None:
        check_index(op, "cols", cols, device)
    step = None if isinstance(s, SliceWrite) else s.step
    if step is not None and step.numel() != 1:
        raise ValueError(f"{op}: step has shape {tuple(step.shape)}; expected one number")
    # one pass for the good case of every step; which fault it was is found out below
    for t in (s.master, *states):
        if t.shape != shape or t.dtype != expected or t.device != device:
            break
    else:
        if step is None or step.device == device:
            return
    if any(t.shape != shape for t in (s.master, *states)):
        raise ValueError(
            f"{op}: the slice of weight {tuple(weight.shape)} has shape {shape}; got master"
            f" {tuple(s.master.shape)} and gradient or moments {[tuple(t.shape) for t in states]}"
        )
    if odd := [str(t.dtype) for t in (s.master, *states) if t.dtype != expected]:
        raise TypeError(
            f"{op}: master, gradient and moments of a {weight.dtype} weight must be {expected}; got"
            f" {', '.join(odd)}"
        )
    tensors = [t for t in (s.master, *states, rows, cols, step) if t is not None]
    odd = sorted({str(t.device) for t in tensors if t.device != device})
    raise ValueError(
        f"{op}: the weight is on {device}, other tensors of its slice are on {', '.join(odd)}"
    )


def check_slice_8bit(s: AdamWSlice8bit) -> None:
    op = "slice_adamw_8bit"
    check_slice(op, s, (s.grad,))
    # the last block of moments may be short and has a scale all the same
    shape, blocks = s.master.shape, (-(-s.master.numel() // BLOCK_8BIT),)
    codes, scales = (s.exp_avg, s.exp_avg_sq), (s.exp_avg_scale, s.exp_avg_sq_scale)
    wrong = any(x.dtype != torch.uint8 or x.shape != shape for x in codes)
    wrong |= any(x.dtype != torch.float32 or x.shape != blocks for x in scales)
    wrong |= any(x.device != s.weight.device for x in (*codes, *scales))
    if wrong or s.weight.dtype == torch.float64:
        raise ValueError(
            f"{op}: a slice of shape {tuple(shape)} has moments"
            f" {[(str(x.dtype), tuple(x.shape)) for x in codes]} and scales"
            f" {[(str(x.dtype), tuple(x.shape)) for x in scales]} for a {s.weight.dtype} weight on"
            f" {s.weight.device}; expected uint8 of the slice's shape and scales of shape {blocks}"
            " in float32, a float32, bfloat16 or float16 weight, all on one device"
        )


def check_one_device(op: str, tensors: Sequence[Tensor]) -> None:
    if len({t.device for t in tensors}) > 1:
        devices = ", ".join(sorted({str(t.device) for t in tensors}))
        raise ValueError(f"{op}: one call works on one device; got tensors on {devices}")
