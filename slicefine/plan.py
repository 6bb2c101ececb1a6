"""Will it fit? The peak memory of a training step and what it is made of, without weights, data or a GPU.

A model is built on the meta device, its tensors become fake ones (shapes and dtypes, no values), and one real training step runs
on them while `slicefine.memory` follows every storage. So the figures are those of the step itself, layer by layer, with
whatever the model's code does; what no such run can see is said in `UNSEEN`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import Optimizer

from slicefine.config import SliceConfig
from slicefine.memory import MemoryReport, track_memory
from slicefine.model import get_slice_model
from slicefine.moves import slices_of
from slicefine.optim import SliceAdamW
from slicefine.targets import find_targets

UNSEEN = "not counted: the CUDA context (about 0.5 GiB), libraries' workspaces, fragmentation of the allocator"


@dataclass(frozen=True)
class Workload:
    """A model and what one step feeds it.

    build: () -> the model on the meta device. inputs: batch size, length -> keyword arguments, made of fake tensors.
    loss: what the model returned, inputs -> scalar. logits_width: size of the vocabulary, if it has one.
    embeddings: model -> the module whose output gradients must reach for the frozen floor.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    loss: Callable[[Any, dict[str, Any]], Tensor]
    embeddings: Callable[[nn.Module], nn.Module]
    logits_width: int | None = None
    checkpointing: bool = False


@dataclass(frozen=True)
class Method:
    """A way to train. prepare: model -> optimizer (None: nothing trains). after_backward: before the optimizer's step."""

    name: str
    prepare: Callable[[nn.Module], Optimizer | None]
    after_backward: Callable[[nn.Module], None] = lambda model: None
    on_meta: Callable[[nn.Module], nn.Module] = lambda model: model  # what must happen before tensors become fake
    targets: str = "all-linear"
    r: int | None = None


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of one step. mode: "eager" or "checkpointing"."""

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
    """Turn the parameters and buffers of a model on the meta device into fake ones; tied ones stay tied."""
    mode, known = FakeTensorMode(allow_non_fake_inputs=True), {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            with mode:
                twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            known[id(tensor)] = tensor, twin  # the original too: its id must not be given to another
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
    """The peak of forward, backward and update in the steady state, with the moments of the steps before.

    Raises whatever the model or the method raises; nothing is guessed.
    """
    model = method.on_meta(workload.build())
    model.train()
    with _fakes(model):
        optimizer = method.prepare(model)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        inputs = workload.inputs(batch, length)
        if optimizer is None:
            workload.embeddings(model).register_forward_hook(lambda module, args, output: output.requires_grad_())
        else:
            _prime(optimizer)
        tracked = track_memory(
            [v for v in inputs.values() if isinstance(v, Tensor)], model=model, optimizer=optimizer,
            logits_width=workload.logits_width,
        )  # fmt: skip
        with tracked as report:
            workload.loss(model(**inputs), inputs).backward()
            if optimizer is not None:
                method.after_backward(model)
                optimizer.step()
                optimizer.zero_grad()
    return Estimate(
        workload.name, method.name, method.targets, method.r, batch, length, report.peak_bytes, trainable,
        "checkpointing" if workload.checkpointing else "eager", _whole(report),
    )  # fmt: skip


def _whole(report: MemoryReport) -> dict[str, int]:
    assert sum(report.breakdown.values()) == report.peak_bytes
    return report.breakdown


# -- methods ----------------------------------------------------------------------------------------------------------


def floor() -> Method:
    """Nothing trains; gradients reach the output of the embeddings. No method that keeps W dense can need less."""

    def prepare(model: nn.Module) -> None:
        model.requires_grad_(False)

    return Method("frozen floor", prepare, targets="-")


def slices(r: int, slice_type: str = "column", in_bwd: bool = False, targets: str | list[str] = "all-linear") -> Method:
    """slicefine with SliceAdamW."""

    def prepare(model: nn.Module) -> Optimizer:
        get_slice_model(model, SliceConfig(r=r, slice_type=slice_type, target_modules=targets))
        return SliceAdamW(model.parameters(), optimizer_in_bwd=in_bwd)

    name = f"slice {slice_type} r={r}" + (", optimizer_in_bwd" if in_bwd else "")
    return Method(name, prepare, targets=_named(targets), r=r)


def full() -> Method:
    """Full fine-tuning in the model's dtype, torch.optim.AdamW(fused=True)."""
    return Method("full", lambda model: torch.optim.AdamW(model.parameters(), fused=True), targets="everything")


def masked(r: int, targets: str | list[str] = "all-linear") -> Method:
    """The masked-gradient baseline: dense gradients of the targets, a mask of 16 columns on them, dense AdamW."""

    def prepare(model: nn.Module) -> Optimizer:
        found = find_targets(model, SliceConfig(r=r, target_modules=targets))
        model.requires_grad_(False)
        weights: list[Any] = list({id(t.module.weight): t.module.weight for t in found if not t.skipped}.values())
        for weight in weights:
            weight.requires_grad_(True)
        model.slicefine_masks = [(w, torch.zeros_like(w, dtype=torch.bool)) for w in weights]  # type: ignore[attr-defined]
        return torch.optim.AdamW(weights, fused=True)

    def after_backward(model: nn.Module) -> None:
        for weight, mask in model.slicefine_masks:  # type: ignore[attr-defined]
            weight.grad.mul_(mask)

    return Method(f"masked r={r}", prepare, after_backward, targets=_named(targets), r=r)


def _named(targets: str | list[str]) -> str:
    return targets if isinstance(targets, str) else ",".join(targets)


# -- what fits --------------------------------------------------------------------------------------------------------


def largest_that_fits(peak: Callable[[int], int], budget: int, start: int) -> int:
    """The largest size whose peak is within the budget, in bytes; 0 if not even 1 is.

    peak: size -> bytes. Peaks grow almost linearly: the secant through the two sizes nearest to the budget says where to look. The
    size returned has been evaluated and fits, and by the secant the one after it does not.
    """
    known = {start: peak(start)}
    other = 2 * start if known[start] <= budget else max(1, start // 2)
    for _ in range(12):
        if other not in known:
            known[other] = peak(other)
        nearest = sorted(known, key=lambda size: abs(known[size] - budget))
        near, far = nearest[0], next((size for size in nearest[1:] if known[size] != known[nearest[0]]), None)
        if far is None:
            return max((size for size, bytes_ in known.items() if bytes_ <= budget), default=0)
        slope = (known[near] - known[far]) / (near - far)
        other = max(0, int(near + (budget - known[near]) / slope))
        if other == 0:
            if 1 not in known:
                known[1] = peak(1)
            if known[1] > budget:
                return 0
            other = 1
        if other in known and known[other] <= budget:
            return other
        if other in known:
            other -= 1
    raise RuntimeError(f"no size found within {budget} bytes; the peaks do not grow with the size: {known}")


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
        "activations": "use --checkpointing, a smaller batch or shorter sequences" if leanest.mode == "eager"
        else "use a smaller batch with gradient accumulation, or shorter sequences",
        "logits": "compute the loss in chunks (a fused linear cross entropy), or use a smaller batch or shorter sequences",
        "temporaries": "use a smaller batch or shorter sequences; the largest are often the loss's float32 logits",
        "gradients": "train slices instead of whole weights, or use optimizer_in_bwd",
        "moments": "train slices instead of whole weights, or use optim_bits=8",
    }[kind]  # fmt: skip
    return f"Leanest trained method: {leanest.method}. {share:.0%} of its peak are {kind}: {help_with}."


def with_checkpointing(workload: Workload) -> Workload:
    """The same with activation checkpointing, by the model's own `gradient_checkpointing_enable`."""

    def build() -> nn.Module:
        model = workload.build()
        enable = getattr(model, "gradient_checkpointing_enable", None) or getattr(model, "set_grad_checkpointing", None)
        if enable is None:
            raise ValueError(
                f"{type(model).__name__} has neither gradient_checkpointing_enable() nor set_grad_checkpointing(): "
                "it cannot be planned with activation checkpointing"
            )
        if enable.__name__ == "set_grad_checkpointing":
            enable(True)
        else:
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    return replace(workload, build=build, checkpointing=True)
