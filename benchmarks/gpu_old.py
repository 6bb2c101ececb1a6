"""`make gpu`: every kernel against the oracle on a GPU, then timings. One command, no network, no compiler.

Writes benchmarks/results/gpu-<device>.json after every part, so that a part that fails or is cut off loses nothing before it;
also to $OUT where that is set. Exit status 1 if a part failed. --device cpu runs the same parts small, through Triton's
interpreter, which is how this file is tested.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicefine import SliceAdamW, SliceConfig, get_slice_model, ops, reference

RESULTS = Path(__file__).parent / "results"
ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def environment(device: str) -> dict[str, Any]:
    import triton

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS.parent
    )
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"
    return {
        "device": name, "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown", "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


# -- correctness ------------------------------------------------------------------------------------------------------


def gradient_errors(device: str, small: bool) -> dict[str, Any]:
    """slice_grad against float64: its error as a multiple of plain PyTorch's in the same precision; at most 2 passes."""
    shapes = [(1, 5, 3), (63, 129, 1), (65, 100, 17)]
    if not small:
        shapes += [(0, 64, 16), (8192, 4096, 16), (4097, 1000, 64), (2048, 512, 256), (8192, 16, 4096)]
    rows = []
    for name, dtype in DTYPES.items():
        for n, out, width in shapes:
            for gather in (False, True):
                dy, x = torch.randn(n, out, device=device).to(dtype), torch.randn(n, width, device=device).to(dtype)
                index = torch.randperm(out, device=device)[: max(1, out // 3)] if gather else None
                exact = reference.slice_grad(dy.double(), x.double(), index)
                chosen = dy if index is None else dy[:, index]
                plain = (chosen.t().float() @ x.float()).double()
                with ops.use_backend("triton"):
                    found, again = (ops.slice_grad(dy, x, index) for _ in range(2))
                error, allowed = (found.double() - exact).abs().max().item(), (plain - exact).abs().max().item()
                bound = 2 * allowed + 1e-6 * exact.abs().max().item()
                rows.append(
                    {
                        "dtype": name,
                        "shape": [n, out, width],
                        "gather": gather,
                        "error": error,
                        "bound": bound,
                        "repeatable": torch.equal(found, again),
                        "ok": error <= bound and torch.equal(found, again),
                    }
                )
    return {"rows": rows, "ok": all(r["ok"] for r in rows)}


def update_errors(device: str, small: bool) -> dict[str, Any]:
    """slice_adamw and slice_grad_adamw against float64; nothing outside the slice may change."""
    out, width, n, rows = (33, 40, 20, []) if small else (1000, 1031, 512, [])
    for name, dtype in DTYPES.items():
        for kind in ("column", "row", "block"):
            for seed in (None, 1234567):
                index_r = None if kind == "column" else torch.arange(3, 20, device=device)
                index_c = None if kind == "row" else torch.randperm(width, device=device)[:7]
                R, K = out if index_r is None else 17, width if index_c is None else 7
                dy, x = torch.randn(n, out, device=device).to(dtype), torch.randn(n, K, device=device).to(dtype)
                start = [
                    torch.randn(R, K, device=device),
                    0.1 * torch.randn(R, K, device=device),
                    0.1 * torch.rand(R, K, device=device),
                ]
                weight, step = torch.randn(out, width, device=device).to(dtype), torch.tensor(3.0, device=device)
                for fused in (False, True):
                    state, w = [t.clone() for t in start], weight.clone()
                    exact, scratch = [t.double() for t in start], weight.double()
                    reference.slice_grad_adamw(
                        dy.double(), x.double(), *exact, scratch, index_r, index_c, step, *ADAMW.values(), False, None
                    )
                    with ops.use_backend("triton"):
                        if fused:
                            ops.slice_grad_adamw(dy, x, *state, w, index_r, index_c, step, *ADAMW.values(), False, seed)
                        else:
                            grad = reference.slice_grad(dy.double(), x.double(), index_r).float()
                            ops.slice_adamw(
                                [state[0]],
                                [grad],
                                [state[1]],
                                [state[2]],
                                [w],
                                [index_r],
                                [index_c],
                                [step],
                                *ADAMW.values(),
                                False,
                                seed,
                            )
                    error = max((a.double() - b).abs().max().item() for a, b in zip(state, exact, strict=True))
                    written = reference.read_slice(w, index_r, index_c)
                    right = torch.equal(
                        written, reference.round_to(state[0], dtype, seed if dtype == torch.bfloat16 else None, 0)
                    )
                    outside = torch.ones(weight.shape, dtype=torch.bool, device=device)
                    reference.write_slice(outside, index_r, index_c, torch.zeros(R, K, dtype=torch.bool, device=device))
                    kept = torch.equal(w[outside], weight[outside])
                    rows.append(
                        {
                            "dtype": name,
                            "slice": kind,
                            "stochastic": seed is not None,
                            "fused": fused,
                            "error": error,
                            "written": right,
                            "outside_kept": kept,
                            "ok": error < 5e-4 and right and kept,
                        }
                    )
    return {"rows": rows, "ok": all(r["ok"] for r in rows)}


def training_runs(device: str, small: bool) -> dict[str, Any]:
    """Losses of a small net trained by triton, by optimizer_in_bwd and by the reference; moves included."""
    width, steps, rows = (24, 6, []) if small else (256, 60, [])

    def run(kind: str, backend: str, in_bwd: bool) -> list[float]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)).to(device)
        model = get_slice_model(net, SliceConfig(r=8, slice_type=kind, switch_interval=5))
        optimizer = SliceAdamW(model.parameters(), lr=1e-3, optimizer_in_bwd=in_bwd)
        x, y, losses = torch.randn(64, width, device=device), torch.randn(64, width, device=device), []
        with ops.use_backend(backend):
            for _ in range(steps):
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses

    for kind in ("column", "row", "block", "row_column"):
        oracle = run(kind, "reference", False)
        for in_bwd in (False, True):
            found = run(kind, "triton", in_bwd)
            difference = max(abs(a - b) for a, b in zip(oracle, found, strict=True))
            rows.append({"slice": kind, "in_bwd": in_bwd, "max_loss_difference": difference, "ok": difference < 1e-4})
    return {"rows": rows, "ok": all(r["ok"] for r in rows)}


# -- speed ------------------------------------------------------------------------------------------------------------


def milliseconds(functions: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, list[float]]:
    """p20, p50 and p80 of each function, in turns, with the second-level cache flushed before each."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    flush = torch.empty(64 * 2**20 if device == "cuda" else 1, dtype=torch.int32, device=device)
    for i in range(repeats + 3):
        for name, function in functions.items():
            flush.zero_()
            if device == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                function()
                end.record()
                torch.cuda.synchronize()
                passed = begin.elapsed_time(end)
            else:
                start = time.perf_counter()
                function()
                passed = 1e3 * (time.perf_counter() - start)
            if i >= 3:
                times[name].append(passed)
    return {name: [float(torch.tensor(t).quantile(q)) for q in (0.2, 0.5, 0.8)] for name, t in times.items()}


def kernel_times(device: str, small: bool) -> dict[str, Any]:
    """slice_grad against the bytes it must read, and beside torch's matrix product."""
    n, out, rows = (32, 64, []) if small else (8192, 4096, [])
    for r in (1, 16, 64, 256):
        r = min(r, out)
        dtype = torch.bfloat16
        dy, x = torch.randn(n, out, device=device).to(dtype), torch.randn(n, r, device=device).to(dtype)
        times = milliseconds(
            {"triton": lambda dy=dy, x=x: _forced("triton", dy, x), "torch": lambda dy=dy, x=x: dy.t() @ x},
            device,
            2 if small else 30,
        )
        size = 2 * n * (out + r) + 4 * out * r
        rows.append({"n": n, "out": out, "r": r, "ms": times, "gigabytes_per_second": size / 1e6 / times["triton"][1]})
    return {"rows": rows, "ok": True}


def _forced(backend: str, dy: Tensor, x: Tensor) -> Tensor:
    with ops.use_backend(backend):
        return ops.slice_grad(dy, x)


def layer_times(device: str, small: bool) -> dict[str, Any]:
    """Forward, backward and update of one layer: frozen floor, slices both ways, and the full gradient."""
    n, width = (32, 64) if small else (8192, 4096)
    dtype, rows = torch.bfloat16, []
    x = torch.randn(n, width, device=device).to(dtype).requires_grad_(True)
    dy = torch.randn(n, width, device=device).to(dtype)

    def make(**options: Any) -> tuple[nn.Module, SliceAdamW]:
        net = get_slice_model(
            nn.Sequential(nn.Linear(width, width, bias=False)).to(device, dtype),
            SliceConfig(switch_interval=None, **options),
        )
        return net, SliceAdamW(net.parameters())

    frozen = nn.Linear(width, width, bias=False).to(device, dtype).requires_grad_(False)
    full = nn.Linear(width, width, bias=False).to(device, dtype)
    dense = (
        torch.optim.AdamW(full.parameters(), fused=True) if device == "cuda" else torch.optim.AdamW(full.parameters())
    )

    def step(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        model(x).backward(dy)
        x.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    functions: dict[str, Callable[[], Any]] = {
        "frozen": lambda: step(frozen, None),
        "full AdamW": lambda: step(full, dense),
    }
    for kind in ("column", "row"):
        for r in (16, 64):
            net, optimizer = make(r=min(r, width), slice_type=kind)
            functions[f"{kind} r={r}"] = lambda net=net, optimizer=optimizer: step(net, optimizer)
    net = get_slice_model(
        nn.Sequential(nn.Linear(width, width, bias=False)).to(device, dtype), SliceConfig(r=16, switch_interval=None)
    )
    in_bwd = SliceAdamW(net.parameters(), optimizer_in_bwd=True)
    functions["column r=16, optimizer_in_bwd"] = lambda: step(net, in_bwd)
    times = milliseconds(functions, device, 2 if small else 30)
    for name, quantiles in times.items():
        rows.append({"method": name, "ms": quantiles, "ratio_to_frozen": quantiles[1] / times["frozen"][1]})
    return {"n": n, "width": width, "rows": rows, "ok": True}


PARTS = (gradient_errors, update_errors, training_runs, kernel_times, layer_times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: `make gpu` needs one (torch.cuda.is_available() is False)", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"environment": environment(options.device), "parts": {}}
    path = options.results / f"gpu-{report['environment']['device'].replace(' ', '-').replace('/', '-')}.json"
    options.results.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        start = time.perf_counter()
        torch.manual_seed(0)
        try:
            result = part(options.device, options.device == "cpu")
        except Exception:
            result = {"ok": False, "error": traceback.format_exc()}
            print(result["error"], file=sys.stderr)
        report["parts"][part.__name__] = {**result, "seconds": time.perf_counter() - start}
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if os.environ.get("OUT"):
            shutil.copy(path, os.environ["OUT"])
        wrong = [row for row in result.get("rows", ()) if not row.get("ok", True)]
        print(
            f"{part.__name__:<18}{'ok' if result['ok'] else 'FAILED':<8}{time.perf_counter() - start:6.1f} s",
            *wrong[:5],
            sep="\n  ",
            flush=True,
        )
    for name in ("kernel_times", "layer_times"):
        for row in report["parts"][name].get("rows", ()):
            print(row)
    print(f"written: {path}")
    return 0 if all(part["ok"] for part in report["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
