"""Make a model lean, and undo it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from slicefine.lean import checkpointing, head, modules
from slicefine.lean import offload as offloading

Checkpoint = Literal["full", "selective"]


@dataclass
class LeanReport:
    """What `lean` has changed.

    loss: the name of the head whose logits are not made, or None.
    norms, mlps, activations: names of the modules that keep less.
    remade: LayerNorms and activations that keep what they kept before, and whose result a row slice
        makes again instead of keeping it.
    checkpoint: None, "full" or "selective".
    offload: None or "activations".
    left: name -> why something stays as it was.
    added: what the model's own method for checkpoints has added.
    """

    loss: str | None = None
    norms: list[str] = field(default_factory=list)
    mlps: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    remade: list[str] = field(default_factory=list)
    checkpoint: str | None = None
    offload: str | None = None
    left: dict[str, str] = field(default_factory=dict)
    added: checkpointing.Added | None = field(default=None, repr=False)

    def __str__(self) -> str:
        said = []
        if self.loss:
            said.append(f"the loss in chunks, without the logits of {self.loss}")
        for names, one, many in (
            (self.norms, "norm", "norms"),
            (self.mlps, "gated MLP", "gated MLPs"),
            (self.activations, "activation", "activations"),
        ):
            if names:
                said.append(f"{len(names)} {one if len(names) == 1 else many}")
        if self.remade:
            said.append(f"{len(self.remade)} inputs that row slices do not keep")
        if self.checkpoint:
            said.append(f"{self.checkpoint} activation checkpointing")
        if self.offload:
            said.append("activations wait in host memory")
        lines = [f"lean: {', '.join(said) or 'nothing to change'}"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  stays: {names[0]}{more}, {reason}")
        return "\n".join(lines)


def lean(
    model: nn.Module,
    loss: bool = True,
    norms: bool = True,
    mlp: bool = True,
    checkpoint: Checkpoint | None = None,
    offload: Literal["activations"] | None = None,
    verbose: bool = True,
) -> nn.Module:
    """Let a model keep less for its backward pass, in place; losses and gradients stay the same.

    Before `get_slice_model` or after it, and for any other method that freezes the base. Modules
    whose weights train and steps without gradients run as before. ``merge_and_unload`` and
    `slicefine.lean.undo` give the model back as it was.

    Args:
        loss: in training the logits are not made; cross entropy is computed in chunks of tokens.
            They are made when something else asks for their values.
        norms: a frozen RMSNorm keeps its input and one number a token. (LayerNorm does so in torch.)
        mlp: a gated MLP (SwiGLU, GeGLU) keeps gate and up; an activation that is written as several
            operators becomes one.
        checkpoint: "full" recomputes each layer in backward, "selective" all but its attention and
            those products that are not wider than their input.
        offload: "activations": what is kept for backward waits in host memory.
        verbose: print what was changed, and what was not recognized.
    Returns:
        The same object.
    Raises:
        ValueError: the head is sliced, so its loss needs the logits; the model is lean already; it
            has no checkpointing of its own; there is no accelerator to move activations from.
    """
    if "_lean_report" in model.__dict__:
        raise ValueError("the model is lean already; call slicefine.lean.undo(model) first")
    if checkpoint not in (None, "full", "selective"):
        raise ValueError(
            f"checkpoint is {checkpoint!r}; expected None, 'full' or 'selective'"
        )
    offloading.check(offload)
    report = LeanReport(checkpoint=checkpoint, offload=offload)
    # what can refuse comes before what changes
    name = head.check(model, report.left) if loss else None
    if checkpoint is not None:
        report.added = checkpointing.enable(model, checkpoint)
    if name is not None:
        head.attach(model)
        report.loss = name
    if norms:
        report.norms = _become(model, modules.recognize_norm, modules.LeanRMSNorm)
        report.remade = _become(model, modules.recognize_layer_norm, modules.LeanLayerNorm)
        report.left |= modules.unknown_norms(model)
    if mlp:
        report.mlps = _become(model, modules.recognize_mlp, modules.LeanGatedMLP)
        known = list(modules.candidates(model, modules.recognize_activation))
        for name, module, how in known:
            several = modules.operators(module) > 1
            (report.activations if several else report.remade).append(name)
            modules.become(module, modules.LeanActivation, how)
        report.left |= modules.unknown_mlps(model)
    if offload is not None:
        offloading.attach(model)
    model.__dict__["_lean_report"] = report
    # by this merge_and_unload finds the way back
    model.__dict__["_undo_lean"] = undo
    if verbose:
        print(report)
    return model


def _become(model: nn.Module, recognize: Any, mixin: type) -> list[str]:
    found = list(modules.candidates(model, recognize))
    for _, module, how in found:
        modules.become(module, mixin, how)
    return [name for name, *_ in found]


def undo(model: nn.Module) -> nn.Module:
    """Give a model back as it was before `lean`, in place; returns the same object.

    Raises:
        ValueError: the model is not lean.
    """
    if "_lean_report" not in model.__dict__:
        raise ValueError("the model is not lean; there is nothing to undo")
    report = model.__dict__.pop("_lean_report")
    model.__dict__.pop("_undo_lean", None)
    for module in model.modules():
        modules.give_back(module)
    head.detach(model)
    offloading.detach(model)
    if report.added is not None:
        checkpointing.disable(model, report.added)
    return model
