"""What the trainer trains: a network with its loss. The loop knows nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from avatars.method import Method
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

    def check_weights(self) -> None:
        """Refuses to begin when weights are missing that any later phase of the training needs.

        Raises:
            UserError: naming the file and where it is looked for.
        """
        ...

    def build(self) -> nn.Module:
        """A module whose `forward(batch)` returns the loss and its parts as scalars, ready for DeepSpeed.

        `batch` is what the loader gives with `progress`, the share of all steps that are done.
        """
        ...

    def dry_pass(self, *, recompute: bool) -> Tensor:
        """Runs the network alone (no rasterizer, no loss) on one made-up example on the meta device.

        Args:
            recompute: with activation checkpointing where the configuration has it.

        Returns:
            A scalar whose `backward` is the network's backward.
        """
        ...

    def method(self, state: dict[str, Tensor], expression_kind: str, device: str) -> Method:
        """The method with these weights, ready to make avatars on `device`.

        Args:
            state: the whole module's float32 weights by name.
            expression_kind: of the shards.
            device: where avatars are made.
        """
        ...

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes the trained network for `avatars` to load."""
        ...

    def verify_export(self, module: nn.Module, folder: Path) -> None:
        """Reads back what `export` wrote and compares every weight and a forward pass with `module`.

        Raises:
            UserError: something differs.
        """
        ...
