"""Task after task: what a model learns, what it forgets, and how that changes with the width of its
slices or its own.

Three modes for slices: ``same``, every task trains the slice at one place; ``disjoint``, each task
its own place, all of them applied together (which does not prevent forgetting: later slices feed
the same outputs); ``attach``, each task's delta by itself on the untouched base, chosen by task id
(which cannot forget). A fourth, ``full``, trains every weight, for sweeps over model width.

Source: Guha & Lakshman, The Diminishing Returns of Width for Continual Learning, ICML 2024, arXiv
2403.06398; replay is Chaudhry et al., arXiv 1902.10486, the functional penalty Li & Hoiem, arXiv
1606.09282, on logits.

`slicefine train` runs on transformers' Trainer; tasks in a row keep a loop of their own. A step adds
to its own loss that of one earlier task, by that task's head, and the change of what another head
said; head and delta change from task to task while the model stays; and models are any nn.Module on
plain tensors, such as the paper's own small networks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.capacity.samples import Samples, logits_of, predict
from slicefine.capacity.side import default_feature
from slicefine.capacity.side_file import base_sha256
from slicefine.config import SliceConfig
from slicefine.continual.heads import Heads
from slicefine.continual.metrics import is_learned, majority_share, summary
from slicefine.continual.task_deltas import TaskDeltas
from slicefine.groups import HEAD_LR, LR
from slicefine.model import get_slice_model, slice_layers
from slicefine.optim import SliceAdamW

MODES = ("same", "disjoint", "attach", "full")


@dataclass(frozen=True)
class TaskSamples:
    """name: the task's id. train, test: samples with labels of this task."""

    name: str
    train: Samples
    test: Samples


@dataclass(frozen=True)
class TrainingOptions:
    """How every task trains.

    lr: of the slices (of all weights in mode ``full``). head_lr: of a head that is fully trained.
    optimizer: "adamw" or "sgd" (mode ``full`` only). warmup: share of the steps, linear decay after
    it; None: constant. replay: samples kept of every earlier task, a batch of which joins each
    step. functional: weight of the mean squared change of the logits that earlier tasks gave on the
    present task's inputs. head: module that is fully trained, each task its own (task id known when
    asked); None: one frozen or sliced output for all. seed: of batches, replay and dropout.
    """

    epochs: int = 3
    batch_size: int = 32
    lr: float = LR
    head_lr: float = HEAD_LR
    optimizer: str = "adamw"
    warmup: float | None = None
    clip: float = 0.0
    replay: int = 0
    functional: float = 0.0
    head: str | None = None
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer is {self.optimizer!r}; expected 'adamw' or 'sgd'")
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if self.replay < 0 or self.functional < 0:
            raise ValueError(
                f"replay is {self.replay} and functional {self.functional}; expected 0 or more"
            )


@dataclass
class Run:
    """What one mode and size did.

    ``matrix[i][t]``: accuracy on task t after training on task i; AA, AF, LA, BWT: `metrics`.
    chance: what the most common label alone would reach, per task. learned: whether a task was
    better than that just after its training. joint: accuracy per task of training on all of them at
    once. alone: of training each from the base. output_drift: L2 distance of the logits on a task's
    test inputs between its own training and the end, mean and largest. weight_drift: mean over
    tasks and trained layers of |A after - A before|_F / |A before|_2. base_drop: accuracy lost on
    ``base_test``. proof: of mode attach.
    """

    mode: str
    size: int
    seed: int
    parameters: int
    model_parameters: int
    matrix: list[list[float]]
    output_drift: dict[str, float]
    weight_drift: float
    seconds: float
    chance: list[float] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    joint: list[float] | None = None
    alone: list[float] | None = None
    base_drop: float | None = None
    proof: dict[str, Any] | None = None
    measures: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As JSON: matrix, AA, AF, LA, BWT, JA and the rest."""
        values = asdict(self)
        values.update(values.pop("measures"))
        values["JA"] = None if self.joint is None else sum(self.joint) / len(self.joint)
        return values


def run(
    make_model: Callable[[], nn.Module],
    tasks: list[TaskSamples],
    mode: str,
    size: int = 16,
    *,
    recipe: TrainingOptions | None = None,
    config: SliceConfig | None = None,
    joint: bool = False,
    alone: bool = False,
    base_test: Samples | None = None,
    save: Path | None = None,
) -> Run:
    """Train on the tasks in their order; test on all of them after each.

    make_model: the pretrained model, afresh each time. size: r of the slices; in mode ``full`` only
    a label. config: the slices' other choices. joint, alone: train the references too. save: a
    folder for the deltas of mode ``attach``, one folder a task. Raises ValueError for a mode that
    does not fit.
    """
    recipe = recipe or TrainingOptions()
    _check(tasks, mode, recipe)
    started = time.perf_counter()
    model = make_model()
    learner = _Learner(
        model,
        tasks,
        mode,
        size,
        recipe,
        config or SliceConfig(switch_interval=None, contiguous=True),
    )
    before = None if base_test is None else learner.accuracy(base_test)
    matrix = []
    for number in range(len(tasks)):
        learner.learn(number)
        matrix.append([learner.test(t) for t in range(len(tasks))])
    proof = learner.proof() if mode == "attach" else None
    if save is not None and learner.deltas is not None:
        learner.deltas.save(save)
    drop = (
        None
        if base_test is None or before is None
        else before - learner.accuracy(base_test)
    )
    result = Run(
        mode,
        size,
        recipe.seed,
        learner.trainable,
        learner.model_parameters,
        matrix,
        learner.output_drift(),
        sum(learner.drifts) / len(learner.drifts),
        time.perf_counter() - started,
        chance=[majority_share(t.test.labels.tolist()) for t in tasks],
        learned=[
            is_learned(matrix[i][i], t.test.labels.tolist()) for i, t in enumerate(tasks)
        ],
        base_drop=drop,
        proof=proof,
        measures=summary(matrix),
    )
    if joint:
        together = _Learner(
            make_model(),
            tasks,
            "full" if mode == "full" else "same",
            size,
            recipe,
            learner.config,
        )
        together.learn_jointly()
        result.joint = [together.test(t) for t in range(len(tasks))]
    if alone:
        result.alone = []
        for number in range(len(tasks)):
            # a start of its own: another order of batches than in the sequence
            own = replace(recipe, seed=recipe.seed + 1000)
            single = _Learner(
                make_model(),
                tasks,
                "full" if mode == "full" else "same",
                size,
                own,
                learner.config,
            )
            single.learn(number)
            result.alone.append(single.test(number))
    return result


def _check(tasks: list[TaskSamples], mode: str, recipe: TrainingOptions) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    if len(tasks) < 2:
        raise ValueError(
            f"there {'is one task' if tasks else 'are no tasks'}; expected two or more"
        )
    if len({t.name for t in tasks}) < len(tasks):
        raise ValueError(f"two tasks have one name: {', '.join(t.name for t in tasks)}")
    if mode != "full" and recipe.optimizer == "sgd":
        raise ValueError("optimizer 'sgd' is for mode 'full'; slices train with SliceAdamW")
    if mode == "attach" and (recipe.replay or recipe.functional):
        raise ValueError(
            "mode 'attach' cannot forget: replay and functional have nothing to do there; leave"
            " them out"
        )


class _Learner:
    """One model on its way through the tasks."""

    def __init__(
        self,
        model: nn.Module,
        tasks: list[TaskSamples],
        mode: str,
        size: int,
        recipe: TrainingOptions,
        config: SliceConfig,
    ) -> None:
        self.model, self.tasks, self.mode, self.recipe = model, tasks, mode, recipe
        whole = [recipe.head] if recipe.head else None
        self.config = config
        if mode != "full":
            # biases and norms belong to no slice: tasks would share them, and undo each other's
            self.config = replace(
                config,
                r=size,
                bias="none",
                norms="none",
                modules_to_save=config.modules_to_save or whole,
            )
        self.trainable, self.model_parameters = (
            0,
            sum(p.numel() for p in model.parameters()),
        )
        self.drifts: list[float] = []
        self.after_training: dict[int, Tensor] = {}
        self.memory: dict[int, Samples] = {}
        self.deltas = TaskDeltas(model) if mode == "attach" else None
        self.heads = (
            Heads(model, recipe.head, len(tasks))
            if recipe.head and mode != "attach"
            else None
        )

    def learn(self, number: int) -> None:
        """Train on one task; the model then is ready for the next."""
        # drift is measured against the weights as this task found them
        before = self._linear_weights()
        if self.deltas is not None:
            self.deltas.detach()
        if self.heads is not None:
            self.heads.use(number)
        # before the slices are made: what the model says while this task has not touched it
        recorded = self._recorded(number)
        self._start(number)
        trained = {
            n for n, m in self.model.named_modules() if m in set(slice_layers(self.model))
        } or set(before)
        optimizer, total = (
            self._optimizer(len(self.tasks[number].train)),
            self._steps(len(self.tasks[number].train)),
        )
        # by task, so that a task sees the same batches whichever mode trains it
        generator = torch.Generator().manual_seed(self.recipe.seed + 31 * number)
        with torch.random.fork_rng(devices=[]):
            # dropout
            torch.manual_seed(self.recipe.seed + 31 * number)
            self._epochs(number, optimizer, total, generator, recorded)
        after = self._linear_weights()
        change = [
            float((after[n] - w).norm() / torch.linalg.matrix_norm(w, 2))
            for n, w in before.items()
            if n in trained
        ]
        self.drifts.append(sum(change) / len(change))
        self._finish(number)
        self.after_training[number] = self._logits(number)

    def learn_jointly(self) -> None:
        """All tasks at once: as many passes over each, batches of one task each, in random order."""
        self._start(0)
        sizes = [len(t.train) for t in self.tasks]
        total = sum(map(self._steps, sizes))
        optimizer = self._optimizer(sum(sizes))
        generator = torch.Generator().manual_seed(self.recipe.seed)
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            step = 0
            for _ in range(self.recipe.epochs):
                batches = [
                    (n, rows)
                    for n, t in enumerate(self.tasks)
                    for rows in t.train.batches(self.recipe.batch_size, generator)
                ]
                # tasks mixed: in their order this would be the sequence itself
                for i in torch.randperm(len(batches), generator=generator).tolist():
                    number, rows = batches[i]
                    self._step(
                        optimizer,
                        step,
                        total,
                        lambda n=number, r=rows: self._loss(self.tasks[n].train[r], n),
                    )
                    step += 1
        if self.mode != "full":
            model: Any = self.model
            model.merge_and_unload()

    # Training

    def _start(self, number: int) -> None:
        if self.mode == "full":
            self.trainable = self.model_parameters
            return
        # a position for each task: no two of them write to the same weights
        place = number if self.mode == "disjoint" else self.config.start_position
        config = replace(self.config, start_position=place)
        if self.mode == "disjoint":
            config = replace(config, switch_interval=None)
        try:
            get_slice_model(self.model, config)
        except ValueError as error:
            if self.mode != "disjoint":
                raise
            raise ValueError(
                f"mode 'disjoint' needs a place of its own for each of {len(self.tasks)} tasks:"
                f" {error}"
            ) from error
        model: Any = self.model
        self.trainable = model.get_nb_trainable_parameters()[0]

    def _finish(self, number: int) -> None:
        if self.mode == "full":
            return
        model: Any = self.model
        if self.deltas is None:
            model.merge_and_unload()
            return
        # before unload, which puts the originals back
        delta = model.delta()
        model.unload()
        self.deltas.add(self.tasks[number].name, delta)
        # a task is tested with its own delta on the base
        self.deltas.attach(self.tasks[number].name)

    def _optimizer(self, samples: int) -> torch.optim.Optimizer:
        recipe = self.recipe
        if recipe.optimizer == "sgd":
            return torch.optim.SGD(self.model.parameters(), lr=recipe.lr)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        slices = {id(layer.slice_weight) for layer in slice_layers(self.model)}
        inside = [p for p in parameters if id(p) in slices or not slices]
        outside = [p for p in parameters if not any(p is q for q in inside)]
        if self.heads is not None:
            outside += [
                p for p in self.heads.parameters() if not any(p is q for q in outside)
            ]
        groups = [
            {"params": inside, "lr": recipe.lr},
            *([{"params": outside, "lr": recipe.head_lr}] if outside else []),
        ]
        return SliceAdamW(groups, lr=recipe.lr, weight_decay=0.0)

    def _steps(self, samples: int) -> int:
        return self.recipe.epochs * -(-samples // self.recipe.batch_size)

    def _epochs(
        self,
        number: int,
        optimizer: torch.optim.Optimizer,
        total: int,
        generator: torch.Generator,
        recorded: dict[int, Tensor],
    ) -> None:
        train, step = self.tasks[number].train, 0
        self.model.train()
        for _ in range(self.recipe.epochs):
            for rows in train.batches(self.recipe.batch_size, generator):
                batch = train[rows]
                loss = lambda b=batch, r=rows: (
                    self._loss(b, number) + self._extra(number, b, r, recorded, generator)
                )
                self._step(optimizer, step, total, loss)
                step += 1

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        step: int,
        total: int,
        loss: Callable[[], Tensor],
    ) -> None:
        recipe = self.recipe
        if recipe.warmup is not None:
            warm = max(1, round(recipe.warmup * total))
            # linear warm-up, then linear decay to 0
            shape = (
                (step + 1) / warm if step < warm else (total - step) / max(1, total - warm)
            )
            for group in optimizer.param_groups:
                # the first step finds the group's own learning rate
                group.setdefault("initial_lr", group["lr"])
                group["lr"] = group["initial_lr"] * shape
        optimizer.zero_grad()
        with self._autocast():
            value = loss()
        if not torch.isfinite(value):
            raise ValueError(
                f"the loss is {value.item()} at step {step + 1}; lower lr ({recipe.lr:g})"
            )
        value.backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(
                [p for g in optimizer.param_groups for p in g["params"]], recipe.clip
            )
        optimizer.step()

    def _loss(self, batch: Samples, number: int) -> Tensor:
        if self.heads is not None:
            self.heads.use(number)
        logits = logits_of(self.model, batch.inputs)
        return nn.functional.cross_entropy(logits, batch.labels.to(logits.device))

    def _extra(
        self,
        number: int,
        batch: Samples,
        rows: Tensor,
        recorded: dict[int, Tensor],
        generator: torch.Generator,
    ) -> Tensor | float:
        """Replay of one earlier task, and the change of what an earlier task's head said of this
        batch.
        """
        if not number or not (self.recipe.replay or self.recipe.functional):
            return 0.0
        # one earlier task a step: the cost does not grow with the number of tasks
        earlier = int(torch.randint(number, (), generator=generator))
        loss: Tensor | float = 0.0
        if self.recipe.functional:
            # with one head for all tasks there is one earlier answer to keep
            said = earlier if self.heads is not None else 0
            if self.heads is not None:
                self.heads.use(said)
            logits = logits_of(self.model, batch.inputs)
            loss = (
                self.recipe.functional
                * (logits - recorded[said][rows].to(logits.device)).square().mean()
            )
        if self.recipe.replay:
            kept = self.memory[earlier]
            chosen = torch.randperm(len(kept), generator=generator)[
                : self.recipe.batch_size
            ]
            loss = loss + self._loss(kept[chosen], earlier)
        return loss

    def _recorded(self, number: int) -> dict[int, Tensor]:
        """What the model says of this task's inputs before it trains on them, by every earlier
        head; and the memory.
        """
        for t in range(number):
            if self.recipe.replay and t not in self.memory:
                order = torch.randperm(
                    len(self.tasks[t].train),
                    generator=torch.Generator().manual_seed(self.recipe.seed + t),
                )
                self.memory[t] = self.tasks[t].train[order[: self.recipe.replay]]
        if not number or not self.recipe.functional:
            return {}
        result = {}
        for t in range(number) if self.heads is not None else (0,):
            if self.heads is not None:
                self.heads.use(t)
            with self._autocast():
                result[t] = predict(self.model, self.tasks[number].train.inputs).float()
        if self.heads is not None:
            self.heads.use(number)
        return result

    def _autocast(self) -> AbstractContextManager[Any]:
        device = next(self.model.parameters()).device.type
        return (
            torch.autocast(device, dtype=torch.bfloat16)
            if self.recipe.bf16
            else nullcontext()
        )

    # Testing

    def _logits(self, number: int) -> Tensor:
        """Of a task's test inputs, by its own head or delta if it has one."""
        if self.deltas is not None:
            name = self.tasks[number].name
            self.deltas.attach(name) if name in self.deltas.deltas else self.deltas.detach()
        if self.heads is not None:
            self.heads.use(number)
        with self._autocast():
            return predict(self.model, self.tasks[number].test.inputs).float()

    def test(self, number: int) -> float:
        return float(
            (self._logits(number).argmax(1) == self.tasks[number].test.labels)
            .double()
            .mean()
        )

    def accuracy(self, samples: Samples) -> float:
        if self.deltas is not None:
            self.deltas.detach()
        with self._autocast():
            return float(
                (predict(self.model, samples.inputs).argmax(1) == samples.labels)
                .double()
                .mean()
            )

    def output_drift(self) -> dict[str, float]:
        distance = [
            (self._logits(t) - self.after_training[t]).norm(dim=1)
            for t in range(len(self.tasks) - 1)
        ]
        return {
            "mean": float(torch.cat(distance).double().mean()),
            "max": max(float(d.max()) for d in distance),
        }

    def proof(self) -> dict[str, Any]:
        """That nothing was lost: logits of every task equal to the bit to those just after it was
        trained, and the base's hash.
        """
        assert self.deltas is not None
        equal = {
            t.name: bool(torch.equal(self._logits(i), self.after_training[i]))
            for i, t in enumerate(self.tasks)
        }
        self.deltas.detach()
        return {
            "bit_equal_logits": equal,
            "base_sha256_at_first": self.deltas.base_sha256,
            "base_sha256_at_last": base_sha256(self.model),
        }

    def _linear_weights(self) -> dict[str, Tensor]:
        """Of the hidden layers: the output's width is the number of classes, not the model's."""
        head = self.recipe.head or default_feature(self.model)
        return {
            name: m.weight.detach().float().clone()
            for name, m in self.model.named_modules()
            if isinstance(m, nn.Linear) and not name.startswith(head)
        }
