"""The ops: their schemas, fakes and checks; a backend that `slicefine.backends.select` chooses runs
them.

The functions here are what the rest of the package calls. Each is registered as
``torch.ops.slicefine.<name>`` too, with flat arguments, so that compilers, modes and profilers see
it. Sizes are those of `slicefine.backends.operands`: N tokens, W of shape [out, in], a slice of R
rows and K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from slicefine.backends import reference
from slicefine.backends.operands import BLOCK_8BIT, AdamWOptions, AdamWSlice, AdamWSlice8bit
from slicefine.backends.select import backend_for, direct
from slicefine.backends.select import use_backend as use_backend

# The ops


def slice_grad(
    grad_output: Tensor,  # [N, out]
    input: Tensor,  # [N, K], already the columns of the slice
    rows: Tensor | None = None,  # [R] int64, None for all
) -> Tensor:
    """Gradient of a slice of a weight: ``grad_output[:, rows].T @ input``.

    Returns:
        [R, K], float32, or float64 for float64 operands.

    Raises:
        ValueError: Shapes or devices do not agree.
        TypeError: Dtypes do not agree, or the index is no int64 tensor.
    """
    module = direct(grad_output)
    if module is None:
        return _ops.slice_grad(grad_output, input, rows)
    _check_operands("slice_grad", grad_output, input, rows)
    return module.slice_grad(grad_output, input, rows)


def slice_adamw(slices: Sequence[AdamWSlice], options: AdamWOptions) -> None:
    """AdamW on the masters of many slices, in place, each written through to its weight.

    Raises:
        ValueError: Shapes or devices do not agree.
        TypeError: A dtype is not the one that the weight asks for.
    """
    _ops.slice_adamw(*_columns(slices, AdamWSlice), *_flat(options))


def slice_adamw_8bit(
    slices: Sequence[AdamWSlice8bit],
    codebook: Tensor,  # [2, 256] float32, `slicefine.backends.reference.dynamic_codebook`
    options: AdamWOptions,
) -> None:
    """`slice_adamw` with both moments in 8 bits.

    Raises:
        ValueError: Shapes, devices, or the dtypes of moments and scales do not agree.
        TypeError: A dtype is not the one that the weight asks for.
    """
    columns = _columns(slices, AdamWSlice8bit)
    _ops.slice_adamw_8bit(*columns[:6], codebook, *columns[6:], *_flat(options))


def slice_grad_adamw(
    grad_output: Tensor,  # [N, out]
    input: Tensor,  # [N, K], already the columns of the slice
    active: AdamWSlice,
    options: AdamWOptions,
) -> None:
    """`slice_grad` and `slice_adamw` of one slice in one; no buffer holds the gradient.

    Raises:
        ValueError: Shapes or devices do not agree.
        TypeError: Dtypes do not agree.
    """
    master, _, *rest = active
    _ops.slice_grad_adamw(grad_output, input, master, *rest, *_flat(options))


def take_columns(
    input: Tensor,  # [..., in]
    cols: Tensor,  # [K] int64
) -> Tensor:
    """What the gradient of a column slice needs of its input; no op, a helper of the forward pass.

    Returns:
        [N, K], one row per token, a copy.
    """
    return (direct(input) or reference).take_columns(input, cols)


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a type of device; the meta device has none and must not be asked."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _columns(slices: Sequence[Any], kind: Any) -> list[list[Any]]:
    """The fields of the slices as the flat schemas take them: a list of tensors for each."""
    if not slices:
        return [[] for _ in kind._fields]
    return [list(column) for column in zip(*slices, strict=True)]


def _flat(o: AdamWOptions) -> tuple[Any, ...]:
    """The options as the flat schemas take them; `dataclasses.astuple` copies and is slow."""
    return o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.maximize, o.seed


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """A backward inside autocast still accumulates in float32."""
    return torch.autocast(device, enabled=False) if autocast_enabled(device) else nullcontext()


# Checks


def _check_operands(op: str, grad_output: Tensor, input: Tensor, rows: Tensor | None) -> None:
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
        _check_index(op, "rows", rows, grad_output.device)


def _check_index(op: str, name: str, index: Tensor, device: torch.device) -> None:
    if index.dtype != torch.int64 or index.dim() != 1 or index.device != device:
        raise TypeError(
            f"{op}: {name} is {index.dtype} of shape {tuple(index.shape)} on {index.device};"
            f" expected (features,) int64 on {device}"
        )


def _check_slice(op: str, s: AdamWSlice | AdamWSlice8bit, states: tuple[Tensor, ...]) -> None:
    """states: gradient and moments that have the master's dtype."""
    weight, rows, cols = s.weight, s.rows, s.cols
    shape = (
        weight.shape[0] if rows is None else rows.numel(),
        weight.shape[1] if cols is None else cols.numel(),
    )
    expected = torch.float64 if weight.dtype == torch.float64 else torch.float32
    device = weight.device
    for name, index in (("rows", rows), ("cols", cols)):
        if index is not None and (index.dtype != torch.int64 or index.device != device):
            _check_index(op, name, index, device)
    for t in (s.master, *states):
        if t.shape != shape or t.dtype != expected or t.device != device:
            break
    else:
        if s.step.device == device:
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
    tensors = [t for t in (s.master, *states, rows, cols, s.step) if t is not None]
    odd = sorted({str(t.device) for t in tensors if t.device != device})
    raise ValueError(
        f"{op}: the weight is on {device}, other tensors of its slice are on {', '.join(odd)}"
    )


def _check_slice_8bit(s: AdamWSlice8bit) -> None:
    op = "slice_adamw_8bit"
    _check_slice(op, s, (s.grad,))
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


def _check_one_device(op: str, tensors: Sequence[Tensor]) -> None:
    if len({t.device for t in tensors}) > 1:
        devices = ", ".join(sorted({str(t.device) for t in tensors}))
        raise ValueError(f"{op}: one call works on one device; got tensors on {devices}")


# What the dispatcher calls, with the flat arguments of the schemas


def _slice_grad(grad_output: Tensor, input: Tensor, rows: Tensor | None = None) -> Tensor:
    _check_operands("slice_grad", grad_output, input, rows)
    device = grad_output.device.type
    run = backend_for(device, {grad_output.dtype}).slice_grad
    if not autocast_enabled(device):
        return run(grad_output, input, rows)
    with _without_autocast(device):
        return run(grad_output, input, rows)


def _slice_adamw(*flat: Any) -> None:
    """flat: a list of tensors for each field of AdamWSlice, then the options."""
    op, width = "slice_adamw", len(AdamWSlice._fields)
    slices = [AdamWSlice(*tensors) for tensors in zip(*flat[:width], strict=True)]
    options = AdamWOptions(*flat[width:])
    for s in slices:
        assert s.grad is not None
        _check_slice(op, s, (s.grad, s.exp_avg, s.exp_avg_sq))
    weights = [s.weight for s in slices]
    _check_one_device(op, weights)
    if not slices:
        return
    module = backend_for(weights[0].device.type, {w.dtype for w in weights})
    module.slice_adamw(slices, options)
    # autograd cannot see a kernel's writes; a graph that still needs an old weight must notice them
    increment_version([t for s in slices for t in (s.master, s.exp_avg, s.exp_avg_sq, s.weight)])


def _slice_adamw_8bit(*flat: Any) -> None:
    """flat: a list of tensors for each field of AdamWSlice8bit, the codebook before the weights,
    then the options.
    """
    op, width = "slice_adamw_8bit", len(AdamWSlice8bit._fields) + 1
    codebook = flat[6]
    lists = (*flat[:6], *flat[7:width])
    slices = [AdamWSlice8bit(*tensors) for tensors in zip(*lists, strict=True)]
    options = AdamWOptions(*flat[width:])
    for s in slices:
        _check_slice_8bit(s)
    weights = [s.weight for s in slices]
    _check_one_device(op, [*weights, codebook] if weights else [])
    if codebook.dtype != torch.float32 or codebook.shape != (2, 256):
        raise ValueError(
            f"{op}: codebook is {codebook.dtype} of shape {tuple(codebook.shape)}; expected float32"
            " (2, 256)"
        )
    if not slices:
        return
    module = backend_for(weights[0].device.type, {w.dtype for w in weights}, op)
    module.slice_adamw_8bit(slices, codebook, options)
    # all but the gradient and the indices are written to
    written = [t for s in slices for t in (s.master, *s[2:7])]
    increment_version(written)


def _slice_grad_adamw(grad_output: Tensor, input: Tensor, master: Tensor, *flat: Any) -> None:
    """flat: the fields of AdamWSlice behind the gradient, then the options."""
    op, width = "slice_grad_adamw", len(AdamWSlice._fields) - 2
    active, options = AdamWSlice(master, None, *flat[:width]), AdamWOptions(*flat[width:])
    weight, rows = active.weight, active.rows
    _check_operands(op, grad_output, input, rows)
    _check_slice(op, active, (active.exp_avg, active.exp_avg_sq))
    found = (grad_output.shape[1] if rows is None else rows.numel(), input.shape[1])
    if found != master.shape or weight.device != input.device:
        raise ValueError(
            f"{op}: grad_output {tuple(grad_output.shape)} and input {tuple(input.shape)} on"
            f" {input.device} make a gradient of shape {found}; the slice has shape"
            f" {tuple(master.shape)} on {weight.device} (input: only the columns of the slice)"
        )
    device = grad_output.device.type
    module = backend_for(device, {grad_output.dtype, weight.dtype})
    with _without_autocast(device):
        module.slice_grad_adamw(grad_output, input, active, options)
    increment_version((master, active.exp_avg, active.exp_avg_sq, weight))


def _fake_slice_grad(grad_output: Tensor, input: Tensor, rows: Tensor | None = None) -> Tensor:
    dtype = reference.accumulation_dtype(grad_output.dtype)
    height = grad_output.shape[1] if rows is None else rows.shape[0]
    return grad_output.new_empty((height, input.shape[1]), dtype=dtype)


def _fake_nothing(*args: Any, **kwargs: Any) -> None:
    return None


# Schemas

_OPTIONS = (
    "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize=False, int?"
    " seed=None"
)
_SCHEMAS = {
    "slice_grad": "(Tensor grad_output, Tensor input, Tensor? rows=None) -> Tensor",
    "slice_adamw": (
        "(Tensor(a!)[] masters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
        f" Tensor(d!)[] weights, Tensor?[] rows, Tensor?[] cols, Tensor[] steps, {_OPTIONS}) -> ()"
    ),
    "slice_adamw_8bit": (
        "(Tensor(a!)[] masters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
        " Tensor(d!)[] exp_avg_scales, Tensor(e!)[] exp_avg_sq_scales, Tensor codebook,"
        f" Tensor(f!)[] weights, Tensor?[] rows, Tensor?[] cols, Tensor[] steps, {_OPTIONS}) -> ()"
    ),
    "slice_grad_adamw": (
        "(Tensor grad_output, Tensor input, Tensor(a!) master, Tensor(b!) exp_avg,"
        " Tensor(c!) exp_avg_sq, Tensor(d!) weight, Tensor? rows, Tensor? cols, Tensor step,"
        f" {_OPTIONS}) -> ()"
    ),
}
_library = torch.library.Library("slicefine", "DEF")
# CompositeExplicitAutograd is the catch-all of devices; the function asks the tensors where they
# are.
for _name, _function, _fake in (
    ("slice_grad", _slice_grad, _fake_slice_grad),
    ("slice_adamw", _slice_adamw, _fake_nothing),
    ("slice_adamw_8bit", _slice_adamw_8bit, _fake_nothing),
    ("slice_grad_adamw", _slice_grad_adamw, _fake_nothing),
):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"slicefine::{_name}", _fake, lib=_library)

_ops = torch.ops.slicefine
