"""One tile of a slice's gradient, G = dY[:, rows]^T X: the part that `slice_grad` and
`slice_grad_adamw` share.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gradient_tile(
    dy_ptr,
    x_ptr,
    rows_ptr,
    stride_dyt,
    stride_dyr,
    stride_xt,
    stride_xk,
    R,
    K,
    t_begin,
    t_end,
    offs_r,
    offs_k,
    HAS_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Sum over tokens [t_begin, t_end) -> [BLOCK_R, BLOCK_K], float32; zero outside R and K."""
    mask_r = offs_r < R
    mask_k = offs_k < K
    if HAS_ROWS:
        # gathered through the index: dY[:, rows] never exists as a tensor
        features = tl.load(rows_ptr + offs_r, mask=mask_r, other=0)
    else:
        features = offs_r.to(tl.int64)
    # int64: n * out passes 2^31 for long batches
    dy_columns = dy_ptr + features * stride_dyr
    x_columns = x_ptr + offs_k.to(tl.int64) * stride_xk
    # float32 whatever the operands are: a sum over thousands of tokens loses its tail in bfloat16
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    # masked lanes load zeros, and a zero adds nothing to the sum: no loop for the tail is needed
    for t in range(t_begin, t_end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        # compared before the widening: int64 comparisons are slower
        mask_t = offs_t < t_end
        offs_t = offs_t.to(tl.int64)
        # [BLOCK_R, BLOCK_T]
        dy = tl.load(
            dy_columns[:, None] + offs_t[None, :] * stride_dyt,
            mask=mask_r[:, None] & mask_t[None, :],
            other=0.0,
        )
        # [BLOCK_T, BLOCK_K]
        x = tl.load(
            x_columns[None, :] + offs_t[:, None] * stride_xt,
            mask=mask_t[:, None] & mask_k[None, :],
            other=0.0,
        )
        # only under the interpreter, see `launch.dot_options`
        if UPCAST:
            dy = dy.to(tl.float32)
            x = x.to(tl.float32)
        # [BLOCK_R, BLOCK_T] @ [BLOCK_T, BLOCK_K] -> [BLOCK_R, BLOCK_K]
        acc = tl.dot(dy, x, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def hand_in(
    acc,
    partials_ptr,
    tickets_ptr,
    tile,
    split,
    splits,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Leave a split's sum in the workspace and take a ticket -> whether every other split of the
    tile has done so.
    """
    # the whole tile is stored, padding included, so the workspace needs no mask
    offs = tl.arange(0, BLOCK_R)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tl.store(
        partials_ptr + (tile * splits + split).to(tl.int64) * (BLOCK_R * BLOCK_K) + offs,
        acc,
    )
    tl.debug_barrier()  # all warps have stored before one of them releases
    # acquire and release: the last arriver sees the sums of all others
    return tl.atomic_add(tickets_ptr + tile, 1, sem="acq_rel") == splits - 1


@triton.jit
def add_up(
    partials_ptr, tickets_ptr, tile, splits, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The last arriver's part: the sum of all splits, always in the same order, and the ticket
    counter back at zero.
    """
    # the ticket was taken by one thread; no other may read partial sums before it is back
    tl.debug_barrier()
    offs = tl.arange(0, BLOCK_R)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    # not atomic adds: float32 sums depend on their order, and this one is the same on every run
    for split in range(0, splits):
        # past the first-level cache, which knows nothing of other processors' stores
        acc += tl.load(
            partials_ptr
            + (tile * splits + split).to(tl.int64) * (BLOCK_R * BLOCK_K)
            + offs,
            cache_modifier=".cg",
        )
    # ready for the next launch on this stream: no launch has to clear the workspace
    tl.store(tickets_ptr + tile, 0)
    return acc
