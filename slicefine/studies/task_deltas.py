"""Deltas of several tasks on one base, switched by task id: nothing that one task has learned can be lost to another."""

from __future__ import annotations

from torch import nn

from slicefine.delta import Delta, DeltaError
from slicefine.studies.side_file import base_sha256


class TaskDeltas:
    """model: the base, in place. Every switch first restores the base, bit for bit; the task's id must be known when asked.

    base_sha256: of the base when this was made; `check` compares.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.base_sha256 = model, base_sha256(model)
        self.deltas: dict[str, Delta] = {}
        self.attached: str | None = None

    def add(self, task: str, delta: Delta) -> None:
        if task in self.deltas:
            raise ValueError(f"there is a delta of task {task!r} already")
        self.deltas[task] = delta

    def attach(self, task: str) -> None:
        """The base with the delta of this task. Raises ValueError for an unknown task, DeltaError for another base."""
        if task not in self.deltas:
            raise ValueError(f"no delta of task {task!r}; there are {', '.join(map(repr, self.deltas)) or 'none'}")
        self.detach()
        self.deltas[task].apply_to(self.model, verify=False)
        self.attached = task

    def detach(self) -> None:
        """The base, bit for bit."""
        if self.attached is not None:
            self.deltas[self.attached].revert_from(self.model)
            self.attached = None

    def check(self) -> None:
        """Detach and raise DeltaError unless every tensor of the model has the bits it had at first."""
        self.detach()
        if (here := base_sha256(self.model)) != self.base_sha256:
            raise DeltaError(f"the base has changed: SHA-256 {here[:12]}, at first {self.base_sha256[:12]}")
