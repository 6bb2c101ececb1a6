"""Methods measured in turns, and the rows that come of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods import Method
from benchmarks.record import quantiles
from benchmarks.speed.registry import Case
from slicefine import track_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what a row's ratios are to; "base" is the case's first method
RATIOS = {"floor": "frozen floor", "masked": "masked gradient", "column": "slice column"}
# every row has these; a value that does not apply is None
KEYS = (
    "part",
    "case",
    "method",
    "measures",
    "axis",
    "dtype",
    "tokens",
    "length",
    "in",
    "out",
    "depth",
    "width",
    "r",
    "targets",
    "equal",
    "trainable",
    "mode",
    "device",
    "device_type",
    "threads",
    "torch",
    "triton",
    "python",
    "peft",
    "commit",
    "date",
    "backend",
    "rounds",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "cpu_p20_ms",
    "cpu_p50_ms",
    "cpu_p80_ms",
    "base",
    *(
        f"{clock}ratio_to_{b}{q}"
        for clock in ("", "cpu_")
        for b in (*RATIOS, "base")
        for q in ("", "_p20", "_p80")
    ),
    "roofline_share",
    "peak_bytes",
)


@dataclass
class Contestant:
    """step(): what is timed. repeats: steps that one call makes. held(): tensors that count as its
    memory before a step.

    nbytes, flops: what the call cannot do without, for shares of the roofline.
    """

    step: Callable[[], Any]
    trainable: int = 0
    held: Callable[[], Iterable[Tensor]] = tuple
    repeats: int = 1
    nbytes: int | None = None
    flops: int | None = None


Times = dict[str, list[float]]


def measure(
    contestants: dict[str, Contestant],
    device: str,
    seconds: float,
    min_rounds: int,
    max_rounds: int,
    flush: bool,
    warmup: int = 1,
) -> tuple[Times, Times]:
    """Milliseconds of each contestant in each round, by the wall clock and, on a CPU, of this
    process on its core.

    The order turns from round to round. On a shared machine the second clock does not run while
    another program has the core. flush: write 64 Mi bytes (256 on a GPU) before each call, so that
    operands come from memory and not from a cache.
    """
    cuda = device == "cuda"
    eraser = (
        torch.empty((256 if cuda else 64) * 2**20, dtype=torch.uint8, device=device)
        if flush or cuda
        else None
    )
    wall: Times = {name: [] for name in contestants}
    cpu: Times = {} if cuda else {name: [] for name in contestants}
    names = list(contestants)
    gc.collect()
    start = time.perf_counter()
    for i in range(warmup + max_rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            contestant = contestants[name]
            if eraser is not None:
                eraser.zero_()
            passed, worked = milliseconds(contestant.step, cuda)
            if i >= warmup:
                wall[name].append(passed / contestant.repeats)
                if not cuda:
                    cpu[name].append(worked / contestant.repeats)
        if i + 1 - warmup >= min_rounds and time.perf_counter() - start > seconds:
            break
    return wall, cpu


def milliseconds(step: Callable[[], Any], cuda: bool) -> tuple[float, float]:
    """By the wall clock (a GPU's own events) and by the process's."""
    if cuda:
        begin, end = (
            torch.cuda.Event(enable_timing=True),
            torch.cuda.Event(enable_timing=True),
        )
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), 0.0
    start, cpu = time.perf_counter(), time.process_time()
    step()
    worked = time.process_time() - cpu
    return 1e3 * (time.perf_counter() - start), 1e3 * worked


def peak_memory(contestant: Contestant, device: str) -> int:
    """Most bytes that one step holds at a time, weights and optimizer state included and other
    contestants left out.
    """
    own = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in contestant.held()
    }
    with track_memory(contestant.held(), device) as report:
        contestant.step()
    others = report.bytes_before - sum(own.values()) if device == "cuda" else 0
    return report.peak_bytes - others


def ratios(times: list[float], base: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of the rounds' ratios: drift of the machine's speed cancels
    within a round.
    """
    low, middle, high = quantiles([t / b for t, b in zip(times, base, strict=True)])
    return low, middle, high


def row_of(
    case: Case,
    method: Method,
    contestant: Contestant,
    times: tuple[Times, Times],
    peak: int | None,
    place: dict[str, Any],
    roofs: dict[str, float],
) -> dict[str, Any]:
    """One row. place: what `record.where` says, and the backend. roofs: bytes and flops per second
    of this machine.
    """
    wall = times[0]
    row: dict[str, Any] = dict.fromkeys(KEYS) | place
    row |= {
        "part": case.part,
        "case": case.name,
        "method": method.name,
        "measures": case.measures,
        "axis": case.axis,
        "dtype": case.dtype,
        "tokens": case.tokens,
        "in": case.in_features,
        "out": case.out_features,
        "length": case.length,
        "depth": case.depth,
        "width": case.width,
        "r": rank(case, method),
        "equal": method.equal,
        "trainable": contestant.trainable,
        "targets": (
            {"models": "all linears", "layers": "the layer", "moves": "all linears"}.get(
                case.part, "the slice"
            )
        ),
        "mode": "eager",
        "rounds": len(wall[method.name]),
        "base": case.base,
        "peak_bytes": peak,
    }
    if case.part == "models":
        row |= {"in": None, "out": None}
    for clock, found in zip(("", "cpu_"), times, strict=True):
        if not found:
            continue
        mine = found[method.name]
        row |= dict(
            zip(
                (f"{clock}p20_ms", f"{clock}p50_ms", f"{clock}p80_ms"),
                quantiles(mine),
                strict=True,
            )
        )
        for name, base in (*RATIOS.items(), ("base", case.base)):
            if base in found:
                key = f"{clock}ratio_to_{name}"
                row |= dict(
                    zip(
                        (f"{key}_p20", key, f"{key}_p80"),
                        ratios(mine, found[base]),
                        strict=True,
                    )
                )
    if contestant.nbytes is not None and contestant.flops is not None:
        needed = max(
            contestant.nbytes / roofs["bytes_per_s"],
            contestant.flops / roofs[f"flops_per_s_{case.dtype}"],
        )
        row["roofline_share"] = 1e3 * needed / row["p50_ms"]
    return row


def rank(case: Case, method: Method) -> int | None:
    """A case's r is that of every method that has one, where the case varies r; else the method has
    its own.
    """
    return (
        case.r
        if method.r is not None and (case.axis or case.part != "models")
        else method.r
    )


def roofs(device: str, bytes_to_copy: int = 2**28) -> dict[str, float]:
    """What this machine reaches: bytes per second of a long copy (read and write), flops per second
    of a square product.
    """
    cuda = device == "cuda"
    source = torch.zeros(bytes_to_copy, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = lambda step, repeats: (
        min(milliseconds(step, cuda)[0] for _ in range(repeats)) / 1e3
    )
    found = {"bytes_per_s": 2 * bytes_to_copy / best(lambda: target.copy_(source), 6)}
    size = 8192 if cuda else 768
    for name, dtype in DTYPES.items():
        a = torch.randn(size, size, device=device).to(dtype)
        found[f"flops_per_s_{name}"] = 2 * size**3 / best(lambda a=a: a @ a, 6)
    # torch's float16 product is far slower than a conversion to float32, so it is no roof
    if not cuda:
        found["flops_per_s_fp16"] = max(
            found["flops_per_s_fp16"], found["flops_per_s_fp32"]
        )
    return found
