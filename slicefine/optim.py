"""SliceAdamW: AdamW for slices and for what trains beside them; the moves (`slicefine.moves`)
happen inside ``step()``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from slicefine import ops
from slicefine.agreement import mark_synced
from slicefine.backends.operands import BLOCK_8BIT, AdamWOptions, AdamWSlice, AdamWSlice8bit
from slicefine.backends.reference import dynamic_codebook
from slicefine.kept import Kept, Slices, by_device
from slicefine.layer import SliceLayer, check_slice_state
from slicefine.moves import finish_step
from slicefine.registry import layers_of, slices_of
from slicefine.sharding import is_sharded, local


class SliceAdamW(Optimizer):
    """AdamW for slices and for everything that trains beside them (new heads, biases), moves
    included.

    params: parameters or groups, as for torch.optim.AdamW; those without a gradient are left alone.
    lr, betas, eps, weight_decay, maximize: as for torch.optim.AdamW, but weight_decay is 0 unless
    given, and decay acts on the active slice only; amsgrad is refused. bf16_stochastic_round: write to bfloat16
    weights rounded stochastically (Philox, reproducible from ``seed``). optimizer_in_bwd: update
    each slice during backward, without a gradient buffer. ``step()`` must follow every backward: it
    moves the slices and updates the other parameters. Gradients cannot be accumulated, clipped,
    unscaled or logged then; whatever would need them raises an error. optim_bits: 32, or 8 for
    moments of slices in 8 bits with a scale per 256 of them (float64 weights take 32 only). state:
    ``step`` (), ``exp_avg`` and ``exp_avg_sq`` (as the slice), float32 or uint8 with
    ``exp_avg_scale`` and ``exp_avg_sq_scale`` (blocks,); ``state_dict`` adds schedule and master.
    Raises ValueError without a single slice among the parameters. Source: Loshchilov & Hutter 2019;
    arXiv 2510.08513 for the slices, arXiv 2110.02861 for 8 bits.
    """

    finishes_its_steps = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        amsgrad: bool = False,
        bf16_stochastic_round: bool = False,
        optimizer_in_bwd: bool = False,
        optim_bits: int = 32,
        seed: int = 0,
    ) -> None:
        if not float(lr) >= 0.0:
            raise ValueError(f"lr is {lr}; expected 0 or more")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {betas}; expected two numbers from 0 to below 1")
        if amsgrad:
            raise ValueError(
                "amsgrad=True: the kernels of slices keep two moments and no maximum of them;"
                " torch.optim.AdamW(model.parameters(), amsgrad=True) trains slices too"
            )
        if not eps >= 0.0 or not weight_decay >= 0.0:
            raise ValueError(
                f"eps is {eps} and weight_decay {weight_decay}; expected 0 or more"
            )
        if optim_bits not in (8, 32):
            raise ValueError(
                f"optim_bits is {optim_bits}; expected 32 (float32 moments) or 8"
            )
        if optim_bits == 8 and optimizer_in_bwd:
            raise ValueError(
                "optim_bits=8 with optimizer_in_bwd=True: moments in 8 bits need"
                " optimizer_in_bwd=False"
            )
        self.optim_bits = optim_bits
        self._codebooks: dict[torch.device, Tensor] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        self.bf16_stochastic_round, self.optimizer_in_bwd, self.seed = (
            bf16_stochastic_round,
            optimizer_in_bwd,
            seed,
        )
        # since the last step
        self._trained_slices: set[Tensor] = set()
        # forward passes since the last step, for optimizer_in_bwd
        self._uses: dict[Tensor, int] = {}
        # gradients of slices used more than once
        self._deferred: dict[Tensor, Tensor] = {}
        self._group_index: dict[Tensor, int] = {}
        # by the index of a group: what updates its slices
        self._updates: dict[int, Kept] = {}
        # after the fields above: torch calls add_param_group, which fills them
        super().__init__(params, defaults)
        count = sum(len(group["params"]) for group in self.param_groups)
        if not slices_of(self):
            raise ValueError(
                f"none of the {count} parameters given is a slice: make slices first (model ="
                " slicefine.get_slice_model(model, config)), then build the optimizer from"
                " model.parameters()"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        for parameter in self.param_groups[index]["params"]:
            self._group_index[parameter] = index
            if (self.optimizer_in_bwd or self.optim_bits == 8) and is_sharded(parameter):
                raise ValueError(
                    f"{'optimizer_in_bwd=True' if self.optimizer_in_bwd else 'optim_bits=8'} does"
                    " not work under fully_shard: "
                    + (
                        "gradients have not been summed over the processes when the update would"
                        " happen"
                        if self.optimizer_in_bwd
                        else "scales of blocks of 256 moments cannot be sharded"
                    )
                    + ". Use SliceAdamW without it."
                )
            for layer in layers_of(parameter) if self.optimizer_in_bwd else ():
                # weak: a layer must not keep an optimizer and its moments alive
                layer.updater_reference = weakref.ref(self)

    # The default path: gradients first, then one update of all slices

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of everything that has a gradient, then write-through and moves. closure: as
        in torch.optim.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # weights that were used several times have waited for all of their uses
        if self.optimizer_in_bwd:
            self._flush_deferred()
        layers = slices_of(self)
        for shared in layers.values():
            # refused before anything is written: half of an update cannot be taken back
            if shared[0].disabled:
                shared[0].require_enabled("an optimizer step")
        for index, group in enumerate(self.param_groups):
            slices, grads, others = {}, [], []
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None or isinstance(grad, _AppliedGradient):
                    continue
                # a tensor's hash is a call in Python: each is asked for once
                shared = layers.get(parameter)
                if shared is None:
                    others.append(parameter)
                    continue
                slices[parameter] = shared
                grads.append(grad)
            self._update_slices(index, slices, grads)
            self._update_others(group, others)
        finish_step(self, self._trained_slices, layers)
        self._trained_slices.clear()
        self._uses.clear()
        return loss

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        device, dtype = (
            parameter.device,
            parameter.dtype if self.optim_bits == 32 else torch.uint8,
        )
        if self.optim_bits == 8 and parameter.dtype == torch.float64:
            raise TypeError(
                "a float64 weight has float64 moments; optim_bits=8 takes float32, bfloat16 and"
                " float16 weights"
            )
        if not state:
            # on the device, where the kernels read it: a captured graph sees each new count
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for key in ("exp_avg", "exp_avg_sq"):
                # contiguous: the kernels index moments as [R, K], row by row
                state[key] = torch.zeros_like(
                    parameter, dtype=dtype, memory_format=torch.contiguous_format
                )
                if self.optim_bits == 8:
                    state[key + "_scale"] = torch.zeros(
                        -(-parameter.numel() // BLOCK_8BIT), device=device
                    )
        elif (state["exp_avg"].dtype == torch.uint8) != (dtype == torch.uint8):
            raise ValueError(
                f"the loaded moments are {state['exp_avg'].dtype} and this optimizer has"
                f" optim_bits={self.optim_bits}; build it with the optim_bits that the state was"
                " saved with"
            )
        elif state["exp_avg"].dtype != dtype or state["step"].device != device:
            # the model has been cast or moved since the last step
            for key, value in state.items():
                state[key] = value.to(
                    device, dtype if key in ("exp_avg", "exp_avg_sq") else value.dtype
                )
        return state

    def _options(self, group: dict[str, Any], layer: SliceLayer) -> AdamWOptions:
        # A new seed for every update and layer, within the 63 bits that a schema's int holds.
        seed = (
            # splitmix64's odd constants: neighboring seeds, steps and layers get unrelated bits
            self.seed * 0x9E3779B97F4A7C15
            + layer.schedule.steps * 0xBF58476D1CE4E5B9
            + layer.spec.seed * 0x94D049BB133111EB
        )
        seed &= 0x7FFFFFFFFFFFFFFF
        beta1, beta2 = group["betas"]
        return AdamWOptions(
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            seed=seed if self.bf16_stochastic_round else None,
        )

    def _update_slices(
        self, index: int, slices: dict[Tensor, list[SliceLayer]], grads: list[Any]
    ) -> None:
        """One call per device for all slices of a group; slices: each parameter with the layers
        that use it.
        """
        if not slices:
            return
        # tied layers share parameter, weight and moments: one update serves them all
        listed = [(parameter, layers[0]) for parameter, layers in slices.items()]
        if index not in self._updates:
            self._updates[index] = Kept(self._prepared)
        group = self.param_groups[index]
        for prepared, steps, ones, places in self._updates[index].of(listed, self.state):
            # one launch counts the steps of all slices
            torch._foreach_add_(steps, ones)  # pyright: ignore[reportPrivateImportUsage]
            options = self._options(group, listed[places[0]][1])
            prepared.step([local(grads[place]) for place in places], options)
        self._trained_slices.update(slices)
        mark_synced(layer for layers in slices.values() for layer in layers)

    def _prepared(
        self, slices: Slices
    ) -> list[tuple[ops.PreparedAdamW, list[Tensor], list[Tensor], list[int]]]:
        """What updates slices: for each device the call, its step counts, what is added to them,
        and its slices' places in the list.
        """
        kind: Any = AdamWSlice if self.optim_bits == 32 else AdamWSlice8bit
        operands = []
        for parameter, layer in slices:
            state, active = self._state(parameter), layer.active
            master = active(parameter)
            moments = [active(state["exp_avg"]), active(state["exp_avg_sq"])]
            if self.optim_bits == 8:
                # a parameter that serves two axes has an unused tail; its scales stay out
                blocks = -(-master.numel() // BLOCK_8BIT)
                moments += [
                    state["exp_avg_scale"][:blocks],
                    state["exp_avg_sq_scale"][:blocks],
                ]
            place = (layer.weight_matrix, layer.rows, layer.cols, state["step"])
            operands.append(kind(master, None, *moments, *place))
        made = []
        for device, places in by_device(slices).items():
            some, codebook = [operands[place] for place in places], None
            if self.optim_bits == 8:
                # sent once to each device
                if device not in self._codebooks:
                    self._codebooks[device] = dynamic_codebook().to(device)
                codebook = self._codebooks[device]
            prepared = ops.PreparedAdamW(some, codebook)
            # with a number in place of tensors _foreach_add_ takes four times as long on a CPU
            ones = [torch.ones((), device=device)] * len(some)
            made.append((prepared, [s.step for s in some], ones, places))
        return made

    def _update_others(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """torch's AdamW for the rest; parameters in half precision get a float32 master, or small
        updates would vanish.
        """
        masters, grads, states = [], [], []
        for p in parameters:
            assert p.grad is not None
            if p.grad.is_sparse:
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} has a sparse gradient; use a dense"
                    " embedding (sparse=False)"
                )
            half = p.dtype in (torch.bfloat16, torch.float16)
            state, precise = self.state[p], torch.float32 if half else p.dtype
            if not state:
                state["step"] = torch.zeros(())
            for name in ("exp_avg", "exp_avg_sq"):
                # the model may have been cast since the last step
                moment = state.get(name)
                new = moment is None
                state[name] = (
                    torch.zeros_like(p, dtype=precise) if new else moment.to(precise)
                )
            if half and "master" not in state:
                state["master"] = p.detach().to(precise, copy=True)
            elif half:
                # follow whoever else has written to the parameter; by element, so that no device
                # waits for an answer
                master = state["master"]
                master.copy_(
                    torch.where(master.to(p.dtype) == p, master, p.to(master.dtype))
                )
            masters.append(state["master"] if half else p)
            grads.append(p.grad.to(masters[-1].dtype))
            states.append(state)
        if not parameters:
            return
        beta1, beta2 = group["betas"]
        adamw(
            masters,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            # On a CPU torch's default is a loop of small operators for every vector; and it reads
            # the value of the step, which a plan's fake tensors have not.
            fused=all(m.device.type == "cpu" and not is_sharded(m) for m in masters)
            or any(map(is_fake, masters))
            or None,
        )
        # the half-precision copy that the model computes with
        for p, master in zip(parameters, masters, strict=True):
            if master is not p:
                p.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; with optimizer_in_bwd it also drops gradients that wait for a weight's other
        uses.
        """
        self._deferred.clear()
        super().zero_grad(set_to_none)

    # Optimizer_in_bwd: the update happens where the gradient is

    def before_forward(self, layer: SliceLayer) -> None:
        """Count the uses of a weight since the last step: one may be updated at once, several must
        wait for each other.
        """
        if torch._C._current_graph_task_id() != -1:
            # activation checkpointing recomputes inside backward; this use has been counted
            return
        parameter = layer.slice_weight
        if parameter in self._trained_slices:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "optimizer_in_bwd=True has already updated this layer since the last step(): a"
                    " second forward with gradients would accumulate, which it cannot. Call"
                    " optimizer.step() after every backward, or use SliceAdamW(...,"
                    " optimizer_in_bwd=False) for gradient accumulation."
                )
            return
        self._uses[parameter] = self._uses.get(parameter, 0) + 1

    def before_backward(self, layer: SliceLayer) -> None:
        """Called before the weight is read: it must not have been updated since the forward pass."""
        layer.require_enabled("an update in backward")
        if layer.slice_weight in self._trained_slices:
            raise RuntimeError(
                "optimizer_in_bwd=True: a second gradient arrived for a layer that has been updated"
                " since the last step() (backward called twice, or one layer in several reentrant"
                " checkpoints). Use optimizer_in_bwd=False, or checkpoint with use_reentrant=False."
            )

    @torch.no_grad()
    def update_in_backward(
        self, layer: SliceLayer, grad_output: Tensor, input: Tensor
    ) -> None:
        """Called in backward, after the input gradient of this use has been computed from the
        weight.
        """
        parameter = layer.slice_weight
        # another use may still need the weight as it was, for its input gradient
        if self._uses.get(parameter, 0) != 1:
            grad = ops.slice_grad(grad_output, input, layer.rows)
            self._deferred[parameter] = (
                self._deferred[parameter] + grad if parameter in self._deferred else grad
            )
        else:
            state, group = self._state(parameter), self._group_of(parameter)
            state["step"] += 1
            active = AdamWSlice(
                master=layer.active(parameter.detach()),
                grad=None,
                exp_avg=layer.active(state["exp_avg"]),
                exp_avg_sq=layer.active(state["exp_avg_sq"]),
                weight=layer.weight_matrix.detach(),
                rows=layer.rows,
                cols=layer.cols,
                step=state["step"],
            )
            ops.slice_grad_adamw(grad_output, input, active, self._options(group, layer))
            self._trained_slices.add(parameter)
            mark_synced(layers_of(parameter))
        # not None, which others take for a slice without a part in this step
        parameter.grad = _AppliedGradient(parameter)

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter group, found again where ``param_groups`` has been edited since."""
        # the lookup that has worked before is checked, not trusted: param_groups is a public list
        index = self._group_index.get(parameter, 0)
        if index >= len(self.param_groups) or not any(
            p is parameter for p in self.param_groups[index]["params"]
        ):
            self._group_index = {
                p: i for i, group in enumerate(self.param_groups) for p in group["params"]
            }
            if parameter not in self._group_index:
                raise RuntimeError(
                    f"a slice of shape {tuple(parameter.shape)} got a gradient, but no parameter"
                    " group of its optimizer holds it any more; build a new optimizer, or freeze"
                    " the slice (slice_weight.requires_grad_(False))"
                )
        return self.param_groups[self._group_index[parameter]]

    def _flush_deferred(self) -> None:
        """Update the slices of weights that were used several times, now that every use has had its
        turn.
        """
        for index, group in enumerate(self.param_groups):
            waiting = [p for p in group["params"] if p in self._deferred]
            flat = []
            for p in waiting:
                grad = self._deferred.pop(p)
                flat.append(
                    grad
                    if grad.shape == p.shape
                    else torch.nn.functional.pad(
                        grad.flatten(), (0, p.numel() - grad.numel())
                    )
                )
            self._update_slices(index, {p: layers_of(p) for p in waiting}, flat)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, and per slice its schedule and master: tensors and numbers only."""
        packed = super().state_dict()
        packed["state"] = {index: dict(state) for index, state in packed["state"].items()}
        for index, parameter in self._indexed(packed):
            if layers := layers_of(parameter):
                packed["state"].setdefault(index, {})["slice"] = layers[0].slice_state()
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counterpart of `state_dict`; the model's weights may be loaded before or after."""
        packed = {
            **state_dict,
            "state": {index: dict(state) for index, state in state_dict["state"].items()},
        }
        # torch's load_state_dict knows tensors per parameter only; schedules go in by themselves
        slices = {
            index: state.pop("slice")
            for index, state in packed["state"].items()
            if "slice" in state
        }
        packed["state"] = {
            index: state for index, state in packed["state"].items() if state
        }
        counts = [len(group["params"]) for group in self.param_groups]
        # else torch says what does not fit, before it changes anything
        if counts == [len(group["params"]) for group in state_dict["param_groups"]]:
            self._check_loaded(state_dict, slices)
        super().load_state_dict(packed)
        for index, parameter in self._indexed(state_dict):
            for layer in layers_of(parameter):
                layer.load_slice_state(slices[index])
        for index, parameter in self._indexed(state_dict):
            for key, value in packed["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    # torch would cast float32 moments and masters to the parameter's dtype, and
                    # leave `step` where it was
                    # torch's AdamW keeps step on the CPU, slice kernels read it on the device
                    where = (
                        "cpu"
                        if key == "step" and not layers_of(parameter)
                        else parameter.device
                    )
                    self.state[parameter][key] = value.detach().to(where, copy=True)

    def _check_loaded(self, packed: dict[str, Any], slices: dict[int, Any]) -> None:
        for index, parameter in self._indexed(packed):
            layers = layers_of(parameter)
            if layers and index not in slices:
                raise ValueError(
                    f"the optimizer state has no slice for parameter {index} (shape"
                    f" {tuple(parameter.shape)}): it was saved by another optimizer or for another"
                    " model. Load a state that SliceAdamW saved, or start afresh."
                )
            for layer in layers:
                check_slice_state(layer, slices[index])

    def __getstate__(self) -> dict[str, Any]:
        own = {
            name: getattr(self, name)
            for name in ("bf16_stochastic_round", "optim_bits", "optimizer_in_bwd", "seed")
        }
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._trained_slices, self._uses, self._deferred = set(), {}, {}
        self._codebooks, self._updates = {}, {}
        self._group_index = {
            p: i for i, group in enumerate(self.param_groups) for p in group["params"]
        }
        for layers in slices_of(self).values():
            for layer in layers if self.optimizer_in_bwd else ():
                layer.updater_reference = weakref.ref(self)

    def _indexed(self, packed: dict[str, Any]) -> Iterator[tuple[int, Tensor]]:
        for group, saved in zip(self.param_groups, packed["param_groups"], strict=True):
            yield from zip(saved["params"], group["params"], strict=True)


class _AppliedGradient(Tensor):
    """Stands in ``slice_weight.grad`` for a gradient that has been applied already: it has a shape
    and no values.

    Clipping, unscaling and logging read gradients; reading this one raises instead of quietly
    seeing nothing.
    """

    @staticmethod
    def __new__(cls, like: Tensor) -> _AppliedGradient:
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device
        )

    def __repr__(self, **_: Any) -> str:
        return f"<gradient of shape {tuple(self.shape)}, applied in backward>"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # zero_grad(set_to_none=False)
        if func in (
            torch.ops.aten.detach.default,
            torch.ops.aten.zero_.default,
        ):
            return args[0]
        raise RuntimeError(
            f"{func} needs the values of a gradient that optimizer_in_bwd=True has already applied:"
            " it cannot clip, unscale, accumulate or log gradients. Use SliceAdamW(...,"
            " optimizer_in_bwd=False), the default."
        )


def slice_state_dict(model: torch.nn.Module) -> dict[str, Any]:
    """Schedules and masters of all slices of a model, by module name: what to save beside the state
    of an optimizer other than SliceAdamW. Tensors and numbers only."""
    return {
        name: m.slice_state()
        for name, m in model.named_modules()
        if isinstance(m, SliceLayer)
    }


def load_slice_state_dict(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Counterpart of `slice_state_dict`. Raises ValueError if the layers are not the same."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SliceLayer)}
    if layers.keys() != state.keys():
        missing, extra = (
            sorted(layers.keys() - state.keys()),
            sorted(state.keys() - layers.keys()),
        )
        raise ValueError(
            f"the saved slices are of other layers: not saved: {missing[:5]}; not in the model:"
            f" {extra[:5]}"
        )
    for name, layer in layers.items():
        check_slice_state(layer, state[name])
    for name, layer in layers.items():
        layer.load_slice_state(state[name])
