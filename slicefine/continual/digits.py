"""Small tasks that come with scikit-learn: the 8x8 digits, permuted or rotated, and a perceptron
for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.capacity.samples import Samples

# of 1,797; the others are the test set
TRAIN = 1297


def load(seed: int = 0) -> tuple[Samples, Samples]:
    """(train, test): (n, 64) in [0, 1] and digits, split by the seed. Raises ImportError saying
    what to install.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install scikit-learn"
        ) from error
    found: Any = load_digits()
    images = torch.tensor(found.data / 16, dtype=torch.float32)
    labels = torch.tensor(found.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return tuple(
        Samples(images[part], labels[part]) for part in (order[:TRAIN], order[TRAIN:])
    )  # pyright: ignore[reportReturnType]


def permuted(tasks: int, seed: int = 0) -> list[tuple[str, Samples, Samples]]:
    """(name, train, test) of each task: the pixels in another fixed order; the first task's is
    their own.
    """
    train, test = load(seed)
    generator = torch.Generator().manual_seed(seed)
    orders = [
        torch.arange(64),
        *(torch.randperm(64, generator=generator) for _ in range(tasks - 1)),
    ]
    return [
        (
            f"permutation {i}",
            Samples(_tensor(train)[:, o], train.labels),
            Samples(_tensor(test)[:, o], test.labels),
        )
        for i, o in enumerate(orders)
    ]


def rotated(angles: Sequence[float], seed: int = 0) -> list[tuple[str, Samples, Samples]]:
    """(name, train, test) of each task: the images turned by an angle in degrees, bilinear."""
    train, test = load(seed)
    turned = lambda part, angle: Samples(_turned(_tensor(part), angle), part.labels)
    return [
        (f"{angle:g} degrees", turned(train, angle), turned(test, angle))
        for angle in angles
    ]


def perceptron(*widths: int, seed: int = 0) -> nn.Sequential:
    """Linear and ReLU by turns, 64 inputs, 10 outputs, the given hidden widths."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [64, *widths, 10]
        parts = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*parts[:-1])


def _tensor(samples: Samples) -> Tensor:
    assert isinstance(samples.inputs, Tensor)
    return samples.inputs


def _turned(images: Tensor, angle: float) -> Tensor:
    radians = torch.deg2rad(torch.tensor(float(angle)))
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros(())
    matrix = torch.stack(
        [torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])]
    ).expand(len(images), 2, 3)
    grid = nn.functional.affine_grid(matrix, [len(images), 1, 8, 8], align_corners=False)
    return nn.functional.grid_sample(
        images.view(-1, 1, 8, 8), grid, align_corners=False
    ).flatten(1)


def pretrained(*widths: int, seed: int = 0, epochs: int = 20) -> nn.Sequential:
    """A `perceptron` trained on the upright digits."""
    model, train = perceptron(*widths, seed=seed), load(seed)[0]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in train.batches(32, generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(
                model(_tensor(train)[rows]), train.labels[rows]
            ).backward()
            optimizer.step()
    return model
