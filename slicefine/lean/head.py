"""The head of a lean model: in a training step it gives `LazyLogits`.

Two hooks of the model put a forward of ours on the head while the model's own forward runs. They
are functions of this module and hold nothing, so copies of the model stay lean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slicefine.lean.loss import lazy_logits
from slicefine.linear import SliceLinear


def check(model: nn.Module, left: dict[str, str]) -> str | None:
    """The name of the head, or None with the reason in ``left``.

    Raises:
        ValueError: the head is sliced.
    """
    head = _head(model)
    if head is None:
        left["loss"] = "which is not that of a language model"
        return None
    name = next(n for n, m in model.named_modules() if m is head)
    _refuse_slices(head, name)
    if type(head).forward is not nn.Linear.forward:
        left[name] = f"a {type(head).__name__} with a forward of its own"
        return None
    if "forward" in head.__dict__:
        left[name] = "whose forward a device map or another library has replaced"
        return None
    return name


def _head(model: Any) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _refuse_slices(head: nn.Module, name: str) -> None:
    if isinstance(head, SliceLinear):
        raise ValueError(
            f"{name} is sliced, and lean's loss reads its weight without calling it, so the slice"
            f" would not train: leave it out (exclude_modules=[{name!r}]), or lean(model,"
            " loss=False)"
        )


def attach(model: nn.Module) -> None:
    model.register_forward_pre_hook(begin)
    # also after an exception: a head that stays lazy would answer calls of others
    model.register_forward_hook(end, always_call=True)


def detach(model: nn.Module) -> None:
    for hooks, ours in ((model._forward_pre_hooks, begin), (model._forward_hooks, end)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def begin(model: nn.Module, args: Any) -> None:
    if not model.training or not torch.is_grad_enabled():
        return
    # asked for anew in each step: the head may have been replaced or sliced since
    head = _head(model)
    _refuse_slices(head, "the head")
    # on the instance and for this call only: state dicts, copies and class stay untouched
    head.__dict__["forward"] = _Lazy(head)


def end(model: nn.Module, args: Any, output: Any) -> None:
    head = _head(model)
    if isinstance(head.__dict__.get("forward"), _Lazy):
        del head.__dict__["forward"]


class _Lazy:
    """The head's forward in a lean step."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def __call__(self, hidden: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            _refuse_compile()
        return lazy_logits(hidden, self.head)


_COMPILED = (
    "torch.compile does not take the loss of a lean model: use lean(model, loss=False), or do not"
    " compile"
)


@torch.compiler.disable(reason=_COMPILED)
def _refuse_compile() -> None:
    # an error raised while the code is traced would only break the graph
    raise RuntimeError(_COMPILED)
