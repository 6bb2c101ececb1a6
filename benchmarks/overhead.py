"""What a layer costs beside its arithmetic: many layers too small for the arithmetic to count.

python -m benchmarks.overhead [--json FILE] [--rounds 31]

210 layers of 64 x 64, r = 8, 4 tokens, one thread. A forward without gradients, and a forward and
backward, are ratios to frozen nn.Linear; a step is one to torch's fused AdamW on tensors of the
slices' size, which trains no weight. All of a group run in turns, and a ratio is the median over
the rounds of (time / base's time of the same round); times are of this process on its core, which
other programs take less part in than in those of the wall. Before anything is timed a slice trains
as the masked baseline does (`benchmarks.layers.agreement`).

To measure another commit, run this file with that checkout on PYTHONPATH (its root and kernels/).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layers import agreement
from benchmarks.record import quantiles, where
from slicefine import SliceAdamW, SliceConfig, get_slice_model

LAYERS, WIDTH, TOKENS, R = 210, 64, 4, 8
KINDS = ("column", "row", "block", "row_column")
# steps between two moves in the case that moves
INTERVAL = 10


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])


def sliced(kind: str, interval: int | None = None) -> Any:
    config = SliceConfig(
        r=R,
        slice_type=kind,
        contiguous=True,
        switch_interval=interval,
        target_modules=r"\d+",
    )
    return get_slice_model(stack(), config)


def forwards() -> dict[str, Callable[[], None]]:
    """A forward pass without gradients: the frozen layers, then each kind of slice."""
    x = torch.randn(TOKENS, WIDTH)

    def run(model: nn.Module) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad():
                model(x)

        return forward

    frozen = stack().requires_grad_(False)
    return {"nn.Linear": run(frozen), **{kind: run(sliced(kind)) for kind in KINDS}}


def trainings() -> dict[str, Callable[[], None]]:
    """Forward and backward for the input and the slices."""
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    dy = torch.randn(TOKENS, WIDTH)

    def run(model: nn.Module) -> Callable[[], None]:
        return lambda: model(x).backward(dy)

    frozen = stack().requires_grad_(False)
    return {"nn.Linear": run(frozen), **{kind: run(sliced(kind)) for kind in KINDS}}


class Steps:
    """``step()`` of an optimizer, with the model and the gradients that it needs."""

    def __init__(self, model: Any, make: Callable[[list[Tensor]], Any]) -> None:
        # an optimizer keeps no model alive
        self.model = model
        slices = [p for p in model.parameters() if p.requires_grad]
        for p in slices:
            p.grad = torch.randn_like(p)
        self.optimizer = make(slices)
        # the guard judges the first steps
        for _ in range(5):
            self.optimizer.step()

    def step(self) -> None:
        self.optimizer.step()


def steps() -> dict[str, Callable[[], None]]:
    """The optimizers' steps."""
    fused = lambda slices: torch.optim.AdamW(slices, lr=1e-3, fused=True)
    plain = nn.ParameterList(torch.zeros(WIDTH, R) for _ in range(LAYERS))
    made = {"torch AdamW, no slices": Steps(plain, fused)}
    for kind in ("column", "row_column"):
        made[kind] = Steps(sliced(kind), SliceAdamW)
    made["column, 8 bits"] = Steps(sliced("column"), lambda s: SliceAdamW(s, optim_bits=8))
    made[f"column, moves every {INTERVAL}"] = Steps(sliced("column", INTERVAL), SliceAdamW)
    made["column, torch AdamW"] = Steps(sliced("column"), fused)
    return {name: one.step for name, one in made.items()}


GROUPS = {
    "forward": forwards,
    "forward and backward": trainings,
    "step": steps,
}


def measure(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, the order turning from round to round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds + 2):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.thread_time()
            calls[name]()
            passed = 1e3 * (time.thread_time() - start)
            if i >= 2:
                times[name].append(passed)
    return times


def rows_of(group: str, rounds: int) -> list[dict[str, Any]]:
    calls = GROUPS[group]()
    times = measure(calls, rounds)
    base = next(iter(calls))
    rows = []
    for name, found in times.items():
        low, middle, high = quantiles(
            [t / b for t, b in zip(found, times[base], strict=True)]
        )
        rows.append(
            {
                "group": group,
                "case": name,
                "base": base,
                "median_ms": quantiles(found)[1],
                "least_ms": min(found),
                "ratio": middle,
                "ratio_p20": low,
                "ratio_p80": high,
                "rounds": rounds,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=list(GROUPS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    agreement((WIDTH, WIDTH), TOKENS, torch.float32, R, "cpu")
    rows: list[dict[str, Any]] = []
    for group in options.group:
        for row in rows_of(group, options.rounds):
            rows.append(row)
            print(
                f"{row['group']:21} {row['case']:24} {row['least_ms']:6.2f} ms at least,"
                f" {row['ratio']:.2f} ({row['ratio_p20']:.2f}-{row['ratio_p80']:.2f})"
                f" of {row['base']}",
                flush=True,
            )
    if options.json:
        found = {"where": where("cpu"), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
