"""The methods of every comparison, each set up in one place: what trains, with which optimizer.

    floor     nothing trains, or only `saved`: no method that keeps its weights dense can be faster
    slice     slicefine with SliceAdamW
    masked    dense gradients and dense Adam, a mask on the gradients: slices without slicefine
    dense     all weights of the targets
    full      all weights of the model
    lora, lorafa, dora, miss, shira, vera, ia3    peft's

Every method gets the same targets and the same learning rate, and torch's AdamW without decay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slicefine import SliceAdamW, SliceConfig, get_slice_model

PEFT = {
    "lora": "LoraConfig",
    "lorafa": "LoraConfig",
    "dora": "LoraConfig",
    "miss": "MissConfig",
    "shira": "ShiraConfig",
    "vera": "VeraConfig",
    "ia3": "IA3Config",
}
KINDS = ("floor", "slice", "masked", "dense", "full", *PEFT)
RANK = 16


class MissingPeerError(RuntimeError):
    """A peer that is compared with is not installed."""


@dataclass(frozen=True)
class Method:
    """One competitor.

    kind: one of `KINDS`; for ops and moves, what their own modules know. r: rank, or width of a
        slice; None where it has none. fp32_adapters: peft's default beside a bfloat16 model. equal:
        what it has in common with the column slice of r = 16, beside the layers that train.
    """

    name: str
    kind: str
    r: int | None = None
    slice_type: str = "column"
    in_bwd: bool = False
    fp32_adapters: bool = False
    equal: str = ""


@dataclass
class Prepared:
    """A model that a method has been put on, with its optimizer (None: nothing trains)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    masked: MaskedGradient | None = None

    def update(self) -> None:
        """What follows backward: the mask where there is one, the optimizer's step, zero_grad."""
        if self.optimizer is None:
            return
        if self.masked is not None:
            self.masked.mask()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def held(self) -> Iterator[Tensor]:
        """Tensors that exist between two steps."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        state = {} if self.optimizer is None else self.optimizer.state
        for entry in state.values():
            yield from (value for value in entry.values() if isinstance(value, Tensor))
        if self.masked is not None:
            yield from self.masked.masks.values()

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def prepare(
    method: Method,
    model: nn.Module,
    targets: Sequence[str],
    *,
    r: int | None = None,
    lr: float = 1e-4,
    saved: Sequence[str] = (),
    fused: bool | None = None,
    wrap: bool = True,
) -> Prepared:
    """Put a method on a model, in place, and make its optimizer.

    Args:
        method: What trains.
        model: Its linear layers at `targets` get the method.
        targets: Names of linear layers, in full.
        r: Instead of the method's own r.
        lr: Learning rate of everything that trains.
        saved: Names of modules that train fully with every method, as a new head does.
        fused: As in torch.optim.AdamW.
        wrap: With peft's model class around the model. Without, peft's layers alone: for timing
            one layer, of which a wrapper's Python would be a large part.

    Returns:
        The model, its optimizer, and the mask of the masked baseline.

    Raises:
        MissingPeerError: peft, or this method in it, is not installed.
        ValueError: The kind is none of `KINDS`.
    """
    adamw = functools.partial(torch.optim.AdamW, lr=lr, weight_decay=0.0, fused=fused)
    width = r or method.r or RANK
    model.requires_grad_(False)
    if method.kind in PEFT:
        return _peft(method, model, targets, width, lr, saved, wrap, adamw)
    for name in saved:
        model.get_submodule(name).requires_grad_(True)
    if method.kind == "slice":
        config = SliceConfig(
            r=width,
            slice_type=method.slice_type,
            switch_interval=None,
            target_modules=list(targets),
            exclude_modules=None,
            modules_to_save=list(saved) or None,
            # what the masked baseline trains
            contiguous=True,
            bias="none",
            norms="none",
        )
        sliced: Any = get_slice_model(model, config)
        optimizer = SliceAdamW(sliced.parameters(), lr=lr, optimizer_in_bwd=method.in_bwd)
        return Prepared(sliced, optimizer)
    if method.kind == "masked":
        chosen = torch.arange(width, device=next(model.parameters()).device)
        features = (None, chosen) if method.slice_type == "column" else (chosen, None)
        masked = MaskedGradient(
            model, list(targets), lambda name, move: features, None, also=tuple(saved)
        )
        return Prepared(model, adamw(masked.parameters()), masked)
    if method.kind == "full":
        model.requires_grad_(True)
    elif method.kind == "dense":
        for name in targets:
            model.get_submodule(name).weight.requires_grad_(True)
    elif method.kind != "floor":
        raise ValueError(
            f"method {method.name!r} is of kind {method.kind!r}; expected one of {', '.join(KINDS)}"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    return Prepared(model, adamw(trained) if trained else None)


def _peft(
    method: Method,
    model: nn.Module,
    targets: Sequence[str],
    r: int,
    lr: float,
    saved: Sequence[str],
    wrap: bool,
    adamw: Callable[..., torch.optim.Optimizer],
) -> Prepared:
    try:
        import peft
    except ImportError as error:
        raise MissingPeerError(f"peft is missing: {error}") from None
    if not hasattr(peft, PEFT[method.kind]):
        raise MissingPeerError(f"peft {peft.__version__} has no {PEFT[method.kind]}")
    config = getattr(peft, PEFT[method.kind])(
        **peft_options(method.kind, targets, r, saved)
    )
    if method.kind == "shira":
        config.mask_fn = random_mask
    adapted: Any
    if wrap:
        adapted = peft.get_peft_model(
            model, config, autocast_adapter_dtype=method.fp32_adapters
        )
    else:
        adapted = peft.inject_adapter_in_model(config, model)
    if method.kind == "lorafa":
        from peft.optimizers import create_lorafa_optimizer

        return Prepared(adapted, create_lorafa_optimizer(adapted, r=r, lora_alpha=r, lr=lr))
    return Prepared(adapted, adamw([p for p in adapted.parameters() if p.requires_grad]))


def peft_options(
    kind: str, targets: Sequence[str], r: int, saved: Sequence[str] = ()
) -> dict[str, Any]:
    """Arguments of peft's config: the scale is 1, everything else is peft's default."""
    options: dict[str, Any] = {"target_modules": list(targets)}
    if saved:
        options["modules_to_save"] = list(saved)
    if kind == "ia3":
        # IA3 scales the input of a feed-forward layer and the output of the others
        options["feedforward_modules"] = [
            name for name in targets if name.rpartition(".")[2] == "dense"
        ]
        return options
    options["r"] = r
    if kind in ("lora", "lorafa", "dora"):
        options["lora_alpha"] = r
    if kind == "dora":
        options["use_dora"] = True
    return options


def random_mask(base_layer: nn.Linear, r: int, **_: Any) -> Tensor:
    """SHiRA's entries, as many as peft's own mask has.

    peft draws them on the host, which takes a minute for a model of three billion parameters; here
    they are drawn on the layer's device.
    """
    weight = base_layer.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    order = torch.randperm(weight.numel(), device=weight.device, generator=generator)
    mask[order[: r * sum(weight.shape)]] = True
    return mask.view(weight.shape)


def linear_names(model: nn.Module, endings: Sequence[str]) -> list[str]:
    """Full names of the linear layers whose last part is one of the endings."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in endings
    ]


class MaskedGradient:
    """The masked-gradient baseline: full weights, full dW, a mask on it, dense Adam; the slice
    moves by moving the mask.

    Build the optimizer from ``parameters()`` with weight_decay=0 (dense decay would reach the
    frozen entries), call ``mask()`` after backward and ``after_step(optimizer)`` after the step.

    Args:
        model: Everything outside `names` and `also` is frozen.
        names: Linear layers to train.
        features: (name, move) -> (rows, cols) of the slice after that many moves, None for all.
        interval: Optimizer steps between moves, None for never. A move resets the dense moments.
        also: Names of modules and parameters that train fully.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        features: Callable[[str, int], tuple[Tensor | None, Tensor | None]],
        interval: int | None,
        also: tuple[str, ...] = (),
    ) -> None:
        self.weights = {name: model.get_submodule(name).weight for name in names}
        self.features, self.interval, self.steps, self.moves = features, interval, 0, 0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                any(f"{name}.".startswith(f"{prefix}.") for prefix in also)
            )
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.others = [
            p
            for n, p in model.named_parameters()
            if p.requires_grad and not any(p is w for w in self.weights.values())
        ]
        self._set_masks()

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.weights.values()
        yield from self.others

    def _set_masks(self) -> None:
        self.masks = {}
        for name, weight in self.weights.items():
            rows, cols = self.features(name, self.moves)
            mask = torch.zeros_like(weight, dtype=torch.bool)
            mask[
                (slice(None) if rows is None else rows.unsqueeze(1)),
                (slice(None) if cols is None else cols),
            ] = True
            self.masks[name] = mask

    @torch.no_grad()
    def mask(self) -> None:
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.mul_(self.masks[name])

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        if self.interval is not None and self.steps % self.interval == 0:
            self.moves += 1
            self._set_masks()
            for weight in self.weights.values():
                optimizer.state.pop(weight, None)
