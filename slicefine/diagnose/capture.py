"""What runs through the linear layers of a model: features, gradients of one loss, and the same
model with random weights.

Memory beyond the model: a forward pass of one batch, and what the bound given holds (`passes`).
Nothing here keeps a copy of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.config import SliceConfig
from slicefine.targets import find_targets, is_linear, output_head

Batch = Mapping[str, Tensor]
# (things, what is being done, how many of them) -> the same things, with a progress bar
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


def quietly(things: Iterable[Any], doing: str, total: int) -> Iterable[Any]:
    """A `Track` that shows nothing."""
    return things


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model. weight (out, in) is a view, however it is stored."""

    name: str
    module: Any

    @property
    def weight(self) -> Tensor:
        stored = self.module.weight
        return stored if isinstance(self.module, nn.Linear) else stored.t()

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


def linear_layers(model: nn.Module, config: SliceConfig | None = None) -> list[Layer]:
    """The layers that a `SliceConfig` would turn into slices; those it skips are left out."""
    seen: set[int] = set()
    layers = []
    for target in find_targets(model, config or SliceConfig()):
        # a module that is used under two names is looked at once
        if target.skipped is None and id(target.module) not in seen:
            seen.add(id(target.module))
            layers.append(Layer(target.name, target.module))
    return layers


def linear_layers_of_shapes(model: nn.Module) -> list[Layer]:
    """The layers of a model on the meta device, whose shapes alone are known: every linear one but
    the output head.
    """
    head = output_head(model)
    return [
        Layer(name, module)
        for name, module in model.named_modules()
        if is_linear(module) and module is not head
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for parameters, and back to what was."""
    modes = {module: module.training for module in model.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    # dropout would add noise to every measurement
    model.eval()
    for parameter in wanted:
        # gradients then flow through activations alone, and no weight's gradient is made
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


# Features at the inputs of layers


@dataclass
class Features:
    """At one layer's input. rows: (n, d) sampled positions (tokens, patches), float32. means:
    (examples, d) over an example's positions; (0, d) where the layer's first dimension is not the
    examples."""

    rows: Tensor
    means: Tensor


def passes(
    widths: Sequence[int], samples: int, examples: int, budget: int
) -> list[list[int]]:
    """Which layers are looked at together, so that their features take at most ``budget`` bytes;
    more passes where it is small.

    widths: input features of each layer. samples, examples: rows of `Features`. out: indices of
    layers per pass. Raises ValueError if the features of a single layer exceed the budget.
    """
    size = lambda i: 4 * widths[i] * (samples + examples)
    groups: list[list[int]] = [[]]
    held = 0
    for i in range(len(widths)):
        if size(i) > budget:
            raise ValueError(
                f"the features of a layer with {widths[i]:,d} inputs take {size(i):,d} bytes and"
                f" the budget is {budget:,d}; raise the budget or sample fewer rows"
            )
        # first fit in the model's order: neighbors share inputs, which are then held once
        if held + size(i) > budget:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += size(i)
    return groups if groups[0] else []


@torch.no_grad()
def input_features(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    samples: int,
    seed: int = 0,
) -> dict[str, Features]:
    """Features at the input of each layer, of one pass over the data; layers that are never called
    are left out.

    batches: keyword arguments of the model; positions that an ``attention_mask`` of the input's
    shape hides are left out. samples: rows kept per layer; layers with the same inputs get one
    object.
    """
    collected: dict[str, list[tuple[Tensor, Tensor]]] = {}
    shared: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
    current: dict[str, Any] = {}

    def take(x: Tensor) -> tuple[Tensor, Tensor]:
        mask = current["mask"]
        # one position per example
        if x.dim() == 2:
            x = x.unsqueeze(1)
        x = x.flatten(1, -2)
        # a mask of another shape is not of these positions
        if mask is None or tuple(mask.shape) != tuple(x.shape[:2]):
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        mask = mask.bool()
        weights = mask.to(torch.float32)
        means = torch.einsum("btd,bt->bd", x.float(), weights) / weights.sum(
            1, keepdim=True
        ).clamp_min(1.0)
        # the first dimension is not the examples', so there is no mean per example
        if len(x) != current["batch"]:
            means = means[:0]
        valid = mask.flatten().nonzero().flatten()
        # each batch its part
        share = -(-samples * current["batch"] // total)
        # by the number of the batch: the same rows whichever layers share a pass
        generator = torch.Generator().manual_seed(seed + current["number"])
        chosen = valid[
            torch.randperm(len(valid), generator=generator)[:share].to(valid.device)
        ]
        return x.flatten(0, 1).index_select(0, chosen).float().cpu(), means.cpu()

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: Any) -> None:
            x = args[0]
            # the tensor is held, so that no other can take its id
            if id(x) not in shared:
                shared[id(x)] = x, take(x)
            collected.setdefault(name, []).append(shared[id(x)][1])

        return before

    total = sum(len(next(iter(batch.values()))) for batch in batches)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(hook(layer.name)).remove)
        for number, batch in enumerate(batches):
            current.update(
                mask=batch.get("attention_mask"),
                number=number,
                batch=len(next(iter(batch.values()))),
            )
            model(**batch)
            shared.clear()
    # layers with the same parts have the same inputs, as q, k and v have
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, parts in collected.items():
        alike.setdefault(tuple(id(rows) for rows, _ in parts), []).append(name)
    joined: dict[str, Features] = {}
    # parts go as they are joined: features are held once and not twice
    for names in alike.values():
        lists = [collected.pop(name) for name in names]
        parts = lists[0]
        features = Features(
            torch.cat([rows for rows, _ in parts])[:samples],
            torch.cat([means for _, means in parts]),
        )
        joined.update(dict.fromkeys(names, features))
        del lists, parts
    return {layer.name: joined[layer.name] for layer in layers if layer.name in joined}


# The same model with random weights


@contextmanager
def random_weights(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Inside, every module computes with freshly initialized parameters, which exist only while
    that module runs.

    So the randomly initialized twin of a model takes the memory of its largest module and not that
    of a second model. Linear and embedding weights are normal with
    ``model.config.initializer_range`` where there is one; else modules initialize themselves
    (``reset_parameters``). Other parameters: vectors called weight are ones, biases zeros,
    everything else normal with 0.02. A module whose weights its parent reads without calling it
    keeps them.
    """
    deviation = getattr(getattr(model, "config", None), "initializer_range", None)

    def before(name: str) -> Any:
        def swap(module: nn.Module, args: Any) -> None:
            kept = {k: p for k, p in module._parameters.items() if p is not None}
            # a stack, because a module may run inside itself
            stack = module.__dict__.setdefault("_slicefine_kept", [])
            stack.append(kept)
            # a seed by the module's name: its weights are the same in every pass and on every call
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(
                    seed + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
                )
                _draw(module, deviation)

        return swap

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(module.__dict__["_slicefine_kept"].pop())

    with ExitStack() as hooks:
        owners = [
            (name, m)
            for name, m in model.named_modules()
            if any(p is not None for p in m._parameters.values())
        ]
        try:
            for name, module in owners:
                # before all other hooks, which may read the weights
                hooks.callback(
                    module.register_forward_pre_hook(before(name), prepend=True).remove
                )
                hooks.callback(module.register_forward_hook(after).remove)
            yield
        finally:
            for _, module in owners:
                kept = module.__dict__.pop("_slicefine_kept", [])
                # the pass was interrupted inside this module
                if kept:
                    module._parameters.update(kept[0])


@torch.no_grad()
def _draw(module: nn.Module, deviation: float | None) -> None:
    fresh = {
        k: nn.Parameter(torch.empty_like(p), requires_grad=False)
        for k, p in module._parameters.items()
        if p is not None
    }
    module._parameters.update(fresh)
    reset = getattr(module, "reset_parameters", None)
    matrices = [p for p in fresh.values() if p.dim() > 1]
    # a model's own scale of initialization wins over the module's default
    if callable(reset) and (deviation is None or not matrices):
        reset()
        return
    for name, parameter in fresh.items():
        if parameter.dim() > 1:
            parameter.normal_(std=deviation or 0.02)
        # the scale of a normalization
        elif name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.zero_()
