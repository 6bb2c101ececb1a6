"""slicefine's Triton kernels: tensors in, tensors out. One file per op; launch configurations in
`configs`.
"""

from slicefine_kernels.gated_activation import gated_activation, gated_activation_backward
from slicefine_kernels.rms_norm import rms_norm, rms_norm_backward
from slicefine_kernels.slice_adamw import slice_adamw
from slicefine_kernels.slice_adamw_8bit import slice_adamw_8bit
from slicefine_kernels.slice_grad import slice_grad
from slicefine_kernels.slice_grad_adamw import slice_grad_adamw
from slicefine_kernels.write_slices import write_slices

__all__ = [
    "gated_activation",
    "gated_activation_backward",
    "rms_norm",
    "rms_norm_backward",
    "slice_adamw",
    "slice_adamw_8bit",
    "slice_grad",
    "slice_grad_adamw",
    "write_slices",
]
