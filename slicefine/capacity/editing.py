"""Train a few weights until listed answers are right: slices, LoRA and side networks by one
protocol.

The loss is a hinge on the margin by which the wanted class wins, its mean over the edits and the
answers to keep (weighting few edits as much as many answers was tried and solved less); the model
runs in evaluation mode, so that what is trained is what is served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.capacity.samples import Samples, joined, logits_of, predict
from slicefine.capacity.side import AdditiveSide, default_feature, features_of
from slicefine.config import SliceConfig
from slicefine.deltas.delta import Delta
from slicefine.layer import SliceLayer
from slicefine.model import get_slice_model
from slicefine.optim import SliceAdamW
from slicefine.targets import find_targets, output_head

METHODS = ("slice", "lora", "side")
LR = {"slice": 2e-3, "lora": 1e-3, "side": 1e-2}
# plain tensors up to this many samples train as one batch
_WHOLE = 1024


@dataclass(frozen=True)
class Fit:
    """steps: that were taken. solved: whether every answer asked for is right. wrong: how many are
    not.
    """

    steps: int
    solved: bool
    wrong: int


class Attempt:
    """A model with the parameters of one method on it, until `keep` or `remove`.

    method: "slice", "lora" or "side". size: width r of a slice, rank of LoRA, hidden neurons of a
    side. config: which layers (slice and LoRA), which axis. layers, feature: of a side.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        size: int,
        config: SliceConfig | None = None,
        layers: int = 2,
        feature: Any = None,
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
        self.base, self.model, self.method, self.size = model, model, method, size
        # a slice that moves would not be the size that is asked about
        given = config or SliceConfig(contiguous=True)
        # and what trains beside the slices would answer for them: a head, biases, norms
        self.config = replace(
            given,
            r=size,
            switch_interval=None,
            bias="none",
            norms="none",
            modules_to_save=given.modules_to_save or [],
        )
        self.side: AdditiveSide | None = None
        # the caller's random numbers stay as they were
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            getattr(self, f"_add_{method}")(layers, feature)

    def _add_slice(self, layers: int, feature: Any) -> None:
        get_slice_model(self.model, self.config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def _add_lora(self, layers: int, feature: Any) -> None:
        self._trained = {
            name for name, p in self.model.named_parameters() if p.requires_grad
        }
        self.model = lora_model(self.model, self.size, self.config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def _add_side(self, layers: int, feature: Any) -> None:
        feature = feature if feature is not None else default_feature(self.model)
        self.feature, self.layers = feature, layers

    def fit(
        self,
        edits: Samples,
        keep: Samples | None,
        *,
        steps: int = 1500,
        lr: float | None = None,
        margin: float = 1.0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> Fit:
        """Train until all answers are right or ``steps`` are over; keep's labels are the answers to
        hold.
        """
        lr = LR[self.method] if lr is None else lr
        if self.method == "side":
            return self._fit_side(edits, keep, steps, lr, margin, seed)
        everything = joined([edits, keep]) if keep is not None else edits
        optimizer: torch.optim.Optimizer
        if self.method == "slice":
            optimizer = SliceAdamW(self.parameters, lr=lr, weight_decay=0.0)
        else:
            optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        # without dropout: the answers that are held are those of evaluation
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        try:
            if isinstance(everything.inputs, Tensor) and len(everything) <= _WHOLE:
                answers = lambda: logits_of(self.model, everything.inputs)
                return _descend(answers, everything.labels, optimizer, steps, margin)
            return self._fit_batches(
                edits, keep, everything, optimizer, steps, margin, batch_size, seed
            )
        finally:
            for module in training:
                module.training = True

    def _fit_batches(
        self,
        edits: Samples,
        keep: Samples | None,
        everything: Samples,
        optimizer: torch.optim.Optimizer,
        steps: int,
        margin: float,
        batch_size: int,
        seed: int,
    ) -> Fit:
        """All edits (or a batch of them) and a batch of what is kept, each step; everything is
        asked after quiet steps.
        """
        generator = torch.Generator().manual_seed(seed)
        quiet, wrong = 0, len(edits)
        for step in range(1, steps + 1):
            chosen = torch.randperm(len(edits), generator=generator)[:batch_size]
            parts = [edits[chosen]]
            if keep is not None:
                parts.append(
                    keep[torch.randperm(len(keep), generator=generator)[:batch_size]]
                )
            batch = joined(parts)
            optimizer.zero_grad()
            lead = _lead(logits_of(self.model, batch.inputs), batch.labels)
            (margin - lead).clamp(min=0).mean().backward()
            optimizer.step()
            # a full check is slow, so it waits for batches that find nothing wrong
            quiet = quiet + 1 if bool((lead > margin / 2).all()) else 0
            if quiet >= 5 or step == steps:
                quiet = 0
                wrong = int(
                    (
                        predict(self.model, everything.inputs).argmax(1)
                        != everything.labels
                    ).sum()
                )
                if wrong == 0:
                    return Fit(step, True, 0)
        return Fit(steps, False, wrong)

    def _fit_side(
        self,
        edits: Samples,
        keep: Samples | None,
        steps: int,
        lr: float,
        margin: float,
        seed: int,
    ) -> Fit:
        everything = joined([edits, keep]) if keep is not None else edits
        # the model does not change, so its features are computed once
        features, base = features_of(self.model, everything.inputs, self.feature)
        features, base = features.float(), base.float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            side = AdditiveSide(
                features.shape[1],
                base.shape[1],
                self.layers,
                self.size,
                feature=self.feature,
            )
        self.parameters = list(side.parameters())
        optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        fit = _descend(
            lambda: base + side(features), everything.labels, optimizer, steps, margin
        )
        # after training: the hooks would compute what is computed here already
        self.side = side.attach(self.model)
        return fit

    @property
    def trainable(self) -> int:
        """Numbers that train."""
        return sum(p.numel() for p in self.parameters)

    def remove(self) -> None:
        """The model as it was before, bit for bit."""
        if self.side is not None:
            self.side.detach()
        elif self.method == "slice":
            model: Any = self.model
            model.unload()
        elif self.method == "lora":
            unload_lora(self.model, self.base, self._trained)
            self.model = self.base

    def keep(self, info: dict[str, Any]) -> Delta | None:
        """End training with what was learned in the model: slices become plain layers, and their
        delta is returned.
        """
        if self.method != "slice":
            return None
        model: Any = self.model
        delta = model.delta(info=info)
        model.merge_and_unload()
        return delta


def _lead(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) the wanted class's logit minus the best other one."""
    labels = labels.to(logits.device)[:, None]
    return (
        logits.gather(1, labels).squeeze(1)
        - logits.scatter(1, labels, float("-inf")).max(1).values
    )


def _descend(
    answers: Callable[[], Tensor],
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    steps: int,
    margin: float,
) -> Fit:
    """Full-batch steps until every answer is right by half the margin, so that rounding does not
    undo it.
    """
    for step in range(steps + 1):
        lead = _lead(answers(), labels)
        if bool((lead > margin / 2).all()):
            return Fit(step, True, 0)
        if step == steps:
            wrong = int((lead <= 0).sum())
            return Fit(steps, wrong == 0, wrong)
        optimizer.zero_grad()
        (margin - lead).clamp(min=0).mean().backward()
        optimizer.step()
    raise AssertionError("unreachable")


def lora_model(model: nn.Module, r: int, config: SliceConfig) -> Any:
    """The model with peft's LoRA on the layers that the config names; alpha = 2 r.

    Raises ImportError saying what to install.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("method 'lora' needs peft: pip install peft") from error
    names = [
        t.name
        for t in find_targets(model, config)
        if t.skipped is None and t.module is not output_head(model)
    ]
    linear = {
        n: m
        for n, m in model.named_modules()
        if n in names and not isinstance(m, SliceLayer)
    }
    return peft.get_peft_model(
        model, peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(linear))
    )  # pyright: ignore[reportArgumentType]


def unload_lora(wrapped: Any, base: nn.Module, trained: set[str]) -> None:
    """Take LoRA off, in place; peft has frozen the base, so what trained before trains again."""
    wrapped.unload()
    # peft leaves it behind, and takes the model for an adapted one next time
    base.__dict__.pop("peft_config", None)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in trained)
