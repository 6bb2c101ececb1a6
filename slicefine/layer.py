"""SliceLayer: a frozen weight with a moving slice that trains.

``weight`` is frozen and always the truth: the forward pass is one ``F.linear``. ``slice_weight`` is
the only trainable parameter: a contiguous master copy of the active slice (float32; float64 for a
float64 weight). Whatever optimizer moves it, ``weight[slice] = cast(slice_weight)`` follows:
`SliceAdamW` does it in its kernel, for any other `torch.optim` optimizer a hook does after its step
(`slicefine.moves`), and every forward checks.
"""

from __future__ import annotations

import weakref
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from slicefine import ops, sharding
from slicefine.agreement import (
    Agreement,
    State,
    after_assignment,
    check_belongs,
    convert_indices,
    convert_master,
    equal,
    mark_agreed,
    master_dtype,
    note_taken,
    sample_visited,
)
from slicefine.config import SliceConfig
from slicefine.originals import Originals, check_complete, set_version
from slicefine.registry import layers_of, register
from slicefine.scores import GradientScores
from slicefine.slices import SliceSchedule, SliceSpec, read_slice, rounds_to, write_slice


class Updater(Protocol):
    """What `optimizer_in_bwd` needs of an optimizer (`SliceAdamW`)."""

    def before_forward(self, layer: SliceLayer) -> None: ...

    def before_backward(self, layer: SliceLayer) -> None: ...

    def update_in_backward(
        self, layer: SliceLayer, grad_output: Tensor, input: Tensor
    ) -> None: ...


class SetAside(NamedTuple):
    """What stood in the weight of a disabled layer: one tensor per saved slice, on the host."""

    values: list[Tensor]
    # version counter of the weight
    version: int


class Watch:
    """Whether a layer has been called, and whether its weight has been read by somebody else."""

    called = False
    read = False


class SliceLayer(nn.Module):
    """A frozen weight with a moving slice that trains; mixed in front of the class that uses it.

    Every attribute that a slice adds to a module is declared here, and nowhere else, so that
    `SliceLinear.to_plain` can leave all of them behind.
    """

    # what the slice may be, where it is, and what happens to optimizer state when it moves
    slice_name: str
    spec: SliceSpec
    schedule: SliceSchedule
    state_on_switch: str
    axis: str
    slice_rows: Tensor
    slice_cols: Tensor
    # the master and how it stands to the weight
    slice_weight: nn.Parameter
    agreement: Agreement
    # the way back
    originals: Originals | None
    originals_lost: str
    set_aside: SetAside | None
    # only with switch_mode="gradient", and only with optimizer_in_bwd
    scores: GradientScores | None
    updater_reference: weakref.ref[Updater] | None
    # what `slicefine.guard` looks at; None when it has seen the slice train
    watch: Watch | None
    unused_slices: str
    # fully_shard replaces one parameter after the other: the weight alone, or slice_weight too
    weight_sharded: bool = False
    sharded: bool = False
    # the weight is stored (in, out), as Conv1D's
    fan_in_fan_out: bool = False
    # the class of the layer without a slice
    plain_class: type[nn.Module] = nn.Linear

    if TYPE_CHECKING:  # of the module that it is mixed into
        weight: nn.Parameter
        bias: nn.Parameter | None
        in_features: int
        out_features: int

    @classmethod
    def own_attributes(cls) -> set[str]:
        """Names of all that a slice adds to a module."""
        return set(SliceLayer.__annotations__)

    def make_slice(self, config: SliceConfig, name: str, r: int | None = None) -> None:
        """Freeze the weight and give it a slice at its first position.

        Args:
            config: what the slice is.
            name: where the layer is in its model, for errors and the seed of random orders.
            r: overrides config.r.
        """
        weight = self.weight
        r = r or config.width(self.out_features, self.in_features)
        _check_weight(weight, name)
        self.slice_name = name
        seed = (config.seed + zlib.crc32(name.encode())) & 0x7FFFFFFF
        self.spec = SliceSpec(
            self.out_features,
            self.in_features,
            config.slice_type,
            r,
            config.r_out or r,
            config.contiguous,
            seed,
        )
        self.schedule = SliceSchedule(
            self.spec, config.switch_mode, config.switch_interval, config.start_position
        )
        self.state_on_switch = config.state_on_switch
        weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        # at full size from the start: whoever copies buffers (AveragedModel) expects one size
        sizes = {"slice_rows": 0, "slice_cols": 0}
        for axis in self.spec.axes:
            rows, cols = self.spec.features(axis, 0)
            sizes["slice_rows"] = max(sizes["slice_rows"], 0 if rows is None else len(rows))
            sizes["slice_cols"] = max(sizes["slice_cols"], 0 if cols is None else len(cols))
        for buffer, size in sizes.items():
            index = torch.zeros(size, dtype=torch.int64, device=weight.device)
            self.register_buffer(buffer, index, persistent=False)
        shape, precise = self.spec.parameter_shape, master_dtype(weight.dtype)
        self.slice_weight = nn.Parameter(
            torch.zeros(shape, dtype=precise, device=weight.device)
        )
        self.scores = GradientScores() if config.switch_mode == "gradient" else None
        self.updater_reference = None
        # fake tensors, with which memory is planned, have no values to keep
        keep = config.keep_originals and not is_fake(weight)
        self.originals = Originals(self.spec) if keep else None
        self.originals_lost = "" if keep else _NOT_KEPT
        self.set_aside = None
        self.watch, self.unused_slices = Watch(), config.unused_slices
        self.select_slice()

    # The active slice

    @property
    def weight_matrix(self) -> Tensor:
        """(out_features, in_features), a view of ``weight`` however it is stored.

        Under FSDP2 this process's part of it.
        """
        weight = self._parameters.get("weight")
        # a parametrized weight is computed by the attribute
        weight = sharding.local(self.weight if weight is None else weight)
        return weight.t() if self.fan_in_fan_out else weight

    @property
    def rows(self) -> Tensor | None:
        """(R,) int64, the active output features; None for all."""
        return None if self.axis == "column" else self.slice_rows

    @property
    def cols(self) -> Tensor | None:
        """(K,) int64, the active input features; None for all."""
        return None if self.axis == "row" else self.slice_cols

    def active(self, flat: Tensor) -> Tensor:
        """The (R, K) part of slice_weight, its gradient or its moments.

        It differs from ``flat`` for ``row_column``, and under FSDP2.
        """
        flat = sharding.local(flat)
        if self.spec.slice_type != "row_column":
            return flat
        R, K = self.spec.shape(self.axis)
        return flat.view(-1)[: R * K].view(R, K)

    @torch.no_grad()
    def select_slice(self) -> None:
        """Select the scheduled slice and load its master copy from the weight."""
        # a plain string: compiled code guards on it, and would recompile at every move were it
        # computed from the move count
        self.axis = self.schedule.axis
        rows, cols = self.spec.features(self.axis, self.schedule.position[self.axis])
        # in place: compiled code and kernels keep reading the same tensors
        if rows is not None:
            self.slice_rows.copy_(rows)
        if cols is not None:
            self.slice_cols.copy_(cols)
        if self.spec.slice_type == "row_column":
            # the unused tail
            self.slice_weight.zero_()
        truth = read_slice(self.weight_matrix, self.rows, self.cols)
        self.active(self.slice_weight).copy_(truth)
        if self.originals is not None:
            self.originals.record(truth, self.rows, self.cols)
        mark_agreed(self)

    # Weight and master

    @torch.no_grad()
    def write_through(self) -> None:
        """``weight[slice] = cast(slice_weight)``, to nearest."""
        self.require_enabled("an optimizer step")
        weight = self.weight_matrix
        values = self.active(self.slice_weight).to(weight.dtype)
        write_slice(weight, self.rows, self.cols, values)
        mark_agreed(self)

    @torch.no_grad()
    def refresh_master(self) -> None:
        """Make the master follow the weight, any part of which may have been written.

        Entries that round to the same value keep their float32 precision.
        """
        self.schedule.note_rewritten()
        master = self.active(self.slice_weight)
        truth = read_slice(self.weight_matrix, self.rows, self.cols)
        master.copy_(torch.where(rounds_to(master, truth), master, truth.to(master.dtype)))
        mark_agreed(self)

    def sync(self) -> None:
        """Bring weight and slice_weight together after one of them was written to from outside."""
        state = self.agreement.state(self)
        if state is State.MASTER_CAST:
            written = self.slice_weight._version != self.agreement.master_version
            convert_master(self)
            # the weight has what the other precision has rounded off
            state = State.MASTER_WRITTEN if written else State.WEIGHT_WRITTEN
        if state is State.UNCHECKED:
            check_belongs(self)
        elif state is State.TOUCHED and equal(self):
            mark_agreed(self)
        elif state in (State.WEIGHT_WRITTEN, State.TOUCHED):
            self.refresh_master()
        elif state is State.MASTER_WRITTEN:
            self.write_through()

    @property
    def updater(self) -> Updater | None:
        """The optimizer that updates this slice during backward, if one does."""
        return None if self.updater_reference is None else self.updater_reference()

    # On and off

    @property
    def disabled(self) -> bool:
        """Whether the weight stands at its original values while training is set aside."""
        return self.set_aside is not None

    @property
    def master(self) -> Tensor:
        """slice_weight as the product takes it: without a gradient while the slices are disabled."""
        return self.slice_weight.detach() if self.disabled else self.slice_weight

    def disable(self) -> None:
        """Put the original values back, bit for bit, and keep the trained ones until `enable`."""
        if self.disabled:
            return
        self.sync()
        originals = self.required_originals("be disabled")
        originals.join()
        version = self.weight._version
        trained = originals.exchange(self.weight_matrix, originals.values())
        for layer in {self, *layers_of(self.slice_weight)}:
            layer.set_aside = SetAside(trained, version)
        mark_agreed(self)

    def enable(self) -> None:
        """Undo `disable`, bit for bit; the master keeps its float32 precision."""
        if self.set_aside is None:
            return
        values, version = self.set_aside
        self.required_originals("be enabled").write(self.weight_matrix, values)
        # a graph built before may go on to its backward, as in preference training with the base as
        # reference
        set_version(self.weight, version)
        for layer in {self, *layers_of(self.slice_weight)}:
            layer.set_aside = None
        rewritten = self.schedule.rewritten
        # changes nothing unless the model has been cast in between
        self.refresh_master()
        self.schedule.rewritten = rewritten

    def required_originals(self, purpose: str) -> Originals:
        if self.originals is None:
            raise RuntimeError(
                f"a slice cannot {purpose}: its original values were not kept"
                f" ({self.originals_lost or _NOT_KEPT}). Train with keep_originals=True, the"
                " default, and resume with the slices' own state (load_slice_state_dict, or"
                " SliceAdamW's)."
            )
        return self.originals

    def require_enabled(self, doing: str) -> None:
        if self.disabled:
            raise RuntimeError(
                f"{doing} while the slices are disabled would be lost: leave disable_adapter() (or"
                " set_adapter back) first"
            )

    # Forward

    def prepare_input(self, input: Tensor) -> tuple[Tensor, SliceLayer | None]:
        """Checks before every use of the weight, and autocast.

        Returns:
            The input as autocast wants it, and this layer if backward must know it.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            sharding.check_whole(self)
            self.sync()
            if self.watch is not None:
                self.watch.called = True
        device = input.device.type
        if ops.autocast_enabled(device) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        if self.disabled:
            return input, None
        updater = self.updater
        # an evaluation between two steps is no use that a gradient could come from
        if updater is not None and torch.is_grad_enabled():
            if compiling:
                raise RuntimeError(
                    "optimizer_in_bwd=True does not work under torch.compile; use SliceAdamW"
                    " without it"
                )
            updater.before_forward(self)
            return input, self
        if self.scores is None or not torch.is_grad_enabled():
            return input, None
        return input, self if self.schedule.needs_gradient_scores else None

    # State: same keys as without a slice, consistent after copies and casts

    def state_key(self, name: str) -> str:
        """The state-dict key of the weight of the layer called ``name``."""
        return f"{name}.weight"

    def slice_state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weight: schedule, master and originals.

        Returns:
            Tensors and numbers only, so that ``torch.load(weights_only=True)`` takes it.
        """
        self.require_enabled("saving the state of slices")
        master = self.slice_weight.detach().clone()
        state: dict[str, Any] = {"schedule": self.schedule.state_dict(), "master": master}
        if not self.sharded:
            state["sample"] = sample_visited(self)
        if self.originals is not None:
            saved = state["originals"] = self.originals.state_dict()
            if self.sharded:
                like = self.slice_weight
                saved["values"] = [sharding.shard_values(v, like) for v in saved["values"]]
        return state

    @torch.no_grad()
    def load_slice_state(self, state: dict[str, Any]) -> None:
        """Counterpart of `slice_state`; the model's state dict may be loaded before or after.

        Raises:
            ValueError: The state is of another slice, or sharded and the layer is not.
        """
        check_slice_state(self, state)
        self.sync()
        self.schedule.load_state_dict(state["schedule"])
        if self.originals is None and self.originals_lost != _NOT_KEPT:
            # they were lost for want of the state that is loaded now
            self.originals = Originals(self.spec)
        if "originals" not in state:
            self.originals, self.originals_lost = (
                None,
                "the loaded state of slices has none",
            )
        elif self.originals is not None:
            values = [sharding.local(value) for value in state["originals"]["values"]]
            self.originals.load_state_dict({**state["originals"], "values": values})
            self.originals.cast(self.weight.dtype)
            self.originals.check_covers(self.schedule.visited)
        self.select_slice()
        self.slice_weight.copy_(state["master"])
        sample = None if self.sharded else state.get("sample")
        self.agreement = Agreement.now(self)._replace(
            unchecked=State.UNCHECKED, sample=sample
        )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self.sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "slice_weight", None)

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
        self.require_enabled("loading weights")
        # before the first step, loaded weights define the originals, unless the slice resumed from
        # a delta: then they have others already
        originals = self.originals
        untouched = (
            originals is not None and self.schedule.steps == 0 and not self.weight.is_meta
        )
        untouched = untouched and originals.holds(self.weight_matrix)  # type: ignore[union-attr]
        started = originals is not None and not untouched and not self.weight.is_meta
        outside = None
        if originals is not None and started:
            outside = originals.outside(self.weight_matrix)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if prefix + "slice_weight" in missing_keys:
            missing_keys.remove(prefix + "slice_weight")
        for other in layers_of(self.slice_weight):
            # load_state_dict(assign=True) would untie them
            other.weight = self.weight
        if not self.sharded:
            # with assign=True the weight may have another dtype now
            convert_master(self)
        self.refresh_master()
        if originals is None:
            return
        originals.cast(self.weight.dtype)
        if outside is not None and not originals.same_outside(outside, self.weight_matrix):
            # entries that no slice has visited have changed: these are weights of another model
            self.originals, self.originals_lost = None, _OTHER_WEIGHTS
        if untouched:
            originals.clear()
            truth = read_slice(self.weight_matrix, self.rows, self.cols)
            originals.record(truth, self.rows, self.cols)

    def _apply(self, fn, recurse: bool = True) -> SliceLayer:
        self.sync()
        if self.sharded:
            sharding.check_conversion(self, fn)
        # Kept out of the conversion: the master is float32 whatever the weight is, and stays the
        # same Parameter object, because an optimizer may hold it; positions are no floating-point
        # numbers, whatever model.type(dtype) says, and no memory that to_empty() may leave empty.
        dtype, rewritten = self.weight.dtype, self.schedule.rewritten
        master = self._parameters.pop("slice_weight")
        indices = {name: self._buffers.pop(name) for name in ("slice_rows", "slice_cols")}
        assert master is not None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["slice_weight"] = master
            self._buffers.update(indices)
        weight = self.weight
        if not self.sharded:
            convert_master(self)
        convert_indices(self)
        if weight.is_meta:
            if self.originals is not None and self.schedule.steps == 0:
                # nothing has trained: the weights that will be loaded are the originals
                self.originals.clear()
        else:
            if self.originals is not None:
                self.originals.cast(weight.dtype)
            if self.set_aside is None:
                self.refresh_master()
            else:
                values = [value.to(weight.dtype) for value in self.set_aside.values]
                self.set_aside = self.set_aside._replace(values=values)
        if weight.dtype == dtype:
            # on another device, with the same values
            self.schedule.rewritten = rewritten
        mark_agreed(self)
        return self

    def __getattr__(self, name: str) -> Any:
        # nn.Module looks parameters up here; the layer's own hot path asks its registry
        if name == "weight" and not torch.compiler.is_compiling():
            note_taken(self)
            if (watch := self.__dict__.get("watch")) is not None:
                watch.read = watch.read or torch.is_grad_enabled()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        self.sync()
        state = self.__dict__.copy()
        # an optimizer belongs to the layers it was made for
        state["updater_reference"] = None
        del state["agreement"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register(self)
        mark_agreed(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name not in ("weight", "slice_weight"):
            return
        # fully_shard assigns DTensors to the names of parameters and calls nothing else, so this is
        # the only place that learns of it
        is_shard = sharding.is_sharded(value)
        if name == "slice_weight":
            register(self)
        elif is_shard:
            self.weight_sharded = True
        if name == "slice_weight" and is_shard and not self.sharded:
            sharding.check_sharding(self)
            sharding.shard_originals(self)
            self.sharded = True
            mark_agreed(self)
        elif "agreement" in self.__dict__ and is_shard == self.sharded:
            # what FSDP2 gathers for a forward pass is a copy, and stays a stand-in
            self.agreement = after_assignment(self.agreement, name, value)


def check_slice_state(layer: SliceLayer, state: dict[str, Any]) -> None:
    """Raise what `SliceLayer.load_slice_state` raises, before anything is changed."""
    if state["master"].shape != layer.slice_weight.shape:
        raise ValueError(
            f"the saved slice has shape {tuple(state['master'].shape)}, this layer's"
            f" {tuple(layer.slice_weight.shape)}: build the model with the saved SliceConfig"
        )
    if sharding.is_sharded(state["master"]) != layer.sharded:
        raise ValueError(
            f"the slice state was saved {'un' if layer.sharded else ''}sharded and the model is"
            f" {'' if layer.sharded else 'not '}sharded: load it before fully_shard, or save it"
            " from a model that is sharded like this one"
        )
    layer.require_enabled("loading the state of slices")
    layer.schedule.check_state(state["schedule"])
    if "originals" in state:
        check_complete(state["originals"])


def _check_weight(weight: Tensor, name: str) -> None:
    """Raise an error that names the layer unless its weight can have a slice."""
    if sharding.is_sharded(weight):
        raise ValueError(
            f"layer {name!r} has a sharded weight (a DTensor); make slices first, then fully_shard"
        )
    dtypes = ", ".join(str(dtype) for dtype in _WEIGHT_DTYPES)
    if not weight.dtype.is_floating_point:
        raise TypeError(
            f"layer {name!r} has a quantized weight ({weight.dtype}); slices train"
            f" {dtypes} weights. Load the model unquantized,"
            " or leave this layer out (exclude_modules)."
        )
    if weight.dtype not in _WEIGHT_DTYPES:
        raise TypeError(
            f"layer {name!r} has a {weight.dtype} weight; expected one of {dtypes}"
        )
    if weight.is_inference():
        raise ValueError(
            f"layer {name!r} was made under torch.inference_mode(), whose tensors cannot train; make"
            " the model outside of it"
        )
    if weight.is_meta:
        raise ValueError(
            f"layer {name!r} has a weight on the meta device, without values; load the weights"
            " before making slices"
        )


_NOT_KEPT = "SliceConfig(keep_originals=False)"
_OTHER_WEIGHTS = "weights of another model were loaded after training had begun"
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
