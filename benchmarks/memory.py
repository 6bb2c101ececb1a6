"""Peak memory of a training step for every method, without a GPU: rows for machines, a table for
people.

python -m benchmarks.memory [--json FILE] [--model FOLDER_OR_ID ...] [--batch 4] [--seq 768]
[--quick] [--mode eager ...]

Rows: {"model", "method", "targets", "r", "peak_bytes", "weights", "activations", "gradients",
    "moments", "logits", "temporaries",
"mode", "trainable", "ratio_to_floor", ...}; mode is "eager", "checkpointing" or "compiled".
Estimates under fake tensors
(`slicefine.plan.estimate`); what they cannot see is in `slicefine.plan.estimate.UNSEEN`. "compiled"
counts the graphs that torch.compile's partitioner
makes, run operator by operator, each row by the ratio to a floor that is compiled too;
optimizer_in_bwd refuses to be compiled.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import where
from slicefine.integrations import peft
from slicefine.integrations.transformers import workload
from slicefine.plan import estimate as plan
from slicefine.plan.tracker import KINDS

MODELS = Path(__file__).parent / "models"
PAIR = ["q_proj", "v_proj"]
MODES = {
    "eager": lambda workload: workload,
    "checkpointing": plan.with_checkpointing,
    "compiled": plan.with_compile,
}


def methods(r: int, quick: bool) -> Iterator[plan.Method]:
    """Ours, and peft's at equal targets and rank, in its default precision (float32 adapters) and
    in the model's.
    """
    yield plan.floor()
    for targets in ["all-linear"] if quick else ["all-linear", PAIR]:
        yield plan.slices(r, targets=targets)
        yield plan.slices(r, targets=targets, in_bwd=True)
        yield plan.slices(r, "row", targets=targets)
        yield plan.masked(r, targets=targets)
        for name in ("LoRA",) if quick else ("LoRA", "LoRA-FA", "DoRA", "MiSS", "VeRA"):
            yield peft.method(name, r, targets)
            yield peft.method(name, r, targets, float32=False)
        if not quick:
            yield peft.method("IA3", r, targets)
    yield plan.full()


def rows(
    models: list[str],
    batch: int,
    length: int,
    r: int = 16,
    quick: bool = False,
    modes: Iterable[str] = tuple(MODES),
) -> Iterator[dict[str, Any]]:
    for model in models:
        for mode in modes:
            made = MODES[mode](workload(model, torch.bfloat16))
            floor = None
            for method in methods(r, quick):
                if made.compiled and "optimizer_in_bwd" in method.name:
                    continue
                row = plan.estimate(made, method, batch, length).row()
                floor = floor or row["peak_bytes"]
                yield {
                    **row,
                    "model": Path(model).name,
                    "dtype": "bf16",
                    "ratio_to_floor": row["peak_bytes"] / floor,
                }


def line(row: dict[str, Any]) -> str:
    parts = ", ".join(
        f"{kind} {row[kind] / 2**30:.2f}" for kind in KINDS if row[kind] >= 2**30 / 100
    )
    return (
        f"{row['model']:<14}{row['mode']:<14}{row['method']:<38}{row['targets']:<16}{row['trainable'] / 1e6:>9.1f}"
        f" M{row['peak_bytes'] / 2**30:>8.2f} GiB {row['ratio_to_floor']:.3f} of the floor: {parts}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", nargs="+", default=[str(MODELS / "llama-3.2-3b")])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=768)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="fewer methods")
    parser.add_argument("--mode", nargs="+", choices=tuple(MODES), default=list(MODES))
    options = parser.parse_args()
    warnings.filterwarnings(
        "ignore", category=FutureWarning
    )  # peft asks transformers by an old name
    found = []
    for row in rows(
        options.model, options.batch, options.seq, options.r, options.quick, options.mode
    ):
        found.append(row)
        print(line(row), flush=True)
        if options.json:
            options.json.write_text(
                json.dumps({"where": where("cpu"), "rows": found}, indent=1) + "\n",
                encoding="utf-8",
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
