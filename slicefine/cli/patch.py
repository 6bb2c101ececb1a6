"""`slicefine patch`: correct listed answers of a trained classifier, and say what it cost."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from slicefine.training.data import UserError


def patch(
    model: Annotated[
        str, typer.Option(help="folder or hub id of a trained Hugging Face classifier")
    ],
    edits: Annotated[
        str,
        typer.Option(help=".csv or .jsonl of inputs with the labels that they should get"),
    ],
    keep: Annotated[
        str | None,
        typer.Option(
            help=(
                "inputs whose present answers must stay, 10 to 20 for each edit; a fifth is held"
                " out and measured only"
            )
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="inputs that are measured only; then nothing of --keep is held out"
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help=(
                "exact: constructed, right on what is listed, does not generalize; train: trained,"
                " not exact"
            )
        ),
    ] = "exact",
    method: Annotated[
        str, typer.Option(help="side, slice or lora; only a side can be exact")
    ] = "side",
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="of what trains: neurons of a side (64), width of a slice (64), rank of LoRA (8)",
        ),
    ] = None,
    layers: Annotated[
        int,
        typer.Option(min=2, max=3, help="of a side; 3 have fewer neurons for many edits"),
    ] = 2,
    steps: Annotated[int, typer.Option(min=1, help="of training, at most")] = 500,
    lr: Annotated[float | None, typer.Option(help="of training; default by method")] = None,
    margin: Annotated[
        float, typer.Option(help="in logits, by which the label asked for must win")
    ] = 1.0,
    target_modules: Annotated[
        list[str] | None, typer.Option(help="layers of slices and LoRA; repeat for several")
    ] = None,
    feature: Annotated[
        str | None, typer.Option(help="module whose input a side reads; default: the head")
    ] = None,
    task: Annotated[
        str, typer.Option(help="text-classification or image-classification")
    ] = "text-classification",
    text_column: str = "text",
    label_column: str = "label",
    image_column: str = "image",
    max_length: Annotated[int, typer.Option(min=1, help="tokens")] = 256,
    output: Annotated[
        Path | None,
        typer.Option(help="folder for the patch; load_patch puts it back into the model"),
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option(
            help="private key in PEM (slicefine delta keygen): sign what --output holds"
        ),
    ] = None,
    as_json: Annotated[
        Path | None,
        typer.Option("--json", help="write efficacy, locality and generality to this file"),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="write an HTML page")] = None,
    seed: int = 0,
) -> None:
    """Hot-fix wrong answers of a classifier. Prints efficacy, locality and generality; the model's
    own files stay as they are.
    """
    try:
        _run(
            model,
            edits,
            keep,
            held_out,
            task,
            text_column,
            label_column,
            image_column,
            max_length,
            output,
            as_json,
            report,
            mode=mode,
            method=method,
            size=size,
            layers=layers,
            steps=steps,
            lr=lr,
            margin=margin,
            feature=feature,
            seed=seed,
            target_modules=target_modules,
            sign=sign,
        )
    except (UserError, ImportError) as error:
        typer.echo(f"slicefine patch: {error}", err=True)
        raise typer.Exit(2) from None


def _run(
    model_name: str,
    edits_file: str,
    keep_file: str | None,
    held_file: str | None,
    task_name: str,
    text: str,
    label: str,
    image: str,
    max_length: int,
    output: Path | None,
    as_json: Path | None,
    report: Path | None,
    *,
    target_modules: list[str] | None,
    sign: Path | None,
    **options: Any,
) -> None:
    from slicefine.capacity.patching import patch as make
    from slicefine.cli import studying
    from slicefine.config import SliceConfig
    from slicefine.training.tasks import Columns

    if sign is not None and (output is None or options["method"] == "lora"):
        raise UserError(
            "--sign signs what --output holds, a side or a slice; peft's adapters have no signature"
            " here"
        )
    task = studying.new_task(task_name, Columns(text, label, image), max_length, edits_file)
    rows = studying.read(edits_file, task, "--edits")
    keep_rows = (
        studying.read(keep_file, task, "--keep", labeled=False) if keep_file else None
    )
    held_rows = (
        studying.read(held_file, task, "--held-out", labeled=False) if held_file else None
    )
    loaded = studying.trained_classifier(task, model_name)
    config = SliceConfig(target_modules=target_modules or "all-linear", contiguous=True)
    edits = studying.encode(task, rows)
    keep = studying.unlabeled(task, keep_rows).inputs if keep_rows else None
    held = studying.unlabeled(task, held_rows).inputs if held_rows else None
    try:
        with warnings.catch_warnings():
            # they are in the patch too, and printed below
            warnings.simplefilter("ignore", UserWarning)
            made = make(
                loaded,
                edits,
                keep,
                held_out=held,
                config=config,
                name=model_name,
                **options,
            )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    typer.echo(said(made))
    if output is not None:
        made.save(output)
        typer.echo(f"patch       {output}")
        if sign is not None:
            from slicefine.deltas import signing

            typer.echo(f"signed      by key {signing.sign(output, sign)}")
    if as_json is not None:
        studying.write_json(as_json, made.row())
    if report is not None:
        from slicefine.capacity.report import patch_page

        patch_page(
            made,
            "Patch",
            f"{model_name}, {len(rows)} edits, mode {made.mode}, method {made.method}",
        ).write(report)


def said(patch: Any) -> str:
    """The three numbers and what to know, in words."""
    r = patch.report
    share = lambda value, of: (
        "not measured" if value is None else f"{100 * value:.1f} % of {of:,d}"
    )
    lines = [
        f"efficacy    {share(r.efficacy, r.edits)} edits answered as asked",
        (
            f"locality    {share(r.locality, r.kept)} kept answers stay"
            f" ({share(r.kept_bit_equal, r.kept)} with every bit of their logits); held-out answers"
            f" that flip: {share(r.held_out_flips, r.held_out)}"
        ),
        (
            f"generality  {share(r.generality, r.perturbed)} perturbed edits answered as asked"
            f" (before the patch {100 * r.generality_before:.1f} %)"
        ),
        f"numbers     {patch.parameters:,d}",
    ]
    return "\n".join([*lines, *(f"note: {line}" for line in patch.warnings)])
