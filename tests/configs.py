"""Configs of tests."""

from __future__ import annotations

from typing import Any

from slicefine import SliceConfig

ALONE: dict[str, Any] = {"contiguous": True, "bias": "none", "norms": "none"}


def slices_alone(**values: Any) -> SliceConfig:
    """A config whose slices are runs of features and train with nothing beside them, unless
    ``values`` say otherwise: what a masked run in plain torch can follow, and what can be counted.
    """
    return SliceConfig(**{**ALONE, **values})
