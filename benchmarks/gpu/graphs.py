"""What a kernel must not do: break a CUDA graph's capture, wait for the device, compile again at a
move, mix up two streams.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.correctness import HYPERPARAMETERS, available
from benchmarks.gpu.job import Job
from slicefine import SliceAdamW, SliceConfig, get_slice_model, ops
from slicefine.backends.operands import AdamWOptions, AdamWSlice

OPTIONS = AdamWOptions(**HYPERPARAMETERS, seed=7)
Buffers = dict[str, Tensor]


def captured(function: Callable[[], Any], device: str) -> Callable[[], Any]:
    """A replay of the function's kernels from a CUDA graph; on a CPU the function. Calls it first,
    to compile and allocate.
    """
    if device != "cuda":
        function()
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def fresh(seed: int, n: int, out: int, width: int, device: str) -> Buffers:
    """Operands and state of a block slice of r = 16 both ways; a new seed is new data at new
    positions.
    """
    torch.manual_seed(seed)
    r = 16
    new = lambda *shape: torch.randn(*shape, device=device)
    return {
        "dy": new(n, out).bfloat16(),
        "x": new(n, r).bfloat16(),
        "rows": torch.randperm(out, device=device)[:r],
        "cols": torch.randperm(width, device=device)[:r],
        "master": new(out, r),
        "grad": new(out, r),
        "exp_avg": 0.1 * new(out, r),
        "exp_avg_sq": 0.1 * new(out, r).square(),
        "weight": new(out, width).bfloat16(),
        "step": torch.full((), 3.0 + seed, device=device),
    }


def run_slice_grad(b: Buffers) -> Tensor:
    return ops.slice_grad(b["dy"], b["x"], b["rows"])


def run_slice_grad_adamw(b: Buffers) -> None:
    active = AdamWSlice(*(b.get(name) for name in AdamWSlice._fields))
    ops.slice_grad_adamw(b["dy"], b["x"], active._replace(grad=None, rows=None), OPTIONS)


def run_slice_adamw(b: Buffers) -> None:
    """Two slices, of which the second is part of the first's tensors: the tables of several are
    sent.
    """
    half = len(b["master"]) // 2
    halves = [
        [b[name][part] for name in ("master", "grad", "exp_avg", "exp_avg_sq", "weight")]
        for part in (slice(half), slice(half, None))
    ]
    slices = [AdamWSlice(*tensors, None, b["cols"], b["step"]) for tensors in halves]
    ops.slice_adamw(slices, OPTIONS)


RUNS = {
    "slice_grad": run_slice_grad,
    "slice_grad_adamw": run_slice_grad_adamw,
    "slice_adamw": run_slice_adamw,
}


def replay_differs(
    run: Callable[[Buffers], Tensor | None], shape: tuple[int, int, int], device: str
) -> list[str]:
    """Names of buffers in which a replay with new data and positions, written in place, differs
    from an eager call.
    """
    static, result, wrong = fresh(0, *shape, device), {}, []
    replay = captured(lambda: result.update(out=run(static)), device)
    for seed in (1, 2):
        new = fresh(seed, *shape, device)
        for name, buffer in static.items():
            buffer.copy_(new[name])
        replay()
        expected = run(new)
        wrong += [
            f"{name}, replay {seed}"
            for name in static
            if not torch.equal(static[name], new[name])
        ]
        if expected is not None and not torch.equal(result["out"], expected):
            wrong.append(f"result, replay {seed}")
    return wrong


def compiled_variants() -> int:
    """How many variants of the Triton kernels this process has compiled or loaded; 0 under the
    interpreter.
    """
    count = 0
    for op in RUNS:
        module = importlib.import_module(f"slicefine_kernels.{op}")
        for value in vars(module).values():
            count += sum(
                len(caches[0]) for caches in getattr(value, "device_caches", {}).values()
            )
    return count


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Inside, a torch call that waits for the device raises RuntimeError."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def move_row(
    run: Callable[[Buffers], Any], shape: tuple[int, int, int], device: str
) -> dict[str, Any]:
    """A call, new positions in place, a call: compilations and waits between."""
    buffers, new = fresh(0, *shape, device), fresh(1, *shape, device)
    run(buffers)
    before = compiled_variants()
    with no_waiting(device):
        for name in ("rows", "cols"):
            buffers[name].copy_(new[name])
        run(buffers)
        # other addresses
        run(new)
    added = compiled_variants() - before
    return {"recompiled": added, "ok": added == 0}


def streams_differ(shape: tuple[int, int, int], device: str) -> bool:
    """slice_grad on two streams at once, twenty times each, against one after the other."""
    data = [fresh(seed, *shape, device) for seed in (0, 1)]
    alone = [run_slice_grad(b) for b in data]
    if device != "cuda":
        return not all(
            torch.equal(run_slice_grad(b), a) for b, a in zip(data, alone, strict=True)
        )
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in data], ([], [])
    for _ in range(20):
        for stream, b, results in zip(streams, data, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(run_slice_grad(b))
    torch.cuda.synchronize()
    return not all(
        torch.equal(f, a) for results, a in zip(found, alone, strict=True) for f in results
    )


def step_waits(moves: bool, device: str) -> str:
    """Whether a whole training step waits for the device; the CPU's part of a move may."""
    net = get_slice_model(
        nn.Sequential(nn.Linear(64, 64)).to(device),
        SliceConfig(r=16, switch_interval=1 if moves else None),
    )
    optimizer, x = SliceAdamW(net.parameters()), torch.randn(8, 64, device=device)

    def step() -> None:
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    try:
        with no_waiting(device):
            step()
    except RuntimeError as error:
        return f"yes: {str(error).splitlines()[0]}"
    return "no"


def graphs(job: Job, name: str = "triton") -> None:
    """Capture and replay, moves, waits and streams, op by op."""
    if not available(job, name):
        return
    shape = (70, 40, 33) if job.small else (8192, 1024, 512)
    with ops.use_backend(name):
        for op, run in RUNS.items():
            with job.attempt(backend=name, op=op, what="replay equals eager"):
                wrong = replay_differs(run, shape, job.device)
                job.row(
                    backend=name,
                    op=op,
                    what="replay equals eager",
                    wrong=", ".join(wrong),
                    ok=not wrong,
                )
            with job.attempt(backend=name, op=op, what="move"):
                job.row(
                    backend=name, op=op, what="move", **move_row(run, shape, job.device)
                )
        with job.attempt(backend=name, op="slice_grad", what="two streams"):
            job.row(
                backend=name,
                op="slice_grad",
                what="two streams",
                ok=not streams_differ(shape, job.device),
            )
        for moves in (False, True):
            what = f"a whole training step waits, {'with' if moves else 'without'} a move"
            with job.attempt(backend=name, op="SliceAdamW", what=what):
                job.row(
                    backend=name,
                    op="SliceAdamW",
                    what=what,
                    answer=step_waits(moves, job.device),
                )


def graphs_cuda(job: Job) -> None:
    graphs(job, "cuda")
