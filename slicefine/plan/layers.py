"""Identical layers are identical: the memory of a deep stack from two shallow ones.

A step over a stack of L layers is cut into phases: before the first layer, each layer's forward,
the loss, each layer's backward, the update. Within one phase every moment grows by the same bytes
with L, so a phase's peak is affine in L: its values for two and three layers give it for any L.
Between the second layer and the last but one it is affine in the layer's place too, so the ends
hold the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

SHORT_STACKS = (2, 3)

Phases = dict[str, dict[str, int]]


def identical_layers(model: nn.Module) -> int | None:
    """How many layers the model's one stack of identical layers has.

    Returns:
        None if there is no such stack, several, or fewer than five layers, which are run as they
        are.
    """
    stack = _stack_of(model)
    if stack is None or len(stack) <= max(SHORT_STACKS) + 1:
        return None
    first = _signature(stack[0])
    return len(stack) if all(_signature(layer) == first for layer in stack) else None


def keep_layers(model: nn.Module, kept: int) -> nn.Module:
    """Shorten the model's stack to its first layers, in place."""
    stack = _stack_of(model)
    assert stack is not None
    del stack[kept:]
    return model


@contextmanager
def phases_of_layers(model: nn.Module, begin: Callable[[str], None]) -> Iterator[None]:
    """Call ``begin`` with the phase that begins: "forward i", "loss", "backward i"."""
    stack = _stack_of(model)
    if stack is None:
        yield
        return
    forward = True

    def enter(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # a checkpointed layer runs again in backward
            if forward:
                begin(f"forward {index}")

        return hook

    def leave(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal forward
            if not forward:
                return
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    # The gradient of its output arrives when a layer's backward begins.
                    leaf.register_hook(lambda gradient: begin(f"backward {index}"))
                    break
            if index == len(stack) - 1:
                forward = False
                begin("loss")

        return hook

    handles = []
    for index, layer in enumerate(stack):
        handles.append(layer.register_forward_pre_hook(enter(index)))
        handles.append(layer.register_forward_hook(leave(index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def extend(two: Phases, three: Phases, depth: int) -> dict[str, int]:
    """The breakdown at the peak of a stack of ``depth`` layers, from those of two and of three.

    Args:
        two: phase -> bytes of each kind at its peak, of a stack of two layers.
        three: the same of three.
    """
    more = depth - 3
    peaks = []
    for short, long in _PAIRS:
        if short in two and long in three:
            peaks.append(_along(three[long], two[short], three[long], more))
    if "backward 1" in three and "backward 0" in two:
        # the second layer, and the last but one: three layers show them as one
        middle = three["backward 1"]
        peaks.append(_along(middle, two["backward 0"], three["backward 0"], more))
        peaks.append(_along(middle, two["backward 1"], three["backward 2"], more))
    return max(peaks, key=lambda kinds: sum(kinds.values()))


# (phase of two layers, the same phase of three), counted from the first layer or from the last
_PAIRS = (
    ("before", "before"),
    ("forward 0", "forward 0"),
    ("forward 1", "forward 1"),
    ("forward 1", "forward 2"),
    ("loss", "loss"),
    ("backward 1", "backward 2"),
    ("backward 0", "backward 0"),
    ("update", "update"),
)


def _along(
    start: dict[str, int], before: dict[str, int], after: dict[str, int], steps: int
) -> dict[str, int]:
    return {
        kind: size + steps * (after[kind] - before[kind]) for kind, size in start.items()
    }


def _stack_of(model: nn.Module) -> Any:
    """The list or sequence of modules of one class that holds most parameters; None if two do."""
    best: list[tuple[int, Any]] = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        kinds = {type(child) for child in module}
        # A run of bare linear layers is a head, not a stack of blocks.
        if len(kinds) == 1 and not kinds & {nn.Linear}:
            best.append((sum(p.numel() for p in module.parameters()), module))
    if not best:
        return None
    largest = max(size for size, _ in best)
    held = [module for size, module in best if size == largest]
    rest = [module for size, module in best if not _inside(module, held[0])]
    return held[0] if len(held) == 1 and len(rest) == 1 else None


def _inside(module: nn.Module, stack: nn.Module) -> bool:
    return module is not stack and any(module is inner for inner in stack.modules())


def _signature(layer: nn.Module) -> list[Any]:
    """What may make one layer's memory differ from another's: all but its number and its name."""
    found: list[Any] = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | tuple) and key not in _NUMBERS
        }
        tensors = {
            key: (value.shape, value.dtype, value.requires_grad)
            for key, value in (*module._parameters.items(), *module._buffers.items())
            if value is not None
        }
        found.append((name, type(module), plain, tensors))
    return found


_NUMBERS = ("layer_idx", "layer_id", "layer_number", "_hf_hook")
