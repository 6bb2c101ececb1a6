"""Slices of parameters that a module uses itself, without a linear layer to call: a projection of
nn.MultiheadAttention, experts.

A `SliceParameter` is a child of that module under the parameter's name; `SlicedModule`, mixed into
the module's class, keeps the
state-dict key. To optimizers, moves and deltas it is a `SliceLayer`.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

# imported for its hook, as in `slicefine.linear`
from slicefine import moves as moves
from slicefine.config import SliceConfig
from slicefine.function import in_transform, slice_linear
from slicefine.layer import SliceLayer
from slicefine.sharding import local


class SliceParameter(SliceLayer):
    """The moving slice of a parameter of another module.

    weight: (out, in), or (experts, out, in): then one slice holds the same columns of every expert,
        and out_features counts
        the rows of all of them.
    Raises ValueError if the slice does not fit.
    """

    @classmethod
    def from_parameter(
        cls, parameter: nn.Parameter, config: SliceConfig, name: str, r: int | None = None
    ) -> SliceParameter:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.weight = parameter
        layer.register_parameter(
            "bias", None
        )  # a bias belongs to the module that holds the parameter
        layer.out_features, layer.in_features = (
            parameter.shape[:-1].numel(),
            parameter.shape[-1],
        )
        layer.make_slice(config, name, r)
        return layer

    @property
    def weight_matrix(self) -> Tensor:
        weight = self._parameters.get("weight")
        # (experts, out, in) as (experts * out, in): its columns are those of every expert at once
        return local(self.weight if weight is None else weight).view(-1, self.in_features)

    def forward(
        self,
        input: Tensor,
        bias: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """``input @ weight[start:stop].T + bias``. input: (..., in). bias: (stop - start,)."""
        stop = self.out_features if stop is None else stop
        input, layer = self.prepare_input(input)
        if (start, stop) == (0, self.out_features):
            return slice_linear(
                input, self.weight_matrix, bias, self.master, self.rows, self.cols, layer
            )
        # scores, updates in backward and torch.func's transforms are of whole rows
        if layer is not None or in_transform():
            whole = slice_linear(
                input, self.weight_matrix, None, self.master, self.rows, self.cols, layer
            )
            return (
                whole[..., start:stop]
                if bias is None
                else whole[..., start:stop] + bias.to(whole.dtype)
            )
        part, rows = self.active(self.master), self.rows
        if rows is None:
            part = part[start:stop]
        else:  # the same shapes wherever the slice is: rows of other parts are computed and dropped
            inside = (rows >= start) & (rows < stop)
            part, rows = part * inside[:, None], (rows - start).clamp(0, stop - start - 1)
        return slice_linear(
            input, self.weight_matrix[start:stop], bias, part, rows, self.cols, None
        )

    def state_key(self, name: str) -> str:
        return name

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # the child has the parameter's name, so the key without ".weight" is the plain module's
        destination[prefix[:-1]] = destination.pop(prefix + "weight")

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys.extend(
            prefix[:-1] if key == prefix + "weight" else key for key in missing
        )


class SlicedModule(nn.Module):
    """Mixed into the class of a module some of whose parameters have become `SliceParameter`
    children.
    """

    _parameter_order: list[str]
    _held_class: type[nn.Module]

    def slice_of(self, name: str) -> SliceParameter | None:
        """The slice that has taken the place of a parameter."""
        child = self._modules.get(name)
        return child if isinstance(child, SliceParameter) else None

    def parameter(self, name: str) -> Tensor | None:
        """A parameter, sliced or not."""
        child = self.slice_of(name)
        return self._parameters.get(name) if child is None else child.weight

    def free_biases(self) -> None:
        """Let the biases of the sliced parameters train."""
        for name in list(self._modules):
            bias = self._parameters.get(f"{name}_bias")
            if bias is not None and self.slice_of(name) is not None:
                bias.requires_grad_(True)

    def restore(self) -> None:
        """Turn the module into what it was: its own class, its own parameters in their order."""
        held = {
            name: child
            for name in self._modules
            if (child := self.slice_of(name)) is not None
        }
        for name, child in held.items():
            child.sync()
            del self._modules[name]
        order = self.__dict__.pop("_parameter_order")
        # what has been registered meanwhile goes last
        late = [name for name in self._parameters if name not in order]
        self._parameters = {
            n: held[n].weight if n in held else self._parameters[n] for n in [*order, *late]
        }  # pyright: ignore
        self.__class__ = type(self)._held_class  # pyright: ignore[reportAttributeAccessIssue]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        for name in self._modules:
            if self.slice_of(name) is not None and prefix + name in state_dict:
                # plain checkpoints have the parameter's key, torch looks for the child's
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As nn.Module's, with the keys in the plain module's order."""
        result = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        first = [prefix + name for name in self._parameter_order if prefix + name in result]
        late = [key for key in result if key.startswith(prefix) and key not in first]
        for key in [*first, *late]:
            # a child's keys come after those of the parameters, and its own is one of these
            result[key] = result.pop(key)
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the mixed class cannot be found by name; the two it is made of can
        own, mixin = self._held_class, type(self).__mro__[1]
        state: Any = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (mixin, own), state


def convert_module(module: nn.Module, mixin: type[SlicedModule]) -> None:
    """Let a module hold slices, in place: its class becomes ``mixin`` in front of its own."""
    if not isinstance(module, SlicedModule):
        # optimizer states count parameters by their place, so `restore` must bring the order back
        module.__dict__["_parameter_order"] = list(module._parameters)
        module.__class__ = _mixed(mixin, type(module))


def swap_parameter(module: nn.Module, name: str, layer: SliceParameter) -> None:
    """Put the slice in the parameter's place; the module already converts slices."""
    del module._parameters[name]
    module._modules[name] = layer


def restore_parameters(model: nn.Module) -> None:
    """Undo `convert_module` and `swap_parameter` in a whole model."""
    for module in list(model.modules()):
        if isinstance(module, SlicedModule):
            module.restore()


@functools.cache
def _mixed(mixin: type, own: type) -> Any:
    # under the name of its own class: whoever prints or matches class names sees no difference
    body = {
        "_held_class": own,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
    }
    return type(own.__name__, (mixin, own), body)


def _rebuild(mixin: type, own: type) -> Any:
    mixed = _mixed(mixin, own)
    return mixed.__new__(mixed)
