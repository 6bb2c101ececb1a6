"""The optimizer's share: SliceAdamW over many layers beside torch.optim.AdamW(foreach=True) with
copy-back on the same slices.

python -m benchmarks.updates [--json FILE] [--layers 100] [--device cuda]

"op" is one call of `ops.slice_adamw`, "step" all of SliceAdamW.step (gradients found, steps
counted, moves due). Copy-back is what torch's optimizer needs after each step: ``weight[:, S] =
master`` for every layer. All run in turns; a speedup is the median over the rounds of (torch's time
/ ours), its p20 and p80 beside it. The weights must agree before anything is timed.
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

from benchmarks.record import quantiles, where
from slicefine import SliceAdamW, SliceConfig, get_slice_model, ops
from slicefine.backends.operands import AdamWOptions, AdamWSlice
from slicefine.model import named_slice_layers
from slicefine.slices import write_slice

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class CopyBack:
    """torch.optim.AdamW on float32 copies of the slices, each copied back into its weight. options:
    foreach, fused, capturable.
    """

    def __init__(
        self,
        weights: list[Tensor],
        indices: list[tuple[Tensor | None, Tensor | None]],
        masters: list[Tensor],
        **options: bool,
    ) -> None:
        self.weights, self.indices = weights, indices
        self.masters = [nn.Parameter(master.detach().clone()) for master in masters]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=1e-3, weight_decay=0.0, **(options or {"foreach": True})
        )

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        for weight, (rows, cols), master in zip(
            self.weights, self.indices, self.masters, strict=True
        ):
            write_slice(weight, rows, cols, master.to(weight.dtype))


def seconds(function: Any, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    layers: int,
    features: int,
    dtype: str,
    slice_type: str,
    r: int,
    device: str,
    rounds: int,
) -> dict[str, Any]:
    """One row. Raises AssertionError if the two optimizers' weights differ after three steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(features, features, bias=False) for _ in range(layers))
    ).to(device, DTYPES[dtype])
    get_slice_model(
        model,
        SliceConfig(r=r, slice_type=slice_type, switch_interval=None, exclude_modules=None),
    )
    slices = [layer for _, layer in named_slice_layers(model)]
    ours = SliceAdamW(model.parameters(), lr=1e-3)
    theirs = CopyBack(
        [layer.weight.detach().clone() for layer in slices],
        [(layer.rows, layer.cols) for layer in slices],
        [layer.slice_weight for layer in slices],
    )
    for layer, master in zip(slices, theirs.masters, strict=True):
        layer.slice_weight.grad = torch.randn_like(layer.slice_weight)
        master.grad = layer.slice_weight.grad.clone()
    for _ in range(3):
        ours.step()
        theirs.step()
    for layer, weight in zip(slices, theirs.weights, strict=True):
        torch.testing.assert_close(layer.weight, weight)
    states = [ours.state[layer.slice_weight] for layer in slices]
    operands = [
        AdamWSlice(
            master=layer.slice_weight.detach(),
            grad=layer.slice_weight.grad,
            exp_avg=state["exp_avg"],
            exp_avg_sq=state["exp_avg_sq"],
            weight=layer.weight,
            rows=layer.rows,
            cols=layer.cols,
            step=state["step"],
        )
        for layer, state in zip(slices, states, strict=True)
    ]
    options = AdamWOptions(1e-3, 0.9, 0.999, 1e-8, 0.0)
    functions = {
        "op": lambda: ops.slice_adamw(operands, options),
        "step": ours.step,
        "foreach": theirs.step,
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 2):
        for name, function in functions.items():
            passed = seconds(function, device == "cuda")
            if i >= 2:
                times[name].append(1e3 * passed)
    row: dict[str, Any] = {
        "layers": layers,
        "in": features,
        "out": features,
        "dtype": dtype,
        "slice_type": slice_type,
        "r": r,
        "device": device,
        "rounds": rounds,
        "foreach_ms": quantiles(times["foreach"])[1],
    }
    for name in ("op", "step"):
        p20, p50, p80 = quantiles(
            [b / a for a, b in zip(times[name], times["foreach"], strict=True)]
        )
        row |= {
            f"{name}_ms": quantiles(times[name])[1],
            f"{name}_speedup": p50,
            f"{name}_p20": p20,
            f"{name}_p80": p80,
        }
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=("cpu", "cuda"),
    )
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows = []
    for dtype in DTYPES:
        for slice_type in ("column", "row"):
            for r in (8, 16):
                row = compare(
                    options.layers,
                    options.features,
                    dtype,
                    slice_type,
                    r,
                    options.device,
                    options.rounds,
                )
                rows.append(row)
                times = "; ".join(
                    f"{name} {row[name + '_ms']:.2f} ms, {row[name + '_speedup']:.2f}x"
                    f" ({row[name + '_p20']:.2f}-{row[name + '_p80']:.2f})"
                    for name in ("op", "step")
                )
                print(
                    f"{dtype} {slice_type:<7}r={r:<3} foreach + copy-back {row['foreach_ms']:.2f}"
                    f" ms; {times}",
                    flush=True,
                )
                if options.json:
                    options.json.write_text(
                        json.dumps({"where": where(options.device), "rows": rows}, indent=1)
                        + "\n"
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
