"""The same step in another mode: lean, with activation checkpointing, under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from slicefine.plan.estimate import Workload


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
        # The reentrant kind gives no gradients behind frozen embeddings, whose output needs none.
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


def with_lean(workload: Workload, **options: Any) -> Workload:
    """The same of a model that `slicefine.lean` has changed.

    Args:
        options: those of `slicefine.lean`.
    """
    if workload.compiled:
        raise ValueError(
            "a lean model's loss is not compiled; choose lean or torch.compile"
        )
    return replace(workload, lean=options)


def with_offload(workload: Workload) -> Workload:
    """The same with activations in host memory between forward and backward."""
    if workload.compiled:
        raise ValueError("a compiled step decides itself what is kept; it is not offloaded")
    return replace(workload, offload=True)


MODES: dict[str, Callable[[Workload], Workload]] = {
    "eager": lambda workload: workload,
    "lean": with_lean,
    "checkpointing": with_checkpointing,
    "lean+checkpointing": lambda workload: with_lean(with_checkpointing(workload)),
    "lean+offload": lambda workload: with_offload(with_lean(workload)),
    "lean+checkpointing+offload": lambda workload: with_offload(
        with_lean(with_checkpointing(workload))
    ),
    "compiled": with_compile,
}
