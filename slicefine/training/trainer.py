"""transformers' Trainer and TRL's SFTTrainer with what slices add to them; the loop is theirs."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Sampler

from slicefine.groups import parameter_groups
from slicefine.integrations.transformers import SliceCallback
from slicefine.layer import SliceLayer
from slicefine.optim import SliceAdamW
from slicefine.training.data import UserError
from slicefine.training.recipe import Recipe
from slicefine.training.tasks import CausalLM, ImageClassification, Task

# Optimizer steps whose rows are sorted by length together, so that batches are padded little.
WINDOW = 25


def new_trainer(
    model: Any,
    task: Task,
    data: Any,
    recipe: Recipe,
    args: Any,
    held: Any = None,
    callbacks: tuple[Any, ...] = (),
) -> Any:
    """A trainer of a model that has slices.

    Args:
        model: from `get_slice_model`.
        task: `prepare`d with the rows, its tokenizer or processor loaded.
        data: to train on, from ``task.dataset``.
        recipe: learning rates, optimizer, seed.
        args: of `slicefine.training.arguments.arguments`.
        held: data for the evaluation while training, used where the arguments want one.
        callbacks: more of Trainer's.

    Returns:
        A Trainer, or an SFTTrainer for a language model; ``train()`` runs it.

    Raises:
        UserError: for a model that the trainer's loss would pass by.
    """
    kind: Any = _language_trainer() if isinstance(task, CausalLM) else ClassifierTrainer
    if isinstance(task, CausalLM):
        refuse_sliced_head(model)
    evaluated = held if wants_evaluation(args) else None
    resumes = SliceCallback(args.resume_from_checkpoint)
    trainer = kind(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=evaluated,
        callbacks=[resumes, *_stopping(recipe, evaluated), *callbacks],
        **_options(task),
    )
    trainer.begin(task, recipe)
    return trainer


def wants_evaluation(args: Any) -> bool:
    """Whether the arguments ask for evaluations while training."""
    return str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"


def refuse_sliced_head(model: Any) -> None:
    """Raise UserError if the language model's head has slices.

    TRL computes the loss from ``lm_head.weight`` without calling the layer, in chunks, so that a
    slice of it would get no gradient.
    """
    head = model.get_output_embeddings()
    if isinstance(head, SliceLayer):
        name = next(name for name, module in model.named_modules() if module is head)
        raise UserError(
            f"{name} has slices, and SFTTrainer computes its loss from {name}.weight without"
            " calling the layer, so they would never train. Leave it out of --target-modules, or"
            f" train all of it with --modules-to-save {name}"
        )


def slice_adamw(model: nn.Module, recipe: Recipe, args: Any) -> SliceAdamW:
    """SliceAdamW over `parameter_groups`, with the recipe's rates."""
    return SliceAdamW(
        parameter_groups(model, recipe.lr, recipe.head_lr, args.weight_decay),
        lr=recipe.lr,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        optimizer_in_bwd=recipe.optimizer_in_bwd,
        seed=recipe.seed or 0,
    )


class SliceTraining:
    """Mixed into a Trainer: SliceAdamW, batches of like length, a stop at a loss that is none."""

    def begin(self, task: Task, recipe: Recipe) -> None:
        """What `Trainer.__init__` has no argument for."""
        self.task, self.recipe = task, recipe
        self.step_losses: deque[float] = deque(maxlen=50)
        self._sum = 0.0
        self.order: LengthWindows | None = None
        assert isinstance(self, transformers.Trainer)
        self.add_callback(_Epochs(self))

    def recent_loss(self) -> float:
        """Mean of the last 50 steps' losses; every process must ask."""
        mine: Any = self
        own = sum(self.step_losses) / max(1, len(self.step_losses))
        every = mine.accelerator.gather(torch.tensor([own], device=mine.args.device))
        return float(every.mean())

    def create_optimizer(self, *more: Any) -> Any:
        """SliceAdamW, unless the settings name another optimizer."""
        mine: Any = self
        if mine.optimizer is None and "optim" not in self.recipe.training:
            mine.optimizer = slice_adamw(mine.model, self.recipe, mine.args)
        return super().create_optimizer(*more)  # type: ignore[misc]

    def training_step(self, *inputs: Any, **more: Any) -> Tensor:
        """One micro-batch; raises UserError before an update with a loss that is not finite."""
        mine: Any = self
        loss = super().training_step(*inputs, **more)  # type: ignore[misc]
        # waits for the device once a micro-batch: the price of noticing in time a loss that is none
        value = loss.item()
        step = mine.state.global_step + 1
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {step}; nothing has been written over. Lower"
                f" --lr ({self.recipe.lr:g}), try --no-bf16, or look at the rows of this batch"
            )
        # A micro-batch's loss is its share of the step's: they add up.
        self._sum += value
        if mine.accelerator.sync_gradients:
            self.step_losses.append(self._sum)
            self._sum = 0.0
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # optimizer_in_bwd has applied the gradients already and keeps none of them to look at
        if self.recipe.optimizer_in_bwd:
            return None
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        mine: Any = self
        chosen = {
            "train_sampling_strategy",
            "group_by_length",
        } & self.recipe.training.keys()
        data = mine.train_dataset if train_dataset is None else train_dataset
        if chosen:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        rows = mine.args.gradient_accumulation_steps * mine.args.world_size
        size = mine.args.train_batch_size * rows
        self.order = LengthWindows(
            _lengths(data), size, mine.args.data_seed or mine.args.seed
        )
        return self.order


class LengthWindows(Sampler[int]):
    """A shuffled order in which the rows of an optimizer step have about the same length.

    The order of an epoch is a function of the seed and the epoch's number, so that a resumed run
    sees what an uninterrupted one would.
    """

    def __init__(self, lengths: list[int], size: int, seed: int) -> None:
        self.lengths, self.size, self.seed, self.epoch = lengths, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # A text as the seed is hashed by SHA-512: the same order in every process.
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        window = WINDOW * self.size
        steps: list[list[int]] = []
        for start in range(0, len(order), window):
            # within a window only: sorted over all rows, the same ones would meet in every epoch
            near = sorted(order[start : start + window], key=self.lengths.__getitem__)
            steps += [near[i : i + self.size] for i in range(0, len(near), self.size)]
        # an incomplete step stays last, or all batches after it would be cut elsewhere
        last = [steps.pop()] if steps and len(steps[-1]) < self.size else []
        rng.shuffle(steps)
        return (i for step in [*steps, *last] for i in step)


def _lengths(data: Any) -> list[int]:
    """Tokens of each row; 0 for images."""
    columns = getattr(data, "column_names", None)
    if columns is not None:
        return [len(ids) for ids in data["input_ids"]]
    return [len(row["input_ids"]) if "input_ids" in row else 0 for row in data]


class _Epochs(transformers.TrainerCallback):
    """Tells the order which epoch it is; DataLoaders of several processes do not."""

    def __init__(self, trainer: SliceTraining) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.order is not None:
            # a little more: epochs are counted in fractions of 1
            self.trainer.order.set_epoch(int((state.epoch or 0.0) + 1e-6))


class ClassifierTrainer(SliceTraining, transformers.Trainer):
    """Trainer of a classifier of texts or images."""


def _language_trainer() -> type:
    """SFTTrainer is imported only for language models; TRL is an extra."""
    from trl.trainer.sft_trainer import SFTTrainer

    return type("LanguageTrainer", (SliceTraining, SFTTrainer), {})


def _options(task: Task) -> dict[str, Any]:
    """What the trainers want to be told of a task."""
    if isinstance(task, CausalLM):
        return {"processing_class": task.tokenizer}
    options = {"compute_loss_func": weighted_cross_entropy, "compute_metrics": accuracy_of}
    # Trainer keeps what this returns for all rows of an evaluation: classes, not logits.
    options["preprocess_logits_for_metrics"] = lambda logits, labels: _first(logits).argmax(
        -1
    )
    if isinstance(task, ImageClassification):
        return {**options, "data_collator": task.batch, "processing_class": task.processor}
    tokenizer: Any = task.tokenizer  # type: ignore[attr-defined]
    collator = transformers.DataCollatorWithPadding(tokenizer)
    return {**options, "data_collator": collator, "processing_class": tokenizer}


def weighted_cross_entropy(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Mean over all rows of an optimizer step, however they are cut into batches and processes."""
    logits = _first(outputs["logits"])
    # A sum over the rows of all batches: a mean of means would weigh a short batch more.
    total = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def _first(logits: Any) -> Tensor:
    return logits[0] if isinstance(logits, tuple | list) else logits


def accuracy_of(prediction: Any) -> dict[str, float]:
    """Trainer's metric of a classification."""
    right = prediction.predictions == prediction.label_ids
    return {"accuracy": float(right.mean())}


def _stopping(recipe: Recipe, evaluated: Any) -> list[Any]:
    if not recipe.early_stopping:
        return []
    if evaluated is None:
        raise UserError(
            "--early-stopping needs rows to evaluate on: --eval-data or --eval-share"
        )
    return [transformers.EarlyStoppingCallback(recipe.early_stopping)]


class Interruption(transformers.TrainerCallback):
    """Ends training after the step in progress when Ctrl-C or SIGTERM arrives, with a checkpoint.

    All processes stop at the same step. A second Ctrl-C interrupts as usual.
    """

    def __init__(self) -> None:
        self.hit = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the block runs, the signals set a flag."""
        before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self._note)
        except ValueError:
            # not the main thread: signals stay as they are
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.hit and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.hit = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            # If one process stopped alone, the others would wait for it in their next collective.
            flag = torch.tensor(int(self.hit), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.hit = bool(flag.item())
        if self.hit:
            control.should_training_stop = control.should_save = True


def last_checkpoint(folder: Any) -> str | None:
    """The newest whole checkpoint of a folder: Trainer writes its state after everything else, so
    one without it was being written when the process died.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if number.isdigit() and state.get("global_step") == int(number):
            found.append((int(number), os.fspath(path)))
    return max(found)[1] if found else None
