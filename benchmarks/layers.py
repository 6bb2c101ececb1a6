"""One layer, forward + backward + update: slices beside the frozen baseline, the masked baseline,
dense AdamW and LoRA.

python -m benchmarks.layers --json FILE [--quick] [--device cuda]

All methods of a shape run in turns within one process, one thread; a ratio is the median over the
rounds of (a method's time / the floor's time of the same round), so drift of the machine's speed
cancels. Each row is {"in", "out", "tokens", "dtype", "r", "method", "device", "median_ms",
"p20_ms", "p80_ms", "ratio_to_floor", "ratio_p20", "ratio_p80", ...}. Before anything is timed the
slice's weight after two steps is compared with the masked baseline's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods import Method, MissingPeerError, prepare
from benchmarks.record import quantiles, where

METHODS = {
    "floor": Method("floor", "floor"),
    "slice": Method("slice", "slice"),
    "slice_bwd": Method("slice_bwd", "slice", in_bwd=True),
    "masked": Method("masked", "masked"),
    "dense": Method("dense", "dense"),
    "lora": Method("lora", "lora"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (in, out)
CPU_SHAPES = ((1024, 1024), (1024, 4096), (4096, 1024))
GPU_SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))


class LayerStep:
    """One layer with a method on it; ``step(x, dy)`` is forward, backward for x and the trained
    part, and the update.
    """

    def __init__(self, method: Method, linear: nn.Linear, r: int) -> None:
        """linear: a template, of which every method trains a copy."""
        layer = nn.Sequential(
            nn.Linear(linear.in_features, linear.out_features, bias=False)
        )
        layer.to(linear.weight.device, linear.weight.dtype)
        layer.load_state_dict({"0.weight": linear.weight})
        self.prepared = prepare(method, layer, ["0"], r=r, lr=1e-3, wrap=False)
        self.layer = self.prepared.model

    def step(self, x: Tensor, dy: Tensor) -> None:
        self.layer(x).backward(dy)
        x.grad = None
        self.prepared.update()


def agreement(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype, r: int, device: str
) -> float:
    """Largest difference of the slice's weight after two steps, slice and slice_bwd against the
    masked baseline in float32.

    Raises AssertionError if it is more than two roundings of the weight's dtype: no speed without
    green.
    """
    torch.manual_seed(1)
    linear = nn.Linear(*shape, bias=False).to(device, dtype)
    x, dy = (
        torch.randn(tokens, shape[0], device=device).to(dtype).requires_grad_(),
        torch.randn(tokens, shape[1], device=device).to(dtype),
    )
    precise = LayerStep(METHODS["masked"], nn.Linear(*shape, bias=False).to(device), r)
    precise.layer.load_state_dict({"0.weight": linear.weight.float()})
    exact_x = x.detach().float().requires_grad_()
    for _ in range(2):
        precise.step(exact_x, dy.float())
    truth, worst = precise.layer.state_dict()["0.weight"], 0.0
    for method in ("slice", "slice_bwd"):
        ours = LayerStep(METHODS[method], linear, r)
        for _ in range(2):
            ours.step(x, dy)
        found = ours.layer.state_dict()["0.weight"]
        assert torch.equal(found[:, r:], linear.weight[:, r:]), (
            f"{method} wrote outside its slice"
        )
        difference = (found.float() - truth)[:, :r].abs()
        worst = max(worst, difference.max().item())
        # Adam's first steps are +-lr whatever the gradient's size: entries with a gradient near 0
        # may differ in sign
        bound = 2 * torch.finfo(dtype).eps * linear.weight.abs().max().item() + 1e-5
        share = (difference > bound).float().mean().item()
        assert share < 1e-3, (
            f"{method}: {share:.2%} of the slice differs from the masked baseline by more than"
            f" {bound:.1e}"
        )
    return worst


def measure(
    layers: dict[str, LayerStep], x: Tensor, dy: Tensor, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each layer in each round; the order turns from round to round, caches
    are flushed on a GPU.
    """
    cuda = x.is_cuda
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device=x.device) if cuda else None
    times: dict[str, list[float]] = {name: [] for name in layers}
    names = list(layers)
    for i in range(rounds + 2):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if flush is not None:
                flush.zero_()
                begin, end = (
                    torch.cuda.Event(enable_timing=True),
                    torch.cuda.Event(enable_timing=True),
                )
                # the flush still runs: what follows is queued behind it, so a launch's latency is
                # not timed
                begin.record()
                layers[name].step(x, dy)
                end.record()
                torch.cuda.synchronize()
                passed = begin.elapsed_time(end)
            else:
                start = time.perf_counter()
                layers[name].step(x, dy)
                passed = 1e3 * (time.perf_counter() - start)
            # the first rounds allocate and warm up
            if i >= 2:
                times[name].append(passed)
    return times


def rows_for(
    shape: tuple[int, int],
    tokens: int,
    dtype: str,
    r: int,
    device: str,
    methods: tuple[str, ...],
    rounds: int,
) -> list[dict[str, Any]]:
    """The rows of one shape, dtype and r; {"method", "absent": why, ...} for a peer that is not
    installed.

    Raises AssertionError if the slice does not train as the masked baseline does.
    """
    difference = agreement(shape, tokens, DTYPES[dtype], r, device)
    torch.manual_seed(0)
    linear = nn.Linear(*shape, bias=False).to(device, DTYPES[dtype])
    x = torch.randn(tokens, shape[0], device=device).to(DTYPES[dtype]).requires_grad_()
    dy = torch.randn(tokens, shape[1], device=device).to(DTYPES[dtype])
    layers, absent = {}, {}
    for method in methods:
        try:
            layers[method] = LayerStep(METHODS[method], linear, r)
        except MissingPeerError as error:
            absent[method] = str(error)
    times = measure(layers, x, dy, rounds)
    rows = []
    for method in methods:
        if method in absent:
            place = {
                "in": shape[0],
                "out": shape[1],
                "tokens": tokens,
                "dtype": dtype,
                "r": r,
            }
            rows.append(
                {**place, "method": method, "device": device, "absent": absent[method]}
            )
            continue
        p20, p50, p80 = quantiles(times[method])
        ratios = quantiles(
            [t / f for t, f in zip(times[method], times["floor"], strict=True)]
        )
        rows.append(
            {
                "in": shape[0],
                "out": shape[1],
                "tokens": tokens,
                "dtype": dtype,
                "r": r,
                "method": method,
                "device": device,
                "median_ms": p50,
                "p20_ms": p20,
                "p80_ms": p80,
                "ratio_to_floor": ratios[1],
                "ratio_p20": ratios[0],
                "ratio_p80": ratios[2],
                "rounds": rounds,
                "difference_to_masked": difference,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line per shape, dtype and r: the ratio to the floor of each method."""
    lines, groups = [], {}
    for row in rows:
        groups.setdefault(
            (row["in"], row["out"], row["tokens"], row["dtype"], row["r"]), []
        ).append(row)
    for (n_in, n_out, tokens, dtype, r), members in groups.items():
        floor = next(m for m in members if m["method"] == "floor")
        cells = [
            (
                f"{m['method']}: {m['absent']}"
                if "absent" in m
                else (
                    f"{m['method']} {m['ratio_to_floor']:.3f}"
                    f" ({m['ratio_p20']:.2f}-{m['ratio_p80']:.2f})"
                )
            )
            for m in members
            if m is not floor
        ]
        lines.append(
            f"{n_in}x{n_out} n={tokens} {dtype} r={r}: floor {floor['median_ms']:.2f} ms; "
            + ", ".join(cells)
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=("cpu", "cuda"),
    )
    parser.add_argument("--tokens", type=int, help="default: 2048 on a CPU, 8192 on a GPU")
    parser.add_argument("--r", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    cpu = options.device == "cpu"
    if cpu:
        torch.set_num_threads(1)
    methods = tuple(dict.fromkeys(["floor", *options.methods]))
    shapes = CPU_SHAPES if cpu else GPU_SHAPES
    tokens = options.tokens or (2048 if cpu else 8192)
    rounds = options.rounds or (5 if options.quick else 21 if cpu else 50)
    rows: list[dict[str, Any]] = []
    for shape in shapes[: 1 if options.quick else None]:
        for dtype in options.dtype:
            for r in options.r:
                rows += rows_for(shape, tokens, dtype, r, options.device, methods, rounds)
                print(table(rows[-len(methods) :]), flush=True)
                if options.json:
                    options.json.write_text(
                        json.dumps({"where": where(options.device), "rows": rows}, indent=1)
                        + "\n"
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
