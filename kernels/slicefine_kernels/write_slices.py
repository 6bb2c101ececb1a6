"""write_slices: W[rows, cols] = cast(master) for many slices, one launch per weight dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from slicefine_kernels.adamw import round_bf16
from slicefine_kernels.configs import adamw_config
from slicefine_kernels.launch import address, address_table, check_contiguous, on_device_of

# columns of the table, one row per slice; an index address of 0 stands for all rows or columns
_FIELDS = tl.constexpr(8)


@triton.jit
def _write_slices_kernel(
    table_ptr,  # [slices, _FIELDS] int64
    WEIGHT_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    entry = table_ptr + tl.program_id(1) * _FIELDS
    # sizes first: most programs of a small slice beside a large one end at the next test
    R = tl.load(entry + 4)
    K = tl.load(entry + 5)
    if block * BLOCK >= R * K:
        return  # the grid is as long as the largest slice
    p_ptr = tl.load(entry).to(tl.pointer_type(tl.float32))
    w_ptr = tl.load(entry + 1).to(tl.pointer_type(WEIGHT_DTYPE))
    rows_address = tl.load(entry + 2)
    cols_address = tl.load(entry + 3)
    stride_wr = tl.load(entry + 6)
    stride_wc = tl.load(entry + 7)

    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < R * K
    p = tl.load(p_ptr + offs, mask=mask, other=0.0)
    # master[r, k] belongs at W[rows[r], cols[k]]
    row = offs // K
    col = offs % K
    if rows_address != 0:
        row = tl.load(rows_address.to(tl.pointer_type(tl.int64)) + row, mask=mask, other=0)
    if cols_address != 0:
        col = tl.load(cols_address.to(tl.pointer_type(tl.int64)) + col, mask=mask, other=0)
    # a plain cast to bfloat16 truncates in Triton's interpreter
    if tl.bfloat16 == WEIGHT_DTYPE:
        value = round_bf16(p)
    else:
        value = p.to(WEIGHT_DTYPE)
    tl.store(w_ptr + row * stride_wr + col * stride_wc, value, mask=mask)


_TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def write_slices(slices: Sequence[Any]) -> None:
    """For each slice: master [R, K] float32; weight [out, in]; rows [R] and cols [K] int64 or None
    for all.
    """
    config = adamw_config()
    for dtype in dict.fromkeys(s.weight.dtype for s in slices):
        chosen = [s for s in slices if s.weight.dtype == dtype and s.master.numel()]
        if not chosen:
            continue
        entries = []
        for s in chosen:
            check_contiguous(master=s.master)
            tensors = (s.master, s.weight, s.rows, s.cols)
            entries.append((*map(address, tensors), *s.master.shape, *s.weight.stride()))
        largest = max(s.master.numel() for s in chosen)
        weight = chosen[0].weight
        with on_device_of(weight):
            _write_slices_kernel[(triton.cdiv(largest, config.BLOCK), len(entries))](
                address_table(tuple(entries), weight.device),
                WEIGHT_DTYPE=_TRITON_DTYPE[dtype],
                BLOCK=config.BLOCK,
                num_warps=config.num_warps,
            )
