"""Gaussians to pictures: one function, three back-ends, gsplat's conventions in all of them."""

from __future__ import annotations

from torch import Tensor

from avatars.cameras import Cameras
from avatars.gaussians import Gaussians
from avatars.rasterize.common import Mode, Rendering, check_shapes
from avatars.rasterize.reference import rasterize_reference

__all__ = ["Rendering", "rasterize"]


def rasterize(
    gaussians: Gaussians,
    cameras: Cameras,
    size: tuple[int, int],
    background: Tensor | None = None,
    mode: Mode = "classic",
) -> Rendering:
    """Draws N Gaussians for C cameras, with gradients to the Gaussians and the background."""
    check_shapes(gaussians, cameras, size, background, mode)
    return rasterize_reference(gaussians, cameras, size, background, mode)
