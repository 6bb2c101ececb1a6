"""What launchers ask of the machine: the device to launch on, its width, how `tl.dot` multiplies,
the workspace.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from slicefine_kernels.configs import (
    grad_config,
    token_splits,
    workspace_floats,
    workspace_tickets,
)


class AdamWOptions(Protocol):
    """What a launcher reads of the options of one AdamW step (slicefine's dataclass has them)."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    seed: int | None


def adamw_scalars(options: AdamWOptions) -> tuple[float, ...]:
    """The options as the kernels take them, from lr to seed."""
    o = options
    # in float64 on the host: float32 on the device would lose digits of a beta close to 1
    # the limit where beta is 0: beta**step is exp(-inf)
    logarithms = (math.log(beta) if beta else -math.inf for beta in (o.beta1, o.beta2))
    # a factor instead of a branch: one compiled kernel serves both directions
    sign = -1.0 if o.maximize else 1.0
    return (o.lr, o.beta1, o.beta2, *logarithms, o.eps, o.weight_decay, sign, o.seed or 0)


def check_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}; expected"
                " contiguous"
            )


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's where several GPUs are
    visible.
    """
    return (
        torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
    )


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a GPU; for the interpreter's CPU tensors 4, so
    that tokens are split.
    """
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 4
    )


@functools.cache
def architecture(device: torch.device) -> str:
    """As the table of configurations calls it: "sm_90", "gfx942", or "cpu" for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def dot_options(dtype: torch.dtype) -> dict[str, str | bool]:
    """INPUT_PRECISION: TF32 for float32 operands only where torch allows it. UPCAST: for the
    interpreter.
    """
    # the same switch as torch's own products obey, so a slice is as precise as its layer
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    # Triton's interpreter (3.6 to 3.8) multiplies the bit patterns of bfloat16 operands as
    # integers.
    upcast = dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    return {"INPUT_PRECISION": "tf32" if tf32 else "ieee", "UPCAST": upcast}


_workspaces: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """(partial sums float32, tickets int32 all zero), one pair per device and stream, shared by
    every layer that runs there.

    Kernels of one stream run one after another and leave the tickets at zero. A CUDA graph gets a
    pair of its own: it replays
    on whatever stream it likes, and what is allocated while it is captured lives in its memory
    pool.
    """
    count = processors(device)
    make = lambda: (
        torch.empty(workspace_floats(count), dtype=torch.float32, device=device),
        torch.zeros(workspace_tickets(count), dtype=torch.int32, device=device),
    )
    if device.type != "cuda":
        return make()
    if torch.cuda.is_current_stream_capturing():
        return make()
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _workspaces:
        _workspaces[key] = make()
    return _workspaces[key]


@dataclass(frozen=True)
class GradientLaunch:
    """How one gradient kernel is launched: grid (tiles, splits), compile-time options, workspace."""

    grid: tuple[int, int]
    splits: int
    tokens_per_split: int
    partials: Tensor
    tickets: Tensor
    options: dict[str, Any]


def gradient_launch(input: Tensor, T: int, R: int, K: int) -> GradientLaunch:
    """For a slice of R x K features and T tokens of input's dtype, on its device."""
    if R * K >= 2**31:
        raise ValueError(
            f"a slice of {R} x {K} features has {R * K} entries; the kernels take fewer than 2**31"
        )
    device = input.device
    config = grad_config(R, K, input.element_size(), architecture(device))
    tiles = triton.cdiv(R, config.BLOCK_R) * triton.cdiv(K, config.BLOCK_K)
    splits, tokens_per_split = token_splits(T, tiles, processors(device), config.BLOCK_T)
    # any pointer will do where nothing is split
    partials, tickets = workspace(device) if splits > 1 else (input, input)
    options = {**asdict(config), **dot_options(input.dtype), "SPLIT": splits > 1}
    if torch.version.hip:
        del options["maxnreg"]
    return GradientLaunch(
        (tiles, splits), splits, tokens_per_split, partials, tickets, options
    )


_tables: OrderedDict[tuple, Tensor] = OrderedDict()  # most recently used last
_captured: list[Tensor] = []  # pinned memory that a CUDA graph copies from at every replay


def address_table(entries: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """(slices, fields) int64 on the device, kept for the next call with the same addresses."""
    if device.type != "cuda":
        return torch.tensor(entries, dtype=torch.int64)
    capturing = torch.cuda.is_current_stream_capturing()
    key = (device, torch.cuda.current_stream(device).cuda_stream, entries)
    # the same addresses at every step between two moves: no copy to the device
    if key in _tables and not capturing:
        _tables.move_to_end(key)
        return _tables[key]
    pinned = torch.tensor(entries, dtype=torch.int64).pin_memory()
    table = pinned.to(device, non_blocking=True)
    # a graph copies from this memory at every replay, so it must outlive the call
    if capturing:
        _captured.append(pinned)
        return table
    _tables[key] = table
    # a move changes the addresses; tables of old positions are dropped
    while len(_tables) > 32:
        _tables.popitem(last=False)
    return table


def address(index: Tensor | None) -> int:
    return 0 if index is None else index.data_ptr()
