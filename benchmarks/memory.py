"""Peak memory of a training step for every method, without a GPU: rows for machines, a table for
people.

python -m benchmarks.memory [--json FILE] [--model FOLDER_OR_ID ...] [--batch 4] [--seq 768]
[--quick] [--mode eager ...] [--base bf16 int8 nf4]

Rows: {"model", "method", "targets", "r", "peak_bytes", "weights", "activations", "gradients",
"moments", "logits", "temporaries", "mode", "base", "trainable", "ratio_to_floor", "error", ...}.
"base" is how the frozen weights are stored: on int8 and nf4 slices and peft's adapters train, and
LoRA is QLoRA. A method
that cannot run in a mode is a row whose "error" says why and whose sizes are null. Estimates under
fake tensors (`slicefine.plan`); what they cannot see is in `slicefine.plan.fit.UNSEEN`. "compiled"
counts the graphs that torch.compile's partitioner makes, run operator by operator, each row by the
ratio to a floor that is compiled too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import where
from slicefine.plan import methods as ours
from slicefine.plan import peft
from slicefine.plan.estimate import Estimate, Method, Workload, estimate
from slicefine.plan.modes import MODES
from slicefine.plan.packed import BASES, with_base
from slicefine.plan.tracker import KINDS
from slicefine.plan.workloads import workload

MODELS = Path(__file__).parent / "models"
PAIR = ["q_proj", "v_proj"]


def methods(r: int, quick: bool) -> Iterator[Method]:
    """Ours, and peft's at equal targets and rank, in its default precision (float32 adapters) and
    in the model's.
    """
    yield ours.floor()
    for targets in ["all-linear"] if quick else ["all-linear", PAIR]:
        yield ours.slices(r, targets=targets)
        yield ours.slices(r, targets=targets, in_bwd=True)
        yield ours.slices(r, "row", targets=targets)
        yield ours.masked(r, targets=targets)
        every = ("LoRA", "LoRA-FA", "MiSS", "DoRA", "VeRA")
        for name in every[:3] if quick else every:
            yield peft.method(name, r, targets)
            yield peft.method(name, r, targets, float32=False)
        if not quick:
            yield peft.method("IA3", r, targets)
    yield ours.full()


def methods_on_packed(r: int, quick: bool) -> Iterator[Method]:
    """What trains beside packed weights; slices in a pool of 128 columns, the default."""
    yield ours.floor()
    for targets in ["all-linear"] if quick else ["all-linear", PAIR]:
        yield ours.slices(r, targets=targets)
        yield ours.slices(r, targets=targets, in_bwd=True)
        for name in ("LoRA",) if quick else ("LoRA", "LoRA-FA", "MiSS"):
            yield peft.method(name, r, targets)
            yield peft.method(name, r, targets, float32=False)


def rows(
    models: list[str],
    batch: int,
    length: int,
    r: int = 16,
    quick: bool = False,
    modes: Iterable[str] = tuple(MODES),
    bases: Iterable[str] = BASES,
) -> Iterator[dict[str, Any]]:
    for model in models:
        for mode, base in itertools.product(modes, bases):
            packed = base != BASES[0]
            # libraries' products with packed weights are graph breaks
            if packed and mode == "compiled":
                continue
            made = MODES[mode](with_base(workload(model, torch.bfloat16), base))
            floor = None
            for method in (methods_on_packed if packed else methods)(r, quick):
                row = _row(made, method, batch, length)
                floor = floor or row["peak_bytes"]
                ratio = row["peak_bytes"] / floor if floor and row["peak_bytes"] else None
                yield {
                    **row,
                    "model": Path(model).name,
                    "dtype": "bf16",
                    "ratio_to_floor": ratio,
                }


def _row(made: Workload, method: Method, batch: int, length: int) -> dict[str, Any]:
    """A method that cannot run in a mode is a row that says why."""
    try:
        return {**estimate(made, method, batch, length).row(), "error": None}
    except Exception as error:
        torch._dynamo.reset()
        lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
        # torch.compile says there what it met
        context = [
            line for line in lines if line.startswith("Developer debug context: raised")
        ]
        reason = ", ".join(lines[:1] + context)
        refused = Estimate(
            made.name,
            method.name,
            method.targets,
            method.r,
            batch,
            length,
            0,
            0,
            made.mode,
            made.base,
        ).row()
        unknown = dict.fromkeys(("peak_bytes", "trainable", *KINDS))
        return {**refused, **unknown, "error": f"{type(error).__name__}: {reason}"}


def line(row: dict[str, Any]) -> str:
    name = f"{row['model']:<14}{row['base']:<6}{row['mode']:<14}{row['method']:<38}{row['targets']:<16}"
    if row["error"]:
        return f"{name} cannot run: {row['error']}"
    parts = ", ".join(
        f"{kind} {row[kind] / 2**30:.2f}" for kind in KINDS if row[kind] >= 2**30 / 100
    )
    trained, peak = row["trainable"] / 1e6, row["peak_bytes"] / 2**30
    return f"{name}{trained:>9.1f} M{peak:>8.2f} GiB {row['ratio_to_floor']:.3f} of the floor: {parts}"


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
    parser.add_argument("--base", nargs="+", choices=BASES, default=list(BASES))
    options = parser.parse_args()
    # peft asks transformers by an old name
    warnings.filterwarnings("ignore", category=FutureWarning)
    found = []
    for row in rows(
        options.model,
        options.batch,
        options.seq,
        options.r,
        options.quick,
        options.mode,
        options.base,
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
