"""The ops: their schemas, fakes and checks; a backend that `slicefine.backends.select` chooses runs
them.

The functions here are what the rest of the package calls. Each is registered as
``torch.ops.slicefine.<name>`` too, with flat arguments, so that compilers, modes and profilers see
it. Sizes are those of `slicefine.backends.operands`: N tokens, W of shape [out, in], a slice of R
rows and K columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from slicefine.backends import reference
from slicefine.backends.checks import (
    check_one_device,
    check_operands,
    check_slice,
    check_slice_8bit,
)
from slicefine.backends.operands import AdamWOptions, AdamWSlice, AdamWSlice8bit, SliceWrite
from slicefine.backends.select import backend_for, direct, watched
from slicefine.backends.select import use_backend as use_backend

# The ops


def slice_grad(
    # [N, out]
    grad_output: Tensor,
    # [N, K], already the columns of the slice
    input: Tensor,
    # [R] int64, None for all
    rows: Tensor | None = None,
) -> Tensor:
    """Gradient of a slice of a weight: ``grad_output[:, rows].T @ input``.

    Returns:
        [R, K], float32, or float64 for float64 operands.

    Raises:
        ValueError: Shapes or devices do not agree.
        TypeError: Dtypes do not agree, or the index is no int64 tensor.
    """
    # past the dispatcher where nobody watches; `direct` says what that saves
    module = direct(grad_output, input)
    if module is None:
        return _ops.slice_grad(grad_output, input, rows)
    check_operands("slice_grad", grad_output, input, rows)
    return module.slice_grad(grad_output, input, rows)


def gradient_of_use(grad_output: Tensor, input: Tensor, rows: Tensor | None) -> Tensor:
    """`slice_grad` for operands that autograd has checked: what backward is given has the shape,
    the dtype and the device of what forward has returned.
    """
    module = direct(grad_output, input)
    if module is None:
        return _ops.slice_grad(grad_output, input, rows)
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
    # [2, 256] float32, `slicefine.backends.reference.dynamic_codebook`
    codebook: Tensor,
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
    # [N, out]
    grad_output: Tensor,
    # [N, K], already the columns of the slice
    input: Tensor,
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


def write_slices(slices: Sequence[SliceWrite]) -> None:
    """``weight[rows][:, cols] = cast(master)`` for many slices, to nearest.

    Raises:
        ValueError: Shapes or devices do not agree.
        TypeError: A master has not the dtype that its weight asks for.
    """
    _ops.write_slices(*_columns(slices, SliceWrite))


def take_columns(
    # [..., in]
    input: Tensor,
    # [K] int64
    cols: Tensor,
) -> Tensor:
    """What the gradient of a column slice needs of its input; no op, a helper of the forward pass.

    Returns:
        [N, K], one row per token, a copy.
    """
    few = not is_compiling() and input.dim() == 2 and input.shape[0] <= _FEW_TOKENS
    if few:
        try:
            return input.index_select(1, cols)
        except (IndexError, RuntimeError):
            # the compiled module says which index it is
            pass
    return (direct(input) or reference).take_columns(input, cols)


# Up to so many tokens torch's own operator takes less than the way into the compiled module: 64 to
# 1024 features, r 8 and 16, one thread of an AMD EPYC, 1.0 against 2.3 us at 4 and 2.5 against 3.0
# us at 256 tokens. Both copy, so the values are the same.
_FEW_TOKENS = 256


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a type of device; the meta device has none and must not be asked."""
    return device != "meta" and torch.is_autocast_enabled(device)


# for any type of device, in a tenth of the time
any_autocast = torch._C._is_any_autocast_enabled


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
    return (
        torch.autocast(device, enabled=False) if autocast_enabled(device) else nullcontext()
    )


# Many small slices again and again


class _Prepared:
    """Slices that an op is called for at every step, with what need not be found out again.

    Where the `cpu` backend runs, the slices are checked and their table of addresses is made once,
    and made anew when an address has changed. Elsewhere, and while a compiler, a mode or a profiler
    watches, every call goes through the op.
    """

    def __init__(self, op: str, slices: Sequence[Any], changed: Sequence[str]) -> None:
        """changed: the fields that the op writes to."""
        self.slices = list(slices)
        self._op = op
        fields = [
            [t for t in s._replace(**self._without) if t is not None] for s in self.slices
        ]
        self._tensors = [t for tensors in fields for t in tensors]
        self._addresses: list[int] = []
        self._numbers = array("q")
        self._written = [getattr(s, name) for s in self.slices for name in changed]
        self._dtypes = {s.weight.dtype for s in self.slices}
        ordinary = (Tensor, torch.nn.Parameter)
        # subclasses (DTensor, fake tensors) have no memory of their own that an address could name
        self._plain = all(type(t) in ordinary and t.is_cpu for t in self._tensors)

    # fields that are given with every call
    _without: ClassVar[dict[str, None]] = {}

    def _table(self) -> tuple[Any, array] | None:
        """(module, the table as it is now) where the compiled module may be called straight."""
        # a compiler or profiler must see the op, which a direct call hides
        if not self._plain or watched():
            return None
        module = backend_for("cpu", self._dtypes, self._op)
        if not hasattr(module, "adamw_table"):
            return None
        # .data may give a tensor other memory between two calls; an old address would be wild
        addresses = [t.data_ptr() for t in self._tensors]
        if addresses != self._addresses:
            for s in self.slices:
                self._check(s)
            self._numbers = self._made(module)
            self._addresses = addresses
        return module, self._numbers

    def _check(self, s: Any) -> None:
        raise NotImplementedError

    def _made(self, module: Any) -> array:
        raise NotImplementedError


class PreparedWrites(_Prepared):
    """`write_slices` for slices that are written again and again, after every optimizer step.

    Make it once and call `write` after every step. Make a new one when a tensor has been replaced
    by another, or when ``.data`` of a tensor has been that a view among them was made of; a move
    that rewrites the indices in place and new ``.data`` of the tensors themselves need none.

    Args:
        slices: As for `write_slices`.
    """

    def __init__(self, slices: Sequence[SliceWrite]) -> None:
        super().__init__("write_slices", slices, ("weight",))

    @torch.no_grad()
    def write(self) -> None:
        """Write every master to its weight.

        Raises:
            ValueError, TypeError: As `write_slices`.
            IndexError: An index is out of range; nothing has been written.
        """
        found = self._table() if self.slices else None
        if found is None:
            return write_slices(self.slices)
        module, numbers = found
        module.write_table(numbers)
        # the kernel writes behind autograd's back; a graph that saved the weight must notice
        return increment_version(self._written)

    def _check(self, s: SliceWrite) -> None:
        check_slice(self._op, s)

    def _made(self, module: Any) -> array:
        return module.write_rows(self.slices)


class PreparedAdamW(_Prepared):
    """`slice_adamw` or `slice_adamw_8bit` for slices that are updated at every step.

    Make it once and call `step` at every step with the gradients of that step. Make a new one when
    a tensor of a slice has been replaced by another (other slices, a fresh state after a move), or
    when ``.data`` of a tensor has been that a view among them was made of. A move that rewrites the
    indices in place, new ``.data`` of the tensors themselves and new gradients need none.

    Args:
        slices: As for `slice_adamw`, or all `AdamWSlice8bit`; their ``grad`` is not read.
        codebook: [2, 256], for slices with moments in 8 bits.
    """

    _without: ClassVar[dict[str, None]] = {"grad": None}

    def __init__(
        self,
        slices: Sequence[AdamWSlice] | Sequence[AdamWSlice8bit],
        codebook: Tensor | None = None,
    ) -> None:
        eight = bool(slices) and isinstance(slices[0], AdamWSlice8bit)
        if eight and codebook is None:
            raise ValueError("slices with moments in 8 bits need a codebook; got None")
        scales = ("exp_avg_scale", "exp_avg_sq_scale") if eight else ()
        changed = ("master", "exp_avg", "exp_avg_sq", *scales, "weight")
        super().__init__("slice_adamw_8bit" if eight else "slice_adamw", slices, changed)
        self._codebook = codebook if eight else None
        # the table points at the step counts themselves, so they must be what the kernel reads
        self._plain &= all(s.step.dtype == torch.float32 for s in slices)
        self._sizes = [(s.master.dtype, s.master.numel()) for s in slices]
        self._grads: list[int] = []

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], options: AdamWOptions) -> None:
        """One update of every slice; the caller has counted the step in ``slice.step``.

        Args:
            grads: One for each slice, in order: its R * K values come first and may be followed by
                others that are not read (the unused tail of a parameter that serves two axes).
            options: As for `slice_adamw`.

        Raises:
            ValueError, TypeError: As `slice_adamw`, or not as many gradients as slices.
            IndexError: An index is out of range; nothing has been written.
        """
        if len(grads) != len(self.slices):
            raise ValueError(f"{len(grads)} gradients for {len(self.slices)} slices")
        found = self._table() if self.slices and self._fit(grads) else None
        if found is None:
            return self._through_the_op(grads, options)
        module, numbers = found
        # gradients may be allocated anew at each step, while the rest of the table stays
        addresses = [g.data_ptr() for g in grads]
        if addresses != self._grads:
            module.set_gradients(numbers, addresses)
            self._grads = addresses
        if self._codebook is None:
            module.adamw_of_table(numbers, options)
        else:
            module.adamw_8bit_of_table(numbers, self._codebook, options)
        return increment_version(self._written)

    def _fit(self, grads: Sequence[Tensor]) -> bool:
        """Whether the kernel can read the gradients as they are."""
        return all(
            type(g) is Tensor
            and g.dtype is dtype
            and g.numel() >= count
            and g.is_contiguous()
            for g, (dtype, count) in zip(grads, self._sizes, strict=True)
        )

    def _through_the_op(self, grads: Sequence[Tensor], options: AdamWOptions) -> None:
        parts = [
            g
            if g.shape == s.master.shape
            else g.reshape(-1)[: s.master.numel()].view_as(s.master)
            for g, s in zip(grads, self.slices, strict=True)
        ]
        slices: Any = [s._replace(grad=g) for s, g in zip(self.slices, parts, strict=True)]
        if self._codebook is None:
            return slice_adamw(slices, options)
        return slice_adamw_8bit(slices, self._codebook, options)

    def _check(self, s: AdamWSlice | AdamWSlice8bit) -> None:
        if isinstance(s, AdamWSlice):
            check_slice(self._op, s, (s.exp_avg, s.exp_avg_sq))
        else:
            # the check wants a gradient; the master has the shape and dtype that one must have
            check_slice_8bit(s._replace(grad=s.master))

    def _made(self, module: Any) -> array:
        # the new table has no gradients yet, so the next step must set them
        self._grads = []
        numbers, _ = module.adamw_table([s._replace(grad=None) for s in self.slices])
        return numbers


# What the dispatcher calls, with the flat arguments of the schemas


def _slice_grad(grad_output: Tensor, input: Tensor, rows: Tensor | None = None) -> Tensor:
    check_operands("slice_grad", grad_output, input, rows)
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
        check_slice(op, s, (s.grad, s.exp_avg, s.exp_avg_sq))
    weights = [s.weight for s in slices]
    check_one_device(op, weights)
    if not slices:
        return
    module = backend_for(weights[0].device.type, {w.dtype for w in weights})
    module.slice_adamw(slices, options)
    # autograd cannot see a kernel's writes; a graph that still needs an old weight must notice them
    increment_version(
        [t for s in slices for t in (s.master, s.exp_avg, s.exp_avg_sq, s.weight)]
    )


def _write_slices(*flat: Any) -> None:
    """flat: a list of tensors for each field of SliceWrite."""
    op = "write_slices"
    slices = [SliceWrite(*tensors) for tensors in zip(*flat, strict=True)]
    for s in slices:
        check_slice(op, s)
    weights = [s.weight for s in slices]
    check_one_device(op, weights)
    if slices:
        module = backend_for(weights[0].device.type, {w.dtype for w in weights}, op)
        module.write_slices(slices)
        increment_version(weights)


def _slice_adamw_8bit(*flat: Any) -> None:
    """flat: a list of tensors for each field of AdamWSlice8bit, the codebook before the weights,
    then the options.
    """
    op, width = "slice_adamw_8bit", len(AdamWSlice8bit._fields) + 1
    codebook = flat[6]
    # the codebook stands behind six lists in the schema, between the scales and the weights
    lists = (*flat[:6], *flat[7:width])
    slices = [AdamWSlice8bit(*tensors) for tensors in zip(*lists, strict=True)]
    options = AdamWOptions(*flat[width:])
    for s in slices:
        check_slice_8bit(s)
    weights = [s.weight for s in slices]
    check_one_device(op, [*weights, codebook] if weights else [])
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


def _slice_grad_adamw(
    grad_output: Tensor, input: Tensor, master: Tensor, *flat: Any
) -> None:
    """flat: the fields of AdamWSlice behind the gradient, then the options."""
    op, width = "slice_grad_adamw", len(AdamWSlice._fields) - 2
    active, options = AdamWSlice(master, None, *flat[:width]), AdamWOptions(*flat[width:])
    weight, rows = active.weight, active.rows
    check_operands(op, grad_output, input, rows)
    check_slice(op, active, (active.exp_avg, active.exp_avg_sq))
    # the master agrees with the indices by now; that dY and X agree with it is left to check
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


def _fake_slice_grad(
    grad_output: Tensor, input: Tensor, rows: Tensor | None = None
) -> Tensor:
    # as the op itself returns it: a compiled graph must not differ in dtype from eager
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
    "write_slices": (
        "(Tensor[] masters, Tensor(a!)[] weights, Tensor?[] rows, Tensor?[] cols) -> ()"
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
    ("write_slices", _write_slices, _fake_nothing),
):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"slicefine::{_name}", _fake, lib=_library)

_ops = torch.ops.slicefine
