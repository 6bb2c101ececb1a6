"""`slicefine train`: fine-tune a Hugging Face model on a table of examples with moving slices."""

from __future__ import annotations

import hashlib
import json
import math
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from slicefine import SliceAdamW, SliceConfig, get_slice_model
from slicefine.atomic import replacing
from slicefine.linear import layers_of
from slicefine.training.data import Row, UserError, chunks, read_rows, split_rows
from slicefine.training.evaluation import file_sha256, measure, planned
from slicefine.training.tasks import TASKS, Columns, ImageClassification, Task

_CONFIG = "Slices"
_TRAINING = "Training"


def train(
    model: Annotated[
        str, typer.Option(help="folder, .gguf file or hub id of a Hugging Face model")
    ],
    data: Annotated[str, typer.Option(help=".csv or .jsonl file, or a hub data set")],
    task: Annotated[str, typer.Option(help=", ".join(TASKS))],
    output: Annotated[Path, typer.Option(help="folder for the trained model")],
    eval_data: Annotated[str | None, typer.Option(help="evaluate on this file")] = None,
    eval_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            help="without --eval-data, hold out this share of the rows; 0: no evaluation",
        ),
    ] = 0.1,
    text_column: str = "text",
    label_column: str = "label",
    image_column: str = "image",
    config: Annotated[
        Path | None,
        typer.Option(
            help="a SliceConfig as JSON; the options below override it", rich_help_panel=_CONFIG
        ),
    ] = None,
    r: Annotated[int | None, typer.Option(help="width of a slice", rich_help_panel=_CONFIG)] = None,
    slice_type: Annotated[
        str | None, typer.Option(help="column, row, block, row_column", rich_help_panel=_CONFIG)
    ] = None,
    switch_interval: Annotated[
        int | None,
        typer.Option(help="optimizer steps between moves; 0: never", rich_help_panel=_CONFIG),
    ] = None,
    switch_mode: Annotated[
        str | None,
        typer.Option(
            help="ascending, descending, random, fixed, gradient, magnitude",
            rich_help_panel=_CONFIG,
        ),
    ] = None,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(help="suffix of a module name; repeat for several", rich_help_panel=_CONFIG),
    ] = None,
    modules_to_save: Annotated[
        list[str] | None,
        typer.Option(help="module that trains whole; new heads do anyway", rich_help_panel=_CONFIG),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, rich_help_panel=_TRAINING)] = 3,
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel=_TRAINING)] = 32,
    accumulate: Annotated[
        int, typer.Option(min=1, help="micro-batches per optimizer step", rich_help_panel=_TRAINING)
    ] = 1,
    max_length: Annotated[int, typer.Option(min=1, help="tokens", rich_help_panel=_TRAINING)] = 256,
    lr: Annotated[float, typer.Option(help="of the slices", rich_help_panel=_TRAINING)] = 1e-3,
    head_lr: Annotated[
        float, typer.Option(help="of modules that train whole", rich_help_panel=_TRAINING)
    ] = 2e-3,
    warmup: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="share of the steps; linear decay after it",
            rich_help_panel=_TRAINING,
        ),
    ] = 0.1,
    clip: Annotated[
        float, typer.Option(min=0, help="gradient norm; 0: none", rich_help_panel=_TRAINING)
    ] = 1.0,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast", rich_help_panel=_TRAINING)] = True,
    optimizer_in_bwd: Annotated[
        bool,
        typer.Option(
            help="update during backward; needs --clip 0 and --accumulate 1",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    gradient_checkpointing: Annotated[bool, typer.Option(rich_help_panel=_TRAINING)] = False,
    seed: Annotated[
        int | None, typer.Option(help="default: that of --config, or 0", rich_help_panel=_TRAINING)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda or cpu; default: cuda where there is one", rich_help_panel=_TRAINING
        ),
    ] = None,
    save_every: Annotated[
        int,
        typer.Option(
            min=0,
            help="steps between checkpoints; 0: at the end and on Ctrl-C",
            rich_help_panel=_TRAINING,
        ),
    ] = 0,
    resume: Annotated[
        bool, typer.Option(help="go on from the checkpoint in --output", rich_help_panel=_TRAINING)
    ] = False,
) -> None:
    """Fine-tune a pretrained model; --output is an ordinary model folder, and the delta folder in
    it holds what has changed.

    Ctrl-C finishes the step, writes a checkpoint and the model as it stands, and exits with 130;
    --resume goes on from there.
    """
    try:
        slices = _slice_config(
            config,
            r=r,
            slice_type=slice_type,
            switch_interval=switch_interval,
            switch_mode=switch_mode,
            target_modules=target_modules,
            modules_to_save=modules_to_save,
            seed=seed,
        )
        recipe = Recipe(
            epochs,
            batch_size,
            accumulate,
            lr,
            head_lr,
            warmup,
            clip,
            bf16,
            optimizer_in_bwd,
            gradient_checkpointing,
            slices.seed,
            save_every,
        )
        columns = Columns(text_column, label_column, image_column)
        raise typer.Exit(
            _run(
                model,
                data,
                eval_data,
                eval_share,
                task,
                columns,
                max_length,
                output,
                slices,
                recipe,
                device,
                resume,
            )
        )
    except UserError as error:
        typer.echo(f"slicefine train: {error}", err=True)
        raise typer.Exit(2) from None


@dataclass
class Recipe:
    epochs: int
    batch_size: int
    accumulate: int
    lr: float
    head_lr: float
    warmup: float
    clip: float
    bf16: bool
    optimizer_in_bwd: bool
    gradient_checkpointing: bool
    seed: int
    save_every: int

    def __post_init__(self) -> None:
        if self.lr < 0 or self.head_lr < 0:
            raise UserError(f"--lr is {self.lr} and --head-lr {self.head_lr}; expected 0 or more")
        if self.optimizer_in_bwd and (self.clip > 0 or self.accumulate > 1):
            raise UserError(
                "--optimizer-in-bwd updates during backward, so it can neither clip nor accumulate:"
                " add --clip 0 --accumulate 1, or leave it out"
            )


def _slice_config(path: Path | None, **given: Any) -> SliceConfig:
    try:
        values = SliceConfig.load(path).to_dict() if path else {}
        values.update({key: value for key, value in given.items() if value is not None})
        if values.get("switch_interval") == 0:
            values["switch_interval"] = None
        return SliceConfig.from_dict(values)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--config {path}: {error}" if path else str(error)) from error


def _run(
    model_name: str,
    data: str,
    eval_data: str | None,
    eval_share: float,
    task_name: str,
    columns: Columns,
    max_length: int,
    output: Path,
    slices: SliceConfig,
    recipe: Recipe,
    device_name: str | None,
    resume: bool,
) -> int:
    # everything that can be wrong is looked at before the model is loaded
    if task_name not in TASKS:
        raise UserError(f"--task {task_name}: expected one of {', '.join(TASKS)}")
    checkpoint = output / "checkpoint.pt"
    _check_output(output)
    if resume and not checkpoint.is_file():
        raise UserError(f"--resume: no checkpoint at {checkpoint}")
    if not resume and checkpoint.is_file():
        raise UserError(
            f"--output {output} holds the checkpoint of another run; add --resume to go on, or"
            " choose another folder"
        )
    task: Task = TASKS[task_name](columns, max_length)
    if isinstance(task, ImageClassification):
        task.folder = Path(data).parent
    rows = read_rows(data, task.required())
    task.prepare(rows)
    held = read_rows(eval_data, task.required(), "--eval-data") if eval_data else []
    device = _device(device_name)
    everything = held if eval_data else rows
    training_data = {"data": data, "sha256": file_sha256(data, rows)}
    if eval_data:
        task.check_labels(held)
    else:
        rows, held = split_rows(rows, eval_share, recipe.seed)
    evaluation = planned(
        task,
        model_name,
        eval_data or data,
        everything,
        held,
        None if eval_data else eval_share,
        recipe.seed,
        recipe.batch_size,
        recipe.bf16,
    )

    torch.manual_seed(recipe.seed)
    model, whole_modules = task.load(model_name, torch.float32)
    slices.modules_to_save = sorted({*(slices.modules_to_save or ()), *whole_modules}) or None
    try:
        get_slice_model(model.to(device), slices)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    if recipe.gradient_checkpointing:
        enable: Any = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )
        enable()
    job = _Job(model, task, rows, recipe, device)
    assert callable(model.planned_coverage)
    typer.echo(_summary(model, whole_modules, job.total))
    if resume:
        job.load(checkpoint)
        typer.echo(f"resumed at step {job.step:,d} of {job.total:,d}")

    interrupted = job.train(checkpoint)
    job.save(checkpoint)
    metrics = {"steps": job.step, "loss": job.recent_loss(), "peak_bytes": job.peak_bytes()}
    info: dict[str, Any] = {
        "model_config": task.config_of(model),
        "recipe": asdict(recipe),
        "loss": job.recent_loss(),
        "training_data": training_data,
    }
    if held and not interrupted:
        evaluation.value = metrics[task.metric] = measure(
            model, task, held, recipe.batch_size, recipe.bf16, device
        )
        info["evaluation"] = evaluation.to_dict()
    _write_model(model, task, slices, recipe, metrics, info, output)
    if interrupted:
        typer.echo(
            f"\nstopped at step {job.step:,d} of {job.total:,d}; the model as it stands is in"
            f" {output}, go on with --resume",
            err=True,
        )
        return 130
    checkpoint.unlink()
    typer.echo(_report(metrics, output))
    return 0


def _summary(model: Any, whole_modules: list[str], steps: int) -> str:
    trainable, total = model.get_nb_trainable_parameters()
    whole = f"\ntrain whole: {', '.join(whole_modules)}" if whole_modules else ""
    return (
        f"trainable {trainable:,d} of {total:,d} parameters ({100 * trainable / total:.2f}"
        f" %){whole}\n{model.planned_coverage(steps)}"
    )


def _report(metrics: dict[str, Any], output: Path) -> str:
    lines = [
        f"{key:<12}{value / 2**20:,.0f} MiB" if key == "peak_bytes" else f"{key:<12}{value:,.4g}"
        for key, value in metrics.items()
    ]
    delta = [f"{'delta':<12}{output / 'delta'}"] if (output / "delta").is_dir() else []
    return "\n".join([*lines, f"{'model':<12}{output}", *delta])


def _check_output(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".slicefine-can-write"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot write there ({error.strerror or error})"
        ) from error


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {error}; `slicefine env` says what there is") from error
    return device


def _write_model(
    model: Any,
    task: Task,
    slices: SliceConfig,
    recipe: Recipe,
    metrics: dict[str, Any],
    info: dict[str, Any],
    output: Path,
) -> None:
    model.save_pretrained(output, whole_model=True)  # the weights are the truth: nothing to merge
    if slices.keep_originals:
        model.save_pretrained(output / "delta", info=info)
    task.save(output)
    slices.save(output / "slice_config.json")
    (output / "training.json").write_text(
        json.dumps({"recipe": asdict(recipe), "metrics": metrics}, indent=2) + "\n",
        encoding="utf-8",
    )


class _Job:
    """One training run: its order of batches is a function of the seed, so a resumed run sees what
    an uninterrupted one would.
    """

    def __init__(
        self, model: nn.Module, task: Task, rows: list[Row], recipe: Recipe, device: torch.device
    ) -> None:
        self.model, self.task, self.rows, self.recipe, self.device = (
            model,
            task,
            rows,
            recipe,
            device,
        )
        per_epoch = -(-len(rows) // (recipe.batch_size * recipe.accumulate))
        self.total, self.step, self.losses = recipe.epochs * per_epoch, 0, []
        # what trains and is not a slice: new heads, modules_to_save
        whole = {id(p) for p in model.parameters() if p.requires_grad and not layers_of(p)}
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if id(p) not in whole], "lr": recipe.lr}]
        if whole:
            groups.append({"params": [p for p in trained if id(p) in whole], "lr": recipe.head_lr})
        self.optimizer = SliceAdamW(
            groups, lr=recipe.lr, optimizer_in_bwd=recipe.optimizer_in_bwd, seed=recipe.seed
        )
        warm = max(1, round(recipe.warmup * self.total))
        shape = lambda s: (
            (s + 1) / warm if s < warm else max(0.0, (self.total - s) / max(1, self.total - warm))
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, shape)
        self.autocast = lambda: (
            torch.autocast(device.type, dtype=torch.bfloat16) if recipe.bf16 else nullcontext()
        )

    def batches(self) -> Iterator[list[list[Row]]]:
        """The micro-batches of each optimizer step: shuffled, sorted by length within 25 steps,
        shuffled again.
        """
        size = self.recipe.batch_size * self.recipe.accumulate
        rng = random.Random(self.recipe.seed)
        for _ in range(self.recipe.epochs):
            order = list(range(len(self.rows)))
            rng.shuffle(order)
            steps = []
            for window in (order[i : i + 25 * size] for i in range(0, len(order), 25 * size)):
                steps += chunks(
                    [
                        self.rows[i]
                        for i in sorted(window, key=lambda i: self.task.length(self.rows[i]))
                    ],
                    size,
                )
            rng.shuffle(steps)
            for rows in steps:
                yield chunks(rows, self.recipe.batch_size)

    def train(self, checkpoint: Path) -> bool:
        """Run to the end; returns whether Ctrl-C stopped it."""
        from tqdm import tqdm

        self.model.train()
        with (
            _interrupt_flag() as stop,
            tqdm(total=self.total, initial=self.step, unit="step", mininterval=1.0) as bar,
        ):
            for number, micro_batches in enumerate(self.batches()):
                if number < self.step:
                    continue
                start = time.perf_counter()
                loss, size = self._update(micro_batches)
                self.step += 1
                rate = size / (time.perf_counter() - start)
                bar.set_postfix_str(
                    f"loss {loss:.3f}, {rate:,.0f} {self.task.unit}/s, peak"
                    f" {self.peak_bytes() / 2**20:,.0f} MiB",
                    refresh=False,
                )
                bar.update()
                if stop():
                    return True
                if self.recipe.save_every and self.step % self.recipe.save_every == 0:
                    self.save(checkpoint)
        return False

    def _update(self, micro_batches: list[list[Row]]) -> tuple[float, int]:
        total, size = 0.0, 0
        batches = [self.task.batch(rows) for rows in micro_batches]
        count = sum(map(self.task.weight, batches))
        if count == 0:
            raise UserError(
                f"the rows of step {self.step + 1} are too short: nothing in them to predict"
            )
        self.optimizer.zero_grad()
        for cpu_batch in filter(self.task.weight, batches):
            batch = {key: value.to(self.device) for key, value in cpu_batch.items()}
            with self.autocast():
                loss = self.model(**batch).loss * (self.task.weight(cpu_batch) / count)
            if not torch.isfinite(loss):
                raise UserError(
                    f"the loss is {loss.item()} at step {self.step + 1}; nothing has been written"
                    f" over. Lower --lr ({self.recipe.lr:g}), try --no-bf16, or look at the rows of"
                    " this batch"
                )
            loss.backward()
            total += loss.item()
            size += self.task.size(batch)
        if self.recipe.clip:
            torch.nn.utils.clip_grad_norm_(
                [p for g in self.optimizer.param_groups for p in g["params"]], self.recipe.clip
            )
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(total)
        return total, size

    def recent_loss(self) -> float:
        recent = self.losses[-50:]
        return sum(recent) / len(recent) if recent else math.nan

    def peak_bytes(self) -> int:
        """Of the device's allocator; on a CPU the largest resident set of the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # Windows
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def save(self, path: Path) -> None:
        """Atomically: a crash while saving leaves the file before it."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
            "losses": self.losses[-50:],
            "rng": torch.get_rng_state(),
            "run": self.identity(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that was interrupted."""
        rows = hashlib.sha256(
            json.dumps(self.rows, default=str, sort_keys=True).encode()
        ).hexdigest()[:16]
        recipe = {key: value for key, value in asdict(self.recipe).items() if key != "save_every"}
        return {
            **recipe,
            "max_length": self.task.max_length,
            "steps": self.total,
            "training rows": rows,
        }

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location="cpu")
        mine, saved = self.identity(), state["run"]
        if differing := [
            f"{k} (saved {saved.get(k)}, given {mine[k]})" for k in mine if saved.get(k) != mine[k]
        ]:
            raise UserError(
                f"--resume: the checkpoint is of another run: {', '.join(differing)}. Give the same"
                " data and options, or another --output"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--resume: the checkpoint does not fit: {error}") from error
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.losses = state["step"], state["losses"]
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


@contextmanager
def _interrupt_flag() -> Iterator[Any]:
    """The first Ctrl-C sets a flag that the loop reads between steps; the second one interrupts as
    usual.
    """
    hit = False

    def handler(signum: int, frame: Any) -> None:
        nonlocal hit
        if hit:
            raise KeyboardInterrupt
        hit = True

    try:
        before = signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: hit
    finally:
        signal.signal(signal.SIGINT, before)
