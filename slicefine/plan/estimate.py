"""Will it fit? The peak memory of a training step and what it is made of, without weights, data or
a GPU.

A model is built on the meta device, its tensors become fake ones (shapes and dtypes, no values),
and one real training step runs
on them while `slicefine.plan.tracker` follows every storage. So the figures are those of the step
itself, layer by layer, with
whatever the model's code does; what no such run can see is said in `UNSEEN`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import Optimizer

from slicefine.lean.apply import lean
from slicefine.lean.offload import Offload
from slicefine.optim import SliceAdamW
from slicefine.plan.layers import (
    SHORT_STACKS,
    extend,
    identical_layers,
    keep_layers,
    phases_of_layers,
)
from slicefine.plan.tracker import MemoryReport, track_compiled, track_memory
from slicefine.registry import slices_of

# how rows name the dtypes of weights
DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Workload:
    """A model and what one step feeds it.

    build: () -> the model on the meta device.
    inputs: batch size, length -> keyword arguments, made of fake tensors.
    loss: what the model returned, inputs -> scalar.
    embeddings: the module whose output must receive gradients in the frozen-baseline run.
    logits_width: size of the vocabulary, if it has one.
    context: context manager that is active during the step.
    lean: the options with which `slicefine.lean` changes the model, None to leave it as it is.
    offload: activations wait in host memory, which is not counted.
    base: how the frozen weights are stored: their dtype, or how they are packed.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    loss: Callable[[Any, dict[str, Any]], Tensor]
    embeddings: Callable[[nn.Module], nn.Module]
    logits_width: int | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    checkpointing: bool = False
    compiled: bool = False
    lean: dict[str, Any] | None = None
    offload: bool = False
    base: str = "bf16"

    @property
    def mode(self) -> str:
        """ "eager", or "compiled", or those of "lean", "checkpointing" and "offload" that are on,
        joined by "+".
        """
        if self.compiled:
            return "compiled"
        switches = {
            "lean": self.lean is not None,
            "checkpointing": self.checkpointing,
            "offload": self.offload,
        }
        return "+".join(name for name, on in switches.items() if on) or "eager"


@dataclass(frozen=True)
class Method:
    """A way to train. prepare: model -> optimizer (None: nothing trains). after_backward: before
    the optimizer's step.
    """

    name: str
    prepare: Callable[[nn.Module], Optimizer | None]
    after_backward: Callable[[nn.Module], None] = lambda model: None
    # what must happen before tensors become fake
    on_meta: Callable[[nn.Module], nn.Module] = lambda model: model
    targets: str = "all-linear"
    r: int | None = None


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of one step. mode, base: those of the `Workload`."""

    model: str
    method: str
    targets: str
    r: int | None
    batch: int
    length: int
    peak_bytes: int
    trainable: int
    mode: str
    base: str = "bf16"
    breakdown: dict[str, int] = field(default_factory=dict)
    phases: dict[str, dict[str, int]] = field(default_factory=dict, repr=False)

    def row(self) -> dict[str, Any]:
        """For JSON."""
        shown = {k: v for k, v in self.__dict__.items() if k not in ("breakdown", "phases")}
        return {**shown, **self.breakdown}


@contextmanager
def _fakes(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Turn the parameters and buffers of a model on the meta device into fake ones; tied ones stay
    tied.
    """
    mode, known = FakeTensorMode(allow_non_fake_inputs=True), {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            with mode:
                # on the CPU, so that no accelerator has to be there
                twin = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            # the original too: its id must not be given to another
            known[id(tensor)] = tensor, twin
        return known[id(tensor)][1]

    for module in model.modules():
        registry: Any
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None:
                    registry[name] = fake(tensor)
    with mode:
        yield mode


def _prime(optimizer: Optimizer) -> None:
    """Give every parameter its moments, as after a first step."""
    if isinstance(optimizer, SliceAdamW) and optimizer.optimizer_in_bwd:
        for parameter in slices_of(optimizer):
            optimizer._state(parameter)
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.requires_grad else None
            )
    optimizer.step()
    optimizer.zero_grad()


def estimate(
    workload: Workload, method: Method, batch: int, length: int, whole: bool = False
) -> Estimate:
    """The peak of forward, backward and update in the steady state, with the moments of the steps
    before.

    Of a stack of identical layers two and three are run and the rest follows, byte for byte, from
    their difference (`slicefine.plan.layers`).

    Args:
        whole: run every layer.
    Raises:
        Whatever the model or the method raises.
    """
    stack = None if whole or workload.compiled else _short_stack(workload.build)
    if stack is None:
        return _estimate_of(workload, method, workload.build(), batch, length)
    depth, shortest = stack
    # a copy for each: keep_layers shortens in place, and a method changes layers
    two, three = (
        _estimate_of(
            workload, method, keep_layers(copy.deepcopy(shortest), kept), batch, length
        )
        for kept in SHORT_STACKS
    )
    return _extended(two, three, depth)


def _short_stack(build: Callable[[], nn.Module]) -> tuple[int, nn.Module] | None:
    """The depth of a model's stack of identical layers, and the model with three of them."""
    if build not in _STACKS:
        model = build()
        depth = identical_layers(model)
        # a deep model takes longer to build than a shallow one takes to run
        short = None if depth is None else (depth, keep_layers(model, max(SHORT_STACKS)))
        _STACKS[build] = short
    return _STACKS[build]


_STACKS: weakref.WeakKeyDictionary[
    Callable[[], nn.Module], tuple[int, nn.Module] | None
] = weakref.WeakKeyDictionary()


def _extended(two: Estimate, three: Estimate, depth: int) -> Estimate:
    breakdown = extend(two.phases, three.phases, depth)
    trained_by_a_layer = three.trainable - two.trainable
    return replace(
        three,
        peak_bytes=sum(breakdown.values()),
        trainable=two.trainable + (depth - 2) * trained_by_a_layer,
        breakdown=breakdown,
        phases={},
    )


def _estimate_of(
    workload: Workload, method: Method, model: nn.Module, batch: int, length: int
) -> Estimate:
    model = method.on_meta(model)
    model.train()
    if workload.lean is not None:
        # still on meta: lean replaces modules, and those it makes become fake with the others
        lean(model, verbose=False, **workload.lean)
    with _fakes(model):
        optimizer = method.prepare(model)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # within the fake mode: these have shapes, and no values either
        inputs = workload.inputs(batch, length)
        if optimizer is None:
            _reach(workload.embeddings(model), workload.compiled)
        else:
            _prime(optimizer)
        step = _compiled_step if workload.compiled else _step
        with workload.context():
            report = step(workload, method, model, optimizer, inputs)
    # each byte at the peak is of one kind
    assert sum(report.breakdown.values()) == report.peak_bytes
    return Estimate(
        workload.name,
        method.name,
        method.targets,
        method.r,
        batch,
        length,
        report.peak_bytes,
        trainable,
        workload.mode,
        workload.base,
        report.breakdown,
        report.phases,
    )


def _reach(embeddings: nn.Module, compiled: bool) -> None:
    """Let gradients flow back to the embeddings' output. Compiled graphs take no requires_grad_,
    but a sum with a parameter.
    """
    if not compiled:
        embeddings.register_forward_hook(
            lambda module, args, output: output.requires_grad_()
        )
        return
    reached: Any = nn.Parameter(torch.zeros((), dtype=next(embeddings.parameters()).dtype))
    embeddings.register_parameter("reached", reached)

    def add(module: nn.Module, args: Any, output: Any) -> Tensor:
        return output + reached

    embeddings.register_forward_hook(add)


def _step(
    workload: Workload,
    method: Method,
    model: nn.Module,
    optimizer: Optimizer | None,
    inputs: dict[str, Any],
) -> MemoryReport:
    with track_memory(
        _tensors(inputs),
        model=model,
        optimizer=optimizer,
        logits_width=workload.logits_width,
    ) as report:
        with phases_of_layers(model, report.begin):
            report.begin("before")
            workload.loss(_forward(workload, model, inputs), inputs).backward()
        report.begin("update")
        _update(method, model, optimizer)
    return report


def _forward(workload: Workload, model: nn.Module, inputs: dict[str, Any]) -> Any:
    with _away(model) if workload.offload else nullcontext():
        return model(**inputs)


def _away(model: nn.Module) -> Offload:
    """The device's view of `slicefine.lean.offload`: a tensor goes, and as large a one comes back."""

    def back(packed: tuple) -> Tensor:
        size, stride, dtype = packed
        return torch.empty_strided(size, stride, dtype=dtype)

    return Offload(model, lambda t: (t.size(), t.stride(), t.dtype), back)


def _compiled_step(
    workload: Workload,
    method: Method,
    model: nn.Module,
    optimizer: Optimizer | None,
    inputs: dict[str, Any],
) -> MemoryReport:
    """Model and loss are one compiled function; the update is eager."""
    torch._dynamo.reset()
    with track_compiled(
        _tensors(inputs),
        model=model,
        optimizer=optimizer,
        logits_width=workload.logits_width,
    ) as tracking:
        loss = torch.compile(
            lambda inputs: workload.loss(model(**inputs), inputs),
            backend=tracking.backend,
            # what runs behind a graph break would not be tracked
            fullgraph=True,
            dynamic=False,
        )
        loss(inputs).backward()
        with tracking.eager:
            _update(method, model, optimizer)
    # it would keep the model
    torch._dynamo.reset()
    return tracking.report


def _update(method: Method, model: nn.Module, optimizer: Optimizer | None) -> None:
    if optimizer is not None:
        method.after_backward(model)
        optimizer.step()
        optimizer.zero_grad()


def _tensors(inputs: dict[str, Any]) -> list[Tensor]:
    return [v for v in inputs.values() if isinstance(v, Tensor)]
