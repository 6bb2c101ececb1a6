"""`slicefine train`: fine-tune a Hugging Face model with moving slices; `slicefine.training` does
the work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slicefine.config import SliceConfig
from slicefine.training.data import UserError
from slicefine.training.recipe import RECIPE, Recipe, merged, read_yaml, settings_of

Switch = bool | None
_DATA, _CONFIG, _TRAINING, _RUN = "Data", "Slices", "Training", "Run"
_SLICES = (
    "r",
    "slice_type",
    "switch_interval",
    "switch_mode",
    "target_modules",
    "modules_to_save",
)


def _option(help: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(
        *names, help=help, rich_help_panel=panel, show_default=False, **more
    )


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="a recipe, a YAML file; the options override it")
    ] = None,
    model: Annotated[
        str | None, _option("folder, .gguf file or hub id of a Hugging Face model", _DATA)
    ] = None,
    data: Annotated[
        str | None,
        _option(
            "csv, tsv, json, jsonl, parquet or arrow file, folder, or hub data set", _DATA
        ),
    ] = None,
    task: Annotated[
        str | None,
        _option("text-classification, causal-lm, image-classification", _DATA),
    ] = None,
    output: Annotated[Path | None, _option("folder for the trained model", _DATA)] = None,
    eval_data: Annotated[str | None, _option("evaluate on these data", _DATA)] = None,
    eval_share: Annotated[
        float | None,
        _option("without --eval-data, hold out this share (0.1); 0: no evaluation", _DATA),
    ] = None,
    text_column: Annotated[str | None, _option("its name (text)", _DATA)] = None,
    label_column: Annotated[str | None, _option("its name (label)", _DATA)] = None,
    image_column: Annotated[str | None, _option("its name (image)", _DATA)] = None,
    format: Annotated[
        str | None,
        _option("rows of a language model (auto): text, messages, prompt, ...", _DATA),
    ] = None,
    max_length: Annotated[int | None, _option("tokens (256)", _DATA)] = None,
    packing: Annotated[Switch, _option("texts in a row", _DATA, "--packing")] = None,
    config: Annotated[Path | None, _option("a SliceConfig as JSON", _CONFIG)] = None,
    r: Annotated[int | None, _option("width of a slice (64)", _CONFIG)] = None,
    slice_type: Annotated[
        str | None, _option("column, row, block, row_column", _CONFIG)
    ] = None,
    switch_interval: Annotated[
        int | None, _option("optimizer steps between moves (100); 0: never", _CONFIG)
    ] = None,
    switch_mode: Annotated[
        str | None,
        _option("ascending, descending, random, fixed, gradient, magnitude", _CONFIG),
    ] = None,
    target_modules: Annotated[
        list[str] | None, _option("suffix of a module name; repeat for several", _CONFIG)
    ] = None,
    modules_to_save: Annotated[
        list[str] | None, _option("module to train fully; new heads are anyway", _CONFIG)
    ] = None,
    epochs: Annotated[int | None, _option("times through the data (3)", _TRAINING)] = None,
    batch_size: Annotated[
        int | None, _option("rows a step and process (32)", _TRAINING)
    ] = None,
    accumulate: Annotated[
        int | None, _option("batches per optimizer step (1)", _TRAINING)
    ] = None,
    lr: Annotated[float | None, _option("of the slices (1e-3)", _TRAINING)] = None,
    head_lr: Annotated[
        float | None, _option("of what is fully trained (2e-3)", _TRAINING)
    ] = None,
    warmup: Annotated[float | None, _option("share of the steps (0.1)", _TRAINING)] = None,
    clip: Annotated[float | None, _option("gradient norm (1); 0: none", _TRAINING)] = None,
    dtype: Annotated[str | None, _option("of weights; auto: as saved", _TRAINING)] = None,
    base: Annotated[
        str | None, _option("pack frozen weights: nf4, int8", _TRAINING, "--quantize")
    ] = None,
    bf16: Annotated[
        Switch, _option("bfloat16 autocast (yes)", _TRAINING, "--bf16/--no-bf16")
    ] = None,
    optimizer_in_bwd: Annotated[
        bool | None,
        _option(
            "update during backward; needs --clip 0 --accumulate 1",
            _TRAINING,
            "--optimizer-in-bwd",
        ),
    ] = None,
    lean: Annotated[Switch, _option("keep less, same loss", _TRAINING, "--lean")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        _option("recompute activations", _TRAINING, "--gradient-checkpointing"),
    ] = None,
    early_stopping: Annotated[
        int | None, _option("evaluations without progress until the end", _TRAINING)
    ] = None,
    settings: Annotated[
        list[str] | None,
        _option(
            "NAME=VALUE, any field of TrainingArguments or SFTConfig; repeat",
            _TRAINING,
            "--set",
        ),
    ] = None,
    seed: Annotated[int | None, _option("default: that of the slices, or 0", _RUN)] = None,
    device: Annotated[str | None, _option("cuda or cpu", _RUN)] = None,
    save_every: Annotated[
        int | None, _option("steps between checkpoints; 0: on Ctrl-C only", _RUN)
    ] = None,
    samples: Annotated[
        int | None,
        _option("prompts that a language model answers before and after (1)", _RUN),
    ] = None,
    resume: Annotated[
        bool, _option("go on from the checkpoint in --output", _RUN, "--resume")
    ] = False,
    print_recipe: Annotated[
        bool, _option("print what would run, as a recipe, and end", _RUN, "--print-recipe")
    ] = False,
) -> None:
    """Fine-tune a pretrained model; --output is an ordinary model folder, and the delta folder in
    it holds what has changed.

    Ctrl-C finishes the step, writes a checkpoint and the model as it stands, and exits with 130;
    --resume goes on from there.
    """
    # first of all, while the only locals are the options
    given = dict(locals())
    try:
        made = _recipe(given)
        if print_recipe:
            typer.echo(made.to_yaml(), nl=False)
            return
        from slicefine.training.run import fine_tune

        raise typer.Exit(fine_tune(made, resume, typer.echo))
    except UserError as error:
        typer.echo(f"slicefine train: {error}", err=True)
        raise typer.Exit(2) from None


def _recipe(given: dict[str, Any]) -> Recipe:
    """The file's content with the options over it."""
    file, config = given.pop("recipe"), given.pop("config")
    resume, output = given.pop("resume"), given["output"]
    given.pop("print_recipe")
    if resume and file is None and output is not None and (output / RECIPE).is_file():
        # what the interrupted run was given, so that --resume --output is enough
        file = output / RECIPE
    slices = {name: given.pop(name) for name in _SLICES}
    training = settings_of(given.pop("settings") or ())
    over: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if "output" in over:
        over["output"] = str(over["output"])
    values = read_yaml(file) if file else {}
    if config is not None:
        values = merged(values, {"slices": _config(config)})
    over["slices"] = {key: value for key, value in slices.items() if value is not None}
    over["training"] = training
    return Recipe.from_dict(merged(values, over), str(file or "the recipe"))


def _config(path: Path) -> dict[str, Any]:
    try:
        return SliceConfig.load(path).to_dict()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--config {path}: {error}") from error
