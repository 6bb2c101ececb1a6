"""The output head of a model: a language model's, which is pretrained, or a classifier's.

A classifier's head is usually new: as many outputs as the task has classes, with random weights. So
"all-linear" trains all of it and never makes slices of it. It is told by what each library says of
its models: PEFT's and transformers' names of heads, timm's ``get_classifier()``, torchvision's
``fc``, ``head``, ``heads`` and ``classifier``.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# PEFT's SEQ_CLS_HEAD_NAMES, of any model
NAMES = ("score", "classifier")
_OF_TRANSFORMERS = (
    *NAMES,
    "cls_classifier",
    "distillation_classifier",
    "classifier_distill",
    "classification_head",
    "qa_outputs",
    "logits_proj",
    "class_labels_classifier",
    "decode_head",
    "auxiliary_head",
)
_OF_TORCHVISION = ("fc", "heads", "head", "classifier")


@dataclass(frozen=True)
class Heads:
    """What a model gives its outputs with.

    Attributes:
        language: the output embedding of a language model; None if it has none.
        task: name -> module of the heads of a classifier.
    """

    language: nn.Module | None = None
    task: dict[str, nn.Module] = field(default_factory=dict)

    def holds(self, name: str) -> str | None:
        """The name of the task head that a module is, or is inside of."""
        inside = (head for head in self.task if f"{name}.".startswith(f"{head}."))
        return next(inside, None)


def find_heads(model: nn.Module) -> Heads:
    """The heads of a model, also of one inside a wrapper."""
    prefix = ""
    while True:
        language = _language_head(model)
        if language is not None:
            # what CTC reads characters from is as new as a classifier
            if type(model).__name__.endswith("ForCTC"):
                name = next(n for n, m in model.named_modules() if m is language)
                return Heads(task={prefix + name: language})
            return Heads(language)
        if task := _task_heads(model):
            return Heads(task={prefix + name: module for name, module in task.items()})
        inner = _wrapped(model)
        if inner is None:
            return Heads()
        prefix, model = f"{prefix}{inner}.", model.get_submodule(inner)


def output_head(model: nn.Module) -> nn.Module | None:
    """The output embedding of a language model, else a module called score or classifier."""
    head = _language_head(model)
    if head is None:
        head = next((m for n in NAMES if (m := getattr(model, n, None)) is not None), None)
    return head


def _language_head(model: Any) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head: Any = None
    # transformers' answer for a model without one
    with contextlib.suppress(NotImplementedError):
        head = get() if callable(get) else None
    return head


def _task_heads(model: nn.Module) -> dict[str, nn.Module]:
    kinds = {kind.__module__.split(".")[0] for kind in type(model).__mro__}
    found: list[Any] = []
    if callable(get := getattr(model, "get_classifier", None)):
        with contextlib.suppress(NotImplementedError):
            given = get()
            found = list(given) if isinstance(given, (tuple, list)) else [given]
    elif "torchvision" in kinds:
        first = next(
            (m for n in _OF_TORCHVISION if (m := _child(model, n)) is not None), None
        )
        found = [] if first is None else [_last_linear(first) or first]
    else:
        names = _OF_TRANSFORMERS if "transformers" in kinds else NAMES
        found = [_child(model, name) for name in names]
    heads = [m for m in found if isinstance(m, nn.Module) and _size(m)]
    # of a classifier that is most of the model only the last layer is as new as a task
    whole = _size(model)
    heads = [(_last_linear(m) or m) if 2 * _size(m) > whole else m for m in heads]
    names_of = {id(m): n for n, m in reversed(list(model.named_modules()))}
    return {names_of[id(m)]: m for m in heads if names_of.get(id(m))}


def _child(model: nn.Module, name: str) -> nn.Module | None:
    child = model._modules.get(name)
    return child if child is not None and _size(child) else None


def _last_linear(module: nn.Module) -> nn.Module | None:
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return linear[-1] if linear else None


def _size(module: nn.Module) -> int:
    # a lazy layer has no size yet
    lazy = nn.parameter.UninitializedParameter
    return sum(p.numel() for p in module.parameters() if not isinstance(p, lazy))


def _wrapped(model: nn.Module) -> str | None:
    """The name of the one child that holds all parameters, as a wrapper has."""
    if model._parameters:
        return None
    names = [
        name
        for name, child in model.named_children()
        if any(True for _ in child.parameters())
    ]
    return names[0] if len(names) == 1 else None
