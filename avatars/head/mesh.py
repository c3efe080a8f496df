"""What methods that put Gaussians on a head need of it, and the frames in which its triangles carry them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["HeadMesh", "triangle_frames"]


class HeadMesh(Protocol):
    """A parametric head as a mesh; `ParametricHead` is one."""

    faces: Tensor  # (F, 3)
    uv: Tensor  # (U, 2)
    uv_faces: Tensor  # (F, 3)
    landmarks68: Tensor  # (68,) vertex ids

    @property
    def n_expression(self) -> int:
        """Length of the expression code."""
        ...

    @property
    def regions(self) -> dict[str, Tensor]:
        """Masks (F,) bool of triangles; the one called "boundary", where there is one, gets no Gaussians."""
        ...

    def vertices(self, identity: Tensor, expression: Tensor) -> Tensor:
        """(B, V, 3) in the head frame, metres, from (B, I) and (B, E)."""
        ...


def triangle_frames(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """How each triangle of a posed mesh is turned, and how large it is (GaussianAvatars, arXiv 2312.02069, 3.1).

    Args:
        vertices: (..., V, 3) metres.
        faces: (F, 3) vertex ids.

    Returns:
        (..., F, 3, 3) rotations whose columns are the first edge, what is left of it in the triangle's plane, and the
        normal; and (..., F) metres, the mean of that edge's length and of the triangle's height over it. A triangle
        without area has zeros in both.
    """
    a, b, c = (vertices[..., faces[:, corner], :] for corner in range(3))
    edge, other = b - a, c - a
    first = nn.functional.normalize(edge, dim=-1)
    normal = nn.functional.normalize(torch.linalg.cross(edge, other), dim=-1)
    second = torch.linalg.cross(normal, first)
    height = (second * other).sum(-1).abs()
    return torch.stack([first, second, normal], -1), (edge.norm(dim=-1) + height) / 2
