"""Gaussians that ride on a head's triangles: where they sit, and how they follow identity and expression."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from avatars.gaussians import Gaussians, matrix_to_quaternion, quaternion_multiply
from avatars.head.mesh import triangle_frames
from avatars.head.uv import sample_uv

if TYPE_CHECKING:
    from avatars.head import ParametricHead

__all__ = ["LocalGaussians", "Seats", "place", "seats_of"]


@dataclass(frozen=True)
class Seats:
    """A point on the head's surface for every Gaussian, the same for all people.

    Attributes:
        corners: (N, 3) vertex ids of the triangle that carries it.
        weights: (N, 3) barycentric place in it.
    """

    corners: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.corners)

    def to(self, device: torch.device | str) -> Seats:
        """The same on `device`."""
        return Seats(self.corners.to(device), self.weights.to(device))

    def posed(self, vertices: Tensor) -> tuple[Tensor, Tensor]:
        """Centres (B, N, 3) and rotations (B, N, 3, 3) of the triangles on posed heads (B, V, 3).

        No gradient goes through rotations, which are those of `triangle_frames`.
        """
        centers = (vertices[:, self.corners] * self.weights[..., None]).sum(2)
        with torch.no_grad():
            frames, _ = triangle_frames(vertices, self.corners)
        return centers, frames


@lru_cache(maxsize=8)
def seats_of(head: ParametricHead, uv_resolution: int) -> Seats:
    """Where Gaussians sit on a head: every triangle's centre, or every covered pixel of its UV map.

    The rim that closes the neck gets none, nor do triangles without area.

    Args:
        head: the head.
        uv_resolution: side of the UV map; 0 for triangles.
    """
    faces = head.faces.cpu().numpy()
    boundary = head.regions.get("boundary")
    free = np.ones(len(faces), bool) if boundary is None else ~boundary.cpu().numpy()
    edges = head.template.cpu().numpy()[faces]
    area = np.linalg.norm(np.cross(edges[:, 1] - edges[:, 0], edges[:, 2] - edges[:, 0]), axis=1)
    free &= area > 1e-12
    if uv_resolution:
        samples = sample_uv(head.uv, head.uv_faces, uv_resolution, ~torch.from_numpy(free).to(head.uv.device))
        return Seats(head.faces.cpu()[samples.triangles.cpu()], samples.barycentric.cpu())
    triangles = np.flatnonzero(free)
    thirds = torch.full((len(triangles), 3), 1 / 3)
    return Seats(torch.from_numpy(faces[triangles]), thirds)


@dataclass
class LocalGaussians:
    """N Gaussians in the frames of their triangles, before activation, with B people in front where there are several.

    Attributes:
        offsets: (…, N, 3) metres from the seat, along the triangle's axes.
        quats: (…, N, 4) wxyz in the triangle's frame, of any length.
        log_scales: (…, N, 3) of metres.
        opacities: (…, N) logits.
        colors: (…, N, K, 3) spherical harmonics; they do not turn with the triangle.
    """

    offsets: Tensor
    quats: Tensor
    log_scales: Tensor
    opacities: Tensor
    colors: Tensor

    def __getitem__(self, person: int) -> LocalGaussians:
        return LocalGaussians(*(values[person] for values in vars(self).values()))

    def to(self, device: torch.device | str) -> LocalGaussians:
        """The same on `device`."""
        return LocalGaussians(*(values.to(device) for values in vars(self).values()))


def place(local: LocalGaussians, centers: Tensor, frames: Tensor) -> Gaussians:
    """One person's Gaussians on a posed head.

    Args:
        local: N Gaussians.
        centers: (N, 3) seats.
        frames: (N, 3, 3) rotations of their triangles.
    """
    turn = matrix_to_quaternion(frames)
    return Gaussians(
        means=centers + (frames @ local.offsets[..., None])[..., 0],
        quats=quaternion_multiply(turn, nn.functional.normalize(local.quats, dim=-1)),
        # Neither a point nor a wall: what a step too far makes of a scale must still be drawn and come back.
        scales=local.log_scales.clamp(-12.0, -2.5).exp(),
        opacities=local.opacities.sigmoid(),
        colors=local.colors,
    )
