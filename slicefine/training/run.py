"""One training from its recipe to the folder that it leaves; `slicefine train` calls nothing else."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from slicefine import atomic
from slicefine.deltas.delta import Delta, DeltaError
from slicefine.deltas.lora import to_lora
from slicefine.lean.apply import lean, undo
from slicefine.model import get_slice_model
from slicefine.training import samples
from slicefine.training.arguments import arguments, check_device, lonely_launch
from slicefine.training.data import UserError, read_rows, split_rows
from slicefine.training.evaluation import file_sha256, measure, planned, rows_sha256
from slicefine.training.loading import location
from slicefine.training.recipe import RECIPE, Recipe
from slicefine.training.tasks import TASKS, CausalLM, ImageClassification, Task
from slicefine.training.trainer import Interruption, last_checkpoint, new_trainer

RUN = "run.json"
INTERRUPTED = 130
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def fine_tune(
    recipe: Recipe, resume: bool = False, say: Callable[[str], None] = print
) -> int:
    """Run a recipe.

    Args:
        recipe: what to train, on what, how.
        resume: go on from the newest checkpoint in the output folder.
        say: takes what there is to tell; called by the main process only.

    Returns:
        0, or 130 after Ctrl-C or SIGTERM, which leave a checkpoint and the model as it stands.

    Raises:
        UserError: for everything that the user can mend; almost all of it before the model is
            loaded.
    """
    run = _Run(recipe, resume, say)
    run.look()
    run.load()
    return run.train()


class _Run:
    """A training in the order in which it happens: `look`, `load`, `train`."""

    def __init__(
        self,
        recipe: Recipe,
        resume: bool,
        say: Callable[[str], None],
    ) -> None:
        self.recipe, self.resume, self._say = recipe, resume, say
        recipe.require("model", "data", "task", "output")
        self.output = Path(str(recipe.output)).expanduser()
        self.model_name, self.data = str(recipe.model), str(recipe.data)
        self.slices = recipe.slice_config()

    def say(self, text: str) -> None:
        if self.args.process_index == 0:
            self._say(text)

    # Everything that can be wrong, before the model is loaded

    def look(self) -> None:
        """Options, folders and rows. Raises UserError for what would fail later."""
        recipe = self.recipe
        if recipe.dtype not in _DTYPES:
            raise UserError(f"--dtype {recipe.dtype}: expected one of {', '.join(_DTYPES)}")
        check_output(self.output, self.model_name, self.resume)
        self.checkpoint = last_checkpoint(self.output) if self.resume else None
        if (
            self.resume
            and (self.output / "training.json").exists()
            and not self._unfinished()
        ):
            raise UserError(f"--resume: the run in {self.output} is finished")
        if self.resume and self.checkpoint is None:
            raise UserError(f"--resume: no checkpoint at {self.output}")
        check_device(recipe.device)
        location(self.model_name)
        self.task = new_task(recipe)
        self._read()
        self.args = arguments(recipe)
        self.args.resume_from_checkpoint = self.checkpoint
        if self.checkpoint is not None:
            self._check_same_run()
        self.task.load_inputs(self.model_name)
        if isinstance(self.task, CausalLM):
            # a template that does not take a conversation says so now
            self._make_data()

    def _unfinished(self) -> bool:
        return (self.output / RUN).exists()

    def _read(self) -> None:
        recipe, task = self.recipe, self.task
        rows = read_rows(self.data, task.required())
        task.prepare(rows)
        self.all_rows, self.training_data = rows, {"data": self.data}
        self.training_data["sha256"] = file_sha256(self.data, rows)
        if recipe.eval_data is None:
            self.rows, self.held = split_rows(rows, recipe.eval_share, self.slices.seed)
            return
        held = read_rows(recipe.eval_data, task.required(), "--eval-data")
        task.check(held, "--eval-data")
        task.check_labels(held)
        self.rows, self.held, self.all_rows = rows, held, held

    def _make_data(self) -> None:
        held = self.held or None
        self.train_data = self.task.dataset(self.rows)
        self.held_data = None if held is None else self.task.dataset(held, "--eval-data")

    def _check_same_run(self) -> None:
        try:
            saved = json.loads((self.output / RUN).read_text(encoding="utf-8"))
            before = Recipe.from_dict(saved["recipe"])
            rows = saved["training_rows"]
        except (OSError, ValueError, KeyError, UserError) as error:
            raise UserError(
                f"--resume: {self.output / RUN} cannot be read ({error})"
            ) from error
        differing = self.recipe.differences(before)
        if rows != rows_sha256(self.rows):
            differing.append("the training rows are others")
        if differing:
            raise UserError(
                f"--resume: the checkpoint is of another run: {', '.join(differing)}. Give the same"
                " data and options, or another --output"
            )

    # The model

    def load(self) -> None:
        """The model with its slices, and the trainer."""
        recipe, task = self.recipe, self.task
        if isinstance(task, CausalLM):
            task.base, task.device = recipe.base, self.args.device
        # a new head is drawn while the model is loaded
        torch.manual_seed(self.slices.seed)
        dtype = recipe.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        self.model, self.whole = task.load(self.model_name, dtype)
        loaded_dtype = str(self.model.dtype).removeprefix("torch.")
        # Before training: the data are hashed as they are now, not as they may be in some hours.
        self.evaluation = planned(
            task,
            self.model_name,
            recipe.eval_data or self.data,
            self.all_rows,
            self.held,
            None if recipe.eval_data else recipe.eval_share,
            self.slices.seed,
            recipe.batch_size,
            recipe.bf16,
            loaded_dtype,
        )
        slices = self.slices
        # from_pretrained has drawn these at random: there is nothing in them to keep
        slices.modules_to_save = (
            sorted({*(slices.modules_to_save or ()), *self.whole}) or None
        )
        try:
            get_slice_model(self.model, slices)
            if recipe.lean:
                lean(self.model, verbose=False)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        # slices change nothing yet, and beside packed weights they must come before evaluation
        self._ask_before()
        self.use_cache = getattr(self.model.config, "use_cache", None)
        self.interruption = Interruption()
        if not isinstance(task, CausalLM):
            # the numbers of the labels are known now
            self._make_data()
        self.trainer = new_trainer(
            self.model,
            task,
            self.train_data,
            recipe,
            self.args,
            self.held_data,
            (self.interruption,),
        )

    def _ask_before(self) -> None:
        self.prompts: list[list[int]] = []
        self.before: list[str] = []
        count = self.recipe.samples
        if isinstance(self.task, CausalLM) and count and self.args.process_index == 0:
            rows = self.held or self.rows
            self.prompts = samples.prompts_of(self.task, rows, count)
            if self.checkpoint is not None and (known := self._known_samples()):
                self.before = known
            else:
                self.before = samples.says(self.model, self.task, self.prompts)

    def _known_samples(self) -> list[str] | None:
        with suppress(OSError, ValueError, KeyError):
            entries = json.loads((self.output / "samples.json").read_text(encoding="utf-8"))
            if len(entries) == len(self.prompts):
                return [entry["before"] for entry in entries]
        return None

    # Training and what it leaves

    def train(self) -> int:
        """Train, evaluate, write. Returns the exit code."""
        trainer, task = self.trainer, self.task
        main = self.args.process_index == 0
        total = total_steps(trainer)
        if lonely := lonely_launch(os.environ):
            self.say(f"warning: {lonely}")
        self.say(self._summary(total))
        for note in task.notes:
            self.say(note)
        if main:
            self._write_run()
        if self.checkpoint is not None:
            step = int(self.checkpoint.rpartition("-")[2])
            self.say(f"resumed at step {step:,d} of {total:,d}")
        with self.interruption.listening():
            try:
                trainer.train(resume_from_checkpoint=self.checkpoint)
            except ValueError as error:
                if self.checkpoint is None:
                    raise
                raise UserError(
                    f"--resume: the checkpoint does not fit: {error}"
                ) from error
        trainer.accelerator.wait_for_everyone()
        if self.recipe.lean:
            # what is written is the model as it was loaded
            undo(self.model)
        if self.use_cache is not None:
            # Trainer switches it off for training, and the model would be saved so
            config: Any = self.model.config
            config.use_cache = self.use_cache
        interrupted, loss = self.interruption.hit, trainer.recent_loss()
        if main:
            self._leave(interrupted, loss)
        trainer.accelerator.wait_for_everyone()
        step = trainer.state.global_step
        if interrupted:
            self.say(
                f"\nstopped at step {step:,d} of {total:,d}; the model as it stands is in"
                f" {self.output}, go on with --resume"
            )
            return INTERRUPTED
        return 0

    def _summary(self, steps: int) -> str:
        trainable, total = self.model.get_nb_trainable_parameters()  # type: ignore[operator]
        lines = [
            f"trainable {trainable:,d} of {total:,d} parameters ({100 * trainable / total:.2f} %)"
        ]
        if self.recipe.lean:
            lines.append(str(self.model._lean_report))
        if self.whole:
            lines.append(f"fully trained: {', '.join(self.whole)}")
        if isinstance(self.task, CausalLM):
            lines.append(f"rows: {self.task.form}, weights in {self.evaluation.dtype}")
        lines.append(str(self.model.planned_coverage(steps)))  # type: ignore[operator]
        return "\n".join(lines)

    def _write_run(self) -> None:
        """What a resumed run is compared with, and the copy of the recipe."""
        content = {"recipe": asdict(self.recipe), "training_rows": rows_sha256(self.rows)}
        atomic.write_text(self.output / RUN, json.dumps(content, indent=2) + "\n")
        atomic.write_text(self.output / RECIPE, self.recipe.to_yaml())

    def _leave(self, interrupted: bool, loss: float) -> None:
        trainer, task, recipe = self.trainer, self.task, self.recipe
        device = self.args.device
        metrics: dict[str, Any] = {
            "steps": trainer.state.global_step,
            "loss": loss,
            "peak_bytes": peak_bytes(device),
        }
        info: dict[str, Any] = {
            "model_config": task.config_of(self.model),
            "recipe": asdict(recipe),
            "loss": loss if math.isfinite(loss) else None,
            "training_data": self.training_data,
        }
        if self.held and not interrupted:
            value = measure(
                self.model,
                task,
                self.held,
                recipe.batch_size,
                recipe.bf16,
                torch.device(device),
            )
            metrics[task.metric] = value
            if math.isfinite(value):
                self.evaluation.value = value
                info["evaluation"] = self.evaluation.to_dict()
        self._write_model(metrics, info)
        self._ask_after()
        if interrupted:
            return
        # its absence beside training.json is what says that the run is finished
        (self.output / RUN).unlink(missing_ok=True)
        if str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) == "no":
            # only the one that an interruption has left
            for folder in self.output.glob("checkpoint-*"):
                shutil.rmtree(folder)
        self.say(report(metrics, self.output))

    def _write_model(self, metrics: dict[str, Any], info: dict[str, Any]) -> None:
        model: Any = self.model
        if self.recipe.base is None:
            # the weights are the truth: nothing to merge
            model.save_pretrained(self.output, whole_model=True)
        if self.slices.keep_originals:
            model.save_pretrained(self.output / "delta", info=info)
        if self.recipe.base is not None:
            self._write_beside_packed()
        self.task.save(self.output)
        self.slices.save(self.output / "slice_config.json")
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        content = {
            "recipe": asdict(self.recipe),
            "metrics": finite,
            "log": self.trainer.state.log_history,
        }
        text = json.dumps(_json(content), indent=2, default=str)
        atomic.write_text(self.output / "training.json", text + "\n")

    def _write_beside_packed(self) -> None:
        """A packed base cannot take in what has trained: it is left as LoRA too, which is exact."""
        try:
            to_lora(Delta.load(self.output / "delta")).save(self.output / "lora")
        except DeltaError as error:
            self.say(f"no LoRA of it: {error}")

    def _ask_after(self) -> None:
        if not self.prompts:
            return
        assert isinstance(self.task, CausalLM)
        after = samples.says(self.model, self.task, self.prompts)
        entries = samples.table(self.task, self.prompts, self.before, after)
        text = json.dumps(entries, indent=2, ensure_ascii=False)
        atomic.write_text(self.output / "samples.json", text + "\n")
        for entry in entries:
            self.say(
                f"asked       {_short(entry['prompt'])}\nbefore      {_short(entry['before'])}\n"
                f"after       {_short(entry['after'])}"
            )


def new_task(recipe: Recipe) -> Task:
    """The task of a recipe, before its rows are read."""
    task = TASKS[str(recipe.task)](recipe.columns(), recipe.max_length)
    if isinstance(task, ImageClassification):
        data = Path(str(recipe.data)).expanduser()
        task.folder = data if data.is_dir() else data.parent
    if isinstance(task, CausalLM):
        settings = recipe.training
        task.form = None if recipe.format == "auto" else recipe.format
        task.chat_template = settings.get("chat_template_path")
        task.answers_only = not (
            settings.get("completion_only_loss") is False
            or settings.get("assistant_only_loss") is False
        )
    return task


def check_output(output: Path, model: str, resume: bool) -> None:
    """Raise UserError for a folder that cannot be written to, or that holds what would be lost."""
    source = Path(model).expanduser()
    folder = source.parent if source.is_file() else source
    if folder.is_dir() and output.is_dir() and folder.samefile(output):
        raise UserError(
            f"--output {output} is the folder of --model: the base model would be overwritten, and"
            " the delta would fit nothing any more; choose another folder"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        # A file, not the permission bits, which say nothing of a disk that is full or read-only.
        probe = output / ".slicefine-can-write"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {output}: cannot write there ({error.strerror or error})"
        ) from error
    if resume:
        return
    if any(output.glob("checkpoint-*")):
        raise UserError(
            f"--output {output} holds the checkpoint of another run; add --resume to go on, or"
            " choose another folder"
        )
    if any((output / name).exists() for name in ("config.json", "delta", "training.json")):
        raise UserError(
            f"--output {output} holds a model already, which would be overwritten; choose another"
            " folder"
        )


def total_steps(trainer: Any) -> int:
    """Optimizer steps of the whole run."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = len(trainer.get_train_dataloader())
    per_epoch = max(1, -(-batches // args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)


def peak_bytes(device: torch.device) -> int:
    """Of the device's allocator; on a CPU the largest resident set of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    # Windows
    except ImportError:
        return 0
    # in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(metrics: dict[str, Any], output: Path) -> str:
    """The last lines of a training."""
    lines = [
        f"{'peak memory':<12}{value / 2**20:,.0f} MiB"
        if key == "peak_bytes"
        else f"{key:<12}{value:,.4g}"
        for key, value in metrics.items()
    ]
    delta = [f"{'delta':<12}{output / 'delta'}"] if (output / "delta").is_dir() else []
    lora = [f"{'LoRA':<12}{output / 'lora'}"] if (output / "lora").is_dir() else []
    return "\n".join([*lines, f"{'model':<12}{output}", *delta, *lora])


def _json(value: Any) -> Any:
    """Without the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(text: str, width: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else "... " + line[-(width - 4) :]
