"""`slicefine compare`: methods of fine-tuning on your own data; `slicefine.compare` does the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from slicefine import atomic
from slicefine.training.data import UserError
from slicefine.training.recipe import Recipe


def compare(
    model: Annotated[str, typer.Option(help="folder, .gguf file or hub id")],
    data: Annotated[str, typer.Option(help="rows, as for slicefine train")],
    output: Annotated[
        Path, typer.Option(help="folder of the journal and the results; goes on in it")
    ],
    task: Annotated[
        str, typer.Option(help="text-classification, causal-lm, image-classification")
    ] = "text-classification",
    methods: Annotated[
        str, typer.Option(help="with commas: slice,paca,lora,dora,miss,shira,ia3,...")
    ] = "slice,lora,full,frozen",
    budget: Annotated[
        list[str] | None,
        typer.Option(help="memory=2GiB, params=500K or seconds=60; repeat for several"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="whole trainings of a method")] = 3,
    original_data: Annotated[
        str | None, typer.Option(help="rows on which nothing should get worse")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="the test set")] = None,
    eval_share: Annotated[float, typer.Option(help="else this share of the rows")] = 0.2,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_length: Annotated[int, typer.Option(min=1, help="tokens")] = 128,
    text_column: str = "text",
    label_column: str = "label",
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast")] = True,
    seed: int = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="write the rows to this file")
    ] = None,
) -> None:
    """Compare methods on your data: rates by validation, paired tests on held-out rows, a verdict.

    Run again with the same options it goes on where it stopped; several processes may share the
    work.
    """
    try:
        # Optuna and SciPy are of an extra, and nothing else needs them
        from slicefine.compare.run import Options, compare_methods

        recipe = Recipe(
            model=model,
            data=data,
            task=task,
            output=str(output),
            eval_data=eval_data,
            eval_share=eval_share,
            epochs=epochs,
            batch_size=batch_size,
            max_length=max_length,
            text_column=text_column,
            label_column=label_column,
            bf16=bf16,
            seed=seed,
            device=device,
            samples=0,
        )
        options = Options(recipe, methods, seeds, budget or (), original_data)
        found = compare_methods(options, typer.echo)
    except UserError as error:
        typer.echo(f"slicefine compare: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json is not None:
        atomic.write_text(as_json, json.dumps(found["rows"], indent=2) + "\n")
    _show(found, output)


def _show(found: dict, output: Path) -> None:
    for line in found["methods"]:
        cells = (f"{k} {_cell(v)}" for k, v in line.items() if k != "method")
        typer.echo(f"{line['method']:<8} {', '.join(cells)}")
    for name, gates in found.get("gates", {}).items():
        for gate in gates:
            if not gate["passed"]:
                typer.echo(f"{name}: gate {gate['gate']} not passed: {gate['reason']}")
    typer.echo(found["verdict"])
    if (output / "recipe.yaml").exists():
        typer.echo(f"train it: slicefine train {output / 'recipe.yaml'}")


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, int | float) else str(value)
