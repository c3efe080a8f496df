"""What the trainer trains, one module a method."""

from __future__ import annotations

from train.config import TrainConfig
from train.task import Task

__all__ = ["task_for"]


def task_for(config: TrainConfig) -> Task:
    """The task that a recipe's configuration describes."""
    from train.tasks.avat3r import Avat3rTask

    return Avat3rTask(config)
