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

from avatars.head.geometry import rasterize_uv

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
    layout = uv.double().cpu().numpy(), uv_faces.cpu().numpy()
    triangle, weights = map(torch.from_numpy, rasterize_uv(*layout, resolution))
    triangle = triangle.flatten().to(uv.device)
    keep = triangle >= 0
    if excluded is not None:
        keep &= ~excluded[triangle]  # -1, where nothing covers the pixel, is false already
    pixels = keep.nonzero()[:, 0]
    return UVSamples(
        triangle[pixels], weights.flatten(0, 1).to(uv.device)[pixels].float(), pixels, resolution
    )
