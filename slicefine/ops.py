"""The ops: schemas, fakes, and the choice of a backend.

`torch.ops.slicefine.slice_grad`, `.slice_adamw`, `.slice_adamw_8bit` and `.slice_grad_adamw` are
what the rest of the package calls. PyTorch's
dispatcher finds the device; on it the first backend runs that is available and takes the dtype:

    cpu:    cpu, reference          cuda:   triton, cuda, reference          any other device:
        reference

``SLICEFINE_BACKEND=name`` (read at the first op) or ``with use_backend("name")`` forces one, for
the whole process (autograd runs the backward of
a CUDA graph on a thread of its own); what is forced and cannot run raises an error, it never falls
back.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from slicefine.backends import reference
from slicefine.backends.reference import BLOCK_8BIT

_log = logging.getLogger("slicefine")
_ALL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """Where the code of a backend is, and what it takes.

    load: () -> (module with the three ops, None), or (None, why it is missing).
    """

    name: str
    devices: Callable[[], tuple[str, ...]]  # empty: every device
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[], tuple[ModuleType | None, str | None]]

    def refusal(self, device: str, dtypes: set[torch.dtype], op: str | None = None) -> str | None:
        """Why this backend cannot run there, or None if it can."""
        module, reason = self.load()
        if module is None:
            return reason
        devices = self.devices()
        if devices and device not in devices:
            return f"it runs on {' and '.join(devices)}, not on {device}"
        if odd := sorted(str(d) for d in dtypes if d not in self.dtypes):
            return f"it takes {', '.join(map(str, self.dtypes))}, not {', '.join(odd)}"
        if op is not None and not hasattr(module, op):
            return f"it has no {op}"
        return None


def _load_reference() -> tuple[ModuleType | None, str | None]:
    return importlib.import_module("slicefine.backends.reference"), None


def _load_native() -> tuple[ModuleType | None, str | None]:
    native = sys.modules.get("slicefine.backends.cpu") or importlib.import_module(
        "slicefine.backends.cpu"
    )
    return (native, None) if native.unavailable is None else (None, native.unavailable)


@functools.cache
def _load_triton() -> tuple[ModuleType | None, str | None]:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return (
            None,
            (
                f"triton does not import ({error}); it comes with torch's CUDA and ROCm wheels on"
                " Linux, or: pip install triton"
            ),
        )
    if os.environ.get("TRITON_INTERPRET") != "1" and (reason := _no_compiler_for_triton()):
        return None, reason
    return importlib.import_module("slicefine_kernels"), None


def _no_compiler_for_triton() -> str | None:
    """Triton 3.6 to 3.8 compiles its launcher with the host's C compiler at run time; it looks for
    one like this.
    """
    if os.environ.get("CC") is not None or shutil.which("gcc") or shutil.which("clang"):
        return None
    if importlib.import_module("triton").knobs.build.impl is not None:
        return None
    return (
        "triton needs a C compiler when it runs, and there is no gcc or clang on PATH (or name one"
        " by CC)"
    )


def _load_cuda() -> tuple[ModuleType | None, str | None]:
    native = importlib.import_module("slicefine.backends.cuda")
    reason = native.unavailable or native.refuses_a_device()
    return (native, None) if reason is None else (None, reason)


def _triton_devices() -> tuple[str, ...]:
    # Triton's interpreter runs the kernels on CPU tensors; it is chosen when Triton is imported.
    return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", lambda: (), _ALL_DTYPES, _load_reference),
        Backend("cpu", lambda: ("cpu",), _ALL_DTYPES, _load_native),
        Backend("triton", _triton_devices, _GPU_DTYPES, _load_triton),
        Backend("cuda", lambda: ("cuda",), _GPU_DTYPES, _load_cuda),
    )
}
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
_forced: str | None = None


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force every op onto one backend (None: choose freely again) until the block ends."""
    global _forced
    if name is not None:
        _known(name, "use_backend")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _known(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: no backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


def _forced_name() -> str | None:
    if _forced is not None:
        return _forced
    name = _environments_name()
    return _known(name, "SLICEFINE_BACKEND") if name else None


@functools.cache
def _environments_name() -> str | None:
    """Read once, at the first op: a look into os.environ takes as long as a small slice's update."""
    return os.environ.get("SLICEFINE_BACKEND")


@functools.cache
def _tell_once(device: str, name: str, skipped: tuple[tuple[str, str], ...]) -> None:
    why = "; ".join(f"{other}: {reason}" for other, reason in skipped)
    _log.info(
        "slicefine runs on backend %r for device %r%s", name, device, f" ({why})" if why else ""
    )


def select(device: str, dtypes: set[torch.dtype], op: str | None = None) -> ModuleType:
    """The module whose ops run for tensors of these dtypes on this device; op: one that not every
    backend has.
    """
    forced = _forced_name()
    key = (forced, device, frozenset(dtypes), op)
    backend, module = _chosen.get(key, (None, None))
    if (
        backend is None
        or module is None
        or BACKENDS[backend.name] is not backend
        or backend.load()[0] is not module
    ):
        first, backend, module = _choose(forced, device, dtypes, op)
        if first:
            _chosen[key] = backend, module
            if forced is None and backend.name == "cpu" and len(dtypes) == 1:
                _compiled[next(iter(dtypes))] = module
    return module


# the first choices made before: every backward asks, and finding out takes longer than a small
# slice's gradient
_chosen: dict[
    tuple[str | None, str, frozenset[torch.dtype], str | None], tuple[Backend, ModuleType]
] = {}


def _choose(
    forced: str | None, device: str, dtypes: set[torch.dtype], op: str | None
) -> tuple[bool, Backend, ModuleType]:
    """(whether nothing had to be skipped, backend, its module)."""
    candidates = (forced,) if forced else _PREFERENCE.get(device, ("reference",))
    skipped = []
    for name in candidates:
        reason = BACKENDS[name].refusal(device, dtypes, op)
        if reason is None:
            _tell_once(device, name, tuple(skipped))
            module, _ = BACKENDS[name].load()
            assert module is not None
            return not skipped, BACKENDS[name], module
        skipped.append((name, reason))
    table = "\n".join(
        f"  {name}: {b.refusal(device, dtypes, op) or 'available'}" for name, b in BACKENDS.items()
    )
    raise RuntimeError(
        f"backend {forced!r} was asked for and cannot run here. What exists:\n{table}"
    )


_ADAMW = (
    "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize=False, int?"
    " seed=None"
)
_library = torch.library.Library("slicefine", "DEF")
_library.define(
    "slice_grad(Tensor grad_output, Tensor input, Tensor? rows=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "slice_adamw(Tensor(a!)[] masters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[]"
    f" exp_avg_sqs, Tensor(d!)[] weights, Tensor?[] rows, Tensor?[] cols, Tensor[] steps, {_ADAMW})"
    " -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "slice_adamw_8bit(Tensor(a!)[] masters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[]"
    " exp_avg_sqs, Tensor(d!)[] exp_avg_scales, Tensor(e!)[] exp_avg_sq_scales, Tensor codebook,"
    f" Tensor(f!)[] weights, Tensor?[] rows, Tensor?[] cols, Tensor[] steps, {_ADAMW}) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "slice_grad_adamw(Tensor grad_output, Tensor input, Tensor(a!) master, Tensor(b!) exp_avg,"
    f" Tensor(c!) exp_avg_sq, Tensor(d!) weight, Tensor? rows, Tensor? cols, Tensor step, {_ADAMW})"
    " -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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


def _check_slice(
    op: str,
    master: Tensor,
    states: tuple[Tensor, ...],
    weight: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    step: Tensor,
) -> None:
    shape = (
        weight.shape[0] if rows is None else rows.numel(),
        weight.shape[1] if cols is None else cols.numel(),
    )
    expected = torch.float64 if weight.dtype == torch.float64 else torch.float32
    device = weight.device
    for name, index in (("rows", rows), ("cols", cols)):
        if index is not None and (index.dtype != torch.int64 or index.device != device):
            _check_index(op, name, index, device)
    for t in (master, *states):
        if t.shape != shape or t.dtype != expected or t.device != device:
            break
    else:
        if step.device == device:
            return
    if any(t.shape != shape for t in (master, *states)):
        raise ValueError(
            f"{op}: the slice of weight {tuple(weight.shape)} has shape {shape}; got master"
            f" {tuple(master.shape)} and gradient or moments {[tuple(t.shape) for t in states]}"
        )
    if odd := [str(t.dtype) for t in (master, *states) if t.dtype != expected]:
        raise TypeError(
            f"{op}: master, gradient and moments of a {weight.dtype} weight must be {expected}; got"
            f" {', '.join(odd)}"
        )
    tensors = [t for t in (master, *states, rows, cols, step) if t is not None]
    odd = sorted({str(t.device) for t in tensors if t.device != device})
    raise ValueError(
        f"{op}: the weight is on {device}, other tensors of its slice are on {', '.join(odd)}"
    )


def _check_one_device(op: str, tensors: list[Tensor]) -> None:
    if len({t.device for t in tensors}) > 1:
        devices = ", ".join(sorted({str(t.device) for t in tensors}))
        raise ValueError(f"{op}: one call works on one device; got tensors on {devices}")


def _slice_grad(grad_output: Tensor, input: Tensor, rows: Tensor | None = None) -> Tensor:
    _check_operands("slice_grad", grad_output, input, rows)
    device = grad_output.device.type
    slice_grad = select(device, {grad_output.dtype}).slice_grad
    if not autocast_enabled(device):
        return slice_grad(grad_output, input, rows)
    with _without_autocast(device):
        return slice_grad(grad_output, input, rows)


def _direct(tensor: Tensor) -> ModuleType | None:
    """The compiled module, where a call with this tensor may go straight to it: an ordinary tensor
    on the CPU, no backend forced,
    and no compiler, mode or profiler that wants to see the op.

    PyTorch's dispatcher takes a few microseconds for an op in Python, and ten times as much after a
    matrix product has emptied the
    caches: together a fifth of what a slice costs beside a frozen layer on the CPU. A GPU's kernels
        run meanwhile.
    """
    if type(tensor) is not Tensor or not tensor.is_cpu or torch.compiler.is_compiling():
        return None
    module = (
        _compiled.get(tensor.dtype)
        if _forced is None and not _modes() and not _profiling()
        else None
    )
    return module if module is not None and module.unavailable is None else None


# dtype -> the compiled module, where `select` has chosen it for the CPU without being forced to
_compiled: dict[torch.dtype, Any] = {}
_modes = torch._C._len_torch_dispatch_stack
_profiling = torch._C._autograd._profiler_enabled  # pyright: ignore[reportAttributeAccessIssue]


def gradient_of_slice(grad_output: Tensor, input: Tensor, rows: Tensor | None = None) -> Tensor:
    """`slice_grad` by the shortest way there is; for the backward of a layer."""
    module = _direct(grad_output)
    if module is None:
        return slice_grad(grad_output, input, rows)
    _check_operands("slice_grad", grad_output, input, rows)
    return module.slice_grad(grad_output, input, rows)


def take_columns(input: Tensor, cols: Tensor) -> Tensor:
    """What the gradient of a column slice needs of its input: see
    `slicefine.backends.reference.take_columns`.
    """
    return (_direct(input) or reference).take_columns(input, cols)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """A backward inside autocast still accumulates in float32."""
    return torch.autocast(device, enabled=False) if autocast_enabled(device) else nullcontext()


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a type of device; the meta device has none and must not be asked."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _slice_adamw(
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    weights: list[Tensor],
    rows: list[Tensor | None],
    cols: list[Tensor | None],
    steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    seed: int | None = None,
) -> None:
    for p, g, m, v, w, r, c, t in zip(
        masters, grads, exp_avgs, exp_avg_sqs, weights, rows, cols, steps, strict=True
    ):
        _check_slice("slice_adamw", p, (g, m, v), w, r, c, t)
    _check_one_device("slice_adamw", weights)
    if masters:
        module = select(masters[0].device.type, {w.dtype for w in weights})
        module.slice_adamw(
            masters,
            grads,
            exp_avgs,
            exp_avg_sqs,
            weights,
            rows,
            cols,
            steps,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            maximize,
            seed,
        )
        # autograd cannot see a kernel's writes; a graph that still needs an old weight must notice
        # them
        increment_version((*masters, *exp_avgs, *exp_avg_sqs, *weights))


def _slice_adamw_8bit(
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    codebook: Tensor,
    weights: list[Tensor],
    rows: list[Tensor | None],
    cols: list[Tensor | None],
    steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    seed: int | None = None,
) -> None:
    moments = zip(exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, strict=True)
    for p, g, (*codes, m, v), w, r, c, t in zip(
        masters, grads, moments, weights, rows, cols, steps, strict=True
    ):
        _check_slice("slice_adamw_8bit", p, (g,), w, r, c, t)
        blocks = (-(-p.numel() // BLOCK_8BIT),)
        wrong = any(x.dtype != torch.uint8 or x.shape != p.shape for x in codes)
        wrong |= (
            any(x.dtype != torch.float32 or x.shape != blocks for x in (m, v))
            or w.dtype == torch.float64
        )
        if wrong or any(x.device != w.device for x in (*codes, m, v)):
            raise ValueError(
                f"slice_adamw_8bit: a slice of shape {tuple(p.shape)} has moments"
                f" {[(str(x.dtype), tuple(x.shape)) for x in codes]} and scales"
                f" {[(str(x.dtype), tuple(x.shape)) for x in (m, v)]} for a {w.dtype} weight on"
                f" {w.device}; expected uint8 of the slice's shape and scales of shape {blocks} in"
                " float32, a float32, bfloat16 or float16 weight, all on one device"
            )
    _check_one_device("slice_adamw_8bit", [*weights, codebook] if weights else [])
    if codebook.dtype != torch.float32 or codebook.shape != (2, 256):
        raise ValueError(
            f"slice_adamw_8bit: codebook is {codebook.dtype} of shape {tuple(codebook.shape)};"
            " expected float32 (2, 256)"
        )
    if masters:
        module = select(masters[0].device.type, {w.dtype for w in weights}, "slice_adamw_8bit")
        module.slice_adamw_8bit(
            masters,
            grads,
            exp_avgs,
            exp_avg_sqs,
            exp_avg_scales,
            exp_avg_sq_scales,
            codebook,
            weights,
            rows,
            cols,
            steps,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            maximize,
            seed,
        )
        increment_version(
            (*masters, *exp_avgs, *exp_avg_sqs, *exp_avg_scales, *exp_avg_sq_scales, *weights)
        )


def _slice_grad_adamw(
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
    maximize: bool = False,
    seed: int | None = None,
) -> None:
    _check_operands("slice_grad_adamw", grad_output, input, rows)
    _check_slice("slice_grad_adamw", master, (exp_avg, exp_avg_sq), weight, rows, cols, step)
    found = (grad_output.shape[1] if rows is None else rows.numel(), input.shape[1])
    if found != master.shape or weight.device != input.device:
        raise ValueError(
            f"slice_grad_adamw: grad_output {tuple(grad_output.shape)} and input"
            f" {tuple(input.shape)} on {input.device} make a gradient of shape {found}; the slice"
            f" has shape {tuple(master.shape)} on {weight.device} (input: only the columns of the"
            " slice)"
        )
    device = grad_output.device.type
    module = select(device, {grad_output.dtype, weight.dtype})
    with _without_autocast(device):
        module.slice_grad_adamw(
            grad_output,
            input,
            master,
            exp_avg,
            exp_avg_sq,
            weight,
            rows,
            cols,
            step,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            maximize,
            seed,
        )
    increment_version((master, exp_avg, exp_avg_sq, weight))


def _fake_slice_grad(grad_output: Tensor, input: Tensor, rows: Tensor | None = None) -> Tensor:
    dtype = torch.float64 if grad_output.dtype == torch.float64 else torch.float32
    return grad_output.new_empty(
        (grad_output.shape[1] if rows is None else rows.shape[0], input.shape[1]), dtype=dtype
    )


def _fake_nothing(*args: Any, **kwargs: Any) -> None:
    return None


# CompositeExplicitAutograd is the catch-all of devices; the function asks the tensors where they
# are.
for _name, _function, _fake in (
    ("slice_grad", _slice_grad, _fake_slice_grad),
    ("slice_adamw", _slice_adamw, _fake_nothing),
    ("slice_adamw_8bit", _slice_adamw_8bit, _fake_nothing),
    ("slice_grad_adamw", _slice_grad_adamw, _fake_nothing),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"slicefine::{_name}", _fake, lib=_library)

slice_grad = torch.ops.slicefine.slice_grad
slice_adamw = torch.ops.slicefine.slice_adamw
slice_adamw_8bit = torch.ops.slicefine.slice_adamw_8bit
slice_grad_adamw = torch.ops.slicefine.slice_grad_adamw
