"""One layer's forward, backward and update against the frozen baseline and the peers:
`benchmarks.layers` on this machine.
"""

from __future__ import annotations

from typing import Any

from benchmarks import layers as layer_benchmark
from benchmarks.gpu.correctness import backends
from benchmarks.gpu.job import Job, bar
from slicefine import ops

SHOWN = (
    "in",
    "out",
    "tokens",
    "dtype",
    "r",
    "method",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "ratio_to_floor",
    "absent",
)
OURS = ("slice", "slice_bwd")


def bars_of(rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """The bar of one shape's rows: ours over the floor, and how much longer the peers take."""
    ratios = {row["method"]: row["ratio_to_floor"] for row in rows if "absent" not in row}
    found = []
    for ours in OURS:
        found.append(
            bar(f"{what}: {ours} / frozen baseline", ratios[ours], 1.05, most=True)
        )
        for peer, least in (("masked", 1.6), ("lora", 1.2)):
            if peer in ratios:
                found.append(
                    bar(
                        f"{what}: {peer} / {ours}",
                        ratios[peer] / ratios[ours],
                        least,
                        most=False,
                    )
                )
    return found


def layers(job: Job) -> None:
    """The shape of the bar first (4096 x 4096, 8,192 tokens, bf16), then Llama's wide ones, then
    other r and float32.
    """
    tokens, rounds = (32, 2) if job.small else (8192, 50)
    cases = (
        [((48, 64), "bf16", 8)]
        if job.small
        else [
            ((4096, 4096), "bf16", 16),
            ((4096, 4096), "bf16", 8),
            ((4096, 14336), "bf16", 16),
            ((14336, 4096), "bf16", 16),
            ((4096, 4096), "bf16", 64),
            ((4096, 4096), "fp16", 16),
            ((4096, 4096), "fp32", 16),
        ]
    )
    names = backends(job)
    tasks = [(case, name) for case in cases for name in names]
    for (shape, dtype, r), name in job.within_time(tasks, 6.0):
        methods = tuple(layer_benchmark.METHODS) if name == names[0] else ("floor", *OURS)
        label = {"backend": name}
        with job.attempt(**label, shape=shape, dtype=dtype, r=r), ops.use_backend(name):
            rows = layer_benchmark.rows_for(
                shape, tokens, dtype, r, job.device, methods, rounds
            )
            for row in rows:
                job.row(**label, **{key: row[key] for key in SHOWN if key in row})
            if job.small or (shape == (4096, 4096) and dtype == "bf16" and r <= 16):
                what = f"layer step {shape[0]} x {shape[1]}, {tokens} tokens, {dtype}, r={r}, {name}"
                job.bars += bars_of(rows, what)
