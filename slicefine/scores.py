"""Scores by which a slice chooses its next position: the size of its weights, or of its gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from slicefine import ops
from slicefine.slices import SliceSpec, read_slice


def slice_norms(weight: Tensor, spec: SliceSpec, axis: str) -> Tensor:
    """Frobenius norm of every slice of a matrix on an axis: (positions,), float64; never a
    temporary as large as the matrix.
    """
    count = spec.positions(axis)
    if axis == "block":
        slices = (read_slice(weight, *_on(weight, spec.features(axis, p))) for p in range(count))
        return torch.stack([torch.linalg.vector_norm(s, dtype=torch.float64) for s in slices])
    strips = (
        weight.index_select(1 if axis == "column" else 0, _index(spec, axis, p).to(weight.device))
        for p in range(count)
    )
    return torch.stack([torch.linalg.vector_norm(strip, dtype=torch.float64) for strip in strips])


def _index(spec: SliceSpec, axis: str, position: int) -> Tensor:
    rows, cols = spec.features(axis, position)
    index = cols if axis == "column" else rows
    assert index is not None
    return index


def _on(like: Tensor, features: tuple[Tensor | None, Tensor | None]) -> Iterator[Tensor | None]:
    return (None if index is None else index.to(like.device) for index in features)


def gradient_scores(grad_output: Tensor, input: Tensor, spec: SliceSpec, axis: str) -> Tensor:
    """Squared Frobenius norm of the gradient of every slice on an axis: (positions,), float64.

    grad_output: (n, out), input: (n, in). One strip of columns (or rows) at a time: memory of a
        slice, time of a full dW.
    """
    scores = torch.zeros(spec.positions(axis), dtype=torch.float64)
    if axis == "row":
        for p in range(len(scores)):
            grad = ops.slice_grad(grad_output, input, _index(spec, "row", p).to(input.device))
            scores[p] = grad.double().square().sum().item()
        return scores
    strips = -(-spec.in_features // spec.r)
    for strip in range(strips):
        _, cols = spec.features(axis, strip)  # for a block the first row of the grid of positions
        assert cols is not None
        energy = (
            ops.slice_grad(grad_output, input.index_select(1, cols.to(input.device)))
            .double()
            .square()
            .sum(1)
            .cpu()
        )
        for p in range(strip, len(scores), strips):
            rows, _ = spec.features(axis, p)
            scores[p] = (energy if rows is None else energy[rows]).sum()
    return scores
