"""One ranked recommendation: which modules, which slices, which r per layer, which learning rate,
how many examples, and why.

What could be measured on the user's data was measured, in short trainings that are taken back
(`slicefine.diagnose.trials`): the learning rate, and candidates of equal or smaller planned memory
side by side with the default. What was not is marked as a rule. A short training is a prediction of
a long one and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from slicefine.config import DEFAULT_R, SliceConfig
from slicefine.diagnose.capture import Batch, Track, quietly
from slicefine.diagnose.trials import RangeTest, TrialOptions, lr_range_test, short_training
from slicefine.diagnose.winning import Loss, loss_of_output
from slicefine.model import get_slice_model
from slicefine.optim import SliceAdamW
from slicefine.plan.estimate import Method

LEAST_R, MOST_R = 4, 64
# steps between moves: 20 and 50 were behind 100 at the same learning rate (docs/diagnose.md)
LEAST_INTERVAL = 100


@dataclass(frozen=True)
class Line:
    """One line of the recommendation. effect: fall of the held-out loss against the alternative,
    where it was measured; lines are ranked by it."""

    setting: str
    value: Any
    evidence: str
    effect: float | None = None


@dataclass(frozen=True)
class Advice:
    """lines: ranked. config: the `SliceConfig` to use. lr: of the slices. cost: planned bytes by
    candidate. candidates: what was tried, best first."""

    lines: list[Line]
    config: SliceConfig
    lr: float
    range_test: RangeTest | None
    lr_trials: dict[float, float]
    candidates: list[dict[str, Any]]
    cost: dict[str, int]
    examples: dict[str, Any]
    claims: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ``config`` loads with `SliceConfig.from_dict`."""
        return {**asdict(self), "config": self.config.to_dict()}


def method_of(config: SliceConfig, name: str = "slices") -> Method:
    """A `slicefine.plan.estimate.Method` of a config. Heads that are fully trained are left out:
    fake tensors have no values for their optimizer to read, and they cost every candidate the same.
    """
    slices = _changed(
        config,
        modules_to_save=None,
        exclude_modules=[*_listed(config.exclude_modules), *_listed(config.modules_to_save)]
        or None,
    )

    def prepare(model: nn.Module) -> SliceAdamW:
        get_slice_model(model, slices)
        return SliceAdamW(model.parameters())

    return Method(name, prepare, r=config.r)


def _listed(names: list[str] | str | None) -> list[str]:
    if isinstance(names, str):
        raise ValueError(
            f"{names!r} is a regular expression; give a list of names, so that heads can be added"
            " to it"
        )
    return names or []


def allocate(
    weights: dict[str, float], heights: dict[str, int], widths: dict[str, int], r: int
) -> dict[str, int]:
    """Widths in proportion to weights that cost no more than r everywhere.

    weights: layer -> how much it should get. heights: the slice's other extent (out_features of a
    column slice). widths: features that r may take of. out: layer -> width, a multiple of 4 between
    4 and 64 where the layer is wide enough, with sum(r_l) <= r L and sum(r_l h_l) <= r sum(h_l):
    neither kept activations nor trained parameters exceed those of r everywhere.
    """
    # a small weight is a small measurement and no proof that a layer has nothing to learn: it keeps
    # LEAST_R. None grows past half its features: one position would be left to move to.
    bounds = {
        name: (
            min(LEAST_R, r, widths[name]),
            max(min(MOST_R, widths[name] // 2), min(r, widths[name])),
        )
        for name in weights
    }

    # multiples of 4, so that layers of like weight share a width
    def at(scale: float) -> dict[str, int]:
        return {
            n: max(bounds[n][0], min(bounds[n][1], int(scale * w) // 4 * 4))
            for n, w in weights.items()
        }

    def costs(chosen: dict[str, int]) -> tuple[int, int]:
        return sum(chosen.values()), sum(chosen[n] * heights[n] for n in chosen)

    # the budget is what r everywhere costs, in kept columns and in trained entries
    limit = costs({n: min(r, widths[n]) for n in weights})
    low, high = (
        0.0,
        MOST_R
        * len(weights)
        / max(min((w for w in weights.values() if w > 0), default=1.0), 1e-12),
    )
    # bisection on one common scale: both costs grow with it, and the largest scale that fits spends
    # the budget
    for _ in range(100):
        middle = (low + high) / 2
        fits = all(a <= b for a, b in zip(costs(at(middle)), limit, strict=True))
        low, high = (middle, high) if fits else (low, middle)
    return at(low)


def candidates_of(survey: dict[str, Any], base: SliceConfig) -> dict[str, SliceConfig]:
    """The default and its rivals at no more parameters or kept activations, from a survey."""
    # a layer that is never called, or that no gradient reaches, gets no say in who gets how much
    rows = [row for row in survey["layers"] if row["energy"] and row["gradient_norm"]]
    pick = lambda key: {row["name"]: row[key] for row in rows}
    column = base.slice_type == "column"
    heights, widths = (
        pick("out_features" if column else "in_features"),
        pick("in_features" if column else "out_features"),
    )
    found = {"default": base}
    # never the other way round: in whole trainings runs of features are behind, and a trial of a
    # few steps does not show it (docs/quality.md)
    if base.contiguous:
        found["scattered"] = _changed(base, contiguous=False)
    r = base.r or DEFAULT_R
    weights = {
        "scattered, r by k(0.9)": {
            row["name"]: float(row["energy"]["k"]["0.9"]) for row in rows
        },
        "scattered, r by gradient norm": {
            row["name"]: float(row["gradient_norm"]) for row in rows
        },
    }
    for name, weight in weights.items():
        pattern = {
            n: width
            for n, width in allocate(weight, heights, widths, r).items()
            if width != r
        }
        if pattern:
            found[name] = _changed(base, contiguous=False, rank_pattern=pattern)
    return found


def _changed(config: SliceConfig, **values: Any) -> SliceConfig:
    return SliceConfig.from_dict({**config.to_dict(), **values})


def advise(
    model: nn.Module,
    survey: dict[str, Any],
    batches: Sequence[Batch],
    held: Sequence[Batch],
    base: SliceConfig | None = None,
    steps_in_all: int = 500,
    trial_steps: int = 40,
    cost: Callable[[SliceConfig], int] | None = None,
    recipe: TrialOptions | None = None,
    loss: Loss = loss_of_output,
    track: Track = quietly,
) -> Advice:
    """Recommend a configuration for a model and data that `slicefine.diagnose.survey` has looked
    at.

    batches, held: training and held-out batches; no example in both. base: the default to compare
        with, `SliceConfig()`
    with new heads in ``modules_to_save``.
    steps_in_all: optimizer steps of the training to come. trial_steps: of each trial. cost: config
        -> planned peak
    bytes; candidates above the default's are left out.
    out: an `Advice`. The model is the same afterwards, bit for bit.
    """
    base = base or SliceConfig(r=DEFAULT_R)
    if trial_steps < 10:
        raise ValueError(
            f"trial_steps is {trial_steps}; a trial of fewer than 10 steps says nothing"
        )
    # decided before the trials and by a rule: a trial is shorter than one interval, so it cannot
    # compare intervals
    interval = _interval(survey, base, steps_in_all)
    rivals = {
        name: _changed(config, switch_interval=interval) if name != "default" else config
        for name, config in candidates_of(survey, base).items()
    }
    planned = {name: cost(config) for name, config in rivals.items()} if cost else {}
    # the comparison is at no more memory than the default; what needs more would win unfairly
    dropped = [name for name in planned if planned[name] > planned["default"]]
    test = lr_range_test(model, base, batches, recipe=recipe, loss=loss, track=track)
    trial = lambda config, lr: (
        short_training(
            model, config, batches, lr, trial_steps, held, recipe, loss
        ).held_loss
        or 0.0
    )
    # the range test sees a handful of steps; a trial at a third and at three times its suggestion
    # says whether a few more steps agree
    lrs = [test.suggested / 3, test.suggested, 3 * test.suggested]
    by_lr = {lr: trial(base, lr) for lr in track(lrs, "trials of learning rates", len(lrs))}
    lr = min(by_lr, key=by_lr.__getitem__)
    # all rivals at one learning rate, the default's best: the default has the advantage, and who
    # beats it beats it as it would be used
    names = [name for name in rivals if name not in dropped]
    # has been trained at this learning rate already
    results = {"default": by_lr[lr]}
    results |= {
        name: trial(rivals[name], lr)
        for name in track(names[1:], "trials of candidates", len(names) - 1)
    }
    best = min(results, key=results.__getitem__)
    order = sorted(results, key=results.__getitem__)
    listed = [
        {
            "name": n,
            "held_loss": results[n],
            "lr": lr,
            "planned_bytes": planned.get(n),
            "config": rivals[n].to_dict(),
        }
        for n in order
    ]
    listed += [
        {
            "name": n,
            "held_loss": None,
            "left_out": "needs more memory than the default",
            "planned_bytes": planned[n],
        }
        for n in dropped
    ]
    config = _changed(rivals[best], switch_interval=interval)
    examples = _examples(survey)
    lines = _lines(
        survey,
        base,
        config,
        best,
        lr,
        test,
        by_lr,
        results,
        planned,
        interval,
        steps_in_all,
        trial_steps,
        examples,
    )
    return Advice(
        lines,
        config,
        lr,
        test,
        by_lr,
        listed,
        planned,
        examples,
        _claims(trial_steps, len(held)),
    )


def _claims(trial_steps: int, held: int) -> list[str]:
    return [
        (
            f"Held-out losses are of trainings of {trial_steps} steps at the first position, on"
            f" {held} held-out batches and one seed: a prediction of a longer training and no more."
            " Whether a much longer training wants a lower learning rate has not been measured."
        ),
        "Memory is planned (slicefine plan), not measured.",
        (
            "The number of examples is the noise-free, local best case at the pretrained weights;"
            " more are better."
        ),
    ]


def _interval(survey: dict[str, Any], base: SliceConfig, steps: int) -> int | None:
    """Every position once if the steps allow it, but never faster than `LEAST_INTERVAL`; a training
    shorter than two intervals stays."""
    if steps < 2 * LEAST_INTERVAL:
        return None
    widths = sorted(
        row["in_features" if base.slice_type == "column" else "out_features"]
        for row in survey["layers"]
    )
    positions = -(-widths[len(widths) // 2] // (base.r or DEFAULT_R))
    return max(LEAST_INTERVAL, steps // positions)


def _examples(survey: dict[str, Any]) -> dict[str, Any]:
    rows = survey.get("tangent") or []
    if not rows:
        return {"measured": False}
    # the last row is all layers together where more than one was tried
    row = rows[-1]
    curve = {int(n): v for n, v in row["invisible_by_examples"].items()}
    return {
        "measured": True,
        "slices": row["name"],
        "rank": row["rank"],
        "pool_bounds_it": row["saturated"],
        "n_min": row["n_min"],
        "advised": row["advised"],
        "effective_rank": row["effective_rank"],
        "invisible_by_examples": curve,
    }


def _lines(
    survey: dict[str, Any],
    base: SliceConfig,
    config: SliceConfig,
    best: str,
    lr: float,
    test: RangeTest,
    by_lr: dict[float, float],
    results: dict[str, float],
    planned: dict[str, int],
    interval: int | None,
    steps: int,
    trial_steps: int,
    examples: dict[str, Any],
) -> list[Line]:
    tried = ", ".join(f"{value:.4f} at {rate:.2g}" for rate, value in sorted(by_lr.items()))
    rivals = ", ".join(
        f"{value:.4f} {name}"
        for name, value in sorted(results.items(), key=lambda item: item[1])
    )
    worst = max(by_lr.values())
    lines = [
        Line(
            "learning rate",
            lr,
            f"range test: the loss falls from {test.low:.2g} to {test.high:.2g}"
            + "".join(f"; {note}" for note in test.notes)
            + f". Held-out loss after {trial_steps} steps: {tried}",
            worst - by_lr[lr],
        ),
        Line(
            "slices and r per layer",
            _shape_of(config),
            f"held-out loss after {trial_steps} steps at {lr:.2g}: {rivals}",
            results["default"] - results[best],
        ),
    ]
    lines.append(Line("target modules", config.target_modules, _targets_evidence(survey)))
    lines.append(Line("slice type", config.slice_type, _type_evidence(config)))
    if planned:
        ratio = planned[best] / planned["default"]
        lines.append(
            Line(
                "cost",
                f"{planned[best] / 2**20:,.0f} MiB",
                f"planned peak of a step; the default {planned['default'] / 2**20:,.0f} MiB"
                f" ({ratio:.3f} of it)",
            )
        )
    why = (
        f"a rule: {steps:,d} steps are fewer than two intervals of {LEAST_INTERVAL}"
        if interval is None
        else (
            f"a rule: every position once in {steps:,d} steps, but not faster than every"
            f" {LEAST_INTERVAL} steps, below which prototypes fell behind (docs/diagnose.md)"
        )
    )
    lines.append(Line("switch interval", interval, why))
    if examples["measured"]:
        bound = "at least " if examples["pool_bounds_it"] else ""
        last = max(examples["invisible_by_examples"], default=0)
        left = (
            f"; {last} examples leave {examples['invisible_by_examples'][last]:.0%} of the pool's"
            " tangent invisible"
            if last
            else ""
        )
        lines.append(
            Line(
                "examples",
                f"{bound}{examples['advised']}",
                f"tangent rank {bound}{examples['rank']} of {examples['slices']}; best case"
                f" {bound}{examples['n_min']}, advice 2 R{left}",
            )
        )
    measured = [line for line in lines if line.effect is not None]
    return sorted(measured, key=lambda line: -(line.effect or 0.0)) + [
        line for line in lines if line.effect is None
    ]


def _shape_of(config: SliceConfig) -> str:
    widths = sorted({config.r or DEFAULT_R, *config.rank_pattern.values()})
    width = (
        f"r = {widths[0]}"
        if len(widths) == 1
        else f"r from {widths[0]} to {widths[-1]} by layer"
    )
    return f"{width}, {'contiguous' if config.contiguous else 'scattered'}"


def _targets_evidence(survey: dict[str, Any]) -> str:
    reached = [row for row in survey["layers"] if row["gradient_norm"]]
    text = f"a rule: all linear layers; a gradient reaches {len(reached)} of {len(survey['layers'])}"
    if survey["unused"]:
        text += f"; never called: {', '.join(survey['unused'][:3])}"
    return text


def _type_evidence(config: SliceConfig) -> str:
    if config.slice_type == "column":
        return (
            "a rule: column slices keep only X[:, S] of a layer's input for backward, row slices"
            " all of it (docs/memory.md)"
        )
    return "as asked for"
