"""`slicefine plan`: will it fit, what takes the memory, what would help; from a configuration
alone.
"""

from __future__ import annotations

import json
import re
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

GIB = 2**30
DTYPES = ("bf16", "fp16", "fp32")
LENGTH_UNIT = 64  # tokens; the longest sequence is a multiple of it
COLOURS = {
    "weights": "blue",
    "moments": "magenta",
    "gradients": "red",
    "logits": "yellow",
    "activations": "green",
    "temporaries": "white",
}


@dataclass(frozen=True)
class Request:
    """What a worker needs to make one line of the table."""

    model: str
    method: str
    r: int
    batch: int
    length: int
    dtype: str
    checkpointing: bool
    budget: int | None


def size_in_bytes(text: str) -> int:
    """ "24GiB", "80 GB" or "24" (GiB) -> bytes."""
    found = re.fullmatch(r"\s*([\d.]+)\s*(GiB|GB|G|MiB|MB)?\s*", text, re.IGNORECASE)
    if not found:
        raise typer.BadParameter(
            f"{text!r} is no size; expected a number with GiB, GB or MiB, such as 24GiB"
        )
    unit = {"gib": GIB, "g": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6}[
        (found[2] or "GiB").lower()
    ]
    return int(float(found[1]) * unit)


def load_workload(model: str, dtype: str) -> Any:
    """From Hugging Face's configuration, or by a name that timm knows."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    if not Path(model).exists() and "/" not in model:
        try:
            from slicefine.integrations import timm as of_timm
        except ImportError:
            of_timm = None
        if of_timm is not None and of_timm.timm.is_model(model):
            return of_timm.workload(model, kind)
    from slicefine.integrations import transformers as of_transformers

    return of_transformers.workload(model, kind)


def methods(r: int) -> dict[str, Any]:
    """name -> () -> Method; peft's only where peft is installed."""
    from slicefine.plan import estimate as plan

    table: dict[str, Any] = {
        "floor": plan.floor,
        "column": lambda: plan.slices(r),
        "column_bwd": lambda: plan.slices(r, in_bwd=True),
        "row": lambda: plan.slices(r, "row"),
        "masked": lambda: plan.masked(r),
        "full": plan.full,
    }
    try:
        from slicefine.integrations import peft
    except ImportError:
        return table
    return {
        **table,
        "lora": lambda: peft.method("LoRA", r),
        "lora_half": lambda: peft.method("LoRA", r, float32=False),
    }


def work(request: Request) -> dict[str, Any]:
    """One line of the table; runs in a process of its own."""
    import torch

    from slicefine.plan import estimate as plan

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    workload, method = (
        load_workload(request.model, request.dtype),
        methods(request.r)[request.method](),
    )
    if request.checkpointing:
        workload = plan.with_checkpointing(workload)
    row = plan.estimate(workload, method, request.batch, request.length).row()
    if request.budget is not None:
        known = {(request.batch, request.length): row["peak_bytes"]}

        def peak(batch: int, length: int) -> int:
            if (batch, length) not in known:
                known[batch, length] = plan.estimate(workload, method, batch, length).peak_bytes
            return known[batch, length]

        row["largest_batch"] = plan.largest_that_fits(
            lambda b: peak(b, request.length), request.budget, request.batch
        )
        if workload.logits_width is not None:
            units = max(1, request.length // LENGTH_UNIT)
            fits = plan.largest_that_fits(
                lambda u: peak(request.batch, u * LENGTH_UNIT), request.budget, units
            )
            row["longest_sequence"] = fits * LENGTH_UNIT
    return row


def bar(breakdown: dict[str, int], largest: int, width: int = 40) -> Any:
    """A line of coloured blocks, to the scale of the largest peak."""
    from rich.text import Text

    text, done = Text(), 0
    total = 0
    for kind, colour in COLOURS.items():
        total += breakdown[kind]
        upto = round(width * total / largest)
        text.append("█" * (upto - done), style=colour)
        done = upto
    return text


def plan(
    model: Annotated[
        str,
        typer.Option(
            help="a config.json, a folder with one, an id of the hub, or a name of timm's"
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, help="sequences or images in a step")] = 4,
    seq: Annotated[int, typer.Option(min=1, help="tokens of a sequence")] = 2048,
    gpu: Annotated[
        str | None, typer.Option(help="memory of the GPU, such as 24GiB: also find what fits")
    ] = None,
    dtype: Annotated[str, typer.Option(help="of the weights: " + ", ".join(DTYPES))] = "bf16",
    r: Annotated[int, typer.Option(min=1, help="width of a slice, rank of LoRA")] = 16,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="activation checkpointing")
    ] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="write the rows to this file")
    ] = None,
) -> None:
    """Peak memory of a training step for each method, without weights, data or a GPU."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from slicefine.plan.estimate import UNSEEN, Estimate, advice

    if dtype not in DTYPES:
        raise typer.BadParameter(
            f"{dtype!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype"
        )
    budget = None if gpu is None else size_in_bytes(gpu)
    console = Console()
    try:
        logits = load_workload(model, dtype).logits_width
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    requests = [
        Request(model, name, r, batch, seq, dtype, checkpointing, budget) for name in methods(r)
    ]
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        running = pool.map(work, requests)
        rows = list(
            track(
                running,
                total=len(requests),
                description="planning",
                console=console,
                transient=True,
            )
        )
    if as_json is not None:
        as_json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    what = f"{batch} x {seq} tokens" if logits else f"{batch} images"
    table = Table(
        title=(
            f"{model}, {dtype}, {what}, {'activation checkpointing' if checkpointing else 'eager'}"
        )
    )
    columns = ["method", "trainable", "peak GiB", *(["fits"] if budget else []), "made of"]
    columns += ["largest batch", *(["longest sequence"] if logits else [])] if budget else []
    for name in columns:
        table.add_column(name, justify="left" if name in ("method", "made of") else "right")
    largest = max(row["peak_bytes"] for row in rows)
    for row in rows:
        cells = [row["method"], f"{row['trainable'] / 1e6:.1f} M", f"{row['peak_bytes'] / GIB:.2f}"]
        cells += ["yes" if row["peak_bytes"] <= budget else "no"] if budget else []
        cells.append(bar(row, largest))
        if budget and row["trainable"]:
            cells += [
                str(row["largest_batch"]),
                *([str(row["longest_sequence"])] if logits else []),
            ]
        table.add_row(*cells)
    console.print(table)
    console.print(
        "made of: " + ", ".join(f"[{colour}]█[/] {kind}" for kind, colour in COLOURS.items())
    )
    fields = Estimate.__dataclass_fields__.keys() - {"breakdown"}
    estimates = [
        Estimate(**{k: row[k] for k in fields}, breakdown={k: row[k] for k in COLOURS})
        for row in rows
    ]
    console.print(advice(estimates))
    console.print(f"({UNSEEN})")
