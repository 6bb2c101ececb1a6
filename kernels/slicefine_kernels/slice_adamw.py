"""slice_adamw: AdamW on the masters of many slices and write-through to their weights, one launch
per weight dtype.

A table in device memory holds, for each slice, the addresses of its tensors; a program takes one
block of one slice. The
table is sent only when an address has changed since the last call, from pinned memory, so a step
neither waits for the device
nor breaks the capture of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from slicefine_kernels.adamw import (
    adamw_update,
    one_minus_power,
    philox_word,
    round_bf16,
    round_bf16_stochastic,
)
from slicefine_kernels.configs import adamw_config
from slicefine_kernels.launch import (
    AdamWOptions,
    adamw_scalars,
    address,
    address_table,
    check_contiguous,
    on_device_of,
)

# columns of the table, one row per slice; an index address of 0 stands for all rows or columns
_FIELDS = tl.constexpr(13)


@triton.jit
def _slice_adamw_kernel(
    table_ptr,  # [slices, _FIELDS] int64
    lr,
    beta1,
    beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    sign,
    seed,
    STOCHASTIC: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # int64: this op sets no limit to R * K, and block * BLOCK may pass 2^31
    block = tl.program_id(0).to(tl.int64)
    entry = table_ptr + tl.program_id(1) * _FIELDS
    # sizes first: most programs of a small slice beside a large one end at the next test
    R = tl.load(entry + 8)
    K = tl.load(entry + 9)
    if block * BLOCK >= R * K:
        return  # the grid is as long as the largest slice
    p_ptr = tl.load(entry).to(tl.pointer_type(tl.float32))
    g_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    m_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    w_ptr = tl.load(entry + 4).to(tl.pointer_type(WEIGHT_DTYPE))
    rows_address = tl.load(entry + 5)
    cols_address = tl.load(entry + 6)
    # by address: the count changes at every step, the table does not
    step = tl.load(tl.load(entry + 7).to(tl.pointer_type(tl.float32)))
    stride_wr = tl.load(entry + 10)
    stride_wc = tl.load(entry + 11)
    # the slice's place in the call, second word of the Philox counter: slices get different bits
    position = tl.load(entry + 12)

    # AdamW
    # master, gradient and moments are contiguous [R, K]; only the weight needs rows and columns
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < R * K
    g = tl.load(g_ptr + offs, mask=mask, other=0.0) * sign
    p = tl.load(p_ptr + offs, mask=mask, other=0.0)
    m = tl.load(m_ptr + offs, mask=mask, other=0.0)
    v = tl.load(v_ptr + offs, mask=mask, other=0.0)
    correction1 = one_minus_power(log_beta1, step)
    correction2 = one_minus_power(log_beta2, step)
    p, m, v = adamw_update(
        p, g, m, v, lr, beta1, beta2, eps, weight_decay, correction1, correction2
    )
    tl.store(p_ptr + offs, p, mask=mask)
    tl.store(m_ptr + offs, m, mask=mask)
    tl.store(v_ptr + offs, v, mask=mask)

    # write-through
    # master[r, k] belongs at W[rows[r], cols[k]]
    row = offs // K
    col = offs % K
    if rows_address != 0:
        row = tl.load(rows_address.to(tl.pointer_type(tl.int64)) + row, mask=mask, other=0)
    if cols_address != 0:
        col = tl.load(cols_address.to(tl.pointer_type(tl.int64)) + col, mask=mask, other=0)
    if STOCHASTIC:
        word = philox_word(seed, offs.to(tl.uint32), position.to(tl.uint32))
        value = round_bf16_stochastic(p, word)
    elif tl.bfloat16 == WEIGHT_DTYPE:
        value = round_bf16(p)
    else:
        value = p.to(WEIGHT_DTYPE)
    tl.store(w_ptr + row * stride_wr + col * stride_wc, value, mask=mask)


_TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def slice_adamw(slices: Sequence[Any], options: AdamWOptions) -> None:
    """For each slice: master, grad, exp_avg, exp_avg_sq [R, K] float32; weight [out, in]; rows [R]
    and cols [K] int64 or None for all; step [] float32 on the device.
    """
    config = adamw_config()
    # this list keeps the copies alive until the launches are queued: the table holds bare addresses
    grads = [s.grad.to(torch.float32).contiguous() for s in slices]
    # a pointer's type is fixed when the kernel is compiled, so each weight dtype has its own launch
    for dtype in dict.fromkeys(s.weight.dtype for s in slices):
        entries, largest = [], 0
        for i, s in enumerate(slices):
            # an empty slice would only add programs that return at once
            if s.weight.dtype != dtype or s.master.numel() == 0:
                continue
            check_contiguous(master=s.master, exp_avg=s.exp_avg, exp_avg_sq=s.exp_avg_sq)
            tensors = (
                s.master,
                grads[i],
                s.exp_avg,
                s.exp_avg_sq,
                s.weight,
                s.rows,
                s.cols,
                s.step,
            )
            entries.append((*map(address, tensors), *s.master.shape, *s.weight.stride(), i))
            largest = max(largest, s.master.numel())
        if not entries:
            continue
        weight = slices[0].weight
        with on_device_of(weight):
            _slice_adamw_kernel[(triton.cdiv(largest, config.BLOCK), len(entries))](
                address_table(tuple(entries), weight.device),
                *adamw_scalars(options),
                STOCHASTIC=options.seed is not None and dtype == torch.bfloat16,
                WEIGHT_DTYPE=_TRITON_DTYPE[dtype],
                BLOCK=config.BLOCK,
                num_warps=config.num_warps,
            )
