"""`slicefine plan`: will it fit, what takes the memory, what would help; from a configuration
alone.
"""

from __future__ import annotations

import json
import re
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

GIB = 2**30
DTYPES = ("bf16", "fp16", "fp32")
# tokens; the longest sequence is a multiple of it
LENGTH_UNIT = 64
COLORS = {
    "weights": "blue",
    "moments": "magenta",
    "gradients": "red",
    "logits": "yellow",
    "activations": "green",
    "temporaries": "white",
}
# the switches of a step, in the order of what they cost
SWITCHES = {
    "eager": "",
    "lean": "--lean",
    "checkpointing": "--gradient-checkpointing",
    "lean+checkpointing": "--lean --gradient-checkpointing",
}
# what --switches plans, and how its table calls it
COMBINATIONS = {
    "eager": "as it is",
    "lean": "lean",
    "checkpointing": "ckpt",
    "lean+checkpointing": "both",
    "lean+offload": "lean, offload",
    "lean+checkpointing+offload": "all",
}


@dataclass(frozen=True)
class Request:
    """What a worker needs to make one line of the table.

    decide: say too how the method fits the budget.
    every: plan the other switches too. base: how the frozen weights are packed.
    """

    model: str
    method: str
    r: int
    batch: int
    length: int
    dtype: str
    mode: str
    budget: int | None
    decide: bool = False
    every: bool = False
    base: str | None = None


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


def load_workload(model: str, dtype: str, base: str | None = None) -> Any:
    """A workload of a model whose linear layers are packed, where ``base`` says so."""
    made = _unpacked_workload(model, dtype)
    if base is None:
        return made
    from slicefine.plan.packed import with_base

    return with_base(made, base)


def _unpacked_workload(model: str, dtype: str) -> Any:
    """From Hugging Face's configuration, or by a name that timm knows."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    if not Path(model).exists() and "/" not in model:
        try:
            from slicefine.plan import timm as of_timm
        except ImportError:
            of_timm = None
        if of_timm is not None and of_timm.timm.is_model(model):
            return of_timm.workload(model, kind)
    from slicefine.plan.workloads import workload

    return workload(model, kind)


def methods(r: int) -> dict[str, Any]:
    """name -> () -> Method; peft's only where peft is installed."""
    from slicefine.plan import methods as ours

    table: dict[str, Any] = {
        "floor": ours.floor,
        "column": lambda: ours.slices(r),
        "row": lambda: ours.slices(r, "row"),
        "masked": lambda: ours.masked(r),
        "full": ours.full,
    }
    try:
        from slicefine.plan import peft
    except ImportError:
        return table
    return {
        **table,
        "miss": lambda: peft.method("MiSS", r),
        "lora": lambda: peft.method("LoRA", r),
        "lora_half": lambda: peft.method("LoRA", r, float32=False),
    }


def method_names(base: str | None = None) -> list[str]:
    """The keys of `methods` that train on a base, without an import that takes seconds."""
    from importlib.util import find_spec

    # beside packed weights only columns train
    names = ["floor", "column", *(["row", "masked", "full"] if base is None else [])]
    return [*names, *(["miss", "lora", "lora_half"] if find_spec("peft") else [])]


class Peaks:
    """Planned peaks of one method, by mode, batch and length; each is evaluated once."""

    def __init__(self, request: Request) -> None:
        self.workload = load_workload(request.model, request.dtype, request.base)
        # one for each mode: what has been built for it is kept with it
        self.modes: dict[str, Any] = {}
        self.method = methods(request.r)[request.method]()
        self.known: dict[tuple[str, int, int], Any] = {}

    def estimate(self, mode: str, batch: int, length: int) -> Any:
        from slicefine.plan.estimate import estimate
        from slicefine.plan.modes import MODES

        key = mode, batch, length
        if mode not in self.modes:
            self.modes[mode] = MODES[mode](self.workload)
        if key not in self.known:
            self.known[key] = estimate(self.modes[mode], self.method, batch, length)
        return self.known[key]

    def __call__(self, mode: str, batch: int, length: int) -> int:
        return self.estimate(mode, batch, length).peak_bytes


def work(request: Request) -> dict[str, Any]:
    """One line of the table; runs in a process of its own."""
    import torch

    from slicefine.plan.fit import largest_that_fits

    # fake tensors compute nothing: more threads would only be started
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    peaks, mode = Peaks(request), request.mode
    row = peaks.estimate(mode, request.batch, request.length).row()
    row["has_length"] = peaks.workload.logits_width is not None
    if request.every:
        modes = [other for other in COMBINATIONS if other != mode]
        row["others"] = [
            peaks.estimate(other, request.batch, request.length).row() for other in modes
        ]
    if request.budget is None or not row["trainable"]:
        return row
    # No batch is small enough then, which a search would find out at batch 1 only.
    if row["weights"] + row["moments"] > request.budget:
        # they are the same at any size
        row |= {"largest_batch": 0, "longest_sequence": 0}
        return row | _choice(request, peaks)
    row["largest_batch"] = largest_that_fits(
        lambda batch: peaks(mode, batch, request.length), request.budget, request.batch
    )
    if row["has_length"]:
        units = largest_that_fits(
            lambda units: peaks(mode, request.batch, units * LENGTH_UNIT),
            request.budget,
            _first_guess(request, row["largest_batch"]),
        )
        row["longest_sequence"] = units * LENGTH_UNIT
    return row | _choice(request, peaks)


def _choice(request: Request, peaks: Peaks) -> dict[str, Any]:
    from slicefine.plan.fit import choose

    if not request.decide or request.budget is None:
        return {}
    asked = SWITCHES[request.mode].split()
    # those with at least the switches that were asked for
    modes = [mode for mode, flags in SWITCHES.items() if set(asked) <= set(flags.split())]
    peak = lambda mode, batch: peaks(mode, batch, request.length)
    return {"choice": asdict(choose(peak, modes, request.batch, request.budget))}


def _first_guess(request: Request, largest_batch: int) -> int:
    """In units of length, at the batch asked for: about as many tokens as the largest batch has."""
    tokens = max(1, largest_batch) * request.length // request.batch
    return max(1, tokens // LENGTH_UNIT)


def verdict(request: Request, choice: dict[str, Any], gpu: str) -> str:
    """What to do, in words; the last line is the one to use."""
    path, batch = Path(request.model), choice["batch"]
    name = (
        path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    )
    asked = (
        f"{request.batch} x {request.length} tokens"
        if request.length
        else str(request.batch)
    )
    needs = f"column slices need {choice['peak_bytes'] / GIB:.1f} GiB"
    switches = SWITCHES[choice["mode"]].split()
    if not batch:
        return (
            f"{name} does not fit {gpu}: at batch 1 {' '.join(['column slices', *switches])} need"
            f" {choice['chosen_bytes'] / GIB:.1f} GiB. Use shorter sequences, a smaller dtype or a"
            " larger GPU."
        )
    line = ["slicefine train --model", request.model, "--batch-size", str(batch)]
    if batch < request.batch:
        line += ["--accumulate", str(-(-request.batch // batch))]
    if request.length:
        line += ["--max-length", str(request.length)]
    if request.base:
        line += ["--quantize", request.base]
    line = " ".join([*line, *switches])
    if choice["mode"] == request.mode and batch == request.batch:
        return f"{name} fits {gpu} at {asked}: {needs}.\n{line}"
    new = switches if choice["mode"] != request.mode else []
    how = " ".join([*new, *([f"--batch-size {batch}"] if batch < request.batch else [])])
    return (
        f"{name} does not fit {gpu} at {asked}: {needs}. With {how} it does:"
        f" {choice['chosen_bytes'] / GIB:.1f} GiB.\n{line}"
    )


def bar(row: dict[str, Any], largest: int, width: int) -> Any:
    """A line of colored blocks, to the scale of the largest peak."""
    from rich.text import Text

    text, done = Text(), 0
    total = 0
    for kind, color in COLORS.items():
        total += row[kind]
        # Ends are rounded, not lengths: so the blocks of a row are as long as its total.
        upto = round(width * total / largest)
        text.append("█" * (upto - done), style=color)
        done = upto
    return text


def plan(
    model: Annotated[
        str,
        typer.Option(
            help="a configuration file, a folder with one, an id of the hub, or a name of timm's"
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, help="sequences or images in a step")] = 4,
    seq: Annotated[int, typer.Option(min=1, help="tokens of a sequence")] = 2048,
    gpu: Annotated[
        str | None,
        typer.Option(help="memory of the GPU, such as 24GiB: also find what fits, and how"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="of the weights: " + ", ".join(DTYPES))
    ] = "bf16",
    base: Annotated[
        str | None,
        typer.Option(help="linear layers quantized: nf4 or int8; LoRA is QLoRA there"),
    ] = None,
    r: Annotated[int, typer.Option(min=1, help="width of a slice, rank of LoRA")] = 16,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="activation checkpointing")
    ] = False,
    lean: Annotated[
        bool, typer.Option("--lean", help="a model that keeps less (slicefine.lean)")
    ] = False,
    switches: Annotated[
        bool,
        typer.Option(
            "--switches", help="every method with every switch, in place of parts"
        ),
    ] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="write the rows to this file")
    ] = None,
) -> None:
    """Peak memory of a training step for each method, without weights, data or a GPU."""
    if dtype not in DTYPES:
        raise typer.BadParameter(
            f"{dtype!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype"
        )
    if base not in (None, "nf4", "int8"):
        raise typer.BadParameter(f"{base!r} is not nf4 or int8", param_hint="--base")
    budget = None if gpu is None else size_in_bytes(gpu)
    chosen = {"lean": lean, "checkpointing": checkpointing}
    mode = "+".join(name for name, on in chosen.items() if on) or "eager"
    if switches and mode != "eager":
        raise typer.BadParameter(
            "--switches plans all of them; leave --lean and --checkpointing out"
        )
    requests = [
        Request(
            model,
            name,
            r,
            batch,
            seq,
            dtype,
            mode,
            budget,
            name == "column",
            switches,
            base,
        )
        for name in method_names(base)
    ]
    # spawn: the child of a fork may wait for ever for a lock that a thread of torch held
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        try:
            rows = _with_progress(pool.map(work, requests), len(requests))
        except (ValueError, ImportError) as error:
            pool.shutdown(cancel_futures=True)
            raise typer.BadParameter(str(error), param_hint="--model") from error
    (column,) = (request for request in requests if request.decide)
    choice = next((row.pop("choice") for row in rows if "choice" in row), None)
    others = [other for row in rows for other in row.pop("others", ())]
    if as_json is not None:
        as_json.write_text(json.dumps(rows + others, indent=1) + "\n", encoding="utf-8")
    if switches:
        _print_switches(rows + others, column)
    _print(rows, column, gpu, choice)


def _with_progress(running: Any, total: int) -> list[dict[str, Any]]:
    from rich.console import Console
    from rich.progress import track

    console = Console()
    return list(
        track(running, total=total, description="planning", console=console, transient=True)
    )


def _called(request: Request) -> str:
    """The model, of a long path its end, so that a title is one line."""
    return request.model if len(request.model) <= 40 else f"...{request.model[-37:]}"


def _print_switches(rows: list[dict[str, Any]], request: Request) -> None:
    """A line for each method, a column for each combination of switches, GiB."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = (
        f"{_called(request)}, {request.dtype}, GiB at {request.batch} x {request.length}"
    )
    table = Table(title=escape(title), box=None, title_justify="left")
    table.add_column("method", no_wrap=True)
    peaks = {(row["method"], row["mode"]): row["peak_bytes"] for row in rows}
    names = dict.fromkeys(row["method"] for row in rows)
    short = {row["method"]: _short(row) for row in rows}
    for heading in COMBINATIONS.values():
        table.add_column(heading, justify="right")
    for name in names:
        cells = [f"{peaks[name, mode] / GIB:.2f}" for mode in COMBINATIONS]
        table.add_row(short[name], *cells)
    Console().print(table)


def _print(
    rows: list[dict[str, Any]],
    request: Request,
    gpu: str | None,
    choice: dict[str, Any] | None,
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from slicefine.plan.fit import UNSEEN, advice

    console = Console()
    tokens = rows[0]["has_length"]
    what = (
        f"{request.batch} x {request.length} tokens"
        if tokens
        else f"{request.batch} images"
    )
    table = Table(
        title=escape(
            f"{_called(request)}, {request.base or request.dtype}, {what}, r={request.r},"
            f" {request.mode}"
        ),
        box=None,
        title_justify="left",
    )
    fits = ["batch", *(["tokens"] if tokens else [])] if gpu else []
    table.add_column("method", no_wrap=True)
    for name in ["trained", "GiB", *fits]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("made of", no_wrap=True)
    width = max(8, min(40, console.width - 41 - 8 * len(fits)))
    largest = max(row["peak_bytes"] for row in rows)
    for row in rows:
        cells = [_short(row), _millions(row["trainable"]), f"{row['peak_bytes'] / GIB:.2f}"]
        if gpu:
            cells.append(str(row.get("largest_batch", "-")))
        if gpu and tokens:
            cells.append(str(row.get("longest_sequence", "-")))
        table.add_row(*cells, bar(row, largest, width))
    console.print(table)
    legend = ", ".join(f"[{color}]█[/] {kind}" for kind, color in COLORS.items())
    console.print("made of: " + legend)
    if gpu:
        also = f"; tokens: the longest sequence at batch {request.batch}" if tokens else ""
        console.print(f"batch: the largest that fits {escape(gpu)}{also}")
    console.print(advice(rows), highlight=False)
    console.print(f"({UNSEEN})", highlight=False)
    if choice is not None and gpu is not None:
        asked = request if tokens else replace(request, length=0)
        console.print(
            "\n" + escape(verdict(asked, choice, gpu)), highlight=False, soft_wrap=True
        )


def _short(row: dict[str, Any]) -> str:
    """The method's name without the rank, which the title says."""
    name = row["method"].replace(f" r={row['r']}", "")
    if row["base"] in ("nf4", "int8"):
        name = name.replace("LoRA", "QLoRA")
    return name.replace("optimizer_in_bwd", "in bwd").replace("low precision", "low")


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count < 999.95e6 else f"{count / 1e9:.1f} G"
