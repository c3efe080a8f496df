"""What a prior is: it looks at pictures and says where things are, or what they are."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from avatars.cameras import Cameras

__all__ = ["FeaturePrior", "PositionPrior"]


@runtime_checkable
class PositionPrior(Protocol):
    """Says where the surface of every pixel is.

    Attributes:
        name: what it is and the first eight digits of its weights' sha256, for example "dust3r:1a2b3c4d".
    """

    name: str

    def __call__(
        self, images: Tensor, cameras: Cameras, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Position maps of N pictures of one scene.

        Args:
            images: (N, 3, H, W) float sRGB in [0, 1].
            cameras: of the pictures.
            masks: (N, 1, H, W) foreground coverage; confidence is 1 where it is 0.

        Returns:
            (N, 3, H, W) points in the cameras' world and (N, 1, H, W) confidence in DUSt3R's raw space, at least
            1, where 1 is no trust.
        """
        ...


@runtime_checkable
class FeaturePrior(Protocol):
    """Says what every patch is.

    Attributes:
        name: what it is and the first eight digits of its weights' sha256, for example "sapiens-0.3b:1a2b3c4d".
        dim: channels D.
        grid: rows h and columns w of a map.
    """

    name: str
    dim: int
    grid: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        """Feature maps (B, D, h, w) float32 of pictures (B, 3, H, W), float sRGB in [0, 1]."""
        ...
