"""What the trainer trains: a network with its loss. The loop knows nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from shards import Manifest

__all__ = ["Batch", "Task"]

Batch = dict[str, Any]


class Task(Protocol):
    """A model, its loss and how it is written out."""

    name: str

    def check(self, manifest: Manifest) -> None:
        """Refuses shards that the network cannot be trained on.

        Raises:
            UserError: naming what does not fit and what to change.
        """
        ...

    def build(self) -> nn.Module:
        """A module whose `forward(batch)` returns the loss and its parts as scalars, ready for DeepSpeed."""
        ...

    def dry_pass(self, *, recompute: bool) -> Tensor:
        """Runs the network alone (no rasterizer, no loss) on one made-up example on the meta device.

        Args:
            recompute: with activation checkpointing where the configuration has it.

        Returns:
            A scalar whose `backward` is the network's backward.
        """
        ...

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes the trained network for `avatars` to load."""
        ...
