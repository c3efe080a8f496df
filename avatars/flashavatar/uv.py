"""Which points of a mesh the pixels of its UV map show.

A FlashAvatar keeps one Gaussian per covered pixel of the head's UV map (paper section 4.1). The map is
rasterized once per head topology: a pixel belongs to the triangle that holds its centre, at `(i + 0.5) /
resolution`. On the FLAME topology with the mouth closed by 30 triangles this rule gives the paper's 3,348 /
13,453 / 53,678 Gaussians at 64² / 128² / 256².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["UVSamples", "sample_uv"]


@dataclass(frozen=True)
class UVSamples:
    """Points on a mesh, one for each covered pixel of its UV map, in the map's row order.

    Attributes:
        triangles: (N,) index of the triangle that holds the pixel centre.
        barycentric: (N, 3) weights of the triangle's three corners, summing to one.
        pixels: (N,) row * resolution + column; row 0 is the top of the map (v = 1).
        resolution: pixels along each side of the map.
    """

    triangles: Tensor
    barycentric: Tensor
    pixels: Tensor
    resolution: int

    def __len__(self) -> int:
        return self.triangles.shape[0]

    def interpolate(self, values: Tensor, faces: Tensor) -> Tensor:
        """Per-vertex values at the samples.

        Args:
            values: (..., V, D) one vector a vertex, for example posed positions.
            faces: (F, 3) vertex indices of the mesh's triangles.

        Returns:
            (..., N, D).
        """
        corners = faces[self.triangles]  # (N, 3)
        return sum(values[..., corners[:, k], :] * self.barycentric[:, k : k + 1] for k in range(3))  # type: ignore[return-value]

    def to(self, device: torch.device | str) -> UVSamples:
        """The same samples on `device`."""
        return UVSamples(
            self.triangles.to(device), self.barycentric.to(device), self.pixels.to(device), self.resolution
        )


def sample_uv(uv: Tensor, uv_faces: Tensor, resolution: int, excluded: Tensor | None = None) -> UVSamples:
    """Rasterizes a UV layout and keeps the covered pixels.

    Args:
        uv: (U, 2) texture coordinates in [0, 1], v upwards as in Wavefront OBJ.
        uv_faces: (F, 3) indices into `uv`, one row a triangle.
        resolution: pixels along each side of the map.
        excluded: (F,) bool, triangles whose pixels are dropped after rasterizing (the open rim of a head).

    Returns:
        The samples. Where triangles overlap in UV, the first one in `uv_faces` has the pixel.
    """
    corners = uv.double()[uv_faces] * resolution  # (F, 3, 2) in pixels; a pixel centre is at i + 0.5
    lowest = (corners.amin(1) - 0.5).ceil().clamp(0, resolution).long()  # first centre inside the box
    highest = (corners.amax(1) - 0.5).floor().clamp(-1, resolution - 1).long()
    extent = (highest - lowest + 1).clamp_min(0)  # (F, 2) columns, rows
    counts = extent.prod(1)

    # One row for each (triangle, pixel of its bounding box); the boxes together are a few times the map.
    triangle = torch.repeat_interleave(torch.arange(len(counts), device=uv.device), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    within = torch.arange(len(triangle), device=uv.device) - first
    column = lowest[triangle, 0] + within % extent[triangle, 0]
    row_from_bottom = lowest[triangle, 1] + within // extent[triangle, 0]

    a, b, c = corners[triangle].unbind(1)
    point = torch.stack([column, row_from_bottom], -1) + 0.5
    area = _cross(b - a, c - a)
    weights = torch.stack([_cross(c - b, point - b), _cross(a - c, point - c), _cross(b - a, point - a)], -1)
    weights = weights / area[:, None]  # dividing by the signed area makes either winding work
    inside = (weights >= 0).all(1) & (area != 0)

    triangle, weights = triangle[inside], weights[inside]
    pixel = ((resolution - 1 - row_from_bottom) * resolution + column)[inside]

    # A stable sort by pixel keeps the triangles of one pixel in face order, so "first" is well defined.
    pixel, order = torch.sort(pixel, stable=True)
    keep = torch.ones_like(pixel, dtype=torch.bool)
    keep[1:] = pixel[1:] != pixel[:-1]
    if excluded is not None:
        keep &= ~excluded[triangle[order]]
    return UVSamples(triangle[order][keep], weights[order][keep].float(), pixel[keep], resolution)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
