"""`slicefine compare`: which method of fine-tuning for these data; `slicefine.compare` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slicefine.cli import tables
from slicefine.training.data import UserError
from slicefine.training.recipe import Recipe, merged, read_yaml, settings_of


def compare(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="a recipe of slicefine train; the options override it"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="folder or hub id of a Hugging Face model")
    ] = None,
    data: Annotated[str | None, typer.Option(help="as of slicefine train")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="text-classification, causal-lm, image-classification"),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="of slice,lora,dora,miss,paca,shira,ia3,prompt,full,frozen")
    ] = "slice,lora,full,frozen",
    output: Annotated[Path, typer.Option(help="folder for everything")] = Path(
        "comparison"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="trainings at the chosen rate")] = 3,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="memory=600MiB, params=400000 or seconds=120; again for more"),
    ] = None,
    test_data: Annotated[
        str | None, typer.Option(help="rows for the test; default: a quarter of --data")
    ] = None,
    original_data: Annotated[
        str | None,
        typer.Option(help="language models: texts that should still be known afterwards"),
    ] = None,
    max_flips: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="gate: share of the test rows that may become worse"
        ),
    ] = 0.1,
    max_forgetting: Annotated[
        float,
        typer.Option(min=0, help="gate: growth of the loss on --original-data, as a share"),
    ] = 0.1,
    epochs: Annotated[int | None, typer.Option(min=1, help="of a training (3)")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="rows (32)")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="tokens (256)")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of TrainingArguments or SFTConfig"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="the rows once more, in this file")
    ] = None,
) -> None:
    """Train several methods on your data, each with a rate of its own, and say which one to use,
    how sure that is, and what it costs.

    The same command again goes on where it was stopped; in a second terminal it takes part.
    """
    from slicefine.compare import report
    from slicefine.compare.methods import chosen
    from slicefine.compare.study import Budget, Options, run

    given: dict[str, Any] = {
        "model": model,
        "data": data,
        "task": task,
        "epochs": epochs,
        "batch_size": batch_size,
        "max_length": max_length,
        "device": device,
    }
    try:
        content = {} if recipe is None else read_yaml(recipe)
        values = merged(content, {k: v for k, v in given.items() if v is not None})
        if settings:
            values = merged(values, {"training": settings_of(settings)})
        values = {key: value for key, value in values.items() if key != "output"}
        made = Recipe.from_dict({**values, "output": str(output)})
        made.require("model", "data", "task")
        names = [name.strip() for name in methods.split(",") if name.strip()]
        options = Options(
            chosen(names, str(made.task)),
            made,
            output,
            seeds,
            [Budget.parse(text) for text in budget or ()],
            test_data,
            original_data,
            max_flips,
            max_forgetting,
            typer.echo,
        )
        with tables.quiet():
            verdict = run(options)
    except (UserError, OSError, ImportError) as error:
        typer.echo(f"slicefine compare: {error}", err=True)
        raise typer.Exit(2) from None
    report.write(verdict, output, json_file)
    tables.show_table(*report.table(verdict))
    typer.echo(f"\n{verdict.sentence}\nreport  {output / report.PAGE}")
    typer.echo(f"recipe  {output / report.RECIPE}")
