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
    if axis == "block":
        # (row blocks, column blocks); a strip of columns at a time
        strips = [
            _by_rows(read_slice(weight, None, cols.to(weight.device)).double(), spec)
            for cols in _strips(spec)
        ]
        return torch.stack(strips, 1).flatten().sqrt()
    slices = (
        weight.index_select(
            1 if axis == "column" else 0, _index(spec, axis, p).to(weight.device)
        )
        for p in range(spec.positions(axis))
    )
    return torch.stack([torch.linalg.vector_norm(s, dtype=torch.float64) for s in slices])


def _strips(spec: SliceSpec) -> Iterator[Tensor]:
    """The columns of the first row of blocks; further rows have the same."""
    for strip in range(-(-spec.in_features // spec.r)):
        cols = spec.features(spec.axes[0], strip)[1]
        assert cols is not None
        yield cols


def _by_rows(strip: Tensor, spec: SliceSpec) -> Tensor:
    """Squared norms of the blocks in a strip (out, r): (row blocks,) float64."""
    energy = strip.square().sum(1)
    # whole blocks of rows lie side by side once they are in the order in which slices take them
    order = spec.order(spec.out_features)
    energy = energy if order is None else energy[order.to(energy.device)]
    width, features = spec.r_out, spec.out_features
    whole = features // width
    sums = energy[: whole * width].view(whole, width).sum(1)
    if whole * width < features:
        # the last position moves back to stay inside
        sums = torch.cat([sums, energy[features - width :].sum().view(1)])
    return sums


def _index(spec: SliceSpec, axis: str, position: int) -> Tensor:
    rows, cols = spec.features(axis, position)
    index = cols if axis == "column" else rows
    assert index is not None
    return index


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
    strips = list(_strips(spec))
    # the grid of positions is as wide as there are strips
    grid = scores.view(-1, len(strips))
    for strip, cols in enumerate(strips):
        grad = ops.slice_grad(grad_output, input.index_select(1, cols.to(input.device)))
        if axis == "block":
            grid[:, strip] = _by_rows(grad.double(), spec)
        else:
            grid[0, strip] = grad.double().square().sum()
    return scores
