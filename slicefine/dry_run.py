"""What a config means in a model, without a change to the model."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch import nn

from slicefine.config import SliceConfig
from slicefine.modules.quantized import pool_size
from slicefine.slices import SliceSchedule, SliceSpec
from slicefine.targets import Target, resolve


@dataclass(frozen=True)
class Match:
    """One row of `list_targets`.

    Attributes:
        name: of the layer, or of the parameter.
        out_features: rows of its weight.
        in_features: columns of its weight.
        r: width of its slice.
        parameters: values that train at a time.
        skipped: why it stays as it is; None for a slice.
        quantized: how its weight is packed, such as "nf4"; None in floating point.
        pool: columns beside a packed weight between which the slice moves; None in floating point.
    """

    name: str
    out_features: int
    in_features: int
    r: int
    parameters: int
    skipped: str | None
    quantized: str | None = None
    pool: int | None = None


def list_targets(model: nn.Module, config: SliceConfig) -> list[Match]:
    """Dry run of `get_slice_model`: what the config means in a model, without changing it.

    Args:
        model: a plain model.
        config: as for `get_slice_model`.

    Returns:
        A row for every layer, in the model's order, those that stay as they are too.

    Raises:
        ValueError: as `get_slice_model` does.
    """
    found = resolve(model, config)
    for note in found.unused:
        warnings.warn(note, stacklevel=2)
    return [_match(target, config) for target in found.layers]


def _match(target: Target, config: SliceConfig) -> Match:
    parameters, pool = 0, None
    out_features, in_features = target.shape
    if target.skipped is None:
        try:
            if target.quantized:
                pool = pool_size(config, in_features, target.r)
            spec = SliceSpec(
                out_features,
                pool or in_features,
                config.slice_type,
                target.r,
                target.r_out,
            )
            SliceSchedule(spec, start_position=config.start_position)
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from error
        parameters = math.prod(spec.parameter_shape)
    shape = out_features, in_features
    skipped, quantized = target.skipped, target.quantized
    return Match(target.name, *shape, target.r, parameters, skipped, quantized, pool)
