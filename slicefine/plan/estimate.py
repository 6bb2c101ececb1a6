"""Will it fit? The peak memory of a training step and what it is made of, without weights, data or
a GPU.

A model is built on the meta device, its tensors become fake ones (shapes and dtypes, no values),
and one real training step runs
on them while `slicefine.plan.tracker` follows every storage. So the figures are those of the step
itself, layer by layer, with
whatever the model's code does; what no such run can see is said in `UNSEEN`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import Optimizer

from slicefine.config import SliceConfig
from slicefine.model import get_slice_model
from slicefine.moves import slices_of
from slicefine.optim import SliceAdamW
from slicefine.plan.tracker import MemoryReport, track_compiled, track_memory
from slicefine.targets import find_targets

UNSEEN = (
    "not counted: the CUDA context (about 0.5 GiB), libraries' workspaces, fragmentation of the"
    " allocator"
)
UNSEEN_COMPILED = UNSEEN + ", and what inductor changes by fusing operators and reusing buffers"


@dataclass(frozen=True)
class Workload:
    """A model and what one step feeds it.

    build: () -> the model on the meta device. inputs: batch size, length -> keyword arguments, made
        of fake tensors.
    loss: what the model returned, inputs -> scalar. logits_width: size of the vocabulary, if it has
        one.
    embeddings: model -> the module whose output gradients must reach for the frozen floor. context:
        entered for the step, where
    the model's code must be told something about the data that values would tell it.
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

    @property
    def mode(self) -> str:
        """ "eager", "checkpointing" or "compiled"."""
        return "checkpointing" if self.checkpointing else "compiled" if self.compiled else "eager"


@dataclass(frozen=True)
class Method:
    """A way to train. prepare: model -> optimizer (None: nothing trains). after_backward: before
    the optimizer's step.
    """

    name: str
    prepare: Callable[[nn.Module], Optimizer | None]
    after_backward: Callable[[nn.Module], None] = lambda model: None
    on_meta: Callable[[nn.Module], nn.Module] = lambda model: (
        model
    )  # what must happen before tensors become fake
    targets: str = "all-linear"
    r: int | None = None


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of one step. mode: "eager", "checkpointing" or "compiled"."""

    model: str
    method: str
    targets: str
    r: int | None
    batch: int
    length: int
    peak_bytes: int
    trainable: int
    mode: str
    breakdown: dict[str, int] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """For JSON."""
        shown = {k: v for k, v in self.__dict__.items() if k != "breakdown"}
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
                twin = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            known[id(tensor)] = (
                tensor,
                twin,
            )  # the original too: its id must not be given to another
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
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()


def estimate(workload: Workload, method: Method, batch: int, length: int) -> Estimate:
    """The peak of forward, backward and update in the steady state, with the moments of the steps
    before.

    Raises whatever the model or the method raises; nothing is guessed.
    """
    model = method.on_meta(workload.build())
    model.train()
    with _fakes(model):
        optimizer = method.prepare(model)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        inputs = workload.inputs(batch, length)
        if optimizer is None:
            _reach(workload.embeddings(model), workload.compiled)
        else:
            _prime(optimizer)
        with workload.context():
            report = (_compiled_step if workload.compiled else _step)(
                workload, method, model, optimizer, inputs
            )
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
        _whole(report),
    )


def _reach(embeddings: nn.Module, compiled: bool) -> None:
    """Let gradients flow back to the embeddings' output. Compiled graphs take no requires_grad_,
    but a sum with a parameter.
    """
    if not compiled:
        embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
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
        _tensors(inputs), model=model, optimizer=optimizer, logits_width=workload.logits_width
    ) as report:
        workload.loss(model(**inputs), inputs).backward()
        _update(method, model, optimizer)
    return report


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
        _tensors(inputs), model=model, optimizer=optimizer, logits_width=workload.logits_width
    ) as tracking:
        loss = torch.compile(
            lambda inputs: workload.loss(model(**inputs), inputs),
            backend=tracking.backend,
            fullgraph=True,
            dynamic=False,
        )
        loss(inputs).backward()
        with tracking.eager:
            _update(method, model, optimizer)
    torch._dynamo.reset()  # it would keep the model
    return tracking.report


def _update(method: Method, model: nn.Module, optimizer: Optimizer | None) -> None:
    if optimizer is not None:
        method.after_backward(model)
        optimizer.step()
        optimizer.zero_grad()


def _tensors(inputs: dict[str, Any]) -> list[Tensor]:
    return [v for v in inputs.values() if isinstance(v, Tensor)]


def _whole(report: MemoryReport) -> dict[str, int]:
    assert sum(report.breakdown.values()) == report.peak_bytes
    return report.breakdown


# Methods


def floor() -> Method:
    """Nothing trains; gradients reach the output of the embeddings. No method that keeps W dense
    can need less.
    """

    def prepare(model: nn.Module) -> None:
        model.requires_grad_(False)

    return Method("frozen floor", prepare, targets="-")


def slices(
    r: int,
    slice_type: str = "column",
    in_bwd: bool = False,
    targets: str | list[str] = "all-linear",
) -> Method:
    """slicefine with SliceAdamW."""

    def prepare(model: nn.Module) -> Optimizer:
        get_slice_model(model, SliceConfig(r=r, slice_type=slice_type, target_modules=targets))
        return SliceAdamW(model.parameters(), optimizer_in_bwd=in_bwd)

    name = f"slice {slice_type} r={r}" + (", optimizer_in_bwd" if in_bwd else "")
    return Method(name, prepare, targets=_named(targets), r=r)


def full() -> Method:
    """Full fine-tuning in the model's dtype, torch.optim.AdamW(fused=True)."""
    return Method(
        "full",
        lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        targets="everything",
    )


def masked(r: int, targets: str | list[str] = "all-linear") -> Method:
    """The masked-gradient baseline: dense gradients of the targets, a mask of columns on them,
    dense AdamW.

    The mask is a vector over the columns, a few KiB: the leanest way to write it.
    """
    masks: list[tuple[Any, Tensor]] = []

    def prepare(model: nn.Module) -> Optimizer:
        found = find_targets(model, SliceConfig(r=r, target_modules=targets))
        model.requires_grad_(False)
        weights: list[Any] = list(
            {id(t.module.weight): t.module.weight for t in found if not t.skipped}.values()
        )
        for weight in weights:
            weight.requires_grad_(True)
        masks[:] = [(w, torch.zeros(w.shape[1], dtype=torch.bool)) for w in weights]
        return torch.optim.AdamW(weights, fused=True)

    def after_backward(model: nn.Module) -> None:
        for weight, mask in masks:
            weight.grad.mul_(mask)

    return Method(f"masked r={r}", prepare, after_backward, targets=_named(targets), r=r)


def _named(targets: str | list[str]) -> str:
    return targets if isinstance(targets, str) else ",".join(targets)


# What fits


def largest_that_fits(peak: Callable[[int], int], budget: int, start: int) -> int:
    """The largest size whose peak is within the budget, in bytes; 0 if not even 1 is.

    peak: size -> bytes, growing. Peaks grow almost linearly: the secant through the largest size
        that fits and the smallest that does
    not says where to look, through the two largest or smallest while only one kind is known. The
    size returned has been evaluated
    and fits; the one after it does not, by the secant at least.
    """
    known: dict[int, int] = {}
    size = start
    for _ in range(40):
        known[size] = peak(size)
        fits, beyond = (
            [s for s in sorted(known) if (known[s] <= budget) == wanted] for wanted in (True, False)
        )
        if not fits and 1 in known:
            return 0
        if len(known) == 1:
            size = 2 * start if fits else max(1, start // 2)
            continue
        low, high = (
            (fits[-1], beyond[0]) if fits and beyond else (fits[-2:] if fits else beyond[:2])
        )
        slope = (known[high] - known[low]) / (high - low)
        size = int(low + (budget - known[low]) / slope) if slope > 0 else 2 * high
        size = max(size, 1)
        if fits and beyond:
            size = min(size, high - 1)  # rounding, or a curve that bends the other way
            if size <= low:
                return low
        elif size in known:
            if fits:
                return fits[-1]
            size = max(1, beyond[0] - 1)
    raise RuntimeError(
        f"no size found within {budget} bytes after {len(known)} tries; peaks by size: {known}"
    )


def advice(estimates: list[Estimate]) -> str:
    """What dominates the leanest trained method's peak, and what would help."""
    trained = [e for e in estimates if e.trainable and not e.method.startswith("frozen")]
    if not trained:
        return ""
    leanest = min(trained, key=lambda e: e.peak_bytes)
    kind, size = max(leanest.breakdown.items(), key=lambda item: item[1])
    share = size / leanest.peak_bytes
    help_with = {
        "weights": "load the weights in a smaller dtype, or shard them over devices",
        "activations": (
            "use --checkpointing, a smaller batch or shorter sequences"
            if leanest.mode == "eager"
            else "use a smaller batch with gradient accumulation, or shorter sequences"
        ),
        "logits": (
            "compute the loss in chunks (a fused linear cross entropy), or use a smaller batch or"
            " shorter sequences"
        ),
        "temporaries": (
            "use a smaller batch or shorter sequences; the largest are often the loss's float32"
            " logits"
        ),
        "gradients": "train slices instead of whole weights, or use optimizer_in_bwd",
        "moments": "train slices instead of whole weights, or use optim_bits=8",
    }[kind]
    return (
        f"Leanest trained method: {leanest.method}. {share:.0%} of its peak are {kind}:"
        f" {help_with}."
    )


def with_compile(workload: Workload) -> Workload:
    """The same under torch.compile: graphs of its own partitioner, run operator by operator
    (`slicefine.plan.tracker.track_compiled`).
    """
    if workload.checkpointing:
        raise ValueError(
            "a step with activation checkpointing is not planned under torch.compile; choose one of"
            " them"
        )
    return replace(workload, compiled=True)


def with_checkpointing(workload: Workload) -> Workload:
    """The same with activation checkpointing, by the model's own method (transformers, timm);
    non-reentrant.
    """
    calls: dict[str, Callable[[Any], Any]] = {
        "activation_checkpointing_enable": lambda enable: enable({"use_reentrant": False}),
        "gradient_checkpointing_enable": lambda enable: enable({"use_reentrant": False}),
        "set_grad_checkpointing": lambda enable: enable(True),
    }

    def build() -> nn.Module:
        model = workload.build()
        for name, call in calls.items():
            if hasattr(model, name):
                call(getattr(model, name))
                return model
        raise ValueError(
            f"{type(model).__name__} has none of {', '.join(calls)}: it cannot be planned with"
            " checkpointing"
        )

    return replace(workload, build=build, checkpointing=True)
