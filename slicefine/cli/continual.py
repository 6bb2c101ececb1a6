"""`slicefine continual`: learn task after task, and measure what is forgotten, by size and mode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from slicefine.cli.capacity import whole_numbers
from slicefine.training.data import UserError, labels_of, split_rows

BUILT_IN = ("digits-permuted", "digits-rotated")
MEASURES = ("AA", "AF", "LA", "BWT", "JA")


Tasks = Annotated[
    str,
    typer.Option(
        help="files in their order, a.csv,b.csv; or digits-permuted or digits-rotated, five tasks"
        " that need no model"
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="folder or hub id of a Hugging Face model; each task gets a new head"
    ),
]
Sizes = Annotated[
    str,
    typer.Option(
        help="rank=4,16,64 (of the slices) or width=16,128,1024 (of a perceptron on the digits)"
    ),
]
Modes = Annotated[
    str,
    typer.Option(
        help="same,disjoint,attach: what the slices of later tasks do to earlier ones"
    ),
]
EvalTasks = Annotated[str | None, typer.Option(help="test files, in the order of --tasks")]
EvalShare = Annotated[
    float, typer.Option(min=0.01, max=0.9, help="without --eval-tasks, test on this share")
]
Kind = Annotated[str, typer.Option(help="text-classification or image-classification")]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="default: 1e-3 for slices of a model, 3e-3 of a perceptron, 0.05 for SGD on a whole"
        " one"
    ),
]
SwitchInterval = Annotated[
    int,
    typer.Option(
        min=0, help="steps between moves in modes same and attach; 0: the slice stays"
    ),
]
Replay = Annotated[
    int, typer.Option(min=0, help="samples of every earlier task to repeat; not for attach")
]
Functional = Annotated[
    float,
    typer.Option(
        min=0, help="weight of the change of earlier heads' logits; not for attach"
    ),
]
Joint = Annotated[
    bool,
    typer.Option(
        "--joint/--no-joint", help="also train on all tasks at once, the reference"
    ),
]
Alone = Annotated[
    bool, typer.Option("--alone", help="also train each task by itself from the base")
]
Threshold = Annotated[
    float, typer.Option(help="of AA per doubling, for the suggested knee")
]
Output = Annotated[
    Path | None, typer.Option(help="folder for the deltas of mode attach, by size and task")
]
AsJson = Annotated[
    Path | None,
    typer.Option("--json", help="write matrix, AA, AF, LA, BWT by mode and size"),
]


def continual(
    tasks: Tasks,
    model: Model = None,
    sweep: Sizes = "rank=16",
    modes: Modes = "same,disjoint,attach",
    eval_tasks: EvalTasks = None,
    eval_share: EvalShare = 0.25,
    task: Kind = "text-classification",
    text_column: str = "text",
    label_column: str = "label",
    image_column: str = "image",
    max_length: Annotated[int, typer.Option(min=1, help="tokens")] = 128,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    lr: LearningRate = None,
    head_lr: Annotated[float, typer.Option(help="of the heads")] = 2e-3,
    slice_type: str = "column",
    contiguous: Annotated[bool, typer.Option("--contiguous/--scattered")] = True,
    switch_interval: SwitchInterval = 0,
    replay: Replay = 0,
    functional: Functional = 0.0,
    joint: Joint = True,
    alone: Alone = False,
    seeds: Annotated[str, typer.Option(help="such as 0,1,2")] = "0",
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast, for models")] = True,
    device: Annotated[str | None, typer.Option(help="cuda or cpu")] = None,
    threshold: Threshold = 0.01,
    output: Output = None,
    as_json: AsJson = None,
    report: Annotated[Path | None, typer.Option(help="write an HTML page")] = None,
) -> None:
    """Fine-tune on tasks one after the other and print what each mode and size learns and forgets."""
    try:
        over, sizes = _sweep(sweep)
        study = _Study(
            over=over,
            sizes=sizes,
            modes=modes.split(","),
            seeds=_seeds(seeds),
            lr=lr,
            bf16=bf16,
            options={
                "epochs": epochs,
                "batch_size": batch_size,
                "head_lr": head_lr,
                "replay": replay,
                "functional": functional,
            },
            slices={
                "slice_type": slice_type,
                "contiguous": contiguous,
                "switch_interval": switch_interval or None,
            },
            joint=joint,
            alone=alone,
            threshold=threshold,
            output=output,
        )
        files = _Files(
            tasks=tasks,
            eval_tasks=eval_tasks,
            eval_share=eval_share,
            kind=task,
            text=text_column,
            label=label_column,
            image=image_column,
            max_length=max_length,
            model=model,
            device=device,
        )
        result = _run(files, study)
    except (UserError, ImportError) as error:
        typer.echo(f"slicefine continual: {error}", err=True)
        raise typer.Exit(2) from None
    _print(result)
    if as_json is not None:
        from slicefine.cli.studying import write_json

        write_json(as_json, result.to_json())
    if report is not None:
        from slicefine.continual.report import continual_page

        subtitle = f"{model or tasks}, {sweep}, {epochs} epochs"
        continual_page(result, "Task after task", subtitle).write(report)


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


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--seeds {text}: expected whole numbers, such as 0,1,2")
    return [int(part) for part in parts]


@dataclass
class _Study:
    """What is varied, and how each task trains. options: of `TrainingOptions`; slices: of
    `SliceConfig`.
    """

    over: str
    sizes: list[int]
    modes: list[str]
    seeds: list[int]
    lr: float | None
    bf16: bool
    options: dict[str, Any]
    slices: dict[str, Any]
    joint: bool
    alone: bool
    threshold: float
    output: Path | None


def _run(files: _Files, study: _Study) -> Any:
    from slicefine.config import SliceConfig
    from slicefine.continual.sequence import MODES
    from slicefine.continual.sweep import sweep

    unknown = [mode for mode in study.modes if mode not in MODES[:3]]
    if study.over == "rank" and unknown:
        raise UserError(f"--modes {unknown[0]}: expected some of {', '.join(MODES[:3])}")
    try:
        make, tasks, options, base_test, targets = _subject(files, study)
        return sweep(
            make,
            tasks,
            study.sizes,
            study.modes,
            over=study.over,
            recipe=options,
            config=SliceConfig(**study.slices, target_modules=targets),
            seeds=study.seeds,
            joint=study.joint,
            alone=study.alone,
            base_test=base_test,
            threshold=study.threshold,
            save=study.output,
            progress=lambda run: typer.echo(_line(run)),
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _subject(files: _Files, study: _Study) -> tuple[Any, Any, Any, Any, Any]:
    """(make_model, tasks, options of the training, test set of the base, targets)."""
    from slicefine.continual.sequence import TrainingOptions

    wide = study.over == "width"
    if files.tasks in BUILT_IN:
        make, tasks, base_test, targets = _digits(files.tasks, study.over)
        lr = study.lr if study.lr is not None else 0.05 if wide else 3e-3
        optimizer = "sgd" if wide else "adamw"
        options = TrainingOptions(**study.options, lr=lr, optimizer=optimizer)
        return make, tasks, options, base_test, targets
    if wide:
        raise UserError(
            "--sweep width=: a pretrained model has one width; sweep rank=, or take --tasks"
            " digits-permuted"
        )
    make, tasks = _from_files(files)
    options = TrainingOptions(
        **study.options,
        lr=1e-3 if study.lr is None else study.lr,
        warmup=0.1,
        clip=1.0,
        head="classifier",
        bf16=study.bf16,
    )
    return make, tasks, _with_head(options, make), None, "all-linear"


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


def _digits(name: str, over: str) -> tuple[Any, Any, Any, Any]:
    """(make_model, tasks, test set of the base, targets) of the digits."""
    import copy

    from slicefine.continual import digits
    from slicefine.continual.sequence import TaskSamples

    permuted = name == BUILT_IN[0]
    angles = (0, 22.5, 45, 67.5, 90)
    if over == "width":

        def tasks(seed: int) -> list[TaskSamples]:
            made = digits.permuted(5, seed) if permuted else digits.rotated(angles, seed)
            return [TaskSamples(*task) for task in made]

        return digits.perceptron, tasks, None, "all-linear"
    base = digits.pretrained(256, 256)
    # the first task is what the base was trained on
    listed = digits.permuted(5)[1:] if permuted else digits.rotated(angles[1:])
    made = [TaskSamples(*task) for task in listed]
    return (lambda: copy.deepcopy(base)), made, digits.load()[1], ["0", "2"]


def _from_files(files: _Files) -> tuple[Any, Any]:
    """(make_model, tasks) of data files and a Hugging Face model."""
    import copy

    import torch

    from slicefine.cli import studying
    from slicefine.continual.sequence import TaskSamples
    from slicefine.training.tasks import Columns

    if files.model is None:
        raise UserError(f"--model is missing; only {' and '.join(BUILT_IN)} need none")
    paths = files.tasks.split(",")
    tests: list[Any] = (
        files.eval_tasks.split(",") if files.eval_tasks else [None] * len(paths)
    )
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
            TaskSamples(
                Path(path).stem, studying.encode(kind, rows), studying.encode(kind, held)
            )
        )
    # read from the disk once; every mode, size and seed starts from a copy
    return lambda: copy.deepcopy(base), tasks


def _line(run: Any) -> str:
    values = ", ".join(f"{key} {value:.3f}" for key, value in run.measures.items())
    return f"{run.mode}, size {run.size}, seed {run.seed}: {values} ({run.seconds:.0f} s)"


def _print(result: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from slicefine.continual.metrics import FORMULAS
    from slicefine.continual.sweep import ATTACHED

    console = Console()
    # no frame: the columns have to fit a terminal of 80
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in ("mode", result.over, *MEASURES, "trained"):
        table.add_column(column, justify="right", no_wrap=True)
    for mode in result.modes:
        for size in result.sizes(mode):
            mean = result.mean(mode, size)
            table.add_row(
                mode, str(size), *_cells(result, mode, size), f"{mean['parameters']:,d}"
            )
    say = lambda text: console.print(text, highlight=False, markup=False)
    say(f"{len(result.tasks)} tasks: {', '.join(result.tasks)}")
    console.print(table)
    for warning in result.warnings():
        say(warning)
    for formula in FORMULAS:
        say(formula)
    for mode in result.modes:
        if trends := result.trends(mode):
            say(
                f"{mode}: {_fit(trends, result.over)}knee at {trends['knee']} ({trends['knee_is']})"
            )
        if mode == "attach":
            say(ATTACHED)


def _cells(result: Any, mode: str, size: int) -> list[str]:
    """AA, AF, LA, BWT and JA. AF and BWT only where something was learned: a 0 would read as
    nothing forgotten.
    """
    mean = result.mean(mode, size)
    left_out = () if result.forgets(mode, size) else ("AF", "BWT")
    return [
        "–" if key in left_out or mean[key] is None else f"{mean[key]:.3f}"
        for key in MEASURES
    ]


def _fit(trends: dict[str, Any], over: str) -> str:
    law = trends["weight_drift"]
    if not law:
        return ""
    return f"weight drift = {law['gamma']:.3g} {over}^{-law['beta']:+.3g} (R² {law['r2']:.3f}); "
