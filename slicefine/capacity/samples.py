"""Samples of a classifier, and what a model answers to them: plain tensors and Hugging Face's
encodings alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """inputs: a tensor (n, ...), or a dict of them as a tokenizer makes it (``model(**inputs)``).
    labels: (n,) int64.
    """

    inputs: Inputs
    labels: Tensor

    def __post_init__(self) -> None:
        sizes = {
            len(t)
            for t in (
                self.inputs.values() if isinstance(self.inputs, dict) else [self.inputs]
            )
        }
        if sizes != {len(self.labels)}:
            raise ValueError(
                f"inputs have {', '.join(map(str, sorted(sizes)))} rows and there are"
                f" {len(self.labels)} labels; expected as many of each"
            )
        if self.labels.dtype != torch.int64 or self.labels.dim() != 1:
            raise TypeError(
                f"labels are {self.labels.dtype} of shape {tuple(self.labels.shape)}; expected"
                " int64 of shape (n,)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        return Samples(take(self.inputs, index), self.labels[index])

    def batches(self, size: int, generator: torch.Generator) -> list[Tensor]:
        """The rows of each batch of one epoch, in random order; of like length where inputs have
        padding.
        """
        order = torch.randperm(len(self), generator=generator)
        if isinstance(self.inputs, dict) and "attention_mask" in self.inputs:
            length = self.inputs["attention_mask"].sum(1)
            # sorted by length within 25 batches: little padding, and still random batches
            windows = [w[length[w].argsort(stable=True)] for w in order.split(25 * size)]
            chunks = [c for w in windows for c in w.split(size)]
            return [
                chunks[i] for i in torch.randperm(len(chunks), generator=generator).tolist()
            ]
        return list(order.split(size))


def joined(parts: list[Samples]) -> Samples:
    """One after the other; encodings are padded to the longest, with zeros on the right."""
    first = parts[0].inputs
    labels = torch.cat([p.labels for p in parts])
    if not isinstance(first, dict):
        return Samples(torch.cat([p.inputs for p in parts]), labels)  # pyright: ignore[reportArgumentType, reportCallIssue]
    inputs = {}
    for key in first:
        tensors = [p.inputs[key] for p in parts]  # pyright: ignore[reportArgumentType, reportCallIssue]
        width = max(t.shape[1] for t in tensors)
        inputs[key] = torch.cat(
            [nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors]
        )
    return Samples(inputs, labels)


def take(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """Some rows, without the columns in which all of them are padding on the right."""
    if not isinstance(inputs, dict):
        return inputs[index]
    rows = {key: value[index] for key, value in inputs.items()}
    mask = rows.get("attention_mask")
    if mask is None or mask.dim() != 2 or not mask.numel():
        return rows
    used = int(mask.any(0).nonzero().max()) + 1
    return {key: v[:, :used] if v.shape[:2] == mask.shape else v for key, v in rows.items()}


def count(inputs: Inputs) -> int:
    return len(next(iter(inputs.values()))) if isinstance(inputs, dict) else len(inputs)


def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """(n, classes), from a model that returns them or an object with ``logits``."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(inputs, dict):
        output: Any = model(**{key: value.to(device) for key, value in inputs.items()})
    else:
        output = model(inputs.to(device))
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(model).__name__} returned {shape}; expected logits of shape (samples, classes):"
            " these studies are of classifiers"
        )
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; every module's own mode back after it."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def predict(model: nn.Module, inputs: Inputs, batch_size: int = 64) -> Tensor:
    """(n, classes) logits on the host, in evaluation mode; encodings are batched by length."""
    n = count(inputs)
    order = torch.arange(n)
    if isinstance(inputs, dict) and "attention_mask" in inputs:
        # inputs of like length together: less padding is computed
        order = inputs["attention_mask"].sum(1).argsort(stable=True)
    with evaluating(model):
        parts = [
            logits_of(model, take(inputs, chunk)).cpu() for chunk in order.split(batch_size)
        ]
    if not parts:
        raise ValueError("there are no samples to predict")
    logits = torch.cat(parts)
    result = torch.empty_like(logits)
    # back in the caller's order
    result[order] = logits
    return result


def accuracy(model: nn.Module, samples: Samples, batch_size: int = 64) -> float:
    """Share of the samples whose largest logit is their label, in [0, 1]."""
    return float(
        (predict(model, samples.inputs, batch_size).argmax(1) == samples.labels)
        .double()
        .mean()
    )
