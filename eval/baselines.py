"""What a method must beat: showing the input picture that was taken from the nearest direction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.inputs import InputSet
from avatars.rasterize import Rendering

__all__ = ["NearestInput", "nearest_input"]


def nearest_input(inputs: InputSet) -> NearestInput:
    """The baseline's "avatar" of an input set."""
    inputs = inputs.masked()
    directions = F.normalize(inputs.cameras.centers, dim=-1)
    return NearestInput(inputs.images, inputs.masks, directions, inputs.expression_kind)


@dataclass(frozen=True)
class NearestInput:
    """The input set itself as an "avatar": shows the input picture whose camera stands nearest in direction.

    It ignores the expression, knows nothing of depth, and has no Gaussians.

    Attributes:
        images: (N, 3, H, W) the input pictures.
        masks: (N, 1, H, W) their masks.
        directions: (N, 3) unit directions from the head's origin to their cameras.
        expression_kind: kind of the capture's codes; they are accepted and ignored.
        method: "nearest-input".
    """

    images: Tensor
    masks: Tensor
    directions: Tensor
    expression_kind: str
    method: str = "nearest-input"

    def render(self, expression: Tensor, cameras: Cameras, size: tuple[int, int]) -> Rendering:
        """The nearest input picture of each of C cameras, resized to (H, W); depth is 0 everywhere."""
        toward = F.normalize(cameras.centers, dim=-1)  # (C, 3)
        nearest = (toward @ self.directions.T).argmax(dim=1)  # (C,)
        images, masks = self.images[nearest], self.masks[nearest]
        if tuple(images.shape[-2:]) != tuple(size):
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
            masks = F.interpolate(masks, size, mode="bilinear", antialias=True)
        no_gaussians = torch.zeros(len(cameras), 0, 2, dtype=torch.int32, device=images.device)
        return Rendering(images, masks, torch.zeros_like(masks), no_gaussians)

    def gaussians(self, expression: Tensor) -> None:
        """There are none.

        Raises:
            UserError: always.
        """
        raise UserError(
            "The nearest-input baseline shows input pictures and has no Gaussians to export or drive."
        )

    def save(self, folder: Path) -> None:
        """It is not saved: it is its input set.

        Raises:
            UserError: always.
        """
        raise UserError("The nearest-input baseline is its input pictures; there is nothing to save.")
