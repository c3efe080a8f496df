"""What the trainer trains: a network with its loss. The loop knows nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Batch", "Task"]

Batch = dict[str, Any]


class Task(Protocol):
    """A model, its loss and how it is written out."""

    name: str

    def build(self) -> nn.Module:
        """A module whose `forward(batch)` returns the loss and its parts as scalars, ready for DeepSpeed."""
        ...

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes the trained network for `avatars` to load."""
        ...


LossParts = tuple[Tensor, dict[str, Tensor]]
