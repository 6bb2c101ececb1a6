"""SliceLinear: an nn.Linear of which only the active slice trains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

# imported for its hook: there is no SliceLinear that torch's optimizers would not move
from slicefine import moves as moves
from slicefine import ops
from slicefine.agreement import agreed
from slicefine.config import SliceConfig
from slicefine.function import slice_linear, source_of
from slicefine.layer import SliceLayer
from slicefine.sharding import check_whole


class SliceLinear(SliceLayer, nn.Linear):
    """Drop-in replacement of nn.Linear with a moving trainable slice.

    The state dict has the same keys both ways.

    Args:
        in_features: as for nn.Linear.
        out_features: as for nn.Linear.
        bias: as for nn.Linear.
        device: as for nn.Linear.
        dtype: of weight and bias.
        config: what the slice is; `SliceConfig()` unless given.

    weight: (out_features, in_features), frozen; (in_features, out_features) with fan_in_fan_out.
    slice_weight: (out, r) for a column slice, (r, in) for a row slice, (r_out, r) for a block, flat
        for ``row_column``.

    Raises:
        ValueError: The slice does not fit.
        TypeError: The weight is not floating point.

    Source: SliceFine, arXiv 2510.08513.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: SliceConfig | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.make_slice(config or SliceConfig(), "")

    @classmethod
    def from_linear(
        cls, linear: nn.Module, config: SliceConfig, name: str = "", r: int | None = None
    ) -> SliceLinear:
        """The same layer with the same weight, bias and hooks.

        Args:
            linear: an nn.Linear or Hugging Face's Conv1D.
            config: what the slice is.
            name: where the layer is in its model; seeds its random order.
            r: overrides config.r.
        """
        # without __init__, which would allocate and fill a weight only to drop it
        layer = cls.__new__(cls)
        # shared hooks, own registries: the original module is left as it was
        layer.__dict__.update(linear.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            layer.__dict__[registry] = dict(linear.__dict__[registry])
        layer.fan_in_fan_out = not isinstance(linear, nn.Linear)
        layer.plain_class = type(linear)
        assert isinstance(linear.weight, Tensor)
        shape = tuple(linear.weight.shape)
        layer.out_features, layer.in_features = (
            shape[::-1] if layer.fan_in_fan_out else shape
        )
        layer.make_slice(config, name, r)
        return layer

    def to_plain(self) -> nn.Module:
        """The layer that this one was made of, with the weight as it stands; counterpart of
        `from_linear`.
        """
        # the master stays behind, so its last values must be in the weight
        self.sync()
        own = self.own_attributes()
        if self.fan_in_fan_out:
            # Conv1D counts its features under names of its own
            own |= {"out_features", "in_features"}
        plain = self.plain_class.__new__(self.plain_class)
        kept = {name: value for name, value in self.__dict__.items() if name not in own}
        for registry in ("_parameters", "_buffers"):
            entries = self.__dict__[registry].items()
            kept[registry] = {name: value for name, value in entries if name not in own}
        kept["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - own
        plain.__dict__.update(kept)
        return plain

    def forward(self, input: Tensor) -> Tensor:
        # most calls find nothing to check or to do beside the product; for them this reads the
        # registries themselves, as an attribute of a module costs as much as a small product
        parameters = self._parameters
        # a parametrized bias is computed by the attribute
        if not is_compiling() and "bias" in parameters and agreed(self):
            bias, axis = parameters["bias"], self.axis
            weight: Tensor = parameters["weight"]  # pyright: ignore[reportAssignmentType]
            weight = weight.t() if self.fan_in_fan_out else weight
            if self.watch is not None:
                # until the slice has been seen to train
                check_whole(self)
                self.watch.called = True
            if not is_grad_enabled():
                # casts under autocast as nn.Linear does
                return F.linear(input, weight, bias)
            if (
                self.set_aside is None
                and self.updater_reference is None
                and self.scores is None
                and not ops.any_autocast()
            ):
                indices, master = self._buffers, parameters["slice_weight"]
                assert master is not None
                rows = None if axis == "column" else indices["slice_rows"]
                cols = None if axis == "row" else indices["slice_cols"]
                # a column slice keeps few columns, whatever could make its input again
                source = source_of(input) if cols is None else None
                return slice_linear(input, weight, bias, master, rows, cols, None, source)
        source = source_of(input)
        input, layer = self.prepare_input(input)
        return slice_linear(
            input,
            self.weight_matrix,
            self.bias,
            self.master,
            self.rows,
            self.cols,
            layer,
            source,
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, slice_type={self.spec.slice_type}, r={self.spec.r},"
            f" switch_interval={self.schedule.interval}"
        )
