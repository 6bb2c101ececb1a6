"""`slicefine continual`: learn task after task, and measure what is forgotten, by size and mode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from slicefine.cli.capacity import whole_numbers
from slicefine.training.data import UserError, labels_of, split_rows

BUILT_IN = ("digits-permuted", "digits-rotated")


def continual(
    tasks: Annotated[
        str,
        typer.Option(
            help=(
                "files in their order, a.csv,b.csv; or digits-permuted or digits-rotated, five"
                " tasks that need no model"
            )
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="folder or hub id of a Hugging Face model; each task gets a new head"),
    ] = None,
    sweep: Annotated[
        str,
        typer.Option(
            help="rank=4,16,64 (of the slices) or width=16,128,1024 (of a perceptron on the digits)"
        ),
    ] = "rank=16",
    modes: Annotated[
        str,
        typer.Option(
            help="same,disjoint,attach: what the slices of later tasks do to earlier ones"
        ),
    ] = "same,disjoint,attach",
    eval_tasks: Annotated[
        str | None, typer.Option(help="test files, in the order of --tasks")
    ] = None,
    eval_share: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="without --eval-tasks, test on this share")
    ] = 0.25,
    task: Annotated[
        str, typer.Option(help="text-classification or image-classification")
    ] = "text-classification",
    text_column: str = "text",
    label_column: str = "label",
    image_column: str = "image",
    max_length: Annotated[int, typer.Option(min=1, help="tokens")] = 128,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    lr: Annotated[
        float | None,
        typer.Option(
            help=(
                "default: 1e-3 for slices of a model, 3e-3 of a perceptron, 0.05 for SGD on a"
                " whole one"
            )
        ),
    ] = None,
    head_lr: Annotated[float, typer.Option(help="of the heads")] = 2e-3,
    slice_type: str = "column",
    contiguous: Annotated[bool, typer.Option("--contiguous/--scattered")] = True,
    switch_interval: Annotated[
        int,
        typer.Option(
            min=0, help="steps between moves in modes same and attach; 0: the slice stays"
        ),
    ] = 0,
    replay: Annotated[
        int, typer.Option(min=0, help="samples of every earlier task to repeat; not for attach")
    ] = 0,
    functional: Annotated[
        float,
        typer.Option(min=0, help="weight of the change of earlier heads' logits; not for attach"),
    ] = 0.0,
    joint: Annotated[
        bool,
        typer.Option("--joint/--no-joint", help="also train on all tasks at once, the reference"),
    ] = True,
    alone: Annotated[
        bool, typer.Option("--alone", help="also train each task by itself from the base")
    ] = False,
    seeds: Annotated[str, typer.Option(help="such as 0,1,2")] = "0",
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast, for models")] = True,
    device: Annotated[str | None, typer.Option(help="cuda or cpu")] = None,
    threshold: Annotated[
        float, typer.Option(help="of AA per doubling, for the suggested knee")
    ] = 0.01,
    output: Annotated[
        Path | None, typer.Option(help="folder for the deltas of mode attach, by size and task")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="write matrix, AA, AF, LA, BWT by mode and size")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="write an HTML page")] = None,
) -> None:
    """Fine-tune on tasks one after the other and print what each mode and size learns and forgets."""
    try:
        over, sizes = _sweep(sweep)
        numbers = (
            [int(s) for s in seeds.split(",")]
            if all(s.isdigit() for s in seeds.split(","))
            else None
        )
        if numbers is None:
            raise UserError(f"--seeds {seeds}: expected whole numbers, such as 0,1,2")
        files = _Files(
            tasks,
            eval_tasks,
            eval_share,
            task,
            text_column,
            label_column,
            image_column,
            max_length,
            model,
            device,
        )
        recipe: dict[str, Any] = dict(
            epochs=epochs,
            batch_size=batch_size,
            head_lr=head_lr,
            replay=replay,
            functional=functional,
        )
        slices = dict(
            slice_type=slice_type, contiguous=contiguous, switch_interval=switch_interval or None
        )
        result = _run(
            files,
            over,
            sizes,
            modes.split(","),
            recipe,
            lr,
            bf16,
            slices,
            numbers,
            joint,
            alone,
            threshold,
            output,
        )
    except (UserError, ImportError) as error:
        typer.echo(f"slicefine continual: {error}", err=True)
        raise typer.Exit(2) from None
    _print(result)
    if as_json is not None:
        from slicefine.cli.studying import write_json

        write_json(as_json, result.to_json())
    if report is not None:
        from slicefine.continual.report import continual_page

        continual_page(
            result, "Task after task", f"{model or tasks}, {sweep}, {epochs} epochs"
        ).write(report)


@dataclass
class _Files:
    """What the tasks are made of."""

    tasks: str
    eval_tasks: str | None
    eval_share: float
    kind: str
    text: str
    label: str
    image: str
    max_length: int
    model: str | None
    device: str | None


def _sweep(text: str) -> tuple[str, list[int]]:
    over, equals, values = text.partition("=")
    if over not in ("rank", "width") or not equals:
        raise UserError(f"--sweep {text}: expected rank=4,16,64 or width=16,128,1024")
    return over, whole_numbers(values, f"--sweep {over}=")


def _run(
    files: _Files,
    over: str,
    sizes: list[int],
    modes: list[str],
    recipe: dict[str, Any],
    lr: float | None,
    bf16: bool,
    slices: dict[str, Any],
    seeds: list[int],
    joint: bool,
    alone: bool,
    threshold: float,
    output: Path | None,
) -> Any:
    from slicefine.config import SliceConfig
    from slicefine.continual.sequence import MODES, Recipe
    from slicefine.continual.sweep import sweep

    if over == "rank" and (unknown := [m for m in modes if m not in MODES[:3]]):
        raise UserError(f"--modes {unknown[0]}: expected some of {', '.join(MODES[:3])}")
    try:
        if files.tasks in BUILT_IN:
            make, tasks, base_test, targets = _digits(files.tasks, over, sizes)
            lr = lr if lr is not None else 0.05 if over == "width" else 3e-3
            made = Recipe(**recipe, lr=lr, optimizer="sgd" if over == "width" else "adamw")
        else:
            if over == "width":
                raise UserError(
                    "--sweep width=: a pretrained model has one width; sweep rank=, or take --tasks"
                    " digits-permuted"
                )
            make, tasks = _files(files)
            base_test, targets = None, "all-linear"
            made = Recipe(
                **recipe,
                lr=1e-3 if lr is None else lr,
                warmup=0.1,
                clip=1.0,
                head="classifier",
                bf16=bf16,
            )
            made = _with_head(made, make)
        config = SliceConfig(**slices, target_modules=targets)
        return sweep(
            make,
            tasks,
            sizes,
            modes,
            over=over,
            recipe=made,
            config=config,
            seeds=seeds,
            joint=joint,
            alone=alone,
            base_test=base_test,
            threshold=threshold,
            save=output,
            progress=lambda run: typer.echo(_line(run)),
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _with_head(recipe: Any, make: Any) -> Any:
    from dataclasses import replace

    from slicefine.targets import output_head

    model = make()
    head = output_head(model)
    names = [n for n, m in model.named_modules() if m is head]
    if not names:
        raise UserError(
            f"{type(model).__name__} has no module called score or classifier to give each task a"
            " head of its own"
        )
    return replace(recipe, head=names[0])


def _digits(name: str, over: str, sizes: list[int]) -> tuple[Any, Any, Any, Any]:
    """(make_model, tasks, test set of the base, targets) of the digits."""
    import copy

    from slicefine.continual import digits
    from slicefine.continual.sequence import Task

    if over == "width":
        tasks = lambda seed: [
            Task(*t)
            for t in (
                digits.permuted(5, seed)
                if name == BUILT_IN[0]
                else digits.rotated((0, 22.5, 45, 67.5, 90), seed)
            )
        ]
        return (lambda width: digits.perceptron(width)), tasks, None, "all-linear"
    base = digits.pretrained(256, 256)
    listed = digits.permuted(5)[1:] if name == BUILT_IN[0] else digits.rotated((22.5, 45, 67.5, 90))
    return (lambda: copy.deepcopy(base)), [Task(*t) for t in listed], digits.load()[1], ["0", "2"]


def _files(files: _Files) -> tuple[Any, Any]:
    """(make_model, tasks) of data files and a Hugging Face model."""
    import copy

    import torch

    from slicefine.cli import studying
    from slicefine.continual.sequence import Task
    from slicefine.training.tasks import Columns

    if files.model is None:
        raise UserError(f"--model is missing; only {' and '.join(BUILT_IN)} need none")
    paths = files.tasks.split(",")
    tests: list[Any] = files.eval_tasks.split(",") if files.eval_tasks else [None] * len(paths)
    if len(tests) != len(paths):
        raise UserError(
            f"--eval-tasks names {len(tests)} files and --tasks {len(paths)}; expected as many"
        )
    columns = Columns(files.text, files.label, files.image)
    kinds, parts = [], []
    for path, test in zip(paths, tests, strict=True):
        kind = studying.new_task(files.kind, columns, files.max_length, path)
        rows = studying.read(path, kind, "--tasks")
        kind.prepare(rows)
        held = studying.read(test, kind, "--eval-tasks") if test else []
        if test:
            kind.check_labels(held)
        else:
            rows, held = split_rows(rows, files.eval_share, 0)
        kinds.append(kind)
        parts.append((rows, held))
    # one model for all: as many outputs as the task with most labels; a task with fewer never asks
    # for the others
    widest = max(kinds, key=lambda k: len(labels_of(parts[kinds.index(k)][0], files.label)))
    place = studying.device_of(files.device)

    torch.manual_seed(0)
    base = widest.load(files.model, torch.float32)[0].to(place)
    tasks = []
    for path, kind, (rows, held) in zip(paths, kinds, parts, strict=True):
        for name in ("tokenizer", "processor"):
            if hasattr(widest, name):
                setattr(kind, name, getattr(widest, name))
        tasks.append(
            Task(Path(path).stem, studying.encode(kind, rows), studying.encode(kind, held))
        )
    return lambda: copy.deepcopy(base), tasks


def _line(run: Any) -> str:
    values = ", ".join(f"{key} {value:.3f}" for key, value in run.measures.items())
    return f"{run.mode}, size {run.size}, seed {run.seed}: {values} ({run.seconds:.0f} s)"


def _print(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from slicefine.continual.metrics import FORMULAS
    from slicefine.continual.sweep import ATTACHED

    table = Table(title=f"{len(result.tasks)} tasks: {', '.join(result.tasks)}")
    columns = ["mode", result.over, "AA", "AF", "LA", "BWT", "JA", "trained"]
    for column in columns:
        table.add_column(column, justify="right")
    shown = lambda value: "–" if value is None else f"{value:.3f}"
    for mode in result.modes:
        for size in result.sizes(mode):
            m = result.mean(mode, size)
            cells = [shown(m[k]) for k in ("AA", "AF", "LA", "BWT", "JA")]
            table.add_row(mode, str(size), *cells, f"{m['parameters']:,d}")
    console = Console()
    console.print(table)
    for formula in FORMULAS:
        console.print(formula, highlight=False, markup=False)
    for mode in result.modes:
        if trends := result.trends(mode):
            law = trends["weight_drift"]
            fit = (
                f"weight drift = {law['gamma']:.3g} {result.over}^{-law['beta']:+.3g} (R²"
                f" {law['r2']:.3f}); "
                if law
                else ""
            )
            console.print(
                f"{mode}: {fit}knee at {trends['knee']} ({trends['knee_is']})",
                highlight=False,
                markup=False,
            )
        if mode == "attach":
            console.print(ATTACHED, highlight=False, markup=False)
