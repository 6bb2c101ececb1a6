"""Everything that can be known about a model and a little data before training, as one dictionary
for JSON and for the HTML report.

Memory beyond the model and a forward and backward pass of one batch: `Options.budget` for features,
`PASS_BYTES` for slice tangents, one weight's gradient, and for the random twin one module
(`bound`). Nothing is trained for keeps: the model is the same afterwards, bit for bit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.config import SliceConfig
from slicefine.diagnose.capture import (
    Batch,
    Features,
    Layer,
    Track,
    input_features,
    linear_layers,
    passes,
    quietly,
    random_weights,
)
from slicefine.diagnose.energy import Energy, task_energy
from slicefine.diagnose.spectra import (
    AXES,
    Balance,
    Null,
    gaussian_null,
    group_bounds,
    spectral_balance,
)
from slicefine.diagnose.tangent import (
    PASS_BYTES,
    label_alignment,
    model_outputs,
    report_from_gram,
    slice_grams,
    slice_of,
)
from slicefine.diagnose.winning import (
    LEAST_POSITIONS,
    Loss,
    Winning,
    loss_of_output,
    winning_report,
)
from slicefine.groups import LR
from slicefine.slices import SliceSchedule, SliceSpec, planned_coverage

NOTES = {
    "balance": (
        "Spectral balance is an anomaly check: random matrices pass it better than trained ones. A"
        " flagged block is one where a contiguous slice would behave unlike the others; nothing"
        " else follows from it."
    ),
    "energy": (
        "k(tau) counts the directions that the data's features span; read it beside the same count"
        " with random weights. It is a plausible start for r and no law."
    ),
    "winning": (
        "A non-zero gradient inside a slice makes its loss fall, so almost any slice is a winner in"
        " the weak sense. What tells slices apart is how much: the spread of the drop over random"
        " positions. Exceptions are named."
    ),
    "tangent": (
        "Ranks at the pretrained weights are quantities of the neural tangent kernel, at a stated"
        " tolerance. n_min is the noise-free, local best case: with fewer examples no method can"
        " pin the slice down, with as many some sets suffice. Plan with 2 R or more."
    ),
}


@dataclass(frozen=True)
class Options:
    """What to look at, and how closely.

    r, axis: of the slices looked at. tokens: feature rows per layer. draws: of each null of the
    balance. tried: layers in which slices are trained at ``positions`` random positions for
    ``steps`` steps with learning rate ``lr``. rank: also slice tangents of those layers, on
    ``outputs`` ("logits", "contrast" or a number of random projections). budget: bytes of features
    held at a time. interval, epochs, batch_size: of the training whose coverage is planned.
    """

    r: int = 16
    axis: str = "column"
    tokens: int = 1024
    draws: int = 8
    tried: int = 6
    positions: int = LEAST_POSITIONS
    steps: int = 3
    lr: float = LR
    rank: bool = False
    outputs: str | int = "logits"
    budget: int = 256 << 20
    interval: int | None = 100
    epochs: int = 3
    batch_size: int = 32
    seed: int = 0


def survey(
    model: nn.Module,
    batches: Sequence[Batch],
    options: Options | None = None,
    labels: Tensor | None = None,
    examples: int | None = None,
    loss: Loss = loss_of_output,
    loss_batches: Sequence[Batch] | None = None,
    config: SliceConfig | None = None,
    track: Track = quietly,
) -> dict[str, Any]:
    """Measure a model on a little data.

    batches: keyword arguments of the model. labels: (examples,) class numbers in the order of the
    batches, for the label-aligned energy. examples: size of the whole training set, for coverage;
    what the batches hold unless given. loss, loss_batches: of the winning-slice check; the batches
    themselves unless given. config: which layers; all linear ones but the head. out: plain numbers,
    strings, lists and dictionaries; the keys are those of the report's sections.
    """
    options = options or Options()
    layers = linear_layers(model, config)
    seconds: dict[str, float] = {}

    def timed(name: str, compute: Any) -> Any:
        start = time.perf_counter()
        found = compute()
        seconds[name] = time.perf_counter() - start
        return found

    balance = timed("balance", lambda: balances(layers, options, track))
    energy = timed(
        "energy", lambda: energies(model, layers, batches, options, labels, track)
    )
    outliers = {
        name: [(start, stop, why) for _, start, stop, why in found[options.axis].flagged]
        for name, found in balance.items()
    }
    # a layer that is never called has no energy, and nothing to train
    used = [layer for layer in layers if layer.name in energy]
    # training at random positions is the slow part: a few layers, of all depths and kinds
    tried = spread_over(used, options.tried)
    winning = timed(
        "winning",
        lambda: winning_report(
            model,
            used,
            loss_batches or batches,
            options.r,
            options.axis,
            tried,
            options.positions,
            options.steps,
            options.lr,
            options.seed,
            loss,
            outliers,
            track,
        ),
    )
    tangents = (
        timed(
            "tangent",
            lambda: tangent_rows(model, used, tried, batches, options, track, labels),
        )
        if options.rank
        else []
    )
    by_name = {w.name: w for w in winning}
    held = sum(len(next(iter(batch.values()))) for batch in batches)
    return {
        "layers": [
            _layer_row(
                layer, balance[layer.name], energy.get(layer.name), by_name.get(layer.name)
            )
            for layer in layers
        ],
        "winning": [_winning_row(w) for w in winning],
        "tangent": tangents,
        "coverage": coverage(used, options, examples or held),
        "unused": [layer.name for layer in layers if layer.name not in energy],
        "notes": NOTES,
        "options": asdict(options),
        "examples": held,
        "bound_bytes": bound(layers, options, model),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def bound(layers: Sequence[Layer], options: Options, model: nn.Module | None = None) -> int:
    """Bytes that a survey takes beyond the model and a pass of one batch, at the most.

    Features of one pass, and beside them the largest of: float64 copies while one layer is
    decomposed, the largest module's random parameters (with a model), three times the largest
    weight in float32 (its gradient, or a null of its shape), slice tangents.
    """
    widest = max(layer.in_features for layer in layers)
    largest = max(layer.in_features * layer.out_features for layer in layers)
    # float64 copies of the rows and of their Gram matrix
    decomposed = 8 * (3 * options.tokens * widest + 3 * min(options.tokens, widest) ** 2)
    own = lambda module: sum(
        4 * p.numel() for p in module._parameters.values() if p is not None
    )
    module = max(map(own, model.modules())) if model is not None else 0
    return options.budget + max(
        decomposed, 3 * 4 * largest, module, 3 * PASS_BYTES if options.rank else 0
    )


def balances(
    layers: Sequence[Layer], options: Options, track: Track = quietly
) -> dict[str, dict[str, Balance]]:
    """Spectral balance of every layer on both axes; the Gaussian null once per shape."""
    gaussian: dict[Any, dict[str, Null]] = {}
    found: dict[str, dict[str, Balance]] = {}
    for layer in track(layers, "spectral balance", len(layers)):
        weight, row = layer.weight.detach(), {}
        for axis in AXES:
            features = weight.shape[0 if axis == "row" else 1]
            # one feature has no groups to compare
            if features < 2:
                continue
            groups = len(group_bounds(features))
            # layers of one shape share the null, which depends on nothing else
            key = tuple(weight.shape), axis
            if key not in gaussian:
                gaussian[key] = gaussian_null(
                    key[0], axis, groups, options.draws, options.seed
                )
            row[axis] = spectral_balance(
                weight, axis, groups, options.draws, options.seed, gaussian[key]
            )
        found[layer.name] = row
    return found


def energies(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    options: Options,
    labels: Tensor | None,
    track: Track,
) -> dict[str, tuple[Energy, Energy]]:
    """(own, with random weights) of every layer that is called, in as many passes as the budget
    asks for.
    """
    held = sum(len(next(iter(batch.values()))) for batch in batches)
    groups = passes(
        [layer.in_features for layer in layers], options.tokens, held, options.budget
    )
    found: dict[str, tuple[Energy, Energy]] = {}
    # own features first: only the energies of one pass are held, never two sets of features
    work = [(group, null) for group in groups for null in (False, True)]
    own: dict[str, Energy] = {}
    for group, null in track(
        work, "features, their own and with random weights", len(work)
    ):
        chosen = [layers[i] for i in group]
        if null:
            with random_weights(model, options.seed):
                features = input_features(
                    model, chosen, batches, options.tokens, options.seed
                )
            found.update(
                {
                    name: (own[name], value)
                    for name, value in _decomposed(features, None).items()
                }
            )
        else:
            features = input_features(model, chosen, batches, options.tokens, options.seed)
            own = _decomposed(features, labels)
    return found


def _decomposed(features: dict[str, Features], labels: Tensor | None) -> dict[str, Energy]:
    """Energies, computed once for layers with the same inputs."""
    # by identity: layers with the same inputs share one object
    known: dict[int, Energy] = {}
    for feature in features.values():
        if id(feature) not in known:
            aligned = labels is not None and len(feature.means) == len(labels)
            known[id(feature)] = task_energy(
                feature.rows,
                labels=labels if aligned else None,
                label_features=feature.means if aligned else None,
            )
    return {name: known[id(feature)] for name, feature in features.items()}


def kind_of(name: str) -> tuple[str, int]:
    """A layer's kind and depth: ("self_attn.q_proj", 12) for "model.layers.12.self_attn.q_proj";
    depth -1 where there is no number."""
    found = re.match(r"(?:.*?\.)?(\d+)\.(.+)", name)
    return (found[2], int(found[1])) if found else (name, -1)


def spread_over(layers: Sequence[Layer], count: int) -> list[str]:
    """Names of layers spread over depth and kinds: depth rises evenly while kinds take turns."""
    if count >= len(layers):
        return [layer.name for layer in layers]
    kinds = list(dict.fromkeys(kind_of(layer.name)[0] for layer in layers))
    chosen: list[str] = []
    for i in range(count):
        # the middle of the i-th of `count` equal parts
        place = (i + 0.5) / count * len(layers)
        wanted = kinds[i % len(kinds)]
        near = min(
            (j for j in range(len(layers)) if layers[j].name not in chosen),
            key=lambda j: (kind_of(layers[j].name)[0] != wanted, abs(j + 0.5 - place)),
        )
        chosen.append(layers[near].name)
    return [layer.name for layer in layers if layer.name in chosen]


def tangent_rows(
    model: nn.Module,
    layers: Sequence[Layer],
    tried: Sequence[str],
    batches: Sequence[Batch],
    options: Options,
    track: Track = quietly,
    labels: Tensor | None = None,
) -> list[dict[str, Any]]:
    """One row for each layer tried and one for all of them together: ranks on a pool of half the
    examples, at most 48, and what training sets of growing size leave invisible."""
    by_name = {layer.name: layer for layer in layers}
    # the Gram matrix grows with the square of examples times outputs
    few = _first_examples(batches, 96)
    held = sum(len(next(iter(batch.values()))) for batch in few)
    outputs = model_outputs(options.outputs, options.seed)
    slices = {}
    for name in tried:
        layer = by_name[name]
        width = min(
            options.r, layer.in_features if options.axis == "column" else layer.out_features
        )
        slices[name] = slice_of(layer, width, options.axis)
    rows, total, parameters = [], None, 0
    for name, gram in track(
        slice_grams(model, slices, few, outputs), "slice tangents", len(slices)
    ):
        size = (
            by_name[name].out_features
            if options.axis == "column"
            else by_name[name].in_features
        ) * options.r
        rows.append(_tangent_row(name, gram, held, size, labels))
        total, parameters = (
            gram.clone() if total is None else total.add_(gram),
            parameters + size,
        )
    if total is not None and len(rows) > 1:
        rows.append(_tangent_row("all of these together", total, held, parameters, labels))
    return rows


def _first_examples(batches: Sequence[Batch], most: int) -> list[Batch]:
    chosen, left = [], most
    for batch in batches:
        if left > 0:
            chosen.append({key: value[:left] for key, value in batch.items()})
            left -= len(next(iter(chosen[-1].values())))
    return chosen


def _tangent_row(
    name: str, gram: Tensor, held: int, parameters: int, labels: Tensor | None
) -> dict[str, Any]:
    outputs = len(gram) // held
    # half to ask about, half to learn from: no example is in both
    pool = held // 2
    sizes = [n for n in (2, 4, 8, 16, 32, 48) if n <= held - pool]
    curve, reports = {}, {}
    for n in sizes:
        # the pool's rows stand first, then as many of the training set as n says
        keep = torch.arange((pool + n) * outputs)
        reports[n] = report_from_gram(
            gram[keep][:, keep], pool, outputs, parameters, tolerance=1e-6
        )
        curve[n] = reports[n].invisible
    last = (
        reports[sizes[-1]]
        if sizes
        else report_from_gram(gram, held, outputs, parameters, tolerance=1e-6)
    )
    # beside the strict rank: what a noisy optimizer can be expected to use
    loose = int((torch.tensor(last.spectrum) > 1e-3).sum())
    row = asdict(last)
    row["label_alignment"] = None
    if labels is not None and outputs == int(labels.max()) + 1 and len(labels) >= held:
        # centered: a constant shift of all logits changes no answer
        targets = torch.nn.functional.one_hot(labels[:held].long(), outputs).double()
        row["label_alignment"] = label_alignment(gram, targets - targets.mean(0))
    row["spectrum"] = [round(v, 9) for v in row["spectrum"]]
    return {"name": name, "rank_1e-3": loose, "invisible_by_examples": curve, **row}


def coverage(layers: Sequence[Layer], options: Options, examples: int) -> dict[str, Any]:
    """Share of the weights' entries that training reaches, by optimizer step, and where it ends."""
    # a last batch that is not full counts as a step
    total = options.epochs * -(-examples // options.batch_size)
    moves = -(-total // options.interval) if options.interval else 1
    # the share changes with a move only
    each = max(1, moves // 60)
    points = sorted(
        {1, total, *(1 + (options.interval or 0) * i for i in range(0, moves, each))}
    )
    shapes: dict[tuple[int, int], int] = {}
    for layer in layers:
        shapes[layer.out_features, layer.in_features] = (
            shapes.get((layer.out_features, layer.in_features), 0) + 1
        )
    entries = sum(o * i * n for (o, i), n in shapes.items())
    curve = []
    for steps in points:
        covered = 0.0
        for (out_features, in_features), count in shapes.items():
            width = min(
                options.r, in_features if options.axis == "column" else out_features
            )
            spec = SliceSpec(out_features, in_features, options.axis, width, width)
            share = planned_coverage(SliceSchedule(spec, interval=options.interval), steps)[
                1
            ]
            covered += share * out_features * in_features * count
        curve.append(covered / entries)
    return {
        "steps": points,
        "share": curve,
        "total_steps": total,
        "r": options.r,
        "interval": options.interval,
    }


def _layer_row(
    layer: Layer,
    balance: dict[str, Balance],
    energy: tuple[Energy, Energy] | None,
    winning: Winning | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": layer.name,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "balance": {axis: _balance_row(found) for axis, found in balance.items()},
        "energy": None,
        "random_energy": None,
        "gradient_norm": None,
        "share_cv": None,
    }
    if energy is not None:
        row["energy"], row["random_energy"] = _energy_row(energy[0]), _energy_row(energy[1])
    if winning is not None:
        row["gradient_norm"], row["share_cv"] = winning.norm, winning.share_cv
    return row


def _energy_row(energy: Energy) -> dict[str, Any]:
    row = asdict(energy)
    row["k"] = {str(tau): k for tau, k in energy.k.items()}
    row["aligned_k"] = energy.aligned_k and {
        str(tau): k for tau, k in energy.aligned_k.items()
    }
    for key in ("curve", "aligned"):
        row[key] = row[key] and [round(v, 6) for v in row[key]]
    return row


def _balance_row(balance: Balance) -> dict[str, Any]:
    row = asdict(balance)
    row.pop("spectra")
    row["effective_rank_min"], row["effective_rank_max"] = (
        min(balance.effective_ranks),
        max(balance.effective_ranks),
    )
    row["flagged"] = [
        {"group": g, "start": a, "stop": b, "why": why} for g, a, b, why in balance.flagged
    ]
    return row


def _winning_row(winning: Winning) -> dict[str, Any]:
    row = asdict(winning)
    for trial, given in zip(winning.trials, row["trials"], strict=True):
        given["one_step_drop"], given["drop"] = trial.one_step_drop, trial.drop
    return row
