"""What every method has in common: it makes avatars, and an avatar gives Gaussians for an expression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gaussians import Gaussians
from avatars.inputs import InputSet
from avatars.rasterize import Rendering, rasterize

__all__ = ["Avatar", "Method", "load_avatar", "render"]


@runtime_checkable
class Avatar(Protocol):
    """A person that can be driven.

    Attributes:
        method: name of the method that made it, for example "avat3r".
        expression_kind: the kind of code that drives it, for example "arkit-52".
    """

    method: str
    expression_kind: str

    def gaussians(self, expression: Tensor) -> Gaussians:
        """The avatar with the face that `expression` (E,) describes, in the head frame."""
        ...

    def save(self, folder: Path) -> None:
        """Writes `avatar.json` and `avatar.safetensors` into `folder`."""
        ...


class Method(Protocol):
    """What makes avatars out of an input set."""

    name: str

    def create(self, inputs: InputSet) -> Avatar:
        """Makes the avatar of the person in `inputs`."""
        ...


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
    method = json.loads(description.read_text())["method"]
    if method == "avat3r":
        from avatars.avat3r import Avat3rAvatar

        return Avat3rAvatar.load(folder)
    if method == "flashavatar":
        from avatars.flashavatar import FlashAvatar

        return FlashAvatar.load(folder)
    raise UserError(f"{description} names the method {method!r}; this version reads avat3r and flashavatar.")
