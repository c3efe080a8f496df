"""Making avatars: the model-agnostic DeepSpeed trainer, its tasks, and the per-subject fits."""

from train.config import TrainConfig
from train.loop import train
from train.task import Task

__all__ = ["Task", "TrainConfig", "train"]
