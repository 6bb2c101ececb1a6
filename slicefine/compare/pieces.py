"""One training of one method, by the room of `slicefine train`, and what it says of every row."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from slicefine.compare.statistics import calibration_error
from slicefine.compare.ways import Way, optimizer_of
from slicefine.integrations.transformers import SliceCallback
from slicefine.training.arguments import arguments, device_of
from slicefine.training.data import Row, UserError, chunks
from slicefine.training.recipe import Recipe
from slicefine.training.run import new_task
from slicefine.training.tasks import CausalLM, Task
from slicefine.training.trainer import new_trainer


@dataclass(frozen=True)
class Setup:
    """What all trainings have in common. rows: of training, validation, test and original data."""

    recipe: Recipe
    labels: list[str]
    form: str | None
    rows: dict[str, list[Row]] = field(repr=False)

    def new_task(self) -> Task:
        task = new_task(self.recipe)
        task.labels = list(self.labels)
        if isinstance(task, CausalLM):
            task.form = self.form
        return task

    def recipe_of(self, way: Way, factor: float, seed: int, epochs: int) -> Recipe:
        """The recipe of a training; a method without layers of its own has the head's rate."""
        given: dict[str, Any] = {"seed": seed, "epochs": epochs, "lr": way.lr * factor}
        if way.kind == "frozen":
            given = {**given, "lr": self.recipe.lr, "head_lr": way.lr * factor}
        return replace(self.recipe, **given)


def run_piece(
    setup: Setup,
    way: Way,
    factor: float,
    seed: int,
    epochs: int,
    parts: tuple[str, ...],
    steps: int = 0,
) -> dict[str, Any]:
    """Train, and score the rows of ``parts``.

    Args:
        steps: stop after as many; 0: after the epochs.

    Returns:
        For JSON. "failed" with the reason where the loss was not finite.
    """
    recipe = setup.recipe_of(way, factor, seed, epochs)
    task = setup.new_task()
    # the same head for every method: it is drawn while the model is loaded
    torch.manual_seed(seed)
    dtype = recipe.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    loaded, whole = task.load(str(recipe.model), dtype)
    heads = [p for name in whole for p in loaded.get_submodule(name).parameters()]
    total = sum(p.numel() for p in loaded.parameters())
    torch.manual_seed(seed)
    model = way.apply(loaded, whole, str(recipe.task), seed)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result: dict[str, Any] = {
        "trainable": trainable,
        "total": total,
        "lr": _rate(way, recipe),
    }
    with tempfile.TemporaryDirectory() as folder:
        if trainable:
            try:
                times = _train(
                    model, task, setup, replace(recipe, output=folder), heads, way, steps
                )
            except UserError as error:
                return {**result, "failed": str(error)}
            result["ms_per_step"] = 1000 * statistics.median(times)
            result["steps"] = len(times)
        if parts:
            result["file_bytes"] = _file_bytes(model, Path(folder) / "saved", way)
    device = device_of(recipe.device)
    model.to(device)
    for part in parts:
        result[part] = scores(model, task, setup.rows[part], recipe, device)
    return result


def _rate(way: Way, recipe: Recipe) -> float:
    return recipe.head_lr if way.kind == "frozen" else recipe.lr


def _train(
    model: Any, task: Task, setup: Setup, recipe: Recipe, heads: Any, way: Way, steps: int
) -> list[float]:
    """Seconds of each optimizer step."""
    args = arguments(recipe)
    if steps:
        args.max_steps = steps
    clock = _Clock()
    data = task.dataset(setup.rows["train"])
    trainer = new_trainer(model, task, data, recipe, args, None, (clock,))
    if not way.slices:
        trainer.optimizer = optimizer_of(model, heads, recipe)
        # it asks for slices
        trainer.remove_callback(SliceCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock.times


class _Clock(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        # every step has read its loss, so a GPU is at most an update behind
        self.times.append(time.perf_counter() - self.start)


def _file_bytes(model: Any, folder: Path, way: Way) -> int:
    """What has to be kept of the fine-tune beside the base model: the trained tensors, a delta."""
    if way.slices:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def scores(
    model: nn.Module, task: Task, rows: list[Row], recipe: Recipe, device: torch.device
) -> dict[str, Any]:
    """Of every row, in the order of the rows: its loss, and for classes the one that was said.

    metric: accuracy, or minus the mean loss of a token; higher is better.
    """
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: task.length(rows[i]))
    language = isinstance(task, CausalLM)
    losses, said, right, sure, tokens = ([0.0] * len(rows) for _ in range(5))
    for places in chunks(order, recipe.batch_size):  # type: ignore[arg-type]
        batch = {k: v.to(device) for k, v in task.batch([rows[i] for i in places]).items()}  # type: ignore[call-overload]
        autocast = torch.autocast(device.type, dtype=torch.bfloat16)
        with autocast if recipe.bf16 else nullcontext():
            labels = batch.pop("labels")
            logits: Tensor = model(**batch).logits.float()
        if language:
            # tokens of a prompt that was learned stand before those of the row
            logits = logits[:, -labels.shape[1] :]
            every = nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
            )
            counts = (labels[:, 1:] != -100).sum(1)
            each = every.sum(1) / counts.clamp(min=1)
        else:
            counts = torch.ones_like(labels)
            each = nn.functional.cross_entropy(logits, labels, reduction="none")
        surest = logits.softmax(-1).amax(-1) if not language else None
        for k, place in enumerate(places):
            losses[place], tokens[place] = float(each[k]), int(counts[k])  # type: ignore[index]
            if surest is not None:
                said[place] = int(logits[k].argmax())  # type: ignore[index]
                right[place] = int(said[place] == int(labels[k]))  # type: ignore[index]
                sure[place] = float(surest[k])  # type: ignore[index]
    loss = sum(a * b for a, b in zip(losses, tokens, strict=True)) / max(1, sum(tokens))
    if not math.isfinite(loss):
        return {"metric": -math.inf, "loss": None, "rows": losses, "said": said}
    if language:
        return {"metric": -loss, "loss": loss, "rows": [-x for x in losses], "said": []}
    return {
        "metric": sum(right) / len(rows),
        "loss": loss,
        "rows": right,
        "said": said,
        "calibration": calibration_error(sure, right),
    }
