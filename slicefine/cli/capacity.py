"""`slicefine capacity`: how many neurons and numbers corrections take, by theorem; and for a model,
which slice would do.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from slicefine.training.data import UserError


def capacity(
    edits: Annotated[
        str,
        typer.Option(
            help=(
                "how many answers to correct; or, with --model, a .csv or .jsonl of inputs with the"
                " labels that they should get"
            )
        ),
    ],
    keep: Annotated[
        int, typer.Option(min=0, help="how many other answers must stay")
    ] = 1000,
    outputs: Annotated[
        int, typer.Option(min=1, help="classes; with --model, the model's")
    ] = 1,
    features: Annotated[
        int,
        typer.Option(
            min=1, help="width of what a side network reads; with --model, the head's"
        ),
    ] = 1,
    model: Annotated[
        str | None,
        typer.Option(
            help="a trained Hugging Face classifier: also predict which slices suffice"
        ),
    ] = None,
    sizes: Annotated[
        str, typer.Option(help="widths of slices to predict for")
    ] = "4,8,16,32,64,128",
    slice_type: Annotated[str, typer.Option(help="column or row")] = "column",
    target_modules: Annotated[
        list[str] | None, typer.Option(help="layers of the slices; repeat for several")
    ] = None,
    task: Annotated[
        str, typer.Option(help="text-classification or image-classification")
    ] = "text-classification",
    max_length: Annotated[int, typer.Option(min=1, help="tokens")] = 256,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="write everything to this file")
    ] = None,
) -> None:
    """What it takes to correct N answers: side networks by theorem, slices by a prediction without
    training.
    """
    try:
        content = _run(
            edits,
            keep,
            outputs,
            features,
            model,
            sizes,
            slice_type,
            target_modules,
            task,
            max_length,
        )
    except (UserError, ImportError) as error:
        typer.echo(f"slicefine capacity: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json is not None:
        from slicefine.cli.studying import write_json

        write_json(as_json, content)


def whole_numbers(text: str, what: str) -> list[int]:
    """ "4,16,64" -> [4, 16, 64]."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(
            f"{what} {text}: expected whole numbers, 1 or more, such as 4,16,64"
        )
    return numbers


def _run(
    edits: str,
    keep: int,
    outputs: int,
    features: int,
    model: str | None,
    sizes: str,
    slice_type: str,
    target_modules: list[str] | None,
    task_name: str,
    max_length: int,
) -> dict[str, Any]:
    from rich.console import Console
    from rich.table import Table

    from slicefine.capacity.bounds import ftc_bounds

    predictions: list[Any] = []
    if model is None:
        (N,) = whole_numbers(edits, "--edits") if "," not in edits else [0]
        if not N:
            raise UserError(
                f"--edits {edits}: expected one number, or a file together with --model"
            )
    else:
        N, outputs, features, predictions = _predict(
            edits, model, sizes, slice_type, target_modules, task_name, max_length
        )
    bounds = [ftc_bounds(N, N + keep, layers, outputs, features) for layers in (2, 3)]
    table = Table(
        title=(
            f"a side network that corrects {N:,d} of {N + keep:,d} answers, {outputs} outputs,"
            f" {features} features"
        )
    )
    for column in ("layers", "neurons", "parameters", "bytes (float64)"):
        table.add_column(column, justify="right")
    for b in bounds:
        spans = [
            f"{low or 0:,d} to {high:,d}"
            for low, high in (b.neurons, b.parameters, b.bytes)
        ]
        table.add_row(str(b.layers), *spans)
    console = Console()
    console.print(table)
    console.print(bounds[1].note, highlight=False)
    if predictions:
        table = Table(
            title=f"{slice_type} slices: rho = needed change / norm of the slice, without training"
        )
        for column in ("r", "parameters", "rho", "verdict"):
            table.add_column(column, justify="right")
        for p in predictions:
            table.add_row(str(p.r), f"{p.parameters:,d}", f"{p.rho:.2f}", p.verdict)
        console.print(table)
        console.print(
            "The verdict was right to within a factor of 2 in r where it was measured; it says"
            " nothing of answers to keep."
        )
    return {
        "bounds": [asdict(b) for b in bounds],
        "predictions": [asdict(p) for p in predictions],
    }


def _predict(
    edits: str,
    model_name: str,
    sizes: str,
    slice_type: str,
    target_modules: list[str] | None,
    task_name: str,
    max_length: int,
) -> tuple[int, int, int, list[Any]]:
    from slicefine.capacity.linearized import predict_sizes
    from slicefine.capacity.side import default_feature
    from slicefine.cli import studying
    from slicefine.config import SliceConfig
    from slicefine.training.tasks import Columns

    grid = whole_numbers(sizes, "--sizes")
    task = studying.new_task(
        task_name, Columns("text", "label", "image"), max_length, edits
    )
    rows = studying.read(edits, task, "--edits")
    model = studying.trained_classifier(task, model_name)
    names = target_modules or "all-linear"
    try:
        config = SliceConfig.from_dict({"slice_type": slice_type, "target_modules": names})
        predictions = predict_sizes(model, studying.encode(task, rows), grid, config)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    head: Any = model.get_submodule(default_feature(model))
    return len(rows), head.out_features, head.in_features, predictions
