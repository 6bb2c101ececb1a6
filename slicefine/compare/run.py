"""A comparison from its options to verdict, rows, recipe and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slicefine import atomic
from slicefine.compare.budget import budgets_of, plan, struck
from slicefine.compare.journal import Journal
from slicefine.compare.pieces import Setup, run_piece
from slicefine.compare.statistics import DISCORDANT, detectable
from slicefine.compare.verdict import judge
from slicefine.compare.ways import Way, chosen
from slicefine.training.data import Row, UserError, read_rows, split_rows
from slicefine.training.evaluation import rows_sha256
from slicefine.training.recipe import RECIPE, Recipe
from slicefine.training.run import new_task
from slicefine.training.tasks import CausalLM

FACTORS = (0.3, 1.0, 3.0)
# Of the epochs: three rates for a third each cost what the one that is left costs.
SHORT = 3
PROBE = 4


@dataclass(frozen=True)
class Options:
    """recipe: model, data, task, output, epochs and what else all trainings share."""

    recipe: Recipe
    methods: str
    seeds: int = 3
    budget: Sequence[str] = ()
    original: str | None = None


def compare_methods(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run or go on with a comparison; the folder of the recipe's ``output`` holds its journal.

    Returns:
        {"verdict", "recommended", "rows", "struck", ...}; also in compare.json of that folder.

    Raises:
        UserError: for what the user can mend.
    """
    comparison = _Comparison(options, say)
    comparison.announce()
    comparison.strike()
    rates = comparison.choose_rates()
    return comparison.finish(rates)


class _Comparison:
    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        recipe = options.recipe
        recipe.require("model", "data", "task", "output")
        if options.seeds < 1:
            raise UserError(f"--seeds {options.seeds}: expected 1 or more")
        self.options, self.say, self.recipe = options, say, recipe
        self.ways, self.budgets = chosen(options.methods), budgets_of(options.budget)
        self.seed = recipe.seed or 0
        self.setup = _setup(options, self.seed)
        self.output = Path(str(recipe.output)).expanduser()
        shared = {k: v for k, v in asdict(recipe).items() if k not in ("output", "device")}
        identity = {
            "recipe": json.loads(json.dumps(shared)),
            "methods": [w.name for w in self.ways],
            "seeds": options.seeds,
            "budget": sorted(options.budget),
            "rows": {part: rows_sha256(rows) for part, rows in self.setup.rows.items()},
        }
        self.journal = Journal(self.output / "journal", identity)

    def announce(self) -> None:
        """What this test set can show, before anything runs."""
        rows = len(self.setup.rows["test"])
        likely, least = detectable(rows, len(self.ways) - 1)
        self.least = {"rows": rows, "likely": likely, "least": least}
        counts = ", ".join(f"{len(r):,d} {part}" for part, r in self.setup.rows.items())
        self.say(f"rows: {counts}")
        if self.recipe.task == "causal-lm":
            self.say("losses are compared row by row; their spread is not known beforehand")
            return
        self.say(
            f"smallest difference that {rows:,d} test rows can show, {len(self.ways)} methods:"
            f" {100 * likely:.1f} points if {DISCORDANT:.0%} of the rows differ (power 0.8), and"
            f" never less than {100 * least:.1f}"
        )

    def strike(self) -> None:
        """Leave out what does not fit, by the planner, and for seconds by a few measured steps."""
        possible = [w for w in self.ways if not w.missing]
        # planned once: every process and every later run strikes the same
        plans = self.journal.finish(
            ["plan"], lambda _: plan(self.recipe, possible, len(self.setup.labels))
        )
        self.plans, self.struck = plans["plan"], {}
        for way in self.ways:
            reason = struck(way, self.plans.get(way.name, {}), self.budgets)
            if not reason and "seconds" in self.budgets:
                name = f"{way.name}-probe"
                probe = self.journal.finish(
                    [name],
                    lambda _, way=way: run_piece(
                        self.setup, way, 1.0, self.seed, 1, (), PROBE
                    ),
                )[name]
                batches = -(-len(self.setup.rows["train"]) // self.recipe.batch_size)
                seconds = probe.get("ms_per_step", 0) / 1000 * batches * self.recipe.epochs
                reason = struck(way, self.plans[way.name], self.budgets, seconds)
            if reason:
                self.struck[way.name] = reason
                self.say(f"struck: {way.name}: {reason}")
        self.left = [w for w in self.ways if w.name not in self.struck]
        if len(self.left) < 2:
            raise UserError(
                f"{len(self.left)} of {len(self.ways)} methods fit the budget; two are needed to"
                " compare: raise it, or name others with --methods"
            )

    def choose_rates(self) -> dict[str, float]:
        """Successive halving: every rate for a third of the epochs, the best one goes on."""
        short = max(1, self.recipe.epochs // SHORT)
        pieces = {f"{w.name}-x{f:g}": (w, f) for w in self.left for f in FACTORS}

        def work(name: str) -> dict[str, Any]:
            way, factor = pieces[name]
            self.say(f"{name}: {short} of {self.recipe.epochs} epochs")
            return run_piece(self.setup, way, factor, self.seed, short, ("valid",))

        self.trials = self.journal.finish(list(pieces), work)
        return {w.name: self._best(w) for w in self.left}

    def _best(self, way: Way) -> float:
        def rank(factor: float) -> Any:
            valid = self.trials[f"{way.name}-x{factor:g}"].get("valid")
            if valid is None or valid["loss"] is None:
                return float("inf"), 0.0, factor
            # equal accuracies are told apart by the loss
            return -valid["metric"], valid["loss"], factor

        return min(FACTORS, key=rank)

    def finish(self, rates: dict[str, float]) -> dict[str, Any]:
        """Whole trainings with every seed, scored on the test rows; then the verdict."""
        seeds = range(self.seed, self.seed + self.options.seeds)
        ways = {w.name: w for w in self.left}
        pieces = {f"{n}-seed{s}": (n, s) for n in ways for s in seeds}
        parts = tuple(p for p in ("test", "original") if p in self.setup.rows)

        def work(name: str) -> dict[str, Any]:
            method, seed = pieces[name]
            self.say(f"{name}: rate x {rates[method]:g}, {self.recipe.epochs} epochs")
            way, epochs = ways[method], self.recipe.epochs
            return run_piece(self.setup, way, rates[method], seed, epochs, parts)

        results = self.journal.finish(list(pieces), work)
        finals = {n: [results[f"{n}-seed{s}"] for s in seeds] for n in ways}
        binary = self.recipe.task != "causal-lm"
        judged = judge(finals, self.plans, binary, self.seed)
        flips = _flips(finals) if binary else {}
        found = {
            **judged,
            "rows": self._rows(finals, list(seeds)),
            "struck": self.struck,
            "rates": rates,
            "plans": self.plans,
            "detectable": self.least,
            "methods": self._table(finals, flips),
        }
        text = json.dumps(found, indent=2, allow_nan=False)
        atomic.write_text(self.output / "compare.json", text + "\n")
        self._write_recipe(judged, ways, rates)
        return found

    def _rows(self, finals: dict[str, Any], seeds: list[int]) -> list[dict[str, Any]]:
        rows = []
        for name, results in finals.items():
            for seed, result in zip(seeds, results, strict=True):
                way = next(w for w in self.left if w.name == name)
                loss = self.recipe.task == "causal-lm"
                value = None
                if "test" in result:
                    value = -result["test"]["metric"] if loss else result["test"]["metric"]
                rows.append(
                    {
                        "task": self.recipe.task,
                        "model": self.recipe.model,
                        "method": name,
                        "config": {"kind": way.kind, **way.options},
                        "lr": result["lr"],
                        "seed": seed,
                        "metric": "loss" if loss else "accuracy",
                        "value": value,
                        "trainable": result["trainable"],
                        "peak_bytes": self.plans[name].get("peak_bytes"),
                        "ms_per_step": result.get("ms_per_step"),
                    }
                )
        return rows

    def _table(
        self, finals: dict[str, Any], flips: dict[str, float]
    ) -> list[dict[str, Any]]:
        table = []
        for way in self.left:
            good = [r for r in finals[way.name] if "failed" not in r]
            mean = lambda get, good=good: sum(map(get, good)) / len(good) if good else None
            line: dict[str, Any] = {
                "method": way.name,
                "test": mean(lambda r: r["test"]["metric"]),
                "trainable": finals[way.name][0]["trainable"],
                "planned_peak_bytes": self.plans[way.name].get("peak_bytes"),
                "ms_per_step": mean(lambda r: r.get("ms_per_step", 0.0)),
                "file_bytes": mean(lambda r: r["file_bytes"]),
                "inference": way.overhead,
                "flips": flips.get(way.name),
            }
            if good and "calibration" in good[0]["test"]:
                line["calibration"] = mean(lambda r: r["test"]["calibration"])
            if good and "original" in good[0]:
                line["original_loss"] = mean(lambda r: r["original"]["loss"])
            table.append(line)
        return table

    def _write_recipe(
        self, judged: dict[str, Any], ways: dict[str, Way], rates: dict[str, float]
    ) -> None:
        """The winner for `slicefine train`, which trains slices; another winner has none."""
        way = ways.get(str(judged["recommended"]))
        path = self.output / RECIPE
        if way is None or not way.slices:
            path.unlink(missing_ok=True)
            return
        whole = self.setup.recipe_of(way, rates[way.name], self.seed, self.recipe.epochs)
        output = str(self.output / "winner")
        whole = replace(whole, output=output, slices=dict(way.options), training={})
        atomic.write_text(path, whole.to_yaml())


def _flips(finals: dict[str, Any]) -> dict[str, float]:
    """Share of the rows that the frozen base with a trained head has right and a method wrong."""
    if "frozen" not in finals:
        return {}
    shares = {}
    for name, results in finals.items():
        pairs = [
            (b["test"]["rows"], r["test"]["rows"])
            for b, r in zip(finals["frozen"], results, strict=True)
            if "test" in b and "test" in r
        ]
        every = [x > y for base, mine in pairs for x, y in zip(base, mine, strict=True)]
        shares[name] = sum(every) / max(1, len(every))
    return shares


def _setup(options: Options, seed: int) -> Setup:
    """The rows in their parts. A row is in one part only; none of the test is seen in the search."""
    recipe = options.recipe
    task = new_task(recipe)
    rows = read_rows(str(recipe.data), task.required())
    task.prepare(rows)
    parts: dict[str, list[Row]] = {}
    if recipe.eval_data is not None:
        parts["test"] = read_rows(recipe.eval_data, task.required(), "--eval-data")
        task.check(parts["test"], "--eval-data")
        task.check_labels(parts["test"])
    else:
        rows, parts["test"] = split_rows(rows, recipe.eval_share, seed)
    # of what is left, so that validation and test are of one size with a share of 0.2
    train, parts["valid"] = split_rows(rows, 0.2, seed + 1)
    if options.original is not None:
        parts["original"] = read_rows(options.original, task.required(), "--original-data")
        task.check(parts["original"], "--original-data")
        task.check_labels(parts["original"])
    form = task.form if isinstance(task, CausalLM) else None
    training = {"disable_tqdm": True, "logging_strategy": "no"}
    own = replace(recipe, training={**training, **recipe.training})
    return Setup(own, task.labels, form, {"train": train, **parts})
