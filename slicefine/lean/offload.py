"""Activations wait for their backward pass in host memory, by torch's own `save_on_cpu`.

What torch's context would move too stays where it is: weights, which backward reads and which are on
the device anyway, and small tensors, for which a copy takes longer than it saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

# bytes; below it a copy is mostly its start
SMALLEST = 2**16
_ACTIVE = "_lean_offloading"


class Offload(saved_tensors_hooks):
    """A context in which what is saved for backward leaves the device.

    Args:
        model: its parameters and buffers stay.
        pack: takes a tensor away and returns what brings it back.
        unpack: brings it back.
    """

    def __init__(
        self,
        model: nn.Module,
        pack: Callable[[Tensor], Any],
        unpack: Callable[[Any], Tensor],
    ) -> None:
        own = [*model.parameters(), *model.buffers()]
        stays = {tensor.untyped_storage()._cdata for tensor in own}

        def pack_activation(tensor: Tensor) -> Any:
            small = tensor.numel() * tensor.element_size() < SMALLEST
            if small or tensor.untyped_storage()._cdata in stays:
                return tensor, None
            return None, pack(tensor)

        def unpack_activation(packed: Any) -> Tensor:
            tensor, away = packed
            return unpack(away) if tensor is None else tensor

        super().__init__(pack_activation, unpack_activation)


def check(how: str | None) -> None:
    """Raise ValueError for another word, or where there is no device to take anything away from."""
    if how not in (None, "activations"):
        raise ValueError(f"offload is {how!r}; expected None or 'activations'")
    if how is not None and not torch.accelerator.is_available():
        raise ValueError(
            "offload='activations' moves activations from an accelerator to host memory, and torch"
            " sees no accelerator here: on a CPU they are in host memory already. Leave offload out,"
            " or use checkpoint='full'"
        )


def attach(model: nn.Module) -> None:
    model.register_forward_pre_hook(begin)
    # also after an exception: other models' activations are not ours to move
    model.register_forward_hook(end, always_call=True)


def detach(model: nn.Module) -> None:
    for hooks, ours in ((model._forward_pre_hooks, begin), (model._forward_hooks, end)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def begin(model: nn.Module, args: Any) -> None:
    if not torch.is_grad_enabled():
        return
    if torch.compiler.is_compiling():
        _refuse_compile()
    device = next(model.parameters()).device.type
    inner = save_on_cpu(pin_memory=device == "cuda", device_type=device)
    context = Offload(model, inner.pack_hook, inner.unpack_hook)
    context.__enter__()
    # a list: a model may be called within its own forward
    model.__dict__.setdefault(_ACTIVE, []).append(context)


def end(model: nn.Module, args: Any, output: Any) -> None:
    active = model.__dict__.get(_ACTIVE)
    if active:
        active.pop().__exit__()
        if not active:
            del model.__dict__[_ACTIVE]


_COMPILED = (
    "torch.compile decides itself what is kept, so offload='activations' does nothing there: use"
    " lean(model, loss=False) without it, or do not compile"
)


@torch.compiler.disable(reason=_COMPILED)
def _refuse_compile() -> None:
    raise RuntimeError(_COMPILED)
