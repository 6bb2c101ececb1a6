"""Which backend runs an op, and why not another.

On a device the first backend runs that is available and takes the dtype:

    cpu:    cpu, reference          cuda:   triton, cuda, reference          any other device:
        reference

``SLICEFINE_BACKEND=name`` (read at the first op) or ``with use_backend("name")`` forces one, for
the whole process (autograd runs the backward of a CUDA graph on a thread of its own); what is
forced and cannot run raises an error, it never falls back.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("slicefine")
_ALL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """Where the code of a backend is, and what it takes.

    devices: () -> the types of device it runs on; empty: every device.
    load: () -> (module with the ops, None), or (None, why it is missing).
    """

    name: str
    devices: Callable[[], tuple[str, ...]]
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[], tuple[ModuleType | None, str | None]]

    def refusal(
        self, device: str, dtypes: set[torch.dtype], op: str | None = None
    ) -> str | None:
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


def _load_cpu() -> tuple[ModuleType | None, str | None]:
    # asked whenever an op looks for its backend: sys.modules answers faster than import_module
    name = "slicefine.backends.cpu"
    module = sys.modules.get(name) or importlib.import_module(name)
    return (module, None) if module.unavailable is None else (None, module.unavailable)


@functools.cache
def _load_triton() -> tuple[ModuleType | None, str | None]:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return None, (
            f"triton does not import ({error}); it comes with torch's CUDA and ROCm wheels on"
            " Linux, or: pip install triton"
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
    module = importlib.import_module("slicefine.backends.cuda")
    reason = module.unavailable or module.refuses_a_device()
    return (module, None) if reason is None else (None, reason)


def _triton_devices() -> tuple[str, ...]:
    # Triton's interpreter runs the kernels on CPU tensors; it is chosen when Triton is imported.
    return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", lambda: (), _ALL_DTYPES, _load_reference),
        Backend("cpu", lambda: ("cpu",), _ALL_DTYPES, _load_cpu),
        Backend("triton", _triton_devices, _GPU_DTYPES, _load_triton),
        Backend("cuda", lambda: ("cuda",), _GPU_DTYPES, _load_cuda),
    )
}
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
_forced: str | None = None


def available_backends() -> dict[str, str | None]:
    """Which backends can run in this process.

    Returns:
        For every backend None if it can run, or the reason why it cannot. A backend that only runs
        on a GPU is not available where torch sees none.
    """
    gpu = torch.cuda.is_available()
    found = {}
    for name, backend in BACKENDS.items():
        _, reason = backend.load()
        devices = backend.devices()
        if reason is None and devices == ("cuda",) and not gpu:
            reason = "it runs on cuda, and torch sees no GPU here"
        found[name] = reason
    return found


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force every op onto one backend until the block ends.

    Args:
        name: A key of `available_backends`; None chooses freely again.

    Raises:
        ValueError: There is no backend of that name.
    """
    # a plain global, not a context variable: autograd's threads would not see the latter
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
        raise ValueError(
            f"{where}: no backend {name!r}; expected one of {', '.join(BACKENDS)}"
        )
    return name


def forced() -> str | None:
    """The backend that `use_backend` or ``SLICEFINE_BACKEND`` forces, if one does."""
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
        "slicefine runs on backend %r for device %r%s",
        name,
        device,
        f" ({why})" if why else "",
    )


# The first choices made before: every backward asks, and finding out takes longer than a small
# slice's gradient.
_Key = tuple[str | None, str, frozenset[torch.dtype], str | None]
_chosen: dict[_Key, tuple[Backend, ModuleType]] = {}
# dtype -> the compiled module, where it was chosen for the CPU without being forced to
_compiled: dict[torch.dtype, Any] = {}


def backend_for(device: str, dtypes: set[torch.dtype], op: str | None = None) -> ModuleType:
    """The module whose ops run for tensors of these dtypes on this type of device.

    Args:
        device: As in ``tensor.device.type``.
        dtypes: Every dtype among the operands that a backend may not take.
        op: Name of an op that not every backend has.

    Raises:
        RuntimeError: The backend that was forced cannot run there.
    """
    name = forced()
    key = (name, device, frozenset(dtypes), op)
    backend, module = _chosen.get(key, (None, None))
    if backend is not None and module is not None and _still_there(backend, module):
        return module
    backend, module, skipped = _choose(name, device, dtypes, op)
    # where one was skipped the reason may go away (a GPU comes into use), so it is asked again
    if not skipped:
        _chosen[key] = backend, module
        if name is None and backend.name == "cpu" and len(dtypes) == 1:
            _compiled[next(iter(dtypes))] = module
    return module


def _still_there(backend: Backend, module: ModuleType) -> bool:
    # an entry may have been replaced since, or its module may answer otherwise
    return BACKENDS[backend.name] is backend and backend.load()[0] is module


def _choose(
    name: str | None, device: str, dtypes: set[torch.dtype], op: str | None
) -> tuple[Backend, ModuleType, bool]:
    """(backend, its module, whether another had to be skipped)."""
    candidates = (name,) if name else _PREFERENCE.get(device, ("reference",))
    skipped = []
    for candidate in candidates:
        backend = BACKENDS[candidate]
        reason = backend.refusal(device, dtypes, op)
        if reason is None:
            _tell_once(device, candidate, tuple(skipped))
            module, _ = backend.load()
            assert module is not None
            return backend, module, bool(skipped)
        skipped.append((candidate, reason))
    table = "\n".join(
        f"  {other}: {backend.refusal(device, dtypes, op) or 'available'}"
        for other, backend in BACKENDS.items()
    )
    raise RuntimeError(
        f"backend {name!r} was asked for and cannot run here. What exists:\n{table}"
    )


_modes = torch._C._len_torch_dispatch_stack
_profiling = torch._C._autograd._profiler_enabled  # pyright: ignore[reportAttributeAccessIssue]


def watched() -> bool:
    """Whether a compiler, a mode or a profiler wants to see every op."""
    return torch.compiler.is_compiling() or bool(_modes()) or _profiling()


def direct(*tensors: Tensor) -> ModuleType | None:
    """The compiled module, where a call with these tensors may go straight to it: ordinary ones on
    the CPU, no backend forced, and nobody watching.

    PyTorch's dispatcher takes a few microseconds for an op in Python, and ten times as much after a
    matrix product has emptied the caches: together a fifth of what a slice costs beside a frozen
    layer on the CPU. A GPU's kernels run meanwhile.
    """
    # spelled out, not `watched()`: this runs in every forward and backward of a layer
    if _forced is not None or torch.compiler.is_compiling() or _modes() or _profiling():
        return None
    for tensor in tensors:
        # a view that the dispatcher would have to negate first is not what its memory holds
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.is_neg():
            return None
    module = _compiled.get(tensors[0].dtype)
    return module if module is not None and module.unavailable is None else None
