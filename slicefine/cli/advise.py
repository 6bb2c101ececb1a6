"""`slicefine advise`: one ranked recommendation for a model and data, with the evidence for each
line.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from slicefine import SliceConfig
from slicefine.cli.diagnose import (
    Subject,
    check_report,
    load_subject,
    machine,
    progress,
    write_json,
)
from slicefine.training.data import UserError
from slicefine.training.tasks import TASKS, Columns

_AUTO = {
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}
MIB = 2**20


def advise(
    model: Annotated[
        str, typer.Option(help="folder, .gguf file or hub id of a Hugging Face model")
    ],
    data: Annotated[
        str, typer.Option(help="training data: .csv or .jsonl file, or a hub data set")
    ],
    task: Annotated[
        str | None, typer.Option(help=f"{', '.join(TASKS)}; default: by the columns")
    ] = None,
    as_json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="write advice and evidence to this file; the SliceConfig is under config",
        ),
    ] = None,
    config_out: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="write the SliceConfig alone to this file, for slicefine train --config",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="write an HTML report to this file")
    ] = None,
    r: Annotated[int, typer.Option(min=1, help="width whose memory is the budget")] = 64,
    epochs: Annotated[int, typer.Option(min=1, help="of the training to come")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="of the training to come")] = 32,
    max_length: Annotated[int, typer.Option(min=1, help="tokens")] = 64,
    examples: Annotated[
        int, typer.Option(min=16, help="rows looked at before the trials")
    ] = 96,
    trial_steps: Annotated[
        int, typer.Option(min=10, help="optimizer steps of each short training")
    ] = 40,
    held: Annotated[
        int, typer.Option(min=16, help="rows held out to compare short trainings on")
    ] = 256,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast in short trainings")] = True,
    text_column: str = "text",
    label_column: str = "label",
    image_column: str = "image",
    seed: int = 0,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; default: cuda where there is one")
    ] = None,
) -> None:
    """Recommend slices, r per layer, learning rate and interval from measurements on your data;
    nothing is trained for keeps."""
    try:
        check_report(report)
        columns = Columns(text_column, label_column, image_column)
        subject = load_subject(
            model, data, task, columns, examples, max_length, seed, device
        )
        found = advice_for(
            subject,
            model,
            r=r,
            epochs=epochs,
            batch_size=batch_size,
            max_length=max_length,
            trial_steps=trial_steps,
            held=held,
            bf16=bf16,
            seed=seed,
        )
        found = {
            "model": model,
            "data": data,
            "task": subject.task_name,
            "machine": machine(subject.device),
            **found,
        }
        if as_json is not None:
            write_json(found, as_json)
        if config_out is not None:
            SliceConfig.from_dict(found["config"]).save(config_out)
        if report is not None:
            from slicefine.diagnose.advice_report import advice_page

            advice_page(found).write(report)
        _show(found)
    except UserError as error:
        typer.echo(f"slicefine advise: {error}", err=True)
        raise typer.Exit(2) from None


def advice_for(
    subject: Subject,
    name: str,
    *,
    r: int,
    epochs: int,
    batch_size: int,
    max_length: int,
    trial_steps: int,
    held: int,
    bf16: bool,
    seed: int,
    tried: int = 4,
) -> dict[str, Any]:
    """Survey and advice of a loaded model as one dictionary. tried: layers in which slices are
    trained at random positions, for the report."""
    from slicefine.diagnose.advice import advise as recommend
    from slicefine.diagnose.survey import Options, survey
    from slicefine.diagnose.trials import TrialOptions

    base = SliceConfig(r=r, modules_to_save=subject.whole_modules or None, seed=seed)
    steps = epochs * -(-subject.rows_in_all // batch_size)
    options = Options(
        r=r,
        tried=tried,
        rank=True,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        outputs=subject.outputs or "logits",
        tokens=512,
    )
    train, kept = _trial_batches(subject, batch_size, trial_steps, held, seed)
    context = (
        (lambda: torch.autocast(subject.device.type, dtype=torch.bfloat16))
        if bf16
        else nullcontext
    )
    with progress() as track:
        try:
            looked = survey(
                subject.model,
                subject.batches,
                options,
                subject.labels,
                subject.rows_in_all,
                loss_batches=subject.loss_batches,
                config=SliceConfig(modules_to_save=base.modules_to_save),
                track=track,
            )
            advice = recommend(
                subject.model,
                looked,
                train,
                kept,
                base,
                steps,
                trial_steps,
                planner(subject, name, batch_size, max_length),
                TrialOptions(seed=seed, context=context),
                track=track,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
    return {**advice.to_dict(), "steps": steps, "survey": looked}


def planner(subject: Subject, name: str, batch_size: int, max_length: int) -> Any:
    """config -> planned peak bytes of a step of this model, weights in float32, by
    `slicefine.plan.estimate`.
    """
    from slicefine.diagnose.advice import method_of
    from slicefine.plan import estimate as plan
    from slicefine.plan.workloads import workload_of

    workload = workload_of(
        subject.model.config, name, torch.float32, _AUTO[subject.task_name]
    )
    return lambda config: (
        plan.estimate(workload, method_of(config), batch_size, max_length).peak_bytes
    )


def _trial_batches(
    subject: Subject, size: int, steps: int, held: int, seed: int
) -> tuple[list[Any], list[Any]]:
    """(training, held-out) batches of the data, shuffled by the seed; the held-out rows are a
    quarter of the data at the most."""
    rows = subject.all_rows
    held = min(held, len(rows) // 4)
    if held < 4 or len(rows) - held < size:
        raise UserError(
            f"--data: {len(rows)} rows are too few to try anything on; expected at least"
            f" {size + size // 2}"
        )
    kept, rest = rows[:held], rows[held:]
    make = lambda chosen: {
        key: value.to(subject.device) for key, value in subject.task.batch(chosen).items()
    }
    full = [rest[i : i + size] for i in range(0, len(rest) - size + 1, size)][
        : max(steps, 60)
    ]
    ordered = sorted(kept, key=subject.task.length)
    return [make(chunk) for chunk in full], [
        make(ordered[i : i + size]) for i in range(0, held, size)
    ]


def _show(found: dict[str, Any]) -> None:
    """The recommendation, then its evidence, each wrapped to the width of the terminal."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    console.print("Recommendation, by measured effect; then what is a rule\n")
    for number, line in enumerate(found["lines"], 1):
        value = (
            f"{line['value']:.2g}"
            if isinstance(line["value"], float)
            else str(line["value"])
        )
        effect = line["effect"]
        gain = "" if effect is None else f"   held-out loss {-effect:+.4f}"
        console.print(Text(f"{number}. {line['setting']}: {value}{gain}", style="bold"))
        console.print(Padding(Text(line["evidence"]), (0, 0, 1, 3)))
    for claim in found["claims"]:
        console.print(Padding(Text(f"- {claim}"), 0))
