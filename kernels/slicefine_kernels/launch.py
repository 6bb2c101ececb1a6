"""What launchers ask of the machine: the device to launch on, its width, how `tl.dot` multiplies."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's where several GPUs are visible."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a GPU; 1 for the interpreter's CPU tensors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def dot_options(dtype: torch.dtype) -> dict[str, str | bool]:
    """INPUT_PRECISION: TF32 for float32 operands only where torch allows it. UPCAST: for the interpreter."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    # Triton's interpreter (3.6 to 3.8) multiplies the bit patterns of bfloat16 operands as integers.
    upcast = dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    return {"INPUT_PRECISION": "tf32" if tf32 else "ieee", "UPCAST": upcast}
