"""Which points of a mesh the pixels of its UV map show, and how large such a pixel is on the mesh.

FlashAvatar (paper section 4.1) and GASP keep one Gaussian per covered pixel of the head's UV map. The map is
rasterized once per head topology: a pixel belongs to the triangle that holds its centre, at `(i + 0.5) /
resolution`. On the FLAME topology with the mouth closed by 30 triangles this rule gives the paper's 3,348 /
13,453 / 53,678 Gaussians at 64² / 128² / 256².
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from avatars.gaussians import matrix_to_quaternion
from avatars.head.geometry import rasterize_uv

__all__ = ["UVSamples", "open_rim", "sample_uv", "surface_frames"]


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


def surface_frames(corners: Tensor, uv: Tensor, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ellipses that cover a surface as the pixels of its UV map do, however the map stretches them.

    Args:
        corners: (N, 3, 3) posed corners of the triangle under each sample.
        uv: (N, 3, 2) their texture coordinates.
        resolution: pixels along each side of the map.

    Returns:
        (N, 4) rotations wxyz that take x and y into the surface and z to its outward normal, (N, 2) half axes of one
        pixel's ellipse in metres, and (N, 3) the normals.
    """
    edges = (corners[:, 1:] - corners[:, :1]).transpose(1, 2)  # (N, 3, 2)
    uv_edges = (uv[:, 1:] - uv[:, :1]).transpose(1, 2)  # (N, 2, 2)
    pixel = (
        edges @ torch.linalg.pinv(uv_edges) / resolution
    )  # (N, 3, 2): the surface moves so far in one pixel
    normals = nn.functional.normalize(torch.linalg.cross(edges[..., 0], edges[..., 1]), dim=-1)
    axes, lengths, _ = torch.linalg.svd(pixel, full_matrices=False)  # (N, 3, 2), (N, 2)
    # A triangle that the map folds to nothing would get an ellipse of any length.
    lengths = lengths.clamp(max=4 * float(lengths.median()))
    first = axes[..., 0]
    second = torch.linalg.cross(normals, first)
    return matrix_to_quaternion(torch.stack([first, second, normals], -1)), lengths, normals


def open_rim(faces: Tensor, boundary: Tensor | None) -> Tensor | None:
    """The triangles that get no Gaussians because they show the inside of a head that is open below.

    FLAME is open at the neck, and the authors drop the pixels of its rim. The built-in head is closed there by a cap,
    which is a surface like any other: pictures from below show it.

    Args:
        faces: (F, 3) triangles of the head.
        boundary: (F,) bool, its region called "boundary", or None where it has none.

    Returns:
        `boundary` where one of its edges belongs to a single triangle, None otherwise.
    """
    if boundary is None or not bool(boundary.any()):
        return None
    pairs = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(dim=1).values  # (3F, 2)
    _, which, count = pairs.unique(dim=0, return_inverse=True, return_counts=True)
    alone = (count[which] == 1).view(3, -1).any(0)
    return boundary if bool((alone & boundary).any()) else None
