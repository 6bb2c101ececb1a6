"""The `cuda` backend: precompiled kernels for machines where no compiler may run.

The module knows nothing of torch and carries its own CUDA runtime, so a build serves every torch
release. If it is missing, the reason is kept in ``unavailable`` and the package works without it.
Nothing here waits for the device, and all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slicefine.backends.operands import AdamWOptions, AdamWSlice, AdamWSlice8bit
from slicefine.backends.table import adamw_row, gradient_row, mismatch, table

unavailable: str | None = None
try:
    _CUDA: Any = importlib.import_module("slicefine._CUDA")
    unavailable = mismatch(_CUDA)
except ImportError as error:
    _CUDA = None
    unavailable = (
        f"the compiled module slicefine._CUDA does not import ({error}); install the CUDA toolkit,"
        " 12.1 or newer, and reinstall slicefine (SLICEFINE_CUDA=1 pip install --force-reinstall"
        " --no-deps .)"
    )
if torch.version.hip:
    unavailable = "torch is built for ROCm, the kernels for CUDA"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # capability: cp.async, bfloat16 on tensor cores


def slice_grad(
    grad_output: Tensor,  # [N, out]
    input: Tensor,  # [N, K]
    rows: Tensor | None = None,  # [R] int64
) -> Tensor:  # [R, K] float32
    """See `slicefine.backends.reference.slice_grad`."""
    _check("slice_grad", {"grad_output": grad_output, "input": input}, {"rows": rows})
    height = grad_output.shape[1] if rows is None else rows.numel()
    out = grad_output.new_empty((height, input.shape[1]), dtype=torch.float32)
    row, _keep = gradient_row(grad_output, input, rows, _tf32())
    launch = _launch(input)
    partials, counters = _workspace(launch)
    _CUDA.slice_grad(
        row, out.data_ptr(), (*launch, partials.data_ptr(), counters.data_ptr())
    )
    return out


def slice_adamw(slices: Sequence[AdamWSlice], options: AdamWOptions) -> None:
    """See `slicefine.backends.reference.slice_adamw`; one launch for up to 300 slices."""
    op = "slice_adamw"
    _check_one_device(op, slices)
    # held until the launch is queued: the table has their addresses, not references
    grads = [_float32(s.grad) for s in slices]
    rows = []
    for s, grad in zip(slices, grads, strict=True):
        _check_slice(op, s, grad)
        _check_state(op, s.weight, exp_avg=s.exp_avg, exp_avg_sq=s.exp_avg_sq)
        rows.append(adamw_row(s, grad, s.step))
    # the device of the launch is the first slice's, so there must be one
    if rows:
        _CUDA.slice_adamw(table(rows), options, (*_launch(slices[0].weight), 0, 0))


def slice_adamw_8bit(
    slices: Sequence[AdamWSlice8bit],
    codebook: Tensor,  # [2, 256]
    options: AdamWOptions,
) -> None:
    """See `slicefine.backends.reference.slice_adamw_8bit`; one launch for up to 270 slices."""
    op = "slice_adamw_8bit"
    _check_one_device(op, slices)
    grads = [_float32(s.grad) for s in slices]
    rows = []
    for s, grad in zip(slices, grads, strict=True):
        _check_slice(op, s, grad)
        _check_state(op, s.weight, torch.uint8, exp_avg=s.exp_avg, exp_avg_sq=s.exp_avg_sq)
        _check_state(
            op, s.weight, exp_avg_scale=s.exp_avg_scale, exp_avg_sq_scale=s.exp_avg_sq_scale
        )
        rows.append(adamw_row(s, grad, s.step))
    if not rows:
        return
    if codebook.shape != (2, 256):
        raise ValueError(
            f"{op}: the codebook has shape {tuple(codebook.shape)}; expected (2, 256)"
        )
    _check_state(op, slices[0].weight, codebook=codebook)
    launch = _launch(slices[0].weight)
    _CUDA.slice_adamw_8bit(table(rows), codebook.data_ptr(), options, (*launch, 0, 0))


def slice_grad_adamw(
    grad_output: Tensor,  # [N, out]
    input: Tensor,  # [N, K]
    active: AdamWSlice,
    options: AdamWOptions,
) -> None:
    """See `slicefine.backends.reference.slice_grad_adamw`; the gradient stays on the chip, but for
    the partial sums of split tiles.
    """
    op, weight = "slice_grad_adamw", active.weight
    _check(op, {"grad_output": grad_output, "input": input}, {"rows": active.rows})
    _check_slice(op, active, None)
    _check_state(op, weight, exp_avg=active.exp_avg, exp_avg_sq=active.exp_avg_sq)
    if weight.device != input.device:
        raise ValueError(
            f"{op}: the input is on {input.device}, the weight on {weight.device}"
        )
    gradient, _keep = gradient_row(grad_output, input, active.rows, _tf32())
    launch = _launch(input)
    partials, counters = _workspace(launch)
    where = (*launch, partials.data_ptr(), counters.data_ptr())
    _CUDA.slice_grad_adamw(gradient, adamw_row(active, None, active.step), options, where)


def _float32(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.to(torch.float32).contiguous()


def _tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _check(op: str, tensors: dict[str, Tensor], indices: dict[str, Tensor | None]) -> None:
    """Before a launch: an address on another device, or of another type, would be a memory fault or
    worse.
    """
    present = {name: index for name, index in indices.items() if index is not None}
    device = next(iter(tensors.values())).device
    for name, tensor in (tensors | present).items():
        if not _on_gpu(tensor):
            raise ValueError(
                f"{op}: {name} is on {tensor.device}; the cuda backend takes tensors on a CUDA"
                " device"
            )
        if tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, {next(iter(tensors))} on {device}"
            )
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{op}: {name} is {tensor.dtype}; the cuda backend takes"
                f" {', '.join(map(str, _DTYPES))} (the reference backend takes float64)"
            )
    for name, index in present.items():
        if index.dtype != torch.int64 or not index.is_contiguous():
            raise ValueError(
                f"{op}: {name} is {index.dtype} with strides {index.stride()}; expected a"
                " contiguous int64 tensor"
            )


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _check_one_device(
    op: str, slices: Sequence[AdamWSlice] | Sequence[AdamWSlice8bit]
) -> None:
    for i, s in enumerate(slices):
        first = slices[0].weight.device
        if s.weight.device != first:
            raise ValueError(
                f"{op}: weight 0 is on {first}, weight {i} on {s.weight.device}; expected one"
                " device"
            )


def _check_slice(op: str, s: AdamWSlice | AdamWSlice8bit, grad: Tensor | None) -> None:
    _check(op, {"weight": s.weight}, {"rows": s.rows, "cols": s.cols})
    _check_state(op, s.weight, master=s.master, step=s.step)
    if grad is not None:
        _check_state(op, s.weight, grad=grad)


def _check_state(
    op: str, weight: Tensor, dtype: torch.dtype = torch.float32, **tensors: Tensor
) -> None:
    """Tensors of this type, contiguous, on the weight's device."""
    for name, tensor in tensors.items():
        if (
            tensor.dtype != dtype
            or not tensor.is_contiguous()
            or tensor.device != weight.device
        ):
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
                f" for shape {tuple(tensor.shape)}; expected contiguous"
                f" {str(dtype).removeprefix('torch.')} on {weight.device}"
            )


def refuses_a_device() -> str | None:
    """Why a GPU of this machine is too old; asks only where CUDA is in use, because asking starts
    it.
    """
    if not torch.cuda.is_initialized():
        return None
    return next(filter(None, map(_too_old, range(torch.cuda.device_count()))), None)


@functools.cache
def _too_old(device: int) -> str | None:
    # older ones would fail inside the launch, with an error that names no reason
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= _OLDEST:
        return None
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; "
        f"the cuda backend needs {_OLDEST[0]}.{_OLDEST[1]} or newer"
    )


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device that the kernels run on."""
    properties = torch.cuda.get_device_properties(device)
    if reason := _too_old(device.index):
        raise RuntimeError(reason)
    return properties.multi_processor_count


def _launch(tensor: Tensor) -> tuple[int, int, int]:
    """Device, stream and processors of a launch."""
    processors = _processors(tensor.device)
    return (
        tensor.device.index,
        torch.cuda.current_stream(tensor.device).cuda_stream,
        processors,
    )


_workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def _workspace(launch: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Partial sums and tickets of a stream; 64 KiB per processor. Every call leaves the tickets at
    zero, so they are cleared once.
    """
    device, stream, processors = launch
    # capture is asked of the current device, which need not be the launch's
    with torch.cuda.device(device):
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        return _new_workspace(
            f"cuda:{device}", processors
        )  # in the graph's own memory, cleared again by every replay
    if (device, stream) not in _workspaces:
        _workspaces[device, stream] = _new_workspace(f"cuda:{device}", processors)
    return _workspaces[device, stream]


def _new_workspace(device: str, processors: int) -> tuple[Tensor, Tensor]:
    # empty: every sum is written before it is read; only the tickets must start at zero
    values = torch.empty(
        _CUDA.workspace_values(processors), dtype=torch.float32, device=device
    )
    return values, torch.zeros(
        _CUDA.workspace_counters(processors), dtype=torch.int32, device=device
    )
