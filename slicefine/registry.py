"""Which layers a slice parameter belongs to.

Optimizers know parameters and nothing else; what a step does to a slice (`slicefine.moves`) starts
from this table. It lies below the layers and knows nothing of them.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

# slice parameter -> the layers that use it, several where a weight is tied. Not an attribute of the
# parameter: that would not survive pickling.
_LAYERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# slice parameter -> the name of its first layer; it outlives the layer
_NAMES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# tells a list of layers that was kept from one that is up to date
_registrations = 0


@dataclass
class _Slices:
    """The slices of an optimizer as they were found last.

    The parameters are held, so that no other can take the id of one that has died.
    """

    registrations: int
    parameters: list[Tensor]
    layers: dict[Tensor, list[weakref.ref[Any]]]


_SLICES: weakref.WeakKeyDictionary[Optimizer, _Slices] = weakref.WeakKeyDictionary()


def layers_of(parameter: Tensor) -> list[Any]:
    """The layers whose active slice this parameter is; empty for any other parameter."""
    references = _LAYERS.get(parameter) or ()
    return [layer for reference in references if (layer := reference()) is not None]


def register(layer: Any) -> None:
    """Note that a layer uses its slice_weight."""
    global _registrations
    parameter = layer._parameters.get("slice_weight")
    if parameter is not None and layer not in layers_of(parameter):
        _LAYERS[parameter] = [*(_LAYERS.get(parameter) or ()), weakref.ref(layer)]
        # lists that optimizers keep are out of date from here on
        _registrations += 1
        if parameter not in _NAMES:
            _NAMES[parameter] = layer.__dict__.get("slice_name") or type(layer).__name__


def name_of(parameter: Tensor) -> str | None:
    """The name of the layer whose active slice this parameter is or was; None for others."""
    return _NAMES.get(parameter)


def slices_of(optimizer: Optimizer) -> dict[Tensor, list[Any]]:
    """The slice parameters of an optimizer, each with the layers that use it.

    Every step asks, and a lookup by weak key costs as much as the update of a small slice: so what
    was found is kept for as long as the optimizer's parameters and the layers are the same.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    known = _SLICES.get(optimizer)
    if known is None or not _up_to_date(known, parameters):
        found = {}
        for parameter in parameters:
            if layers := layers_of(parameter):
                # weak: an optimizer that outlives its model must not keep the layers alive
                found[parameter] = [weakref.ref(layer) for layer in layers]
        known = _SLICES[optimizer] = _Slices(_registrations, parameters, found)
    alive = {}
    for parameter, references in known.layers.items():
        first = references[0]()
        if first is not None and len(references) == 1:
            alive[parameter] = [first]
        elif layers := [layer for r in references if (layer := r()) is not None]:
            alive[parameter] = layers
    return alive


def _up_to_date(known: _Slices, parameters: list[Tensor]) -> bool:
    if known.registrations != _registrations or len(known.parameters) != len(parameters):
        return False
    # by identity: == would compare the values of tensors
    return all(map(is_, known.parameters, parameters))
