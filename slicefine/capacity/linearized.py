"""rho: how far a slice would have to move to make edits, predicted from the pretrained point
without training.

The model is linearized in the slice; the least-norm change that gives every edit its margin is
compared with the norm of the slice's weights. Counting parameters or ranks predicts nothing here;
rho was right to within a factor of 2 in r where it was tried.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.capacity.samples import Samples, logits_of, take
from slicefine.config import SliceConfig
from slicefine.slices import SliceSpec
from slicefine.targets import find_targets

COMFORTABLE, BORDERLINE = 1.0, 2.5


@dataclass(frozen=True)
class Prediction:
    """r: width of the slice. parameters: that would train. rho: needed change / norm of the slice's
    weights. rank: of the edits' gradients. verdict: "comfortable" (rho <= 1), "borderline" (<= 2.5)
    or "too small"."""

    r: int
    parameters: int
    rho: float
    rank: int
    verdict: str


def verdict(rho: float) -> str:
    return (
        "comfortable"
        if rho <= COMFORTABLE
        else "borderline"
        if rho <= BORDERLINE
        else "too small"
    )


def predict_sizes(
    model: nn.Module,
    edits: Samples,
    sizes: Sequence[int],
    config: SliceConfig | None = None,
    margin: float = 1.0,
    batch_size: int = 32,
) -> list[Prediction]:
    """rho of column or row slices of several widths, for making ``edits`` (their labels are the
    answers wanted).

    config: which layers, which axis, which start position; its r is replaced by each of ``sizes``.
    margin: by which the wanted class must win. One forward and backward pass over the edits serves
    all sizes; memory is edits x slice, largest size. Raises ValueError for a slice type other than
    column or row.
    """
    config = config or SliceConfig(contiguous=True)
    if config.slice_type not in ("column", "row"):
        raise ValueError(
            f"slice_type is {config.slice_type!r}; rho is defined for column and row slices here"
        )
    if not len(edits) or not sizes:
        raise ValueError("there are no edits or no sizes; nothing to predict")
    # by the largest size, so that all sizes are predicted for the same layers
    targets = [
        t for t in find_targets(model, replace(config, r=max(sizes))) if t.skipped is None
    ]
    layers = {t.name: t.module for t in targets}
    grams = {r: torch.zeros(len(edits), len(edits), dtype=torch.float64) for r in sizes}
    needed = []
    rows: dict[int, list[list[Tensor]]] = {r: [] for r in sizes}
    for start in range(0, len(edits), batch_size):
        batch = edits[slice(start, start + batch_size)]
        need, seen = _contrast_gradients(model, batch, layers, margin)
        needed.append(need)
        for r in sizes:
            rows[r].append(
                [
                    _slice_rows(config, r, name, *pair)
                    for name, pair in zip(layers, seen, strict=True)
                ]
            )
    for r in sizes:
        for parts in zip(*rows[r], strict=True):
            gradient = torch.cat(parts)
            grams[r] += gradient @ gradient.t()
    need = torch.cat(needed)
    result = []
    for r in sizes:
        norm = sum(_slice_norm(config, r, name, m) for name, m in layers.items()) ** 0.5
        # rho is the least norm of a change that gives every edit what it lacks, over the slice's
        # own norm
        values, vectors = torch.linalg.eigh(grams[r])
        # directions of rounding only: dividing by them would blow rho up
        kept = values > values.max() * 1e-12 * len(edits)
        along = vectors.t() @ need
        # what no change of the slice can give counts as infinitely far
        lost = float(along[~kept].square().sum()) > 1e-16 * float(need.square().sum())
        rho = (
            float("inf")
            if lost
            else float((along[kept].square() / values[kept]).sum().sqrt()) / norm
        )
        parameters = sum(
            r * (_matrix(m).numel() // _width(config, m)) for m in layers.values()
        )
        result.append(Prediction(r, parameters, rho, int(kept.sum()), verdict(rho)))
    return result


def _contrast_gradients(
    model: nn.Module, batch: Samples, layers: dict[str, nn.Module], margin: float
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """((n,) what wanted minus best other logit lacks, per layer (input, gradient of that contrast
    at the output)).
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    calls = 0

    def record(name: str, args: Any, output: Any) -> Tensor:
        nonlocal calls
        calls += 1
        # a leaf beside the output: its gradient is the output's, whatever follows in place
        marked = output + torch.zeros_like(output, requires_grad=True)
        seen[name] = args[0].detach(), marked
        return marked

    handles = [
        layer.register_forward_hook(
            lambda module, args, output, name=name: record(name, args, output)
        )
        for name, layer in layers.items()
    ]
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.enable_grad():
            logits = logits_of(model, take(batch.inputs, slice(None)))
            wanted = batch.labels.to(logits.device)
            own = logits.gather(1, wanted[:, None]).squeeze(1)
            # the strongest rival of each sample
            other = logits.scatter(1, wanted[:, None], float("-inf")).max(1).values
            contrast = own - other
            if calls != len(layers) or len(seen) != calls:
                raise ValueError(
                    f"{calls} calls of {len(layers)} layers in one forward pass: a layer was called"
                    " several times, or not at all, and rho is not defined for it; leave it out"
                    " (exclude_modules)"
                )
            gradients = torch.autograd.grad(
                contrast.sum(), [seen[n][1] for n in layers], allow_unused=True
            )
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    # an edit that is right by the margin already needs nothing
    need = (margin - contrast.detach()).clamp(min=0).double().cpu()
    pairs = []
    for name, gradient in zip(layers, gradients, strict=True):
        x, z = seen[name]
        pairs.append(
            (_by_token(x), _by_token(torch.zeros_like(z) if gradient is None else gradient))
        )
    return need, pairs


def _by_token(x: Tensor) -> Tensor:
    """(n, features) or (n, ..., features) -> (n, tokens, features), float64 on the host."""
    x = x.double().cpu()
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _slice_rows(config: SliceConfig, r: int, name: str, x: Tensor, g: Tensor) -> Tensor:
    """(n, slice entries): gradient of each sample's contrast in the slice, summed over its tokens."""
    rows, cols = _features(config, r, name, g.shape[-1], x.shape[-1])
    x, g = x if cols is None else x[..., cols], g if rows is None else g[..., rows]
    return torch.einsum("nto,nti->noi", g, x).flatten(1)


def _features(
    config: SliceConfig, r: int, name: str, out: int, width: int
) -> tuple[Tensor | None, Tensor | None]:
    """The features that `SliceLinear` would take in this layer, scattered by the layer's own order
    or not.
    """
    # as `SliceLayer.make_slice` has it
    seed = (config.seed + zlib.crc32(name.encode())) & 0x7FFFFFFF
    spec = SliceSpec(out, width, config.slice_type, r, r, config.contiguous, seed)
    return spec.features(config.slice_type, config.start_position)


def _matrix(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight.detach().double().cpu()  # pyright: ignore[reportCallIssue, reportAssignmentType]
    return weight if isinstance(module, nn.Linear) else weight.t()


def _width(config: SliceConfig, module: nn.Module) -> int:
    return _matrix(module).shape[0 if config.slice_type == "row" else 1]


def _slice_norm(config: SliceConfig, r: int, name: str, module: nn.Module) -> float:
    """Squared Frobenius norm."""
    weight = _matrix(module)
    rows, cols = _features(config, r, name, weight.shape[0], weight.shape[1])
    return float(
        (weight if rows is None else weight[rows])[:, slice(None) if cols is None else cols]
        .square()
        .sum()
    )
