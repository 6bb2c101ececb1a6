"""SliceLinear: an nn.Linear of which only the active slice trains, and the autograd function behind it.

``weight`` is frozen and always the truth: the forward pass is one ``F.linear``. ``slice_weight`` is the only trainable
parameter: a contiguous master copy of the active slice (float32; float64 for a float64 weight). Whatever optimizer moves it,
``weight[slice] = cast(slice_weight)`` follows: `SliceAdamW` does it in its kernel, for any other `torch.optim` optimizer
a hook does after its step (`slicefine.moves`), and every forward checks.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slicefine import ops
from slicefine.config import SliceConfig
from slicefine.moves import layers_of, register
from slicefine.reference import read_slice, write_slice
from slicefine.scores import gradient_scores, slice_norms
from slicefine.slices import SliceSchedule, SliceSpec


class Updater(Protocol):
    """What `optimizer_in_bwd` needs of an optimizer (`SliceAdamW`)."""

    def before_forward(self, layer: SliceLinear) -> None: ...

    def before_backward(self, layer: SliceLinear) -> None: ...

    def update_in_backward(self, layer: SliceLinear, grad_output: Tensor, input: Tensor) -> None: ...


class SliceLinear(nn.Linear):
    """Drop-in replacement of nn.Linear with a moving trainable slice; the state dict has the same keys both ways.

    weight: (out_features, in_features), frozen; (in_features, out_features) with fan_in_fan_out.
    slice_weight: (out, r) for a column slice, (r, in) for a row slice, (r_out, r) for a block, flat for ``row_column``.
    Raises ValueError if the slice does not fit, TypeError for a weight that is not floating point.
    Source: SliceFine, arXiv 2510.08513.
    """

    slice_rows: Tensor
    slice_cols: Tensor
    axis: str
    fan_in_fan_out: bool = False  # the weight is stored (in, out), as Conv1D's
    _versions: tuple[int, int, int]  # of weight and slice_weight when they last agreed

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
        self._become_slice(config or SliceConfig(), "")

    @classmethod
    def from_linear(cls, linear: nn.Module, config: SliceConfig, name: str = "", r: int | None = None) -> SliceLinear:
        """The same layer with the same weight, bias and hooks; ``linear`` is an nn.Linear or Hugging Face's Conv1D.

        name: where the layer is in its model; seeds its random order. r: overrides config.r.
        """
        layer = cls.__new__(cls)
        # shared hooks, own registries: the original module is left as it was
        layer.__dict__.update(linear.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            layer.__dict__[registry] = dict(linear.__dict__[registry])
        layer.fan_in_fan_out = not isinstance(linear, nn.Linear)
        assert isinstance(linear.weight, Tensor)
        shape = tuple(linear.weight.shape)
        layer.out_features, layer.in_features = shape[::-1] if layer.fan_in_fan_out else shape
        layer._become_slice(config, name, r)
        return layer

    def _become_slice(self, config: SliceConfig, name: str, r: int | None = None) -> None:
        weight = self.weight
        if not weight.dtype.is_floating_point:
            raise TypeError(
                f"layer {name!r} has a quantised weight ({weight.dtype}); slices train {', '.join(str(d) for d in _WEIGHT_DTYPES)} "
                "weights. Load the model unquantised, or leave this layer out (exclude_modules)."
            )
        if weight.dtype not in _WEIGHT_DTYPES:
            raise TypeError(
                f"layer {name!r} has a {weight.dtype} weight; expected one of {', '.join(str(d) for d in _WEIGHT_DTYPES)}"
            )
        if weight.is_meta:
            raise ValueError(
                f"layer {name!r} has a weight on the meta device, without values; load the weights before making slices"
            )
        seed = (config.seed + zlib.crc32(name.encode())) & 0x7FFFFFFF
        self.spec = SliceSpec(
            self.out_features, self.in_features, config.slice_type, r or config.r, config.r_out or r or config.r,
            config.contiguous, seed,
        )  # fmt: skip
        self.schedule = SliceSchedule(self.spec, config.switch_mode, config.switch_interval, config.start_position)
        self.state_on_switch = config.state_on_switch
        weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.register_buffer("slice_rows", torch.empty(0, dtype=torch.int64, device=weight.device), persistent=False)
        self.register_buffer("slice_cols", torch.empty(0, dtype=torch.int64, device=weight.device), persistent=False)
        self.slice_weight = nn.Parameter(
            torch.zeros(self.spec.parameter_shape, dtype=_master_dtype(weight.dtype), device=weight.device)
        )
        self.scores: dict[str, Tensor] = {}
        self._scores_task = -1
        self._updater: weakref.ref[Updater] | None = None
        self._awaiting_weight = False
        self.place()

    # -- the active slice -------------------------------------------------------------------------------------------

    @property
    def weight_matrix(self) -> Tensor:
        """(out_features, in_features), a view of ``weight`` however it is stored."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    @property
    def rows(self) -> Tensor | None:
        """(R,) int64, the active output features; None for all."""
        return None if self.axis == "column" else self.slice_rows

    @property
    def cols(self) -> Tensor | None:
        """(K,) int64, the active input features; None for all."""
        return None if self.axis == "row" else self.slice_cols

    def active(self, flat: Tensor) -> Tensor:
        """The (R, K) part of slice_weight, its gradient or its moments; differs from ``flat`` for ``row_column`` only."""
        if self.spec.slice_type != "row_column":
            return flat
        R, K = self.spec.shape(self.axis)
        return flat.view(-1)[: R * K].view(R, K)

    @torch.no_grad()
    def place(self) -> None:
        """Point the indices at the scheduled position and read the master from the weight."""
        # a plain string: compiled code guards on it, and would recompile at every move were it computed from the move count
        self.axis = self.schedule.axis
        rows, cols = self.spec.features(self.axis, self.schedule.position[self.axis])
        for name, index in (("slice_rows", rows), ("slice_cols", cols)):
            buffer = getattr(self, name)
            if index is None:
                continue
            if buffer.numel() == index.numel():
                buffer.copy_(index)  # in place: compiled code and kernels keep reading the same tensor
            else:
                setattr(self, name, index.to(buffer.device))
        if self.spec.slice_type == "row_column":
            self.slice_weight.zero_()  # the unused tail
        self.active(self.slice_weight).copy_(read_slice(self.weight_matrix, self.rows, self.cols))
        self.mark_synchronised()

    @torch.no_grad()
    def write_through(self) -> None:
        """``weight[slice] = cast(slice_weight)``, to nearest."""
        write_slice(self.weight_matrix, self.rows, self.cols, self.active(self.slice_weight).to(self.weight.dtype))
        self.mark_synchronised()

    @torch.no_grad()
    def read_back(self) -> None:
        """Make the master follow the weight; entries that already round to it keep their extra bits."""
        master = self.active(self.slice_weight)
        truth = read_slice(self.weight_matrix, self.rows, self.cols)
        master.copy_(torch.where(_rounds_to(master, truth), master, truth.to(master.dtype)))
        self._awaiting_weight = False
        self.mark_synchronised()

    def mark_synchronised(self) -> None:
        """Note that weight and master agree, for every layer that shares them."""
        note_agreement({self, *layers_of(self.slice_weight)})

    @property
    def slice_changed(self) -> bool:
        """Whether something has written to slice_weight since the weight last followed it."""
        return self.slice_weight._version != self._versions[2]

    def synchronise(self) -> None:
        """Bring weight and slice_weight together after one of them was written to from outside."""
        if not self._awaiting_weight and _versions_of(self) == self._versions:
            return
        if self._awaiting_weight:
            self._check_belongs()
        if self.slice_weight.device != self.slice_rows.device:
            return  # tied to a layer that is being moved to another device, as this one will be
        if _versions_of(self)[:2] != self._versions[:2]:
            # also when both were written to, as by weight averaging, which knows nothing of positions
            self.read_back()
        elif self.slice_changed:
            self.write_through()

    def _check_belongs(self) -> None:
        truth = read_slice(self.weight_matrix, self.rows, self.cols)
        if not bool(_rounds_to(self.active(self.slice_weight).detach(), truth).all()):
            raise RuntimeError(
                "the loaded slice state does not belong to the weights in the model: the saved master of the active slice differs "
                "from the weight. Load the model's state dict of the same checkpoint too."
            )
        self._awaiting_weight = False
        self.mark_synchronised()

    @property
    def updater(self) -> Updater | None:
        """The optimizer that updates this slice during backward, if one does."""
        return self._updater() if self._updater is not None else None

    def position_scores(self, axis: str) -> Tensor:
        count = self.spec.positions(axis)
        if self.schedule.mode == "magnitude":
            return slice_norms(self.weight_matrix, self.spec, axis)
        return self.scores.get(axis, torch.zeros(count, dtype=torch.float64))

    def add_scores(self, grad_output: Tensor, input: Tensor) -> None:
        """Score the next positions by the gradient of one backward pass; micro-batches add up their squared norms.

        A pass that starts without an accumulated gradient starts anew, so a skipped or discarded step leaves nothing.
        """
        task, axis = torch._C._current_graph_task_id(), self.schedule.next_axis
        if task != self._scores_task and self.slice_weight.grad is None:
            self.scores = {}
        self._scores_task = task
        self.scores[axis] = self.scores.get(axis, 0) + gradient_scores(grad_output, input, self.spec, axis)

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.synchronise()
        device = input.device.type
        if ops.autocast_enabled(device) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        updater = self.updater
        if updater is not None:
            if compiling:
                raise RuntimeError("optimizer_in_bwd=True does not work under torch.compile; use SliceAdamW without it")
            updater.before_forward(self)
        layer = None
        if updater is not None or (torch.is_grad_enabled() and self.schedule.needs_gradient_scores):
            layer = self
        return _SliceLinearFunction.apply(
            input, self.weight_matrix, self.bias, self.slice_weight, self.rows, self.cols, layer
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slice_type={self.spec.slice_type}, r={self.spec.r}, switch_interval={self.schedule.interval}"

    # -- state: same keys as nn.Linear, consistent after copies and casts --------------------------------------------

    def slice_state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weight: schedule and master; tensors and numbers only."""
        return {"schedule": self.schedule.state_dict(), "master": self.slice_weight.detach().clone()}

    @torch.no_grad()
    def load_slice_state(self, state: dict[str, Any]) -> None:
        """Counterpart of `slice_state`; the model's own state dict may be loaded before or after."""
        if state["master"].shape != self.slice_weight.shape:
            raise ValueError(
                f"the saved slice has shape {tuple(state['master'].shape)}, this layer's {tuple(self.slice_weight.shape)}: "
                "build the model with the saved SliceConfig"
            )
        self.synchronise()
        self.schedule.load_state_dict(state["schedule"])
        self.place()
        self.slice_weight.copy_(state["master"])
        self._awaiting_weight = True
        self.mark_synchronised()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.synchronise()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "slice_weight", None)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "slice_weight" in missing_keys:
            missing_keys.remove(prefix + "slice_weight")
        for other in layers_of(self.slice_weight):
            other.weight = self.weight  # load_state_dict(assign=True) would untie them
        self.read_back()

    def _apply(self, fn, recurse: bool = True) -> SliceLinear:
        self.synchronise()
        master = self._parameters.pop("slice_weight")
        assert master is not None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["slice_weight"] = master
        weight = self.weight
        # the same Parameter object: an optimizer may hold it
        master.data = (
            master.data.to(weight.device, _master_dtype(weight.dtype))
            if not weight.is_meta
            else torch.empty_like(master.data, device="meta")
        )
        if master.grad is not None:
            applied = type(master.grad) is not Tensor  # optimizer_in_bwd leaves a gradient without values
            master.grad = None if applied or weight.is_meta else master.grad.to(master.device, master.dtype)
        if not weight.is_meta:
            self.read_back()
        self.mark_synchronised()
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.synchronise()
        state = self.__dict__.copy()
        state["_updater"] = None  # an optimizer belongs to the layers it was made for
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mark_synchronised()
        register(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "slice_weight":
            register(self)


def _versions_of(layer: SliceLinear) -> tuple[int, int, int]:
    """Which weight it is, how often it has been written to, and how often slice_weight."""
    weight, master = layer._parameters.get("weight"), layer._parameters.get("slice_weight")
    if weight is None or master is None:  # replicas of nn.DataParallel and parametrized weights keep theirs elsewhere
        weight, master = layer.weight, layer.slice_weight
    return id(weight), weight._version, master._version


def note_agreement(layers: Iterable[SliceLinear]) -> None:
    """Note that weight and master of these layers agree; the layers are all those that share them."""
    for layer in layers:
        layer.__dict__["_versions"] = _versions_of(
            layer
        )  # nn.Module's __setattr__ takes longer than a small slice's update


_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _master_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rounds_to(master: Tensor, truth: Tensor) -> Tensor:
    """Where the master is a more precise copy of the weight; bfloat16 may have been rounded stochastically, up or down."""
    nearest = master.to(truth.dtype) == truth
    if truth.dtype != torch.bfloat16:
        return nearest
    down = master.view(torch.int32) >> 16
    bits = truth.contiguous().view(torch.int16).to(torch.int32)
    return nearest | (down == bits) | (down + 1 == bits)


class _SliceLinearFunction(torch.autograd.Function):
    """y = x W^T + b with a gradient for x, the bias and the slice; keeps X[:, cols], or X for a row slice.

    ``layer`` is None but for the two cases in which backward does more than return gradients: scores for the next move, and
    `optimizer_in_bwd`.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, slice_weight, rows, cols, layer):
        if weight.dtype != input.dtype and ops.autocast_enabled(input.device.type):
            cast_weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
        else:
            cast_weight = weight
        needs_input, _, _, needs_slice, *_ = ctx.needs_input_grad
        ctx.scoring = layer is not None and layer.schedule.needs_gradient_scores
        kept = None
        if needs_slice:
            kept = input if cols is None or ctx.scoring else ops.take_columns(input, cols)
        # the weight itself, not its cast: a bfloat16 copy of every weight would live until backward
        ctx.save_for_backward(weight if needs_input else None, kept, rows, cols)
        ctx.layer, ctx.slice_shape = layer, slice_weight.shape
        ctx.slice_edge = 2 if bias is None else 3  # tensor inputs before slice_weight
        return F.linear(input, cast_weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        # gradients are recorded only for a gradient of the gradient, which this refuses
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, grad_output)


def _backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs_input, _, needs_bias, needs_slice, *_ = ctx.needs_input_grad
    updater = ctx.layer.updater if ctx.layer is not None and needs_slice else None
    if updater is not None:
        # torch.autograd.grad towards something else asks for no update
        needs_slice = torch._C._will_engine_execute_node(ctx.next_functions[ctx.slice_edge][0])
        if needs_slice:
            updater.before_backward(ctx.layer)
    weight, kept, rows, cols = ctx.saved_tensors
    grad_input = grad_bias = grad_slice = None
    # once for both products: attention hands back a transposed gradient, which each of them would copy
    flat = grad_output.reshape(-1, grad_output.shape[-1])
    if needs_input:
        grad_input = flat.mm(weight if weight.dtype == flat.dtype else weight.to(flat.dtype))
        grad_input = grad_input.view(*grad_output.shape[:-1], weight.shape[1])
    if needs_bias:
        grad_bias = flat.sum(0)
    if needs_slice:
        grad_slice = _slice_gradient(
            ctx, flat, kept if kept.dim() == 2 else kept.reshape(-1, kept.shape[-1]), rows, cols
        )
    return grad_input, None, grad_bias, grad_slice, None, None, None


_backward_once = once_differentiable(_backward)


def _slice_gradient(ctx, grad_output: Tensor, kept: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor | None:
    """The gradient for slice_weight; None where the update has been made in place of it. Also collects scores."""
    layer = ctx.layer
    if ctx.scoring:
        layer.add_scores(grad_output, kept)
        if cols is not None:
            kept = kept.index_select(1, cols)
    if layer is not None and layer.updater is not None:
        layer.updater.update_in_backward(layer, grad_output, kept)
        return None
    grad = ops.gradient_of_slice(grad_output, kept, rows)
    if grad.shape == ctx.slice_shape:
        return grad
    flat = grad.new_zeros(ctx.slice_shape)  # row_column: the slice, then an unused tail
    flat[: grad.numel()] = grad.flatten()
    return flat
