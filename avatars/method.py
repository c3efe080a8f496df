"""What every method has in common: it makes avatars, and an avatar gives Gaussians for an expression."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gaussians import Gaussians
from avatars.inputs import InputSet
from avatars.rasterize import Rendering, rasterize

__all__ = ["Avatar", "Method", "check_codes", "load_avatar", "load_method", "render"]

METHODS = {
    "avat3r": "avatars.avat3r:Avat3rMethod",
    "fastavatar": "avatars.fastavatar.method:FastAvatarMethod",
}
"""Where the class of each trained network is: `load(folder, dtype)` reads what a training exported."""
PRIORS = {"gasp": "headsplat fit gasp --network"}
"""Trained networks that make nobody by themselves, and what fits people with them."""
AVATARS = {
    "avat3r": "avatars.avat3r:Avat3rAvatar",
    "fastavatar": "avatars.fastavatar:FastAvatar",
    "flashavatar": "avatars.flashavatar:FlashAvatar",
    "gasp": "avatars.gasp:GaspAvatar",
}
"""Where the class of each avatar is: `load(folder)` reads what `save` wrote."""


@runtime_checkable
class Avatar(Protocol):
    """A person that can be driven.

    Attributes:
        method: name of the method that made it, for example "avat3r".
        expression_kind: the kind of code that drives it, for example "arkit-52".
    """

    method: str
    expression_kind: str

    @property
    def expression_length(self) -> int:
        """Length E of that code."""
        ...

    def gaussians(self, expression: Tensor) -> Gaussians:
        """The avatar with the face that `expression` (E,) describes, in the head frame."""
        ...

    def sequence(self, expressions: Tensor) -> list[Gaussians]:
        """What `gaussians` makes of each of several codes (B, E), in one pass where the method can."""
        ...

    def save(self, folder: Path) -> None:
        """Writes `avatar.json` and `avatar.safetensors` into `folder`."""
        ...


class Method(Protocol):
    """What makes avatars out of an input set.

    Attributes:
        name: for example "avat3r".
        expression_kind: the kind of code that drives its avatars.
    """

    name: str
    expression_kind: str

    @property
    def expression_length(self) -> int:
        """Length of the code."""
        ...

    @property
    def size(self) -> int:
        """Side in pixels of the square pictures."""
        ...

    @property
    def needs_positions(self) -> bool:
        """Whether its pictures must come with position maps."""
        ...

    def create(self, inputs: InputSet) -> Avatar:
        """Makes the avatar of the person in `inputs`."""
        ...


def check_codes(avatar: Avatar, expressions: Tensor) -> None:
    """Refuses codes that do not drive an avatar.

    Raises:
        UserError: `expressions` is not (B, E) with the avatar's own E.
    """
    if expressions.shape[1:] != (avatar.expression_length,):
        raise UserError(
            f"This avatar is driven by {avatar.expression_kind} codes of {avatar.expression_length} numbers, not by "
            f"{tuple(expressions.shape[1:])}."
        )


def render(
    avatar: Avatar,
    expression: Tensor,
    cameras: Cameras,
    size: tuple[int, int],
    background: Tensor | None = None,
) -> Rendering:
    """Pictures of an avatar with one expression.

    Args:
        avatar: any method's avatar.
        expression: (E,) code of the avatar's own `expression_kind`.
        cameras: C cameras in the head frame.
        size: height and width in pixels.
        background: (3,) or (C, 3) colour, black when None.

    Returns:
        image (C, 3, H, W), alpha (C, 1, H, W) and depth (C, 1, H, W).
    """
    return rasterize(avatar.gaussians(expression), cameras, size, background)


def load_method(folder: str | Path, dtype: torch.dtype = torch.float32) -> Method:
    """Reads a trained network that makes avatars.

    Args:
        folder: what a training exported, with `model.json`.
        dtype: arithmetic of the network.

    Raises:
        UserError: the folder holds no model, a prior that makes nobody by itself, or a model of a method that this
            version does not know.
    """
    description = Path(folder) / "model.json"
    if not description.is_file():
        raise UserError(
            f"{folder} holds no model.json. Train a model with `make train`, or name its export folder."
        )
    name = json.loads(description.read_text()).get("method")
    if name in PRIORS:
        raise UserError(
            f"{folder} is a prior of {name} and makes nobody by itself; fit people with it: `{PRIORS[name]} {folder}`."
        )
    kind: type[Any] = _kind(METHODS, description)
    method: Method = kind.load(folder, dtype)
    return method


def load_avatar(folder: str | Path) -> Avatar:
    """Reads an avatar that any method saved.

    Raises:
        UserError: the folder holds no avatar, or one of a method that this version does not know.
    """
    folder = Path(folder)
    description = folder / "avatar.json"
    if not description.is_file():
        raise UserError(
            f"{folder} holds no avatar.json. Make an avatar with `headsplat fit` or `headsplat create`."
        )
    kind: type[Any] = _kind(AVATARS, description)
    avatar: Avatar = kind.load(folder)
    return avatar


def _kind(known: dict[str, str], description: Path) -> type[Any]:
    """The class that reads what `description` describes."""
    method = json.loads(description.read_text()).get("method")
    if method not in known:
        raise UserError(
            f"{description} names the method {method!r}; this version reads {' and '.join(known)}."
        )
    module, _, name = known[method].partition(":")
    kind: type[Any] = getattr(importlib.import_module(module), name)
    return kind
