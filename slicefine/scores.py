"""Scores by which a slice chooses its next position: the size of its weights, or of its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slicefine import ops, sharding
from slicefine.slices import SliceSpec, read_slice


class GradientScores:
    """Squared gradient norms of the positions of a layer, summed over the micro-batches of a step.

    Only layers with switch_mode "gradient" have them.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._task = -1

    def add(self, layer: Any, grad_output: Tensor, input: Tensor) -> None:
        """Score the next positions of ``layer`` by the gradient of one backward pass.

        Args:
            layer: the `SliceLayer` that these scores belong to.
            grad_output: (n, out).
            input: (n, in).
        """
        task, axis = torch._C._current_graph_task_id(), layer.schedule.next_axis
        # a pass that starts without an accumulated gradient starts anew, so that a skipped or
        # discarded step leaves nothing
        if task != self._task and layer.slice_weight.grad is None:
            self.clear()
        self._task = task
        # one sum per axis: alternating slices score the axis that they take next
        new = gradient_scores(grad_output, input, layer.spec, axis)
        self._sums[axis] = self._sums.get(axis, 0) + new

    def clear(self) -> None:
        self._sums = {}

    def of(self, spec: SliceSpec, axis: str) -> Tensor:
        """(positions,) float64; zeros where nothing has been scored."""
        zeros = torch.zeros(spec.positions(axis), dtype=torch.float64)
        return self._sums.get(axis, zeros)


def position_scores(layer: Any, axis: str) -> Tensor:
    """What decides the next position of a layer with a score mode: (positions,) float64."""
    if layer.scores is not None:
        return layer.scores.of(layer.spec, axis)
    norms = slice_norms(layer.weight_matrix, layer.spec, axis)
    # squares add up over processes, norms do not
    if sharding.is_sharded(layer.weight):
        return sharding.sum_over_shards(norms.square(), layer.weight).sqrt()
    return norms


def slice_norms(weight: Tensor, spec: SliceSpec, axis: str) -> Tensor:
    """Frobenius norm of every slice of a matrix on an axis: (positions,), float64; never a
    temporary as large as the matrix.
    """
    count = spec.positions(axis)
    # a strip of columns would hold other blocks too
    if axis == "block":
        slices = (
            read_slice(weight, *_on(weight, spec.features(axis, p))) for p in range(count)
        )
        return torch.stack(
            [torch.linalg.vector_norm(s, dtype=torch.float64) for s in slices]
        )
    strips = (
        weight.index_select(
            1 if axis == "column" else 0, _index(spec, axis, p).to(weight.device)
        )
        for p in range(count)
    )
    return torch.stack(
        [torch.linalg.vector_norm(strip, dtype=torch.float64) for strip in strips]
    )


def _index(spec: SliceSpec, axis: str, position: int) -> Tensor:
    rows, cols = spec.features(axis, position)
    index = cols if axis == "column" else rows
    assert index is not None
    return index


def _on(
    like: Tensor, features: tuple[Tensor | None, Tensor | None]
) -> Iterator[Tensor | None]:
    return (None if index is None else index.to(like.device) for index in features)


def gradient_scores(
    grad_output: Tensor, input: Tensor, spec: SliceSpec, axis: str
) -> Tensor:
    """Squared Frobenius norm of the gradient of every slice on an axis: (positions,), float64.

    grad_output: (n, out), input: (n, in). One strip of columns (or rows) at a time: memory of a
        slice, time of a full dW.
    """
    scores = torch.zeros(spec.positions(axis), dtype=torch.float64)
    if axis == "row":
        for p in range(len(scores)):
            grad = ops.slice_grad(
                grad_output, input, _index(spec, "row", p).to(input.device)
            )
            scores[p] = grad.double().square().sum().item()
        return scores
    # the grid of positions is strips wide; position p lies in column p % strips
    strips = -(-spec.in_features // spec.r)
    for strip in range(strips):
        # for a block the first row of the grid of positions
        _, cols = spec.features(axis, strip)
        assert cols is not None
        # [out]: squared norm of each row within the strip; blocks of one strip share it
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
