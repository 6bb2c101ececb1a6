"""Task after task: what a model learns, what it forgets, and how that changes with width."""

from slicefine.continual.metrics import (
    average_accuracy,
    average_forgetting,
    backward_transfer,
    learning_accuracy,
)
from slicefine.continual.sequence import MODES, Recipe, Run, Task, run

__all__ = [
    "MODES",
    "Recipe",
    "Run",
    "Task",
    "average_accuracy",
    "average_forgetting",
    "backward_transfer",
    "learning_accuracy",
    "run",
]
