"""SliceLinear: an nn.Linear of which only the active slice trains, and the autograd function behind
it.

``weight`` is frozen and always the truth: the forward pass is one ``F.linear``. ``slice_weight`` is
the only trainable
parameter: a contiguous master copy of the active slice (float32; float64 for a float64 weight).
    Whatever optimizer moves it,
``weight[slice] = cast(slice_weight)`` follows: `SliceAdamW` does it in its kernel, for any other
`torch.optim` optimizer
a hook does after its step (`slicefine.moves`), and every forward checks.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from slicefine import ops, sharding
from slicefine.config import SliceConfig
from slicefine.function import slice_product
from slicefine.moves import layers_of, register
from slicefine.originals import Ledger, set_version
from slicefine.scores import gradient_scores, slice_norms
from slicefine.slices import SliceSchedule, SliceSpec, read_slice, rounds_to, write_slice


class Updater(Protocol):
    """What `optimizer_in_bwd` needs of an optimizer (`SliceAdamW`)."""

    def before_forward(self, layer: SliceLinear) -> None: ...

    def before_backward(self, layer: SliceLinear) -> None: ...

    def update_in_backward(
        self, layer: SliceLinear, grad_output: Tensor, input: Tensor
    ) -> None: ...


class SliceLinear(nn.Linear):
    """Drop-in replacement of nn.Linear with a moving trainable slice; the state dict has the same
    keys both ways.

    weight: (out_features, in_features), frozen; (in_features, out_features) with fan_in_fan_out.
    slice_weight: (out, r) for a column slice, (r, in) for a row slice, (r_out, r) for a block, flat
        for ``row_column``.
    Raises ValueError if the slice does not fit, TypeError for a weight that is not floating point.
    Source: SliceFine, arXiv 2510.08513.
    """

    slice_rows: Tensor
    slice_cols: Tensor
    axis: str
    weight_sharded: bool = False  # by fully_shard, which replaces one parameter after the other
    sharded: bool = False  # both the weight and slice_weight
    fan_in_fan_out: bool = False  # the weight is stored (in, out), as Conv1D's
    plain_class: type[nn.Module] = nn.Linear  # what merging gives back
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
    def from_linear(
        cls, linear: nn.Module, config: SliceConfig, name: str = "", r: int | None = None
    ) -> SliceLinear:
        """The same layer with the same weight, bias and hooks; ``linear`` is an nn.Linear or
        Hugging Face's Conv1D.

        name: where the layer is in its model; seeds its random order. r: overrides config.r.
        """
        layer = cls.__new__(cls)
        # shared hooks, own registries: the original module is left as it was
        layer.__dict__.update(linear.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            layer.__dict__[registry] = dict(linear.__dict__[registry])
        layer.fan_in_fan_out = not isinstance(linear, nn.Linear)
        layer.plain_class = type(linear)
        assert isinstance(linear.weight, Tensor)
        shape = tuple(linear.weight.shape)
        layer.out_features, layer.in_features = shape[::-1] if layer.fan_in_fan_out else shape
        layer._become_slice(config, name, r)
        return layer

    def _become_slice(self, config: SliceConfig, name: str, r: int | None = None) -> None:
        weight = self.weight
        if sharding.is_sharded(weight):
            raise ValueError(
                f"layer {name!r} has a sharded weight (a DTensor); make slices first, then"
                " fully_shard"
            )
        if not weight.dtype.is_floating_point:
            raise TypeError(
                f"layer {name!r} has a quantised weight ({weight.dtype}); slices train"
                f" {', '.join(str(d) for d in _WEIGHT_DTYPES)} weights. Load the model unquantised,"
                " or leave this layer out (exclude_modules)."
            )
        if weight.dtype not in _WEIGHT_DTYPES:
            raise TypeError(
                f"layer {name!r} has a {weight.dtype} weight; expected one of"
                f" {', '.join(str(d) for d in _WEIGHT_DTYPES)}"
            )
        if weight.is_meta:
            raise ValueError(
                f"layer {name!r} has a weight on the meta device, without values; load the weights"
                " before making slices"
            )
        seed = (config.seed + zlib.crc32(name.encode())) & 0x7FFFFFFF
        self.spec = SliceSpec(
            self.out_features,
            self.in_features,
            config.slice_type,
            r or config.r,
            config.r_out or r or config.r,
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
        self.register_buffer(
            "slice_rows", torch.empty(0, dtype=torch.int64, device=weight.device), persistent=False
        )
        self.register_buffer(
            "slice_cols", torch.empty(0, dtype=torch.int64, device=weight.device), persistent=False
        )
        self.slice_weight = nn.Parameter(
            torch.zeros(
                self.spec.parameter_shape, dtype=_master_dtype(weight.dtype), device=weight.device
            )
        )
        self.scores: dict[str, Tensor] = {}
        self._scores_task = -1
        self._updater: weakref.ref[Updater] | None = None
        self._awaiting_weight = False
        # fake tensors, with which memory is planned, have no values to keep
        self.ledger = Ledger(self.spec) if config.keep_originals and not is_fake(weight) else None
        # while disabled: what the ledger's pieces held, and the weight's version
        self._trained: list[Tensor] | None = None
        self._trained_version = 0
        self.place()

    # The active slice

    @property
    def weight_matrix(self) -> Tensor:
        """(out_features, in_features), a view of ``weight`` however it is stored; under FSDP2 this
        process's part of it.
        """
        weight = sharding.local(self.weight)
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
        """The (R, K) part of slice_weight, its gradient or its moments; differs from ``flat`` for
        ``row_column``, and under FSDP2.
        """
        flat = sharding.local(flat)
        if self.spec.slice_type != "row_column":
            return flat
        R, K = self.spec.shape(self.axis)
        return flat.view(-1)[: R * K].view(R, K)

    @torch.no_grad()
    def place(self) -> None:
        """Point the indices at the scheduled position and read the master from the weight."""
        # a plain string: compiled code guards on it, and would recompile at every move were it
        # computed from the move count
        self.axis = self.schedule.axis
        rows, cols = self.spec.features(self.axis, self.schedule.position[self.axis])
        for name, index in (("slice_rows", rows), ("slice_cols", cols)):
            buffer = getattr(self, name)
            if index is None:
                continue
            if buffer.numel() == index.numel():
                buffer.copy_(
                    index
                )  # in place: compiled code and kernels keep reading the same tensor
            else:
                setattr(self, name, index.to(buffer.device))
        if self.spec.slice_type == "row_column":
            self.slice_weight.zero_()  # the unused tail
        truth = read_slice(self.weight_matrix, self.rows, self.cols)
        self.active(self.slice_weight).copy_(truth)
        if self.ledger is not None:
            self.ledger.record(truth, self.rows, self.cols)
        self.mark_synchronised()

    @torch.no_grad()
    def write_through(self) -> None:
        """``weight[slice] = cast(slice_weight)``, to nearest."""
        self.require_enabled("an optimizer step")
        write_slice(
            self.weight_matrix,
            self.rows,
            self.cols,
            self.active(self.slice_weight).to(self.weight.dtype),
        )
        self.mark_synchronised()

    @torch.no_grad()
    def read_back(self) -> None:
        """Make the master follow the weight; entries that already round to it keep their extra
        bits.
        """
        master = self.active(self.slice_weight)
        truth = read_slice(self.weight_matrix, self.rows, self.cols)
        master.copy_(torch.where(rounds_to(master, truth), master, truth.to(master.dtype)))
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
        if (not self._awaiting_weight and _versions_of(self) == self._versions) or self.disabled:
            return
        if self.sharded and not sharding.is_sharded(self.weight):
            return  # gathered for a forward pass: a copy
        if self._awaiting_weight:
            self._check_belongs()
        if self.slice_weight.device != self.slice_rows.device:
            return  # tied to a layer that is being moved to another device, as this one will be
        if _versions_of(self)[:2] != self._versions[:2]:
            # also when both were written to, as by weight averaging, which knows nothing of
            # positions
            self.read_back()
        elif self.slice_changed:
            self.write_through()

    def _check_belongs(self) -> None:
        truth = read_slice(self.weight_matrix, self.rows, self.cols)
        if not bool(rounds_to(self.active(self.slice_weight).detach(), truth).all()):
            raise RuntimeError(
                "the loaded slice state does not belong to the weights in the model: the saved"
                " master of the active slice differs from the weight. Load the model's state dict"
                " of the same checkpoint too."
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
            norms = slice_norms(self.weight_matrix, self.spec, axis)
            sharded = sharding.is_sharded(self.weight)
            return (
                sharding.sum_over_shards(norms.square(), self.weight).sqrt() if sharded else norms
            )
        return self.scores.get(axis, torch.zeros(count, dtype=torch.float64))

    def add_scores(self, grad_output: Tensor, input: Tensor) -> None:
        """Score the next positions by the gradient of one backward pass; micro-batches add up their
        squared norms.

        A pass that starts without an accumulated gradient starts anew, so a skipped or discarded
        step leaves nothing.
        """
        task, axis = torch._C._current_graph_task_id(), self.schedule.next_axis
        if task != self._scores_task and self.slice_weight.grad is None:
            self.scores = {}
        self._scores_task = task
        self.scores[axis] = self.scores.get(axis, 0) + gradient_scores(
            grad_output, input, self.spec, axis
        )

    # On and off

    @property
    def disabled(self) -> bool:
        """Whether the weight stands at its original values while training is set aside."""
        return self._trained is not None

    @property
    def master(self) -> Tensor:
        """slice_weight as the product takes it: without a gradient while the slices are disabled."""
        return self.slice_weight.detach() if self.disabled else self.slice_weight

    def disable(self) -> None:
        """Put the original values back, bit for bit, and keep the trained ones on the host until
        `enable`.
        """
        if self._trained is not None:
            return
        self.synchronise()
        ledger = self.required_ledger("be disabled")
        ledger.join()
        version = self.weight._version
        trained = ledger.exchange(self.weight_matrix, ledger.originals())
        for layer in {self, *layers_of(self.slice_weight)}:
            layer._trained, layer._trained_version = trained, version
        self.mark_synchronised()

    def enable(self) -> None:
        """Undo `disable`, bit for bit; the master keeps the extra bits that it had."""
        if self._trained is None:
            return
        self.required_ledger("be enabled").write(self.weight_matrix, self._trained)
        # a graph built before may go on to its backward, as in preference training with the base as
        # reference
        set_version(self.weight, self._trained_version)
        for layer in {self, *layers_of(self.slice_weight)}:
            layer._trained = None
        self.read_back()  # changes nothing unless the model has been cast in between

    def required_ledger(self, purpose: str) -> Ledger:
        if self.ledger is None:
            raise RuntimeError(
                f"a slice cannot {purpose}: its original values were not kept"
                " (SliceConfig(keep_originals=False)). Train with keep_originals=True, the"
                " default, and resume with the slices' own state (load_slice_state_dict, or"
                " SliceAdamW's)."
            )
        return self.ledger

    def require_enabled(self, doing: str) -> None:
        if self.disabled:
            raise RuntimeError(
                f"{doing} while the slices are disabled would be lost: leave disable_adapter() (or"
                " set_adapter back) first"
            )

    # Forward

    def forward(self, input: Tensor) -> Tensor:
        input, layer = self.before_product(input)
        return slice_product(
            input, self.weight_matrix, self.bias, self.master, self.rows, self.cols, layer
        )

    def before_product(self, input: Tensor) -> tuple[Tensor, SliceLinear | None]:
        """What precedes every use of the weight: (input as autocast wants it, the layer if backward
        must know it).
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            sharding.check_whole(self)
            self.synchronise()
        device = input.device.type
        if ops.autocast_enabled(device) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        updater = self.updater
        if updater is not None and not self.disabled:
            if compiling:
                raise RuntimeError(
                    "optimizer_in_bwd=True does not work under torch.compile; use SliceAdamW"
                    " without it"
                )
            updater.before_forward(self)
        scoring = torch.is_grad_enabled() and self.schedule.needs_gradient_scores
        return input, self if (updater is not None or scoring) and not self.disabled else None

    def state_key(self, name: str) -> str:
        """The state-dict key of the weight of the layer called ``name``."""
        return f"{name}.weight"

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, slice_type={self.spec.slice_type}, r={self.spec.r},"
            f" switch_interval={self.schedule.interval}"
        )

    # State: same keys as nn.Linear, consistent after copies and casts

    def slice_state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weight: schedule, master and ledger; tensors and
        numbers only.
        """
        self.require_enabled("saving the state of slices")
        state = {
            "schedule": self.schedule.state_dict(),
            "master": self.slice_weight.detach().clone(),
        }
        if self.ledger is not None:
            state["ledger"] = self.ledger.state_dict()
            if self.sharded:
                state["ledger"]["values"] = [
                    sharding.shard_values(v, self.slice_weight) for v in state["ledger"]["values"]
                ]
        return state

    @torch.no_grad()
    def load_slice_state(self, state: dict[str, Any]) -> None:
        """Counterpart of `slice_state`; the model's own state dict may be loaded before or after."""
        if state["master"].shape != self.slice_weight.shape:
            raise ValueError(
                f"the saved slice has shape {tuple(state['master'].shape)}, this layer's"
                f" {tuple(self.slice_weight.shape)}: build the model with the saved SliceConfig"
            )
        if sharding.is_sharded(state["master"]) != self.sharded:
            raise ValueError(
                f"the slice state was saved {'un' if self.sharded else ''}sharded and the model is"
                f" {'' if self.sharded else 'not '}sharded: load it before fully_shard, or save it"
                " from a model that is sharded like this one"
            )
        self.require_enabled("loading the state of slices")
        self.synchronise()
        self.schedule.load_state_dict(state["schedule"])
        if "ledger" not in state:
            self.ledger = None  # nobody can tell any more what the originals were
        elif self.ledger is not None:
            values = [sharding.local(value) for value in state["ledger"]["values"]]
            self.ledger.load_state_dict({**state["ledger"], "values": values})
            self.ledger.cast(self.weight.dtype)
            self.ledger.check_covers(self.schedule.visited)
        self.place()
        self.slice_weight.copy_(state["master"])
        self._awaiting_weight = True
        self.mark_synchronised()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self.synchronise()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "slice_weight", None)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        self.require_enabled("loading weights")
        # if nothing has trained, what is loaded are the originals; a slice that goes on from a
        # delta has others already
        untouched = self.ledger is not None and self.schedule.steps == 0 and not self.weight.is_meta
        untouched = untouched and self.ledger is not None and self.ledger.holds(self.weight_matrix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "slice_weight" in missing_keys:
            missing_keys.remove(prefix + "slice_weight")
        for other in layers_of(self.slice_weight):
            other.weight = self.weight  # load_state_dict(assign=True) would untie them
        self.read_back()
        if self.ledger is not None and untouched:
            self.ledger.clear()
            self.ledger.record(
                read_slice(self.weight_matrix, self.rows, self.cols), self.rows, self.cols
            )

    def _apply(self, fn, recurse: bool = True) -> SliceLinear:
        self.synchronise()
        if self.sharded:
            sharding.check_conversion(self, fn)
        master = self._parameters.pop("slice_weight")
        assert master is not None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["slice_weight"] = master
        weight = self.weight
        # the same Parameter object: an optimizer may hold it
        if not self.sharded:
            master.data = (
                master.data.to(weight.device, _master_dtype(weight.dtype))
                if not weight.is_meta
                else torch.empty_like(master.data, device="meta")
            )
        if master.grad is not None:
            applied = (
                type(master.grad) is not Tensor
            )  # optimizer_in_bwd leaves a gradient without values
            master.grad = (
                None if applied or weight.is_meta else master.grad.to(master.device, master.dtype)
            )
        if not weight.is_meta:
            if self.ledger is not None:
                self.ledger.cast(weight.dtype)
            if self._trained is None:
                self.read_back()
            else:
                self._trained = [values.to(weight.dtype) for values in self._trained]
        self.mark_synchronised()
        return self

    def _become_sharded(self) -> None:
        """`fully_shard` has replaced the parameters by its shards; during a forward pass it shows
        the whole again, for reading only.
        """
        sharding.check_sharding(self)
        sharding.shard_ledger(self)
        self.sharded = True
        self.mark_synchronised()

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
        if name == "weight" and sharding.is_sharded(value):
            self.weight_sharded = True
        if name == "slice_weight":
            register(self)
            if not self.sharded and sharding.is_sharded(value):
                self._become_sharded()


def _versions_of(layer: SliceLinear) -> tuple[int, int, int]:
    """Which weight it is, how often it has been written to, and how often slice_weight."""
    weight, master = layer._parameters.get("weight"), layer._parameters.get("slice_weight")
    if (
        weight is None or master is None
    ):  # replicas of nn.DataParallel and parametrized weights keep theirs elsewhere
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
