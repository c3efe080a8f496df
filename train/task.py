"""What the trainer trains: a network with its loss. The loop knows nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from torch.nn import Parameter

from avatars.errors import UserError
from avatars.method import Method
from shards import Manifest

__all__ = ["Batch", "Task", "check_codes", "check_head", "check_size", "of_kind"]

Batch = dict[str, Any]
Kind = TypeVar("Kind")


def of_kind(config: object, kind: type[Kind]) -> Kind:
    """The recipe's model configuration as the task's own kind.

    Raises:
        TypeError: it is another method's.
    """
    if not isinstance(config, kind):
        raise TypeError(f"this task trains a {kind.__name__}, not a {type(config).__name__}")
    return config


def check_size(manifest: Manifest, size: int) -> None:
    """Refuses pictures of another side than the recipe's.

    Raises:
        UserError: they are.
    """
    if manifest.settings.size != size:
        raise UserError(
            f"{manifest.folder} holds pictures of {manifest.settings.size} px and the recipe's --model.size is {size}; "
            "change one of them (`headsplat shards pack --size`)."
        )


def check_codes(manifest: Manifest, length: int) -> None:
    """Refuses expression codes of another length than the recipe's.

    Raises:
        UserError: they are.
    """
    if manifest.expression_length != length:
        raise UserError(
            f"{manifest.folder} holds {manifest.expression_kind} codes of {manifest.expression_length} numbers and the "
            f"recipe's --model.expression-dim is {length}."
        )


def check_head(manifest: Manifest, head: str) -> None:
    """Refuses captures that another head tracked than the recipe's, or none.

    Raises:
        UserError: they are.
    """
    if manifest.head != head:
        raise UserError(
            f"{manifest.folder} was tracked with the head {manifest.head or 'none'!r} and the recipe's --model.head is "
            f"{head!r}; the method needs the pictures' own head. Synthetic captures (`headsplat synth`) have it."
        )


class Task(Protocol):
    """A model, its loss and how it is written out.

    Attributes:
        name: for example "avat3r".
        size: side in pixels of the pictures that it is trained on.
        reads_inputs: whether its batches need the pictures of input sets; they are not read otherwise.
        prior_values: numbers of priors that come with each of those pictures.
        most_gaussians: how many Gaussians an example renders at most.
        makes_avatars: whether what it trains makes avatars by itself and can be evaluated. A prior that only a fit
            uses does not.
        next_step: what a user does with what it trained; only for a task that makes no avatars.
    """

    name: str
    size: int
    reads_inputs: bool
    prior_values: int
    most_gaussians: int
    makes_avatars: bool
    next_step: str

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

    def parameter_groups(self, module: nn.Module) -> list[tuple[float, list[Parameter]]]:
        """What is trained, with the share of the recipe's learning rate that each part takes."""
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
        """The method with these weights, ready to make avatars on `device`; only asked where `makes_avatars`.

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
