"""Is any slice as good as another? Shares of the gradient, and what training a slice at random
positions does to the
loss.

A non-zero restricted gradient makes every slice a "winner" in the weak sense of a falling loss;
what tells slices apart
is how much it falls. The universal winning-slice hypothesis (arXiv 2510.08513) is checked on the
user's own model by
the spread of that fall over positions, and exceptions are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from slicefine.config import SliceConfig
from slicefine.diagnose.capture import Batch, Layer, Track, evaluating, quietly
from slicefine.groups import LR
from slicefine.model import get_slice_model, named_slice_layers
from slicefine.optim import SliceAdamW
from slicefine.slices import SliceSpec, SliceType

LEAST_POSITIONS = 8
_LITTLE, _MUCH = 0.1, 5.0  # times r / d: a share below or above is named as an exception

Loss = Callable[[nn.Module, Batch], Tensor]


def loss_of_output(model: nn.Module, batch: Batch) -> Tensor:
    """The ``loss`` that Hugging Face models return for a batch with labels."""
    return model(**batch).loss


@dataclass(frozen=True)
class GradientShares:
    """How the squared gradient norm of one weight is spread over its features. norm: of the whole
    gradient.

    columns: (in,) share of each input feature; rows: (out,) of each output feature; each sums to 1
        (to 0 for a zero
    gradient).
    dead: (in,) bool, input features that are zero at every position.
    """

    norm: float
    columns: Tensor
    rows: Tensor
    dead: Tensor


@dataclass(frozen=True)
class Trial:
    """One slice trained alone for a few steps on one batch: loss before, after one step, after all."""

    position: int
    share: float
    before: float
    one_step: float
    after: float

    @property
    def one_step_drop(self) -> float:
        return self.before - self.one_step

    @property
    def drop(self) -> float:
        return self.before - self.after


@dataclass(frozen=True)
class Winning:
    """One layer. shares: (positions,) of the squared gradient norm, to be compared with r / d =
    ``expected``.

    share_cv: their coefficient of variation. trials: at random positions, none where only gradients
        were asked for.
    drop_cv, one_step_cv: coefficients of variation of the trials' drops. winners: share of the
        trials whose loss fell.
    exceptions: what is unlike the rest, in words.
    """

    name: str
    axis: str
    r: int
    expected: float
    norm: float
    shares: list[float]
    share_cv: float
    trials: list[Trial] = field(default_factory=list)
    one_step_cv: float | None = None
    drop_cv: float | None = None
    winners: float | None = None
    exceptions: list[str] = field(default_factory=list)


def gradient_shares(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    loss: Loss = loss_of_output,
) -> dict[str, GradientShares]:
    """Where the gradient of the mean loss of each batch lies, averaged over batches as squared
    norms; layers never
    reached are left out.

    The gradient of one weight at a time exists, for as long as its norms take. A layer that is
    called several times in
    one forward pass counts with the sum of the calls' squared norms.
    """
    sums: dict[str, list[Tensor]] = {}
    alive: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # positions are summed over, so their arrangement does not matter
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            # a feature that is zero everywhere has a zero gradient, and no slice there can learn
            seen = (x != 0).any(0)
            alive[name] = alive[name] | seen if name in alive else seen
            zero = (
                torch.zeros((), dtype=output.dtype, device=output.device)
                .expand(output.shape)
                .requires_grad_()
            )

            def measure(leaf: Tensor) -> None:
                grad, leaf.grad = (
                    leaf.grad,
                    None,
                )  # it would keep the gradients of all outputs alive
                assert grad is not None
                # the gradient of one weight, squared in place: it exists only while its norms are
                # taken
                square = (
                    grad.reshape(-1, grad.shape[-1]).t().float() @ x.float()
                ).square_()
                found = [square.sum(0).double().cpu(), square.sum(1).double().cpu()]
                sums[name] = (
                    [a + b for a, b in zip(sums[name], found, strict=True)]
                    if name in sums
                    else found
                )

            # called as soon as this output's gradient is known
            zero.register_post_accumulate_grad_hook(measure)
            return output + zero

        return after

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(hook(layer.name)).remove)
        for batch in batches:
            with torch.enable_grad():
                loss(model, batch).backward()
    result = {}
    for layer in layers:
        if layer.name in sums:
            columns, rows = sums[layer.name]
            # a zero gradient has shares of 0 and not NaN
            total = columns.sum().clamp_min(1e-300)
            result[layer.name] = GradientShares(
                math.sqrt(float(columns.sum()) / len(batches)),
                columns / total,
                rows / total,
                ~alive[layer.name].cpu(),
            )
    return result


def shares_of_positions(shares: GradientShares, spec: SliceSpec) -> Tensor:
    """(positions,) share of the squared gradient norm inside each slice of a column or row spec."""
    axis = spec.slice_type
    by_feature = shares.columns if axis == "column" else shares.rows
    index = [
        spec.features(axis, p)[1 if axis == "column" else 0]
        for p in range(spec.positions(axis))
    ]
    return torch.stack([by_feature[i].sum() for i in index if i is not None])


def winning_report(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    r: int = 16,
    axis: str = "column",
    tried: Sequence[str] = (),
    positions: int = LEAST_POSITIONS,
    steps: int = 3,
    lr: float = LR,
    seed: int = 0,
    loss: Loss = loss_of_output,
    outliers: Mapping[str, Sequence[tuple[int, int, str]]] | None = None,
    track: Track = quietly,
) -> list[Winning]:
    """The empirical check of the winning-slice hypothesis on a model and a few batches.

    layers: whose gradient shares are measured. tried: names of those in which slices are trained
        too, one at a time, at
    ``positions`` random positions (all where there are fewer) for ``steps`` steps of `SliceAdamW`
    with ``lr`` on the
    first batch; weights are put back bit for bit. Layers narrower than r get a slice of all.
    outliers: layer -> (first feature, past the last, why) of blocks flagged by
        `slicefine.diagnose.spectra`, named
    where they meet a slice.
    Raises ValueError for fewer than 8 positions, for an axis that is neither "column" nor "row",
    for unknown names in
    ``tried``.
    """
    if positions < LEAST_POSITIONS:
        raise ValueError(
            f"positions is {positions}; a spread over fewer than {LEAST_POSITIONS} says nothing"
        )
    if axis not in ("column", "row"):
        raise ValueError(f"axis is {axis!r}; expected 'column' or 'row'")
    if unknown := sorted(set(tried) - {layer.name for layer in layers}):
        raise ValueError(
            f"tried names {', '.join(unknown)}, which are not among the layers"
        )
    shares = gradient_shares(model, layers, batches, loss)
    reached = [layer for layer in layers if layer.name in shares]
    trials: dict[str, list[Trial]] = {}
    for layer in track(
        [layer for layer in reached if layer.name in tried],
        "slices at random positions",
        len(tried),
    ):
        by_position = shares_of_positions(shares[layer.name], _spec(layer, r, axis))
        generator = torch.Generator().manual_seed(seed)
        # without replacement: a position trained twice would count twice in the spread
        chosen = torch.randperm(len(by_position), generator=generator)[:positions].tolist()
        trials[layer.name] = [
            Trial(
                p,
                float(by_position[p]),
                *_train_slice(model, layer, r, axis, p, batches[0], steps, lr, loss),
            )
            for p in sorted(chosen)
        ]
    return [
        _summary(
            layer,
            shares[layer.name],
            r,
            axis,
            trials.get(layer.name, []),
            (outliers or {}).get(layer.name, ()),
        )
        for layer in reached
    ]


def _spec(layer: Layer, r: int, axis: str) -> SliceSpec:
    width = min(r, layer.in_features if axis == "column" else layer.out_features)
    return SliceSpec(layer.out_features, layer.in_features, axis, width, width)


def _train_slice(
    model: nn.Module,
    layer: Layer,
    r: int,
    axis: str,
    position: int,
    batch: Batch,
    steps: int,
    lr: float,
    loss: Loss,
) -> tuple[float, float, float]:
    """Losses before, after one and after all steps of training one slice of one layer; the weight
    is put back.
    """
    width = _spec(layer, r, axis).r
    modes = {module: module.training for module in model.modules()}
    model.eval()
    config = SliceConfig(
        r=width,
        slice_type=cast(SliceType, axis),
        contiguous=True,
        bias="none",
        norms="none",
        start_position=position,
        switch_interval=None,
        target_modules=[layer.name],
    )
    get_slice_model(model, config)
    sliced = dict(named_slice_layers(model))[layer.name]
    # float32, as exact as the weight or more
    original = sliced.slice_weight.detach().clone()
    losses = []
    try:
        optimizer = SliceAdamW([sliced.slice_weight], lr=lr)
        for _ in range(steps):
            value = loss(model, batch)
            value.backward()
            # the loss before each step, and after the last one
            losses.append(value.item())
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses.append(float(loss(model, batch)))
    finally:
        with torch.no_grad():
            sliced.slice_weight.copy_(original)
        sliced.write_through()
        model.merge_and_unload()  # type: ignore[operator]
        for module, mode in modes.items():
            # the layer's own module was replaced and is put back below
            if module is not layer.module:
                module.training = mode
    _keep_module(model, layer)
    return losses[0], losses[1], losses[-1]


def _keep_module(model: nn.Module, layer: Layer) -> None:
    """Put the layer's own module back in place of the one that merging made: others may hold hooks
    on it, or a
    reference."""
    merged = model.get_submodule(layer.name)
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is merged:
                parent._modules[key] = layer.module


def _cv(values: Sequence[float]) -> float | None:
    tensor = torch.tensor(values, dtype=torch.float64)
    mean = float(tensor.mean()) if len(values) else 0.0
    return float(tensor.std(correction=0)) / abs(mean) if mean else None


def _summary(
    layer: Layer,
    shares: GradientShares,
    r: int,
    axis: str,
    trials: list[Trial],
    outliers: Sequence[tuple[int, int, str]],
) -> Winning:
    spec = _spec(layer, r, axis)
    by_position = shares_of_positions(shares, spec)
    features = layer.in_features if axis == "column" else layer.out_features
    # what a position would hold of a gradient that is spread evenly
    expected = spec.r / features
    fell = [t.drop > 0 for t in trials]
    return Winning(
        layer.name,
        axis,
        spec.r,
        expected,
        shares.norm,
        by_position.tolist(),
        _cv(by_position.tolist()) or 0.0,
        trials,
        _cv([t.one_step_drop for t in trials]) if trials else None,
        _cv([t.drop for t in trials]) if trials else None,
        sum(fell) / len(fell) if fell else None,
        _exceptions(shares, spec, axis, by_position, expected, trials, outliers),
    )


def _exceptions(
    shares: GradientShares,
    spec: SliceSpec,
    axis: str,
    by_position: Tensor,
    expected: float,
    trials: list[Trial],
    outliers: Sequence[tuple[int, int, str]],
) -> list[str]:
    if shares.norm == 0.0:
        return ["no gradient reaches this layer"]
    said = []
    dead = shares.dead.nonzero().flatten()
    if axis == "column" and len(dead):
        whole = [
            p
            for p in range(len(by_position))
            if (cols := spec.features(axis, p)[1]) is not None
            and bool(shares.dead[cols].all())
        ]
        said.append(
            f"{len(dead)} of {len(shares.dead)} input features are zero on this data"
            + (
                f"; slices at positions {_list(whole)} hold nothing else and cannot learn"
                if whole
                else ""
            )
        )
    low, high = (
        (by_position < _LITTLE * expected).nonzero().flatten(),
        (by_position > _MUCH * expected).nonzero().flatten(),
    )
    if len(low):
        said.append(
            f"{_positions(low.tolist())} less than {_LITTLE:g} times the share r/d of the gradient"
        )
    if len(high):
        said.append(
            f"{_positions(high.tolist())} more than {_MUCH:g} times the share r/d of the gradient"
        )
    if worse := [t.position for t in trials if t.drop <= 0]:
        said.append(f"the loss did not fall at positions {_list(worse)}")
    said += [f"features {start} to {stop - 1}: {why}" for start, stop, why in outliers]
    return said


def _positions(numbers: Sequence[int]) -> str:
    return (
        f"position {numbers[0]} has"
        if len(numbers) == 1
        else f"positions {_list(numbers)} have"
    )


def _list(numbers: Sequence[int], most: int = 6) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown + (f" and {len(numbers) - most} more" if len(numbers) > most else "")
