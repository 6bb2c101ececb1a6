"""A comparison from its options to its verdict: look, choose rates, train with several seeds, ask."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slicefine.compare.methods import FACTORS, Method
from slicefine.compare.statistics import calibration_error, compare, smallest_difference
from slicefine.compare.store import Results
from slicefine.compare.trial import Answers, Trial
from slicefine.compare.verdict import Contender, Verdict, decide
from slicefine.training.arguments import check_settings
from slicefine.training.data import Row, UserError, read_rows, split_rows
from slicefine.training.evaluation import rows_sha256
from slicefine.training.recipe import Recipe
from slicefine.training.run import new_task
from slicefine.training.tasks import CausalLM, Task

# Successive halving: every rate for a third of the steps, then the better ones for all of them.
_FIRST_SHARE = 1 / 3
_KEPT = 2
_KINDS = ("memory", "params", "seconds")


@dataclass(frozen=True)
class Budget:
    """What a method may cost.

    Args:
        kind: "memory" (peak of a step, in bytes), "params" (that train) or "seconds" (of one whole
            training).
        limit: in that unit.
    """

    kind: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From ``memory=600MiB``, ``params=400000`` or ``seconds=120``.

        Raises:
            UserError: for anything else.
        """
        kind, _, value = text.partition("=")
        number, scale = value.strip(), 1.0
        for power, unit in enumerate(("KiB", "MiB", "GiB"), 1):
            if kind == "memory" and number.endswith(unit):
                number, scale = number.removesuffix(unit), 1024.0**power
        try:
            limit = float(number) * scale
        except ValueError:
            limit = 0.0
        if kind not in _KINDS or not limit > 0:
            raise UserError(
                f"--budget {text}: expected memory=600MiB, params=400000 or seconds=120"
            )
        return cls(kind, limit)

    def exceeded(self, look: dict[str, Any]) -> str | None:
        """Why a method is too dear, or None. look: of `slicefine.compare.trial.Look`."""
        seconds = look["ms_per_step"] * look["steps"] / 1000
        cost = {
            "memory": look["peak_bytes"],
            "params": look["trainable"],
            "seconds": seconds,
        }
        if cost[self.kind] <= self.limit:
            return None
        if self.kind == "memory":
            return (
                f"a step takes {look['peak_bytes'] / 2**20:,.0f} MiB, the budget is"
                f" {self.limit / 2**20:,.0f} MiB"
            )
        what = "parameters train" if self.kind == "params" else "seconds for one training"
        return f"{cost[self.kind]:,.0f} {what}, the budget is {self.limit:,.0f}"


@dataclass
class Options:
    """What is compared, on what, how often.

    Args:
        methods: to compare.
        recipe: model, data, task and training, as `slicefine train` has them; its rate is not used.
        output: folder for everything.
        seeds: trainings of each method with its chosen rate.
        budgets: that strike a method before it trains.
        test_data: rows for the last word; None holds a quarter of the data out.
        original_data: texts that the model should still know (language models).
        max_flips: share of the rows that the plain model had right which a method may get wrong.
        max_forgetting: growth of the loss on the original data that is accepted, as a share.
    """

    methods: list[Method]
    recipe: Recipe
    output: Path
    seeds: int = 3
    budgets: list[Budget] = field(default_factory=list)
    test_data: str | None = None
    original_data: str | None = None
    max_flips: float = 0.1
    max_forgetting: float = 0.1
    say: Callable[[str], None] = print


@dataclass
class _Data:
    train: list[Row]
    valid: list[Row]
    test: list[Row]
    original: list[Row] = field(default_factory=list)


def run(options: Options) -> Verdict:
    """Run a comparison, or what is left of it.

    Args:
        options: see `Options`. The same command again goes on where it was stopped; the same
            command in a second terminal takes part.

    Returns:
        The verdict; the folder holds its rows, report and recipe.

    Raises:
        UserError: for what the user can mend.
    """
    return _Study(options).run()


class _Study:
    def __init__(self, options: Options) -> None:
        self.options, self.recipe = options, options.recipe
        self.recipe.require("model", "data", "task")
        check_settings(self.recipe)
        self.seed = self.recipe.seed or 0
        self.task: Task = new_task(self.recipe)
        self.language = isinstance(self.task, CausalLM)
        if options.original_data and not self.language:
            raise UserError(
                "--original-data is for language models: before its training a classifier has no"
                " head that could be asked"
            )
        self.data = self._read()
        self.task.load_inputs(str(self.recipe.model))
        self.results = Results(options.output, self._setup())

    def _read(self) -> _Data:
        options, task = self.options, self.task
        rows = read_rows(str(self.recipe.data), task.required())
        task.prepare(rows)
        if options.test_data is None:
            rows, test = split_rows(rows, 0.25, self.seed)
        else:
            test = read_rows(options.test_data, task.required(), "--test-data")
            task.check(test, "--test-data")
            task.check_labels(test)
        train, valid = split_rows(rows, self.recipe.eval_share or 0.1, self.seed + 1)
        found = _Data(train, valid, test)
        if options.original_data:
            found.original = read_rows(options.original_data, [], "--original-data")
            task.check(found.original, "--original-data")
        return found

    def _setup(self) -> dict[str, Any]:
        recipe = {
            k: v
            for k, v in asdict(self.recipe).items()
            if k not in ("output", "lr", "device")
        }
        hashes = {name: rows_sha256(rows) for name, rows in vars(self.data).items()}
        budgets = [asdict(budget) for budget in self.options.budgets]
        return {"recipe": recipe, "rows": hashes, "budgets": budgets}

    def run(self) -> Verdict:
        self._say_before()
        while (left := self._left()) != []:
            # another process may have all that can be done now
            if not any(self._do(*piece) for piece in left):
                time.sleep(1)
        return self._verdict()

    def _say_before(self) -> None:
        data, pairs = self.data, len(self.options.methods) - 1
        say = self.options.say
        say(
            f"{len(data.train):,d} rows to train on, {len(data.valid):,d} to choose rates,"
            f" {len(data.test):,d} for the test"
        )
        if not self.language:
            smallest = smallest_difference(len(data.test), pairs)
            say(
                f"a difference below about {100 * smallest:.1f} points cannot be shown with"
                f" {len(data.test):,d} test rows and {pairs} comparisons (80 % power)"
            )

    # Pieces of work

    def _left(self) -> list[tuple[str, Method, Callable[[Method], tuple]]]:
        """(key, method, what to do) of every piece that is not done and can be begun."""
        done = self.results.done()
        left: list[tuple[str, Method, Callable]] = []
        if self.language and "base" not in done:
            left.append(("base", self.options.methods[0], self._ask_base))
        for method in self.options.methods:
            for key, work in self._next(method, done):
                if key not in done:
                    left.append((key, method, work))
        return left

    def _next(self, method: Method, done: dict[str, Any]) -> list[tuple[str, Callable]]:
        """The pieces of a method whose conditions are met, done or not."""
        look = f"{method.name}-look"
        if look not in done:
            return [(look, self._look)]
        if self._struck(method, done):
            return []
        first = [(self._key(method, f, 0), self._piece(f, 0)) for f in FACTORS]
        if any(key not in done for key, _ in first):
            return first
        factors = self._best(method, done, 0, FACTORS)[:_KEPT]
        second = [(self._key(method, f, 1), self._piece(f, 1)) for f in factors]
        if any(key not in done for key, _ in second) or not factors:
            return second
        best = self._best(method, done, 1, factors)
        if not best:
            return []
        # the chosen rate with the first seed has been trained in the second round
        return [
            (self._key(method, best[0], 1, seed), self._piece(best[0], 1, seed))
            for seed in range(1, self.options.seeds)
        ]

    def _key(
        self,
        method: Method,
        factor: float,
        rung: int,
        seed: int = 0,
    ) -> str:
        return f"{method.name}-{factor:g}-{'third' if rung == 0 else 'whole'}-{seed}"

    def _best(
        self, method: Method, done: dict[str, Any], rung: int, factors: Any
    ) -> list[float]:
        """Factors by their value on the validation rows, the best first; failed ones left out."""
        values = {f: done[self._key(method, f, rung)].get("valid") for f in factors}
        found = [f for f in factors if values[f] is not None]
        # of equal ones the rate of the rule
        return sorted(found, key=lambda f: (-values[f], abs(np.log(f))))

    def _struck(self, method: Method, done: dict[str, Any]) -> str | None:
        look = done[f"{method.name}-look"]
        if look.get("error"):
            return look["error"]
        reasons = [budget.exceeded(look) for budget in self.options.budgets]
        return next((reason for reason in reasons if reason), None)

    def _do(
        self,
        key: str,
        method: Method,
        work: Callable[[Method], tuple],
    ) -> bool:
        """Do one piece, unless another process has it."""
        if not self.results.claim(key):
            return False
        if key in self.results.done():
            return True
        content, value, answers = work(method)
        self.results.finish(key, content, value, answers)
        shown = content.get("error") or (
            f"{value:.4f} on the validation rows" if value is not None else ""
        )
        self.options.say(f"{key}: {shown}" if shown else key)
        gc.collect()
        return True

    def _look(self, method: Method) -> tuple:
        try:
            trial = Trial(method, self.recipe, self.task, 1.0, self.seed)
            return asdict(trial.look(self.data.train)), None, None
        except torch.OutOfMemoryError as error:
            return {"error": f"a step does not fit the device: {error}"[:300]}, None, None

    def _piece(
        self,
        factor: float,
        rung: int,
        seed: int = 0,
    ) -> Callable[[Method], tuple]:
        def train(method: Method) -> tuple:
            trial = Trial(method, self.recipe, self.task, factor, self.seed + seed)
            share = _FIRST_SHARE if rung == 0 else 1.0
            content: dict[str, Any] = {"factor": factor, "lr": trial.lr, "seed": seed}
            try:
                with tempfile.TemporaryDirectory() as folder:
                    seconds = trial.train(self.data.train, share, Path(folder))
            except UserError as error:
                # a rate that is too high for this method says nothing of the others
                return {**content, "error": str(error)}, None, None
            valid = trial.ask(self.data.valid).mean
            content |= {"seconds": seconds, "valid": valid}
            if rung == 0:
                return content, valid, None
            answers = {"test": trial.ask(self.data.test)}
            if self.data.original:
                answers["original"] = trial.ask(self.data.original)
            return content, valid, _arrays(answers)

        return train

    def _ask_base(self, method: Method) -> tuple:
        from slicefine.compare.methods import METHODS

        trial = Trial(METHODS["full"], self.recipe, self.task, 1.0, self.seed)
        answers = {"test": trial.ask(self.data.test)}
        if self.data.original:
            answers["original"] = trial.ask(self.data.original)
        return {"valid": trial.ask(self.data.valid).mean}, None, _arrays(answers)

    # The verdict

    def _verdict(self) -> Verdict:
        done = self.results.done()
        contenders, struck = [], {}
        for method in self.options.methods:
            reason = self._struck(method, done)
            best = [] if reason else self._chosen(method, done)
            if not best:
                struck[method.name] = reason or self._failure(method, done)
                continue
            contenders.append(self._contender(method, best[0], done))
        if not contenders:
            lines = "\n".join(f"  {name}: {reason}" for name, reason in struck.items())
            raise UserError(f"no method is left to compare:\n{lines}")
        scores = {c.name: c.scores for c in contenders}
        first = max(contenders, key=lambda c: (c.value, -c.look["peak_bytes"]))
        pairs = compare(scores, first.name, self.seed, binary=not self.language)
        return decide(contenders, first, pairs, struck, self.task.metric, self.recipe)

    def _chosen(self, method: Method, done: dict[str, Any]) -> list[float]:
        factors = self._best(method, done, 0, FACTORS)[:_KEPT]
        return self._best(method, done, 1, factors)

    def _failure(self, method: Method, done: dict[str, Any]) -> str:
        errors = [
            content["error"]
            for key, content in done.items()
            if key.startswith(f"{method.name}-") and content.get("error")
        ]
        return f"every rate failed: {errors[0]}" if errors else "every rate failed"

    def _contender(
        self,
        method: Method,
        factor: float,
        done: dict[str, Any],
    ) -> Contender:
        keys = [self._key(method, factor, 1, s) for s in range(self.options.seeds)]
        kept = [k for k in keys if k in done and not done[k].get("error")]
        arrays = [self.results.answers(key) for key in kept]
        scores = np.stack([a["test"] for a in arrays])
        contender = Contender(
            method.name,
            done[kept[0]]["lr"],
            scores,
            [done[key]["seed"] for key in kept],
            [done[key]["seconds"] for key in kept],
            done[f"{method.name}-look"],
        )
        if not self.language:
            confidence = np.concatenate([a["test_confidence"] for a in arrays])
            contender.calibration = calibration_error(confidence, scores.reshape(-1))
        contender.flips = self._flips(scores, done)
        if self.data.original:
            before = -self.results.answers("base")["original"].mean()
            after = float(np.mean([-a["original"].mean() for a in arrays]))
            contender.forgetting = float(after / before - 1)
        contender.gates = self._gates(contender)
        return contender

    def _flips(self, scores: np.ndarray, done: dict[str, Any]) -> float | None:
        """Share of the rows that the plain model does better on than this one.

        For a classifier the plain model is the one of which the head alone has trained.
        """
        if self.language:
            before = self.results.answers("base")["test"]
            return float((scores.mean(0) < before).mean())
        frozen = next((m for m in self.options.methods if m.name == "frozen"), None)
        best = (
            self._chosen(frozen, done) if frozen and not self._struck(frozen, done) else []
        )
        if frozen is None or not best:
            return None
        before = self.results.answers(self._key(frozen, best[0], 1))["test"]
        right = before > 0
        return float((scores[0][right] == 0).sum() / max(1, len(before)))

    def _gates(self, contender: Contender) -> list[str]:
        """Why a method is not recommended whatever its score."""
        options, reasons = self.options, []
        if contender.flips is not None and contender.flips > options.max_flips:
            reasons.append(
                f"{100 * contender.flips:.0f} % of the test rows are worse than with the plain"
                f" model (--max-flips {options.max_flips:g})"
            )
        forgotten = contender.forgetting
        if forgotten is not None and forgotten > options.max_forgetting:
            reasons.append(
                f"the loss on the original data grew by {100 * forgotten:.0f} %"
                f" (--max-forgetting {options.max_forgetting:g})"
            )
        return reasons


def _arrays(answers: dict[str, Answers]) -> dict[str, np.ndarray]:
    arrays = {name: a.scores for name, a in answers.items()}
    return arrays | {f"{name}_confidence": a.confidence for name, a in answers.items()}
