"""Deltas of several tasks on one base, switched by task id: nothing that one task has learned can
be lost to another.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import nn

from slicefine.atomic import write_text
from slicefine.capacity.side_file import base_sha256
from slicefine.deltas.delta import CONFIG_FILE, Delta, DeltaError


class TaskDeltas:
    """model: the base, in place. Every switch first restores the base, bit for bit; the task's id
    must be known when asked.

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
        """The base with the delta of this task. Raises ValueError for an unknown task, DeltaError
        for another base.
        """
        if task not in self.deltas:
            raise ValueError(
                f"no delta of task {task!r}; there are"
                f" {', '.join(map(repr, self.deltas)) or 'none'}"
            )
        self.detach()
        # unverified: hashing the base at every switch takes long; `check` does it when asked
        self.deltas[task].apply_to(self.model, verify=False)
        self.attached = task

    def detach(self) -> None:
        """The base, bit for bit."""
        if self.attached is not None:
            self.deltas[self.attached].revert_from(self.model)
            self.attached = None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """One delta a task, each in a folder of its name; `Delta.load` and `add` bring them back."""
        for task, delta in self.deltas.items():
            # a task's name may hold what no folder name can
            own = Path(folder) / re.sub(r"[^A-Za-z0-9._-]+", "-", task)
            delta.save(own)
            write_text(own / CONFIG_FILE, delta.config_json())

    def check(self) -> None:
        """Detach and raise DeltaError unless every tensor of the model has the bits it had at
        first.
        """
        self.detach()
        if (here := base_sha256(self.model)) != self.base_sha256:
            raise DeltaError(
                f"the base has changed: SHA-256 {here[:12]}, at first {self.base_sha256[:12]}"
            )
