"""Kernel times against the bytes that must move and the measured bandwidth of a copy.

Two clocks: a CUDA graph of many calls, where no launch is waited for but all that a call does
counts (under capture Triton's backend makes a workspace per call and clears it), and the profiler's
sum of kernel durations in ordinary calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.correctness import DTYPES, HYPERPARAMETERS, backends, plain_product
from benchmarks.gpu.graphs import captured
from benchmarks.gpu.job import Job, bar
from benchmarks.record import quantiles
from benchmarks.roofline import op_bytes
from benchmarks.updates import CopyBack
from slicefine import ops
from slicefine.backends.operands import AdamWOptions, AdamWSlice

# bytes; operands that rotate through more than this come from memory
L2 = 256 * 2**20
# the bar: of the measured bandwidth of a copy
SHARE = 0.85


def milliseconds(
    function: Callable[[], Any], device: str, calls: int, rounds: int
) -> float:
    """Median time of one of the calls that a function makes."""
    function()
    times = []
    for _ in range(rounds):
        if device == "cuda":
            begin, end = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True),
            )
            torch.cuda.synchronize()
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / calls)
        else:
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start) / calls)
    return quantiles(times)[1]


def kernel_milliseconds(function: Callable[[int], Any], calls: int) -> float:
    """Device time of a call's kernels, the mean of many, from torch's profiler; GPUs only."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for i in range(calls):
            function(i)
        torch.cuda.synchronize()
    on_device = [
        event for event in profiler.events() if event.device_type == DeviceType.CUDA
    ]
    if len(on_device) < calls:
        raise RuntimeError(f"the profiler saw {len(on_device)} kernels in {calls} calls")
    return sum(event.time_range.elapsed_us() for event in on_device) / calls / 1e3


def copy_bandwidth(job: Job) -> float:
    """GB/s of a device-to-device copy of 512 MiB, bytes read and written."""
    size = 2**16 if job.small else 512 * 2**20
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=job.device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), job.device, 1, 3 if job.small else 30)
    return 2 * size / ms / 1e6


def gradient_operands(
    n: int, R: int, K: int, rows: bool, offset: bool, dtype: torch.dtype, device: str
) -> tuple:
    """dY (n, R; twice as wide with rows) and X (n, K), one element past a 16-byte boundary if
    offset.
    """

    def values(width: int) -> Tensor:
        storage = torch.randn(n * width + offset, device=device).to(dtype)
        return storage[int(offset) :].view(n, width)

    out = 2 * R if rows else R
    index = torch.arange(R, 2 * R, device=device) if rows else None
    return values(out), values(K), index


def gradient_times(
    n: int,
    R: int,
    K: int,
    rows: bool,
    offset: bool,
    dtype: torch.dtype,
    names: list[str],
    job: Job,
) -> dict[str, dict[str, float]]:
    """ "graph" and "kernel" milliseconds of each backend's slice_grad; "graph" of torch's product
    with the same float32 result.
    """
    moved = op_bytes("slice_grad", n, R, K, dtype.itemsize)
    copies = 1 if job.small else max(2, min(16, -(-2 * L2 // moved)))
    sets = [
        gradient_operands(n, R, K, rows, offset, dtype, job.device) for _ in range(copies)
    ]
    calls, rounds = (1, 1) if job.small else (max(8, copies), 20)
    found = {}

    def timed(function: Callable[..., Tensor]) -> float:
        replay = captured(
            lambda: [function(*sets[i % copies]) for i in range(calls)][-1], job.device
        )
        return milliseconds(replay, job.device, calls, rounds)

    for name in names:
        with ops.use_backend(name):
            found[name] = {"graph": timed(ops.slice_grad)}
            if job.device == "cuda":
                try:
                    found[name]["kernel"] = kernel_milliseconds(
                        lambda i: ops.slice_grad(*sets[i % copies]), 2 * calls
                    )
                # torch asserts that it was built with CUPTI
                except (
                    RuntimeError,
                    AssertionError,
                ) as error:
                    if (note := f"no kernel times: {error}") not in job.notes:
                        job.notes.append(note)
    found["torch"] = {"graph": timed(plain_product)}
    return found


def gradient_cases(small: bool) -> list[tuple[int, int, bool, bool, str]]:
    """(wide, r, a row slice, offset by one element, dtype), the important ones first."""
    if small:
        return [(48, 8, False, False, "bf16"), (48, 8, True, True, "fp32")]
    ranks = (16, 1, 8, 32, 64, 256)
    first = [(4096, r, False, False, "bf16") for r in ranks]
    first += [(wide, 16, False, False, "bf16") for wide in (8192, 14336)]
    first += [(4096, r, True, False, "bf16") for r in (16, 64)]
    first += [(4096, 16, rows, True, "bf16") for rows in (False, True)]
    first += [(4096, 16, rows, False, "fp32") for rows in (False, True)]
    rest = [
        (wide, r, rows, offset, dtype)
        for dtype in ("bf16", "fp32")
        for offset in (False, True)
        for wide in (4096, 8192, 14336)
        for rows in (False, True)
        for r in ranks
    ]
    return list(dict.fromkeys([*first, *rest]))


def kernels(job: Job) -> None:
    """The copy, slice_adamw over a model's layers, slice_grad over shapes."""
    names, bandwidth = backends(job), copy_bandwidth(job)
    job.row(op="copy of 512 MiB", gb_per_s=bandwidth)
    adamw_rows(job, names, bandwidth)
    n = 32 if job.small else 8192
    for wide, r, rows, offset, dtype in job.within_time(gradient_cases(job.small), 4.0):
        R, K = (r, wide) if rows else (wide, r)
        label = {
            "op": "slice_grad",
            "dtype": dtype,
            "n": n,
            "R": R,
            "K": K,
            "offset": offset,
        }
        with job.attempt(**label):
            times = gradient_times(n, R, K, rows, offset, DTYPES[dtype], names, job)
            moved = op_bytes("slice_grad", n, R, K, DTYPES[dtype].itemsize)
            for name, clocks in times.items():
                for how, ms in clocks.items():
                    speed = moved / ms / 1e6
                    job.row(
                        **label,
                        backend=name,
                        how=how,
                        ms=ms,
                        gb_per_s=speed,
                        share_of_copy=speed / bandwidth,
                    )
                if (
                    name != "torch"
                    and dtype == "bf16"
                    and wide <= 4096
                    and r <= 16
                    and not offset
                ):
                    what = (
                        f"slice_grad {R} x {K}, {n} tokens, {dtype}, {name}, {how}: share of copy"
                        " bandwidth"
                    )
                    job.bars.append(bar(what, speed / bandwidth, SHARE, most=False))


def adamw_rows(job: Job, names: list[str], bandwidth: float) -> None:
    """slice_adamw on columns of many layers, beside torch's fused AdamW with the slices copied
    back; both as CUDA graphs.
    """
    layers, out, width, r = (3, 40, 33, 4) if job.small else (196, 4096, 4096, 16)
    rounds, device = (1 if job.small else 20), job.device
    weights = [torch.randn(out, width, device=device).bfloat16() for _ in range(layers)]
    cols = [torch.arange(r, 2 * r, device=device) for _ in range(layers)]
    state = [[torch.randn(out, r, device=device) for _ in range(layers)] for _ in range(2)]
    moments = [
        [torch.zeros(out, r, device=device) for _ in range(layers)] for _ in range(2)
    ]
    steps = [torch.ones((), device=device) for _ in range(layers)]
    columns = (*state, *moments, weights, [None] * layers, cols, steps)
    slices = [AdamWSlice(*tensors) for tensors in zip(*columns, strict=True)]
    hyperparameters = AdamWOptions(**HYPERPARAMETERS)
    moved = layers * op_bytes("slice_adamw", 0, out, r, 2)
    label = {"op": "slice_adamw", "dtype": "bf16", "R": out, "K": r, "layers": layers}

    def add(backend: str, how: str, ms: float) -> None:
        speed = moved / ms / 1e6
        job.row(
            **label,
            backend=backend,
            how=how,
            ms=ms,
            gb_per_s=speed,
            share_of_copy=speed / bandwidth,
        )

    for name in names:
        call = lambda: ops.slice_adamw(slices, hyperparameters)
        with job.attempt(**label, backend=name), ops.use_backend(name):
            add(name, "eager", milliseconds(call, device, 1, rounds))
            add(name, "graph", milliseconds(captured(call, device), device, 1, rounds))
    options = {"fused": True, "capturable": True} if device == "cuda" else {"foreach": True}
    with job.attempt(**label, backend="torch"):
        theirs = CopyBack(weights, [(None, c) for c in cols], state[0], **options)
        for master, grad in zip(theirs.masters, state[1], strict=True):
            master.grad = grad
        add("torch, copy-back", "eager", milliseconds(theirs.step, device, 1, rounds))
        add(
            "torch, copy-back",
            "graph",
            milliseconds(captured(theirs.step, device), device, 1, rounds),
        )
