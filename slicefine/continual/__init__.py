"""Task after task: what a model learns, what it forgets, and how that changes with width."""

from slicefine.continual.metrics import (
    average_accuracy,
    average_forgetting,
    backward_transfer,
    learning_accuracy,
)
from slicefine.continual.sequence import MODES, Run, TaskSamples, TrainingOptions, run

__all__ = [
    "MODES",
    "Run",
    "TaskSamples",
    "TrainingOptions",
    "average_accuracy",
    "average_forgetting",
    "backward_transfer",
    "learning_accuracy",
    "run",
]
