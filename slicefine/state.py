"""What slicefine keeps in a model: one object, under one key of the model's ``__dict__``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from slicefine.config import SliceConfig

_KEY = "_slicefine"


@dataclass
class ModelState:
    """Everything that a model with slices, or with loaded deltas, knows of them.

    Attributes:
        adapters: the register of the model's adapters (`slicefine.deltas.adapters`).
        config: of the slices in training; None while there are none.
        trained_before: names of the parameters that required a gradient before the slices came.
        base: shape and version counter of the base's tensors when slices were made, by key.
        input_hooks: whether transformers' hooks were on the embeddings before.
        saved: state-dict keys of what modules_to_save fully trains.
    """

    adapters: Any
    config: SliceConfig | None = None
    trained_before: frozenset[str] = frozenset()
    base: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    input_hooks: bool = False
    saved: frozenset[str] = frozenset()


def state_of(model: Any) -> ModelState | None:
    """The state of a model; None for one that slicefine has not touched."""
    return model.__dict__.get(_KEY)


def set_state(model: Any, state: ModelState | None) -> None:
    """Give a model its state; None takes it away."""
    if state is None:
        model.__dict__.pop(_KEY, None)
    else:
        model.__dict__[_KEY] = state


def config_of(model: Any) -> SliceConfig | None:
    """The config of the slices in training; None for a model without any."""
    state = state_of(model)
    return None if state is None else state.config
