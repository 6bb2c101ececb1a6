"""One piece of a comparison: a method put on a fresh model, looked at, trained, and asked row by row."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slicefine.compare.methods import Method, Prepared
from slicefine.integrations.transformers import SliceCallback
from slicefine.model import SliceModel
from slicefine.plan.tracker import track_memory
from slicefine.training.arguments import arguments
from slicefine.training.data import Row
from slicefine.training.recipe import Recipe
from slicefine.training.run import total_steps
from slicefine.training.tasks import CausalLM, Task
from slicefine.training.trainer import new_trainer, slice_adamw

_STEPS, _FORWARDS = 3, 5


@dataclass(frozen=True)
class Answers:
    """What a model said of rows, in their order.

    Args:
        scores: (n,) 1 for right and 0 for wrong; for language models minus the loss of the row.
        confidence: (n,) probability of the predicted class; empty for language models.
    """

    scores: np.ndarray
    confidence: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.scores.mean())


@dataclass(frozen=True)
class Look:
    """A method before it trains, on the batch of the longest rows.

    Args:
        trainable: parameters that train.
        peak_bytes: of one step, by following every tensor (CPU) or by the allocator (GPU).
        ms_per_step: median of a few steps, in milliseconds.
        file_bytes: of what is kept of a fine-tune.
        overhead: time of a forward pass beside that of the plain model, as a ratio.
        steps: of a whole training.
    """

    trainable: int
    peak_bytes: int
    ms_per_step: float
    file_bytes: int
    overhead: float
    steps: int


class Trial:
    """A method, a rate and a seed on a model that has just been loaded.

    Args:
        method: what trains.
        recipe: of the comparison: model, task, how long.
        task: prepared with the rows; its tokenizer is loaded.
        factor: by which the method's rate is multiplied.
        seed: of the head, the order of the rows, and the slices.
    """

    def __init__(
        self, method: Method, recipe: Recipe, task: Task, factor: float, seed: int
    ) -> None:
        rate = method.rate * factor
        # where only the head trains, its rate is what there is to choose
        head = recipe.head_lr * (factor if method.rate == 0 else 1.0)
        # as it was given: a method may write into its config
        self.recipe = replace(
            recipe, lr=rate, head_lr=head, seed=seed, slices=dict(recipe.slices)
        )
        self.method, self.task = method, task
        self.device = arguments(self.recipe).device
        self.base, self.heads = self._load()
        self.prepared: Prepared = method.put(
            self.base, self.heads, self.recipe.slice_config()
        )

    def _load(self) -> tuple[Any, list[str]]:
        torch.manual_seed(int(self.recipe.seed or 0))
        name = self.recipe.dtype
        dtype = name if name == "auto" else getattr(torch, name)
        model, heads = self.task.load(str(self.recipe.model), dtype)
        return model.to(self.device), heads

    @property
    def lr(self) -> float:
        return self.recipe.lr or self.recipe.head_lr

    def _optimizer(self, args: Any) -> torch.optim.Optimizer:
        model = self.prepared.model
        if isinstance(model, SliceModel):
            return slice_adamw(model, self.recipe, args)
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                head = any(f".{part}." in f".{name}" for part in self.heads)
                groups.setdefault((head, parameter.dim() > 1), []).append(parameter)
        # the same rules as for slices: heads at their own rate, vectors without decay
        settings = [
            {
                "params": parameters,
                "lr": self.recipe.head_lr if head else self.recipe.lr,
                "weight_decay": args.weight_decay if matrix else 0.0,
            }
            for (head, matrix), parameters in groups.items()
        ]
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.AdamW(settings, betas=betas, eps=args.adam_epsilon)

    # Before the training

    def look(self, rows: list[Row]) -> Look:
        """Measure a few steps; the model is of no use afterwards."""
        model: Any = self.prepared.model
        args = arguments(self.recipe)
        longest = sorted(rows, key=self.task.length)[-self.recipe.batch_size :]
        batch = self._to_device(self.task.batch(longest))
        file_bytes = self._file_bytes()
        overhead = self._overhead(batch)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        optimizer = self._optimizer(args)
        model.train()
        self._step(batch, optimizer)
        with track_memory(device=self.device, model=model, optimizer=optimizer) as report:
            self._step(batch, optimizer)
        times = [self._time(lambda: self._step(batch, optimizer)) for _ in range(_STEPS)]
        steps = -(-len(rows) // (self.recipe.batch_size * self.recipe.accumulate))
        return Look(
            trainable,
            report.peak_bytes,
            1000 * statistics.median(times),
            file_bytes,
            overhead,
            steps * self.recipe.epochs,
        )

    def _step(self, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        with self._autocast():
            loss = self.prepared.model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def _overhead(self, batch: dict[str, Tensor]) -> float:
        plain, _ = self._load()
        plain.eval()
        self.prepared.model.eval()
        times: dict[str, list[float]] = {"plain": [], "method": []}
        with torch.no_grad(), self._autocast():
            # in turns: what else the machine does meets both
            for _ in range(_FORWARDS):
                for key, model in (("plain", plain), ("method", self.prepared.model)):
                    times[key].append(self._time(lambda model=model: model(**batch)))
        return statistics.median(times["method"]) / statistics.median(times["plain"])

    def _time(self, what: Callable[[], object]) -> float:
        start = time.perf_counter()
        what()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _file_bytes(self) -> int:
        model: Any = self.prepared.model
        if not self.prepared.adapter:
            kept = [p for p in model.parameters() if p.requires_grad]
            return sum(p.numel() * p.element_size() for p in kept)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            files = Path(folder).glob("*.safetensors")
            return sum(file.stat().st_size for file in files)

    # The training

    def train(
        self,
        rows: list[Row],
        share: float,
        folder: Path,
    ) -> float:
        """Train on rows for a share of the recipe's steps; returns the seconds it took.

        Raises:
            UserError: the loss is not finite.
        """
        recipe = replace(self.recipe, output=str(folder))
        data = self.task.dataset(rows)
        trainer = self._trainer(data, recipe)
        if share < 1:
            steps = max(1, round(share * total_steps(trainer)))
            recipe = replace(recipe, training={**recipe.training, "max_steps": steps})
            trainer = self._trainer(data, recipe)
        trainer.optimizer = self._optimizer(trainer.args)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start

    def _trainer(self, data: Any, recipe: Recipe) -> Any:
        model: Any = self.prepared.model
        trainer = new_trainer(model, self.task, data, recipe, arguments(recipe))
        if not isinstance(model, SliceModel):
            # which would say that there are no slices
            trainer.remove_callback(SliceCallback)
        return trainer

    # After it

    @torch.no_grad()
    def ask(self, rows: list[Row]) -> Answers:
        """What the model says of every row, in batches of like length."""
        model: Any = self.prepared.model
        model.eval()
        order = sorted(range(len(rows)), key=lambda i: self.task.length(rows[i]))
        scores, confidence = np.zeros(len(rows)), np.zeros(len(rows))
        size = self.recipe.batch_size
        for part in (order[i : i + size] for i in range(0, len(order), size)):
            batch = self._to_device(self.task.batch([rows[i] for i in part]))
            with self._autocast():
                logits = model(**batch).logits.float()
            if isinstance(self.task, CausalLM):
                scores[part] = _minus_loss(logits, batch["labels"])
                continue
            likely, predicted = logits.softmax(-1).max(-1)
            scores[part] = (predicted == batch["labels"]).cpu().numpy()
            confidence[part] = likely.cpu().numpy()
        language = isinstance(self.task, CausalLM)
        return Answers(scores, confidence[:0] if language else confidence)

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in batch.items()}

    def _autocast(self) -> Any:
        if not self.recipe.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def _minus_loss(logits: Tensor, labels: Tensor) -> np.ndarray:
    """(n,) minus the mean loss of each row's predicted tokens."""
    targets = labels[:, 1:]
    # a prompt's virtual tokens stand in front
    logits = logits[:, -labels.shape[1] : -1]
    losses = F.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    count = (targets != -100).sum(1).clamp(min=1)
    return -(losses.sum(1) / count).cpu().numpy()
