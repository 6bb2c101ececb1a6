"""What `get_slice_model` warns of once it is known which layers become slices."""

from __future__ import annotations

import math

from torch import nn

from slicefine.config import SliceConfig
from slicefine.layer import SliceLayer
from slicefine.matching import means_everything, some
from slicefine.modules.quantized import PoolSlice
from slicefine.swapping import count_parameters
from slicefine.targets import Target

# a share of the parameters below which slices cannot change what a model does
_LITTLE = 0.01
# of one warning
_LINES = 8


def notes_on(
    model: nn.Module,
    targets: list[Target],
    layers: dict[str, SliceLayer],
    config: SliceConfig,
) -> list[str]:
    """What to warn of once it is known which layers become slices."""
    notes = []
    frozen_on_purpose = config.modules_to_save == []
    skipped = [t for t in targets if t.skipped and not (t.is_head and frozen_on_purpose)]
    if skipped:
        notes.append(_skipped(skipped))
    if config.fan_in_fan_out and not any(layer.fan_in_fan_out for layer in layers.values()):
        notes.append(
            "fan_in_fan_out is True, but no target stores its weight as (in, out); it has no effect"
        )
    if config.pool and not any(isinstance(layer, PoolSlice) for layer in layers.values()):
        notes.append(
            f"pool is {config.pool}, and no target is quantized: it has no effect, slices move over"
            " all of their weights"
        )
    weights = {id(layer.weight): _size_of(layer) for layer in layers.values()}
    # a table of embeddings is looked up: its size says nothing of what the layers can learn
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    total = count_parameters(model, tables)
    share = sum(weights.values()) / total
    if share < _LITTLE and means_everything(config):
        notes.append(
            f"the {len(weights)} sliced weights are {100 * share:.2f} % of this"
            f" {type(model).__name__}: the rest is frozen and no linear layer, so little can be"
            " learned"
        )
    cut = config.r and all(
        layer.spec.r < config.r and _whole(layer) for layer in layers.values()
    )
    if means_everything(config) and cut:
        notes.append(
            f"r={config.r} is wider than every layer: all of each weight trains, which is full"
            " fine-tuning"
        )
    return notes


def _size_of(layer: SliceLayer) -> int:
    if isinstance(layer, PoolSlice):
        return layer.out_features * layer.full_features
    return layer.weight.numel()


def _whole(layer: SliceLayer) -> bool:
    """Whether the slice is all of its weight, at its first position."""
    return math.prod(layer.spec.shape(layer.axis)) == layer.weight_matrix.numel()


def _skipped(targets: list[Target]) -> str:
    """One text on all layers that stay as they are, those with one reason on one line."""
    by_reason: dict[str, list[str]] = {}
    for target in targets:
        assert target.skipped is not None
        by_reason.setdefault(target.skipped, []).append(target.name)
    lines = [
        f"{some(names)} {'stays as it is' if len(names) == 1 else 'stay as they are'}: {reason}"
        for reason, names in by_reason.items()
    ]
    if len(lines) > _LINES:
        rest = len(lines) - _LINES
        lines[_LINES:] = [
            f"and {rest} more (list_targets(model, config) gives each its reason)"
        ]
    return "\n".join(lines)
