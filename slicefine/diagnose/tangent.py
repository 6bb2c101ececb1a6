"""The slice tangent: how a model's outputs answer to the entries of slices, and what that says
about the examples needed.

J, ((n C), P), holds the derivative of output c of example i by each entry of the slices. It is
built from one hook per sliced layer, which keeps the layer's input (its slice for a column slice)
and the gradient at its output; no gradient of a whole weight exists. Where only inner products are
needed, `slice_gram` adds up J J^T over chunks of parameters and J never exists.

At the pretrained weights the rank of J is a quantity of the neural tangent kernel; at fine-tuned
weights it is that of local linear recovery. Say which. Source: local linear recovery, arXiv
2406.18035 (lemma 7: a sample recovers locally where the rank on it equals the rank at all); its
restriction to slices is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.diagnose.capture import Batch, Layer, evaluating, linear_layers
from slicefine.slices import SliceSpec

# rows and columns of a weight; None stands for all of them
Slice = tuple[Tensor | None, Tensor | None]
# of J at a time
CHUNK_BYTES = 64 << 20
# inputs and output gradients of the layers of one pass
PASS_BYTES = 256 << 20


def slice_of(
    layer: Layer,
    r: int,
    axis: str = "column",
    position: int = 0,
) -> Slice:
    """The slice of width r at a position of a layer, as `SliceSpec` numbers them."""
    return SliceSpec(layer.out_features, layer.in_features, axis, r, r).features(
        axis, position
    )


def model_outputs(
    kind: str | int = "logits", seed: int = 0
) -> Callable[[Any, Batch], Tensor]:
    """What of a model's output J is the derivative of: (model's return value, batch) -> (examples,
    C).

    kind: "logits"; "contrast", logits less their mean over classes, less the last, which follows
    from the others; or a number k of random ±1 projections over sqrt(classes), for many classes.
    Logits with a position (examples, T, classes) are taken at each example's last visible position.
    Raises ValueError for another kind.
    """
    if not (
        kind in ("logits", "contrast")
        or (isinstance(kind, int) and not isinstance(kind, bool) and kind > 0)
    ):
        raise ValueError(
            f"outputs is {kind!r}; expected 'logits', 'contrast' or a number of random projections"
        )

    def outputs(result: Any, batch: Batch) -> Tensor:
        logits = result if isinstance(result, Tensor) else result.logits
        if logits.dim() == 3:
            mask = batch.get("attention_mask")
            last = torch.full((len(logits),), logits.shape[1] - 1, device=logits.device)
            if mask is not None:
                # the last visible position, whichever side the padding is on
                last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
            logits = logits[torch.arange(len(logits), device=logits.device), last]
        if kind == "contrast":
            return (logits - logits.mean(1, keepdim=True))[:, :-1]
        if isinstance(kind, int):
            # seeded: all batches must see the same projections
            generator = torch.Generator().manual_seed(seed)
            signs = (
                torch.randint(2, (logits.shape[1], kind), generator=generator).to(logits)
                * 2
                - 1
            )
            return logits @ signs / math.sqrt(logits.shape[1])
        return logits

    return outputs


class _Recorder:
    """Hooks on the sliced layers: the inputs of their calls, and a zero added to each output whose
    gradient is the output's."""

    def __init__(self, layers: Mapping[str, Layer], slices: Mapping[str, Slice]) -> None:
        self.slices = slices
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in slices}
        self.stack = ExitStack()
        for name in slices:
            self.stack.callback(
                layers[name].module.register_forward_hook(self._hook(name)).remove
            )

    def _hook(self, name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # an output that is overwritten in place later would take its gradient with it; this
            # zero stays what it is
            zero = (
                torch.zeros((), dtype=output.dtype, device=output.device)
                .expand(output.shape)
                .requires_grad_()
            )
            cols = self.slices[name][1]
            x = args[0].detach()
            self.calls[name].append(
                (x if cols is None else x.index_select(-1, cols.to(x.device)), zero)
            )
            return output + zero

        return after


def _terms(
    model: nn.Module,
    layers: Mapping[str, Layer],
    slices: Mapping[str, Slice],
    batch: Batch,
    outputs: Any,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of one batch, per layer: inputs (n, T, k) and output gradients (n, C, T, m), whose products
    summed over T are J."""
    recorder = _Recorder(layers, slices)
    with recorder.stack, torch.enable_grad():
        result = outputs(model(**batch), batch)
        if result.dim() != 2:
            raise ValueError(
                f"the outputs have shape {tuple(result.shape)}; expected (examples, C)"
            )
        never = [name for name, calls in recorder.calls.items() if not calls]
        if never:
            raise ValueError(
                f"layers that the model never calls have no tangent: {', '.join(never)}; leave"
                " them out"
            )
        # the gradient at a zero that was added to an output is the output's gradient
        zeros = [zero for calls in recorder.calls.values() for _, zero in calls]
        count = result.shape[1]
        # of a sum over examples: no example sees another, so each finds its own gradient in it
        grads = [
            torch.autograd.grad(
                result[:, c].sum(),
                zeros,
                retain_graph=c + 1 < count,
                materialize_grads=True,
            )
            for c in range(count)
        ]
    terms, position = {}, 0
    for name, calls in recorder.calls.items():
        rows = slices[name][0]
        inputs, deltas = [], []
        for x, zero in calls:
            if len(zero) != len(result):
                raise ValueError(
                    f"layer {name} gets an input whose first dimension is {len(zero)} and not the"
                    f" {len(result)} examples; its derivatives cannot be told apart by example"
                )
            # [n, C, ..., out]
            delta = torch.stack([g[position] for g in grads], 1).unflatten(
                0, (len(result),)
            )
            position += 1
            # only the slice's rows: the rest of an output gradient is not part of J
            delta = delta if rows is None else delta.index_select(-1, rows.to(delta.device))
            inputs.append(x.reshape(len(x), -1, x.shape[-1]))
            deltas.append(delta.reshape(len(x), count, -1, delta.shape[-1]))
        # several calls of a layer in one forward pass add up: they become further positions
        terms[name] = torch.cat(inputs, 1), torch.cat(deltas, 2)
    return terms


def _prepared(model: nn.Module, slices: Mapping[str, Slice]) -> dict[str, Layer]:
    layers = {layer.name: layer for layer in linear_layers(model)}
    layers |= {
        n: Layer(n, m)
        for n, m in model.named_modules()
        if n in slices and n not in layers and isinstance(m, nn.Linear)
    }
    if missing := sorted(slices.keys() - layers.keys()):
        raise ValueError(
            f"no linear layers called {', '.join(missing)}; there are {', '.join(list(layers)[:8])}"
        )
    return layers


def slice_jacobian(
    model: nn.Module,
    slices: Mapping[str, Slice],
    batches: Sequence[Batch],
    outputs: Any = None,
) -> Tensor:
    """J of the outputs by the entries of slices.

    slices: layer name -> (rows, cols) of its weight, None for all. batches: keyword arguments of
    the model, which runs in evaluation mode. outputs: (model's return value, batch) -> (examples,
    C); `model_outputs` by default. out: (examples * C, P), examples outer, in the order of
    ``slices`` with each slice in row-major order, in the model's dtype.
    """
    layers = _prepared(model, slices)
    outputs = outputs or model_outputs()
    parts = []
    with evaluating(model):
        for batch in batches:
            terms = _terms(model, layers, slices, batch, outputs)
            parts.append(
                torch.cat(
                    [
                        torch.einsum("ncto,ntk->ncok", d, x).flatten(2).flatten(0, 1)
                        for x, d in terms.values()
                    ],
                    1,
                )
            )
    return torch.cat(parts)


def slice_gram(
    model: nn.Module,
    slices: Mapping[str, Slice],
    batches: Sequence[Batch],
    outputs: Any = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """J J^T without J: (examples * C, examples * C), float64; the sum of `slice_grams` over the
    layers. Raises ValueError without a slice."""
    total: Tensor | None = None
    for _, gram in slice_grams(model, slices, batches, outputs, chunk_bytes):
        total = gram if total is None else total.add_(gram)
    if total is None:
        raise ValueError("slices is empty; name at least one layer")
    return total


def slice_grams(
    model: nn.Module,
    slices: Mapping[str, Slice],
    batches: Sequence[Batch],
    outputs: Any = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """(layer, J J^T of its slice alone), one after the other.

    As many layers share a pass over the data as `PASS_BYTES` hold, by the size of the first; of a
    layer with one position per example it is the product of two Gram matrices, of others a sum over
    chunks of at most ``chunk_bytes`` of J (at least one row of a slice). Arguments otherwise as for
    `slice_jacobian`.
    """
    layers = _prepared(model, slices)
    outputs = outputs or model_outputs()
    # the first layer alone: its size says how many fit in one pass
    waiting, together = list(slices), 1
    while waiting:
        names, waiting = waiting[:together], waiting[together:]
        with evaluating(model):
            parts = [
                _terms(model, layers, {n: slices[n] for n in names}, batch, outputs)
                for batch in batches
            ]
        for name in names:
            mine = [part.pop(name) for part in parts]
            if len(names) == 1:
                together = max(
                    1, PASS_BYTES // sum(4 * (x.numel() + d.numel()) for x, d in mine)
                )
            yield name, _gram_of(*_joined(mine), chunk_bytes)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients of all batches, shorter ones padded with zeros."""
    # a padded position has input 0 and gradient 0, and so adds nothing to J
    length = max(x.shape[1] for x, _ in parts)
    pad = lambda tensor, dim: nn.functional.pad(
        tensor, (0, 0, 0, length - tensor.shape[dim])
    )
    return torch.cat([pad(x, 1) for x, _ in parts]), torch.cat(
        [pad(d, 2) for _, d in parts]
    )


def _gram_of(x: Tensor, delta: Tensor, chunk_bytes: int) -> Tensor:
    """x (n, T, k), delta (n, C, T, m) -> (n C, n C), float64."""
    n, count, length, m = delta.shape
    # J is an outer product per example: its Gram matrix is the product of two small ones
    if length == 1:
        d = delta.double().reshape(n * count, m)
        inner = x.double().reshape(n, -1)
        inner = (inner @ inner.t()).repeat_interleave(count, 0).repeat_interleave(count, 1)
        return (d @ d.t()).mul_(inner).cpu()
    # at least one output row at a time, so that J is never whole
    rows = max(1, chunk_bytes // (8 * n * count * x.shape[-1]))
    gram = torch.zeros(n * count, n * count, dtype=torch.float64, device=x.device)
    for start in range(0, m, rows):
        part = (
            torch.einsum("ncto,ntk->ncok", delta[..., start : start + rows], x)
            .double()
            .reshape(n * count, -1)
        )
        gram += part @ part.t()
    return gram.cpu()


# Ranks and examples


@dataclass(frozen=True)
class TangentReport:
    """What slices can tell apart on a pool of examples, and how much of it a training set pins
    down.

    parameters: P. examples, outputs: n and C of the pool. rank: of J on the pool, at ``tolerance``
    of its largest singular value. train_rank: the same on the training set, None without one.
    saturated: the rank equals n C, so the pool bounds it and a larger one may find more. invisible:
    share, in [0, 1], of the pool's tangent (Frobenius norm) outside the span of the training set's.
    effective_rank: exp of the entropy of the squared singular values. per_example: largest rank
    that one example adds, min(C, r) for a row slice. n_min: ceil(rank / per_example), the
    noise-free, local best case. advised: 2 rank examples. spectrum: singular values over the
    largest. top_share: of the five largest squared singular values in the sum of all.
    """

    parameters: int
    examples: int
    outputs: int
    rank: int
    tolerance: float
    saturated: bool
    effective_rank: float
    per_example: int
    n_min: int
    advised: int
    spectrum: list[float]
    top_share: float
    train_rank: int | None = None
    invisible: float | None = None
    verdict: str = ""


def sample_size(rank: int, outputs: int, r: int | None = None) -> tuple[int, int]:
    """(n_min, advised): ceil(rank / min(C, r)) examples at best, 2 rank as advice.

    r: width of a row slice, which one example at one position cannot exceed; None for other slices.
    The first number is that of the noise-free, local case: with fewer no method can tell the
    slice's directions apart, with as many some sets suffice. Source: lemma 7 and corollary 1 of
    arXiv 2406.18035, restricted to a slice.
    """
    if rank < 1 or outputs < 1:
        raise ValueError(f"rank is {rank} and outputs {outputs}; expected at least 1")
    return -(-rank // min(outputs, r or outputs)), 2 * rank


def tangent_rank(
    model: nn.Module,
    slices: Mapping[str, Slice],
    pool: Sequence[Batch],
    train: Sequence[Batch] = (),
    outputs: Any = None,
    tolerance: float = 1e-6,
    r: int | None = None,
) -> TangentReport:
    """Rank of the slices' tangent on a pool and on a training set, from one Gram matrix.

    pool, train: batches; no labels are needed. tolerance: singular values below it, relative to the
    largest, count as zero; a Gram matrix in float64 tells apart what is above about 1e-7. r: width,
    where the slices are row slices seen at one position. out: a `TangentReport`. Raises ValueError
    for a tolerance that the Gram matrix cannot resolve.
    """
    if not 1e-7 <= tolerance < 1:
        raise ValueError(
            f"tolerance is {tolerance}; expected 1e-7 (what float64 resolves in J J^T) to 1"
        )
    gram = slice_gram(model, slices, [*pool, *train], outputs)
    examples = sum(len(next(iter(batch.values()))) for batch in pool)
    total = examples + sum(len(next(iter(batch.values()))) for batch in train)
    count = len(gram) // total
    parameters = _entries(_prepared(model, slices), slices)
    return report_from_gram(gram, examples, count, parameters, tolerance, r)


def report_from_gram(
    gram: Tensor,
    examples: int,
    outputs: int,
    parameters: int,
    tolerance: float = 1e-6,
    r: int | None = None,
) -> TangentReport:
    """A `TangentReport` from J J^T of the pool's examples followed by the training set's."""
    split = examples * outputs
    own = gram[:split, :split]
    # rounding leaves eigenvalues of a semidefinite matrix slightly below 0
    values = torch.linalg.eigvalsh(own).flip(0).clamp_min(0.0)
    if not float(values[0]) > 0.0:
        raise ValueError(
            "the outputs do not answer to the slices at all; their tangent is zero"
        )
    # of J: the square roots of J J^T's
    singular = (values / values[0]).sqrt()
    rank = int((singular > tolerance).sum())
    share = values / values.sum()
    n_min, advised = sample_size(rank, outputs, r)
    train_rank = invisible = None
    if len(gram) > split:
        train_rank, invisible = _seen(gram, split, tolerance)
    # a rank as large as the pool is the pool's, not the slices'
    saturated = rank == min(split, parameters) and split < parameters
    return TangentReport(
        parameters,
        examples,
        outputs,
        rank,
        tolerance,
        saturated,
        float((-(share * share.clamp_min(1e-300).log()).sum()).exp()),
        min(outputs, r or outputs),
        n_min,
        advised,
        singular.tolist(),
        float(share[:5].sum()),
        train_rank,
        invisible,
        _verdict(rank, saturated, train_rank, invisible),
    )


def label_alignment(gram: Tensor, targets: Tensor) -> float:
    """yᵀ K y / (‖y‖² ‖K‖) in [0, 1]: how much the labels lie where the slices move the outputs
    most.

    gram: (n C, n C), as of `slice_gram`. targets: (n, C), such as centered one-hot labels. ‖K‖
    is the largest eigenvalue.
    """
    y = targets.to("cpu", torch.float64).flatten()
    if len(y) != len(gram) or not float(y.square().sum()) > 0.0:
        raise ValueError(
            f"targets have {len(y)} entries and the Gram matrix {len(gram)} rows; expected as many,"
            " not all zero"
        )
    return float(y @ gram @ y / (y @ y) / torch.linalg.eigvalsh(gram)[-1])


def _seen(gram: Tensor, split: int, tolerance: float) -> tuple[int, float]:
    """(rank of the training part, share of the pool's part outside its span)."""
    values, vectors = torch.linalg.eigh(gram[split:, split:])
    # squared: the tolerance is of singular values, these are eigenvalues
    kept = values > tolerance**2 * values[-1].clamp_min(1e-300)
    cross = gram[:split, split:] @ vectors[:, kept]
    # the pool's tangent projected on the span of the training set's
    seen = float((cross.square().sum(0) / values[kept]).sum())
    whole = float(gram[:split, :split].trace())
    # rounding may take the projection a little beyond the whole
    return int(kept.sum()), math.sqrt(max(0.0, 1.0 - seen / whole))


def _verdict(
    rank: int, saturated: bool, train_rank: int | None, invisible: float | None
) -> str:
    if train_rank is None or invisible is None:
        return "the pool is too small to bound the rank" if saturated else ""
    if saturated:
        return (
            f"the pool is too small to bound the rank; {invisible:.0%} of its tangent is invisible"
            " to the training set"
        )
    if train_rank >= rank:
        return "the training set pins the slices down on this pool, in the local, noise-free case"
    return (
        f"the training set leaves {rank - train_rank} of {rank} directions open; {invisible:.0%} of"
        " the tangent is invisible to it"
    )


def _entries(layers: Mapping[str, Layer], slices: Mapping[str, Slice]) -> int:
    size = lambda index, features: features if index is None else len(index)
    return sum(
        size(rows, layers[name].out_features) * size(cols, layers[name].in_features)
        for name, (rows, cols) in slices.items()
    )
