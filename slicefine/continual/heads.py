"""The heads of a sequence of tasks, where each task has its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn


class Heads:
    """One head per task in the place of the model's own; all start alike."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        tasks: int,
    ) -> None:
        path, _, self.name = name.rpartition(".")
        try:
            self.parent = model.get_submodule(path)
            own = self.parent.get_submodule(self.name)
        except AttributeError as error:
            raise ValueError(
                f"head is {name!r}, which the model does not have: {error}"
            ) from error
        self.modules = [own, *(copy.deepcopy(own) for _ in range(tasks - 1))]
        for module in self.modules:
            module.requires_grad_(True)

    def use(self, task: int) -> None:
        self.parent._modules[self.name] = self.modules[task]

    def parameters(self) -> Iterator[nn.Parameter]:
        for module in self.modules:
            module.requires_grad_(True)
            yield from module.parameters()
