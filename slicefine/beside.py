"""What trains beside the slices of a model is on record before its first update.

A head or a norm that is unfrozen by hand is no part of the config, and an optimizer tells nobody
what it is about to change. So every optimizer is asked before its step which parameters train, and
each model with slices keeps the values of its own that are new among them.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from slicefine.registry import layers_of

Record = Callable[[Any, set[int]], None]

# model with slices -> what puts its parameters on record, given the ids of those that train
_MODELS: weakref.WeakKeyDictionary[nn.Module, Record] = weakref.WeakKeyDictionary()
# how many parameters an optimizer had when it was asked last, and those that did not train then
_SEEN: weakref.WeakKeyDictionary[Optimizer, tuple[int, list[Tensor]]] = (
    weakref.WeakKeyDictionary()
)
_requires_grad = operator.attrgetter("requires_grad")


def watch(model: nn.Module, record: Record) -> None:
    """Have ``record(model, ids)`` called before parameters train that did not before."""
    _MODELS[model] = record
    # an optimizer that has been asked before knew nothing of this model
    _SEEN.clear()


def forget(model: nn.Module) -> None:
    """The model has no slices any more."""
    _MODELS.pop(model, None)


def before_step(optimizer: Optimizer) -> None:
    """Let every model put on record what an optimizer trains for the first time."""
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    known = _SEEN.get(optimizer)
    # every step comes here: one look at each frozen parameter, and no list of them all
    if (
        known is not None
        and known[0] == count
        and True not in map(_requires_grad, known[1])
    ):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    layers = [layer for p in parameters for layer in layers_of(p)]
    # what slices train in; its own gradient never comes
    sliced = {id(layer._parameters.get("weight")) for layer in layers}
    frozen = [p for p in parameters if not p.requires_grad and id(p) not in sliced]
    _SEEN[optimizer] = count, frozen
    ids = {id(p) for p in parameters if p.requires_grad}
    for model, record in list(_MODELS.items()):
        record(model, ids)
