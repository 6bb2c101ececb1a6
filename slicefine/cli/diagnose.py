"""`slicefine diagnose`: what can be known about a model and a little data before training."""

from __future__ import annotations

import importlib.util
import json
import math
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from slicefine.training.arguments import device_of
from slicefine.training.data import Row, UserError, read_rows, split_rows
from slicefine.training.tasks import TASKS, Columns, ImageClassification, Task


def diagnose(
    model: Annotated[
        str, typer.Option(help="folder, .gguf file or hub id of a Hugging Face model")
    ],
    data: Annotated[
        str | None, typer.Option(help=".csv or .jsonl file, or a hub data set")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help=f"{', '.join(TASKS)}; default: by the columns")
    ] = None,
    rank: Annotated[
        bool,
        typer.Option("--rank", help="also the slices' tangent ranks: how many examples"),
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="write an HTML report to this file")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="write everything measured to this file")
    ] = None,
    examples: Annotated[int, typer.Option(min=8, help="rows of the data looked at")] = 96,
    tokens: Annotated[int, typer.Option(min=32, help="feature rows per layer")] = 1024,
    max_length: Annotated[int, typer.Option(min=1, help="tokens of an example")] = 64,
    r: Annotated[int, typer.Option(min=1, help="width of the slices looked at")] = 16,
    slice_type: Annotated[str, typer.Option(help="column or row")] = "column",
    layers: Annotated[
        int, typer.Option(min=0, help="layers in which slices are tried")
    ] = 6,
    positions: Annotated[
        int, typer.Option(min=8, help="random positions per layer tried")
    ] = 8,
    memory: Annotated[
        str, typer.Option(help="of features held at a time, such as 256MiB")
    ] = "256MiB",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help=(
                "say in how many passes and with which bound of memory, from the configuration"
                " alone"
            ),
        ),
    ] = False,
    text_column: str = "text",
    label_column: str = "label",
    image_column: str = "image",
    seed: int = 0,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; default: cuda where there is one")
    ] = None,
) -> None:
    """Spectra, task energy, slice tangents and winning slices of a pretrained model on your data;
    nothing is trained
    for keeps."""
    from slicefine.cli.plan import size_in_bytes
    from slicefine.diagnose.report import summary, survey_page
    from slicefine.diagnose.survey import Options, survey

    try:
        options = Options(
            r=r,
            axis=slice_type,
            tokens=tokens,
            tried=layers,
            positions=positions,
            rank=rank,
            budget=size_in_bytes(memory),
            seed=seed,
        )
        check_report(report)
        if slice_type not in ("column", "row"):
            raise UserError(f"--slice-type {slice_type}: expected column or row")
        if dry_run:
            typer.echo(passes_planned(model, options, examples))
            return
        if data is None:
            raise UserError("--data is missing: a .csv or .jsonl file, or a hub data set")
        subject = load_subject(
            model,
            data,
            task,
            Columns(text_column, label_column, image_column),
            examples,
            max_length,
            seed,
            device,
        )
        if subject.outputs is not None:
            options = Options(**{**options.__dict__, "outputs": subject.outputs})
        with progress() as track:
            try:
                found = survey(
                    subject.model,
                    subject.batches,
                    options,
                    subject.labels,
                    subject.rows_in_all,
                    loss_batches=subject.loss_batches,
                    track=track,
                )
            except ValueError as error:
                raise UserError(str(error)) from error
        found = {
            "model": model,
            "data": data,
            "task": subject.task_name,
            "machine": machine(subject.device),
            **found,
        }
        _note_new_heads(found, subject)
        if as_json is not None:
            write_json(found, as_json)
        if report is not None:
            survey_page(found).write(report)
        typer.echo("\n".join(summary(found)))
        typer.echo(
            f"{sum(found['seconds'].values()):.0f} s"
            + (f"; report: {report}" if report else "; --report out.html draws it")
        )
    except UserError as error:
        typer.echo(f"slicefine diagnose: {error}", err=True)
        raise typer.Exit(2) from None


def _note_new_heads(found: dict[str, Any], subject: Subject) -> None:
    if subject.whole_modules:
        found["notes"] = {
            **found["notes"],
            "winning": (
                found["notes"]["winning"]
                + " Newly initialized here, so gradients pass through random weights:"
                f" {', '.join(subject.whole_modules)}."
            ),
        }


# Shared with `slicefine advise`


@dataclass
class Subject:
    """A loaded model and a sample of its data. all_rows: the data's, shuffled; batches: of the
    sample, by length.
    outputs: for tangents, where logits are too many."""

    model: Any
    task: Task
    task_name: str
    whole_modules: list[str]
    all_rows: list[Row]
    batches: list[dict[str, torch.Tensor]]
    loss_batches: list[dict[str, torch.Tensor]]
    labels: torch.Tensor | None
    device: torch.device
    outputs: str | int | None

    @property
    def rows_in_all(self) -> int:
        return len(self.all_rows)


def load_subject(
    model: str,
    data: str,
    task_name: str | None,
    columns: Columns,
    examples: int,
    max_length: int,
    seed: int,
    device_name: str | None,
    batch_size: int = 16,
) -> Subject:
    """Read the data, load the model in float32, make batches; raises UserError like `slicefine
    train`.
    """
    if task_name is not None and task_name not in TASKS:
        raise UserError(f"--task {task_name}: expected one of {', '.join(TASKS)}")
    rows = read_rows(data, [])
    task_name = task_name or guess_task(rows[0], columns, data)
    task: Task = TASKS[task_name](columns, max_length)
    if isinstance(task, ImageClassification):
        task.folder = Path(data).parent
    # Again: the first look was at the columns, by which a task is guessed, and asked for none.
    rows = read_rows(data, task.required())
    task.prepare(rows)
    device = device_of(device_name)
    # for the shuffle: files are often sorted by label
    rows = split_rows(rows, 0.0, seed)[0]
    chosen = rows[:examples]
    torch.manual_seed(seed)
    loaded, whole = task.load(model, torch.float32)
    loaded.to(device).eval()
    # by length, so that batches are padded little
    ordered = sorted(chosen, key=task.length)
    batches = [
        {
            key: value.to(device)
            for key, value in task.batch(ordered[i : i + batch_size]).items()
        }
        for i in range(0, len(ordered), batch_size)
    ]
    classes = len(task.labels)
    labels = torch.cat([batch["labels"] for batch in batches]).cpu() if classes else None
    # a slice alone is trained for some steps at every position tried, so the trials are most of the
    # time for a large model
    large = sum(p.numel() for p in loaded.parameters()) > 5e7
    few = {
        key: value.to(device)
        for key, value in task.batch(chosen[: 4 if large or not classes else 16]).items()
    }
    return Subject(
        loaded,
        task,
        task_name,
        whole,
        rows,
        batches,
        [few],
        labels,
        device,
        None if 0 < classes <= 16 else 4,
    )


def guess_task(row: Row, columns: Columns, data: str) -> str:
    """The task by the columns of a row."""
    if columns.image in row and columns.label in row:
        return "image-classification"
    if columns.text in row:
        return "text-classification" if columns.label in row else "causal-lm"
    raise UserError(
        f"--data {data}: neither a column {columns.text!r} nor {columns.image!r}; it has"
        f" {', '.join(map(repr, row))}. Name them with --text-column or --image-column"
    )


def check_report(report: Path | None) -> None:
    """Raise UserError where a report is asked for and cannot be drawn, before anything is measured."""
    if report is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "--report draws with matplotlib, which is not installed: pip install"
            " 'slicefine[diagnose]', or use --json"
        )


@contextmanager
def progress() -> Iterator[Any]:
    """A `Track` that draws one bar per stage on standard error, for a terminal and for a log alike."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<46}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def track(things: Iterable[Any], doing: str, total: int) -> Iterable[Any]:
            return bars.track(things, total=total, description=doing)

        yield track


def machine(device: torch.device) -> str:
    """What it was measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = names[0] if names else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def write_json(found: dict[str, Any], path: Path) -> None:
    """Numbers that are not finite become null, so that the file is JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(_finite(found), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def passes_planned(model: str, options: Any, examples: int) -> str:
    """In how many passes a model would be looked at, and the bound of the memory beyond it; no
    weights are read.
    """
    from slicefine.cli.plan import load_workload
    from slicefine.diagnose.capture import linear_layers_of_shapes, passes
    from slicefine.diagnose.survey import bound

    try:
        built = load_workload(model, "bf16").build()
        layers = linear_layers_of_shapes(built)
        groups = passes(
            [layer.in_features for layer in layers],
            options.tokens,
            examples,
            options.budget,
        )
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    weights = sum(p.numel() for p in built.parameters())
    return (
        f"{len(layers)} linear layers, {weights:,d} parameters ({4 * weights / 2**30:.1f} GiB in"
        f" float32); features in {2 * len(groups)} passes over {examples} examples, half of them"
        " with random weights; beyond the model and one pass of one batch at most"
        f" {bound(layers, options, built) / 2**20:,.0f} MiB"
    )
