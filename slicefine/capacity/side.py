"""AdditiveSide: a frozen model f plus a small ReLU network g on features of one of its modules, f +
g.

g hangs on hooks: nothing of f is replaced, moved or written to, so its state dict is what it was
and `detach` leaves no trace. Source: Sohn et al., Fine-Tuning Capacity, UAI 2024, arXiv 2408.00359.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from slicefine.capacity.exact import (
    Bumps,
    Zigzags,
    choose_direction,
    three_layers,
    two_layers,
)
from slicefine.capacity.samples import Inputs, count, evaluating, logits_of, take
from slicefine.targets import output_head

Features = str | Callable[..., Tensor]
WHY_NOT_HALF = (
    "an exact side network cannot run in {}: its knots lie between neighboring samples and its"
    " slopes reach 1e4 and more, so rounding the features to 8 or 11 bits moves samples across"
    " knots (errors of 14 to 200 were measured where 1e-6 is promised). Keep it in float64; the"
    " model beside it may have any dtype that gives float32 features."
)
_HALF = (torch.bfloat16, torch.float16)


class AdditiveSide(nn.Module):
    """g of f + g: trained, or exact by construction (`exact_side`).

    features: width of the features. outputs: of g, those of the model. layers: 2 or 3. width:
    hidden neurons in all. feature: name of the module whose *input* the features are, or a callable
    of the model's own arguments that returns them (n, features). output: name of the module to
    whose output g is added; None: ``feature`` itself, or the model's output if feature is a
    callable. The defaults suit a linear head. The last layer starts at zero, so an untrained side
    changes nothing, bit for bit. Raises ValueError for another number of layers or too few neurons.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        layers: int = 2,
        width: int = 16,
        *,
        feature: Features,
        output: str | None = None,
    ) -> None:
        super().__init__()
        self.network: nn.Module = _relu_network(features, outputs, layers, width)
        self._place(feature, output)

    @classmethod
    def of(
        cls, network: nn.Module, feature: Features, output: str | None = None
    ) -> AdditiveSide:
        """A side with a network that exists already."""
        side = cls.__new__(cls)
        nn.Module.__init__(side)
        side.network = network
        side._place(feature, output)
        return side

    def _place(self, feature: Features, output: str | None) -> None:
        self.feature = feature
        self.output = (
            output if output is not None else feature if isinstance(feature, str) else ""
        )
        self._handles: list[Any] = []
        self._seen: Tensor | None = None
        self._on = True

    @property
    def exact(self) -> bool:
        return isinstance(self.network, (Bumps, Zigzags))

    @property
    def layers(self) -> int:
        network = self.network
        return (
            network.layers
            if isinstance(network, (Bumps, Zigzags))
            else len(_linears(network))
        )

    @property
    def neurons(self) -> int:
        """Hidden neurons (ReLUs) in all."""
        network = self.network
        if isinstance(network, (Bumps, Zigzags)):
            return network.neurons
        return sum(layer.out_features for layer in _linears(network)[:-1])

    @property
    def stored(self) -> int:
        """Numbers that describe g."""
        network = self.network
        return (
            network.stored
            if isinstance(network, (Bumps, Zigzags))
            else sum(p.numel() for p in network.parameters())
        )

    def forward(self, features: Tensor) -> Tensor:
        """(n, ..., features) -> (n, ..., outputs), in the network's dtype."""
        if self.exact:
            if features.dtype in _HALF:
                raise TypeError(WHY_NOT_HALF.format(features.dtype))
            return self.network(features)
        return self.network(features.to(next(self.network.parameters()).dtype))

    # On a model

    def attach(self, model: nn.Module) -> AdditiveSide:
        """Add g to a model's output from now on; returns self. Raises ValueError if attached
        already, or for no such module.
        """
        if self._handles:
            raise ValueError("this side is attached already; call detach() first")
        # before any hook is registered: an unknown name leaves nothing behind
        target = _submodule(model, self.output)
        if isinstance(self.feature, str):
            source = _submodule(model, self.feature)
            self._handles.append(
                source.register_forward_pre_hook(self._see_input, with_kwargs=True)
            )
        else:
            self._handles.append(
                model.register_forward_pre_hook(self._see_call, with_kwargs=True)
            )
        self._handles.append(target.register_forward_hook(self._add))
        return self

    def detach(self) -> None:
        """Take g off the model, which is then what it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """f alone inside the block."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def _see_input(
        self,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
    ) -> None:
        found = (
            args[0]
            if args
            else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
        )
        if not isinstance(found, Tensor):
            raise ValueError(
                f"{self.feature} was called without a tensor to take features from; name another"
                " module"
            )
        self._seen = found

    def _see_call(
        self,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
    ) -> None:
        if self._on:
            # the callable may well run the model
            with self.disabled():
                self._seen = cast(Callable[..., Tensor], self.feature)(*args, **kwargs)

    def _add(
        self,
        module: nn.Module,
        args: tuple,
        result: Any,
    ) -> Any:
        if not self._on:
            return None
        # taken once: a second call without new features must not reuse old ones
        features, self._seen = self._seen, None
        logits = getattr(result, "logits", result)
        if features is None or not isinstance(logits, Tensor):
            raise ValueError(
                f"the output of {self.output or 'the model'} is a {type(result).__name__} and"
                f" features {'were' if features is not None else 'were not'} seen before it;"
                " expected a tensor or an object with logits, after the module that gives the"
                " features"
            )
        # broadcasting would add one sample's change to others
        if features.dim() != logits.dim():
            raise ValueError(
                f"the features have shape {tuple(features.shape)} and the output"
                f" {tuple(logits.shape)}: expected one row of features per row of the output. Name"
                " the module that takes the pooled features, or give a callable that returns them"
            )
        here = next(
            (t.device for t in (*self.network.parameters(), *self.network.buffers())),
            features.device,
        )
        # the model has moved; g follows it at its first use there
        if here != features.device:
            self.to(features.device)
        # computed in g's own precision, rounded once
        change = self(features).to(logits.dtype)
        total = logits + change
        # where g is zero the answer keeps its bits, also a zero's sign
        if not change.requires_grad:
            total = torch.where(change == 0, logits, total)
        if result is logits:
            return total
        result.logits = total
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> AdditiveSide:
        if self.exact:
            # what the conversion does is seen on a number, before it touches the network
            probe = fn(torch.zeros(1, dtype=torch.float64))
            if probe.dtype in _HALF:
                raise TypeError(WHY_NOT_HALF.format(probe.dtype))
            if probe.dtype != torch.float64:
                if isinstance(self.network, Zigzags):
                    raise TypeError(
                        f"the exact three-layer network runs in float64 only, not {probe.dtype}:"
                        " its weights reach 1e9"
                    )
                knots: Any = self.network.knots
                rounded = knots.to(probe.dtype)
                if bool((rounded.diff() <= 0).any()):
                    raise TypeError(
                        f"two knots of the exact side network fall together in {probe.dtype}; keep"
                        " it in float64"
                    )
        return super()._apply(fn, recurse)


def exact_side(
    features: Tensor,
    edits: dict[int, Tensor | int],
    *,
    logits: Tensor | None = None,
    margin: float = 1.0,
    layers: int = 2,
    projection: str = "random",
    tries: int = 64,
    prefer: str = "conditioning",
    slack: float = 0.5,
    seed: int = 0,
    feature: Features = "",
    output: str | None = None,
) -> AdditiveSide:
    """A side network that is right on every edit and zero on every other sample listed, without
    training.

    features: (K, d) of all samples that matter, edits among them; float32 or float64. edits: row ->
    what g must add there, (outputs,), or the class that must win, which takes ``logits`` too.
    logits: (K, outputs) of f. margin: by which the class wins. layers: 2 (at most 3 N neurons) or 3
    (at most 6 sqrt(3 N + 2), and rounding, for one output). projection, tries, prefer:
    `choose_direction`. slack: share of the gap between an edit and its neighbor in which the
    neighbor's answer stays; features that vary a little (other batches) need some. out: an
    `AdditiveSide` in float64; zero generality: it knows the samples and nothing around them. Raises
    TypeError for bfloat16 or float16 features, ValueError for samples that cannot be told apart.
    Source: Sohn et al., UAI 2024, theorems 4.1 and 5.1.
    """
    if features.dtype in _HALF:
        raise TypeError(WHY_NOT_HALF.format(features.dtype))
    if features.dim() != 2 or not features.dtype.is_floating_point:
        raise ValueError(
            f"features have shape {tuple(features.shape)} and {features.dtype}; expected (samples,"
            " width)"
        )
    if not edits:
        raise ValueError("there are no edits; nothing to construct")
    if outside := [i for i in edits if not 0 <= i < len(features)]:
        raise ValueError(
            f"edits name row {outside[0]}; there are rows 0 to {len(features) - 1}"
        )
    if layers not in (2, 3) or not 0 <= slack < 1 or margin <= 0:
        raise ValueError(
            f"layers is {layers}, slack {slack}, margin {margin}; expected 2 or 3, 0 <= slack < 1"
            " and a positive margin"
        )
    if projection not in ("random", "lda") or prefer not in ("conditioning", "neurons"):
        raise ValueError(
            f"projection is {projection!r} and prefer {prefer!r}; expected 'random' or 'lda', and"
            " 'conditioning' or 'neurons'"
        )
    index = torch.tensor(list(edits))
    value = torch.stack([_change(i, wanted, logits, margin) for i, wanted in edits.items()])
    # the construction compares neighbors that may differ in their last bits
    x = features.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(x).all() and torch.isfinite(value).all()):
        raise ValueError("features or edits hold NaN or infinity")
    direction, line = choose_direction(
        x, index, value, projection, tries, prefer, layers, seed
    )
    network = (two_layers if layers == 2 else three_layers)(direction, line, slack)
    return AdditiveSide.of(network, feature, output)


def _change(
    row: int,
    wanted: Tensor | int,
    logits: Tensor | None,
    margin: float,
) -> Tensor:
    """What must be added to f's logits; for a class: to its logit alone, so that it wins by the
    margin.
    """
    if isinstance(wanted, Tensor):
        return wanted.detach().to("cpu", torch.float64).reshape(-1)
    if logits is None:
        raise ValueError(
            "edits that name a class need logits=, the (K, outputs) answers of the model"
        )
    own = logits[row].detach().to("cpu", torch.float64)
    if not 0 <= wanted < len(own):
        raise ValueError(
            f"the edit of row {row} wants class {wanted}; the model has classes 0 to {len(own) - 1}"
        )
    # the strongest rival, wherever it is
    others = torch.cat([own[:wanted], own[wanted + 1 :]]).max()
    change = torch.zeros_like(own)
    # an edit that is right by the margin already asks for nothing
    change[wanted] = (others + margin - own[wanted]).clamp(min=0)
    return change


def default_feature(model: nn.Module) -> str:
    """The name of the linear head, whose input the features are: the model's own, or its last
    linear layer.
    """
    names = {id(m): n for n, m in model.named_modules()}
    head = output_head(model)
    if head is not None and isinstance(head, nn.Linear):
        return names[id(head)]
    if head is not None:
        # a head of several layers: its last one is linear in the features
        inner = [n for n, m in head.named_modules() if isinstance(m, nn.Linear)]
        if inner:
            return f"{names[id(head)]}.{inner[-1]}"
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError(
            f"{type(model).__name__} has no linear layer; say which module's input the features are"
        )
    return linears[-1]


def features_of(
    model: nn.Module, inputs: Inputs, feature: Features, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """((n, d) features, (n, classes) logits) on the host, in evaluation mode."""
    seen: list[Tensor] = []
    handle = None
    if isinstance(feature, str):
        handle = _submodule(model, feature).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(
                (args or tuple(kwargs.values()))[0].detach().cpu()
            ),
            with_kwargs=True,
        )
    logits = []
    try:
        with evaluating(model):
            for start in range(0, count(inputs), batch_size):
                batch = take(inputs, slice(start, start + batch_size))
                logits.append(logits_of(model, batch).cpu())
                if not isinstance(feature, str):
                    found = feature(**batch) if isinstance(batch, dict) else feature(batch)
                    seen.append(found.detach().cpu())
    finally:
        if handle is not None:
            handle.remove()
    if not seen or seen[0].dim() != 2 or sum(map(len, seen)) != count(inputs):
        shapes = tuple(seen[0].shape) if seen else "never seen"
        raise ValueError(
            f"the input of {feature!r} is {shapes}; expected one row of features per sample. Name"
            " the module that takes the pooled features, or give a callable that returns them"
        )
    return torch.cat(seen), torch.cat(logits)


def _relu_network(
    features: int,
    outputs: int,
    layers: int,
    width: int,
) -> nn.Sequential:
    if layers not in (2, 3):
        raise ValueError(f"layers is {layers}; expected 2 or 3")
    if width < layers - 1:
        raise ValueError(
            f"width is {width}; expected at least {layers - 1} hidden neurons for {layers} layers"
        )
    hidden = [width] if layers == 2 else [width // 2, width - width // 2]
    sizes = [features, *hidden, outputs]
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes):
        parts += [nn.Linear(a, b), nn.ReLU()]
    network = nn.Sequential(*parts[:-1])
    last = _linears(network)[-1]
    # g starts at zero, so attaching it changes no bit
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return network


def _linears(network: nn.Module) -> list[nn.Linear]:
    return [m for m in network.modules() if isinstance(m, nn.Linear)]


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = [n for n, _ in model.named_modules() if n]
        raise ValueError(
            f"the model has no module {name!r}; it has {', '.join(names[-8:])} and others"
        ) from None
