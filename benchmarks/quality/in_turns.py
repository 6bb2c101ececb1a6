"""Train MiniLM on one task by several methods in turns: the same batches, head, schedule and
dropout, in one process, so that times and memory compare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.corpora import Corpus, Pair
from benchmarks.quality.sentiment import (
    HEAD_LR,
    SentenceClassifier,
    Trainee,
    groups,
    precision,
)
from slicefine import SliceAdamW, SliceConfig, get_slice_model, parameter_groups

BATCH, LENGTH, DECAY = 32, 64, 0.01
MODEL = "all-MiniLM-L6-v2"
# every linear layer of an encoder block: what slices train, too
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value", "dense"]}


@dataclass(frozen=True)
class Way:
    """One way to fine-tune.

    method: "slice", "lora" or "full". config: what differs from the defaults of the method.
    """

    method: str
    lr: float
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, float]:
        return self.method, json.dumps(self.config, sort_keys=True), self.lr


class TextTask:
    """A corpus, tokenised."""

    def __init__(self, name: str, corpus: Corpus) -> None:
        from transformers import AutoTokenizer

        from benchmarks.quality.sentiment import encoder_path

        self.name, labels = name, {label: i for i, label in enumerate(corpus.labels)}
        self.classes = len(labels)
        self.tokenizer = AutoTokenizer.from_pretrained(encoder_path())

        def encode(pairs: list[Pair]) -> tuple[list[list[int]], Tensor]:
            texts = [text for text, _ in pairs]
            ids = self.tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
            return ids, torch.tensor([labels[label] for _, label in pairs])

        self.parts = {
            p: encode(getattr(corpus, p)) for p in ("train", "validation", "test")
        }

    def steps(self, epochs: int) -> int:
        return epochs * -(-len(self.parts["train"][0]) // BATCH)

    def batches(self, seed: int, epochs: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Shuffled, sentences of like length together: little padding, the same work for all."""
        ids, labels = self.parts["train"]
        rng = np.random.RandomState(seed)
        for _ in range(epochs):
            order, batches = rng.permutation(len(ids)), []
            for start in range(0, len(order), 25 * BATCH):
                near = sorted(order[start : start + 25 * BATCH], key=lambda i: len(ids[i]))
                batches += [near[i : i + BATCH] for i in range(0, len(near), BATCH)]
            for i in rng.permutation(len(batches)):
                yield self._padded([ids[j] for j in batches[i]]), labels[batches[i]]

    def _padded(self, ids: list[list[int]]) -> dict[str, Tensor]:
        return dict(self.tokenizer.pad({"input_ids": ids}, return_tensors="pt"))

    @torch.no_grad()
    def score(self, model: nn.Module, part: str) -> tuple[float, float]:
        """(accuracy in %, mean loss) on a part."""
        model.eval()
        ids, labels = self.parts[part]
        right, loss = 0, 0.0
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), 2 * BATCH):
            chosen = order[start : start + 2 * BATCH]
            with precision(True):
                logits = model(self._padded([ids[i] for i in chosen])).float()
            right += int((logits.argmax(1) == labels[chosen]).sum())
            loss += float(F.cross_entropy(logits, labels[chosen], reduction="sum"))
        return 100 * right / len(ids), loss / len(ids)


def prepared(task: TextTask, way: Way, seed: int, epochs: int) -> Trainee:
    """The model with a method on it, its optimizer and schedule."""
    torch.manual_seed(seed)
    model = SentenceClassifier(task.classes)
    if way.method == "slice":
        config = {"modules_to_save": ["classifier"], "seed": seed, **way.config}
        get_slice_model(model, SliceConfig(**config))
        optimizer: torch.optim.Optimizer = SliceAdamW(
            parameter_groups(model, way.lr, HEAD_LR)
        )
        return Trainee(model, optimizer, task.steps(epochs), bf16=True)
    if way.method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(**LORA, **way.config), model.encoder)
    elif way.method != "full":
        raise ValueError(f"method is {way.method!r}; expected slice, lora or full")
    parts = []
    for group in groups(model, way.lr):
        vectors = [p for p in group["params"] if p.dim() <= 1]
        matrices = [p for p in group["params"] if p.dim() > 1]
        parts.append({**group, "params": matrices, "weight_decay": DECAY})
        parts.append({**group, "params": vectors, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW([p for p in parts if p["params"]], lr=way.lr)
    return Trainee(model, optimizer, task.steps(epochs), bf16=True)


def train_in_turns(
    task: TextTask, ways: list[Way], seed: int, part: str, epochs: int
) -> list[dict[str, Any]]:
    """One row for each way: trained with one seed, scored on one part."""
    trainees = [prepared(task, way, seed, epochs) for way in ways]
    for i, (batch, labels) in enumerate(task.batches(seed, epochs)):
        for trainee in trainees:
            trainee.step(batch, labels, seed=1_000 * seed + i, measure_memory=i in (1, 2))
    rows = []
    for way, trainee in zip(ways, trainees, strict=True):
        accuracy, loss = task.score(trainee.model, part)
        measured = trainee.row(way.method, None, seed)
        rows.append(
            {
                "task": task.name,
                "model": MODEL,
                "method": way.method,
                "config": way.config,
                "lr": way.lr,
                "seed": seed,
                "metric": "accuracy",
                "value": accuracy,
                "trainable": measured["trainable"],
                "peak_bytes": measured["peak_bytes"],
                "ms_per_step": measured["ms_per_step"],
                "part": part,
                "loss": loss,
                "training_loss": float(np.mean(trainee.losses[-20:])),
                "steps": measured["steps"],
                "in_turns": [other.method for other in ways],
            }
        )
    return rows
