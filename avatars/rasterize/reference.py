"""The reference rasterizer: plain torch, any floating type, any device, gradients by autograd. Slow.

It is the oracle that the fast back-ends are tested against, and the way out on a machine without a compiler.
The rules are gsplat's (Ye et al. 2024, arXiv 2409.06765); EWA splatting is Zwicker et al. 2001.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.gaussians import Gaussians, quaternion_to_matrix, sh_basis
from avatars.rasterize.common import (
    ALPHA_MAX,
    ALPHA_MIN,
    EPS_2D,
    EXTENT_MAX,
    FAR,
    NEAR,
    TRANSMITTANCE_MIN,
    Mode,
    Rendering,
    check_values,
)

__all__ = ["Projection", "project", "rasterize_reference"]

TILE = 16


@dataclass
class Projection:
    """The M Gaussians that one camera sees, nearest first.

    Attributes:
        index: (M,) their numbers.
        means: (M, 2) pixels.
        conics: (M, 3) upper triangle of the inverse covariances, 1/pixels².
        opacities: (M,), with the antialiasing factor where that mode is on.
        depths: (M,) camera z, metres.
        colors: (M, 3) as seen from this camera.
        radii: (M, 2) int32 half sizes of the boxes, pixels.
    """

    index: Tensor
    means: Tensor
    conics: Tensor
    opacities: Tensor
    depths: Tensor
    colors: Tensor
    radii: Tensor


def project(
    gaussians: Gaussians, K: Tensor, world_to_camera: Tensor, size: tuple[int, int], mode: Mode = "classic"
) -> Projection:
    """Projects Gaussians to one picture and drops those that cannot appear in it.

    Args:
        gaussians: N Gaussians.
        K: (3, 3) pixels.
        world_to_camera: (4, 4).
        size: height and width in pixels.
        mode: "antialiased" multiplies opacities by sqrt(det before blur / det after blur).
    """
    height, width = size
    rotation, translation = world_to_camera[:3, :3], world_to_camera[:3, 3]
    with torch.no_grad():  # what is behind the camera must not reach the divisions below
        z = gaussians.means @ rotation[2] + translation[2]
        index = ((z >= NEAR) & (z <= FAR) & (gaussians.opacities >= ALPHA_MIN)).nonzero()[:, 0]
    g = gaussians[index]

    in_camera = g.means @ rotation.T + translation  # (M, 3)
    x, y, z = in_camera.unbind(-1)
    axes = rotation @ (quaternion_to_matrix(g.quats) * g.scales[:, None, :])  # (M, 3, 3)

    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    margin_x, margin_y = 0.3 * 0.5 * width / fx, 0.3 * 0.5 * height / fy
    tx = z * (x / z).clamp(-cx / fx - margin_x, (width - cx) / fx + margin_x)
    ty = z * (y / z).clamp(-cy / fy - margin_y, (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * tx / z**2, zero, fy / z, -fy * ty / z**2], dim=-1)
    half = jacobian.unflatten(-1, (2, 3)) @ axes  # (M, 2, 3)
    covariance = half @ half.transpose(1, 2)
    a, b, c = covariance[:, 0, 0] + EPS_2D, covariance[:, 0, 1], covariance[:, 1, 1] + EPS_2D
    determinant = a * c - b * b

    opacities = g.opacities
    if mode == "antialiased":
        ratio = (covariance[:, 0, 0] * covariance[:, 1, 1] - b * b) / determinant
        positive = ratio > 0  # the square root has no slope at 0: flat Gaussians are dropped below instead
        opacities = opacities * torch.where(positive, torch.where(positive, ratio, 1.0).sqrt(), 0.0)

    means = torch.stack([fx * x / z + cx, fy * y / z + cy], dim=-1)
    with torch.no_grad():
        extent = (2 * (opacities / ALPHA_MIN).clamp(min=1).log()).sqrt().clamp(max=EXTENT_MAX)
        radii = (extent[:, None] * torch.stack([a, c], dim=-1).sqrt()).ceil()  # (M, 2)
        limit = means.new_tensor([width, height])
        seen = (means + radii > 0).all(-1) & (means - radii < limit).all(-1)
        seen &= (determinant > 0) & (opacities >= ALPHA_MIN) & (radii > 0).all(-1)
        order = seen.nonzero()[:, 0]
        order = order[z[order].argsort(stable=True)]

    if gaussians.sh_degree is None:
        colors = g.colors[order]
    else:
        center = -torch.linalg.solve(rotation, translation)
        directions = torch.nn.functional.normalize(g.means[order] - center, dim=-1)
        basis = sh_basis(gaussians.sh_degree, directions)  # (M, K)
        colors = ((basis[..., None] * g.colors[order]).sum(-2) + 0.5).clamp(min=0)
    conics = torch.stack([c, -b, a], dim=-1) / determinant[:, None]
    return Projection(
        index[order],
        means[order],
        conics[order],
        opacities[order],
        z[order],
        colors,
        radii[order].clamp(max=2**31 - 128).int(),
    )


def rasterize_reference(
    gaussians: Gaussians,
    cameras: Cameras,
    size: tuple[int, int],
    background: Tensor | None = None,
    mode: Mode = "classic",
) -> Rendering:
    """Pictures of Gaussians; the same arguments and result as `avatars.rasterize.rasterize`."""
    check_values(gaussians, background)
    pictures = []
    radii = torch.zeros(len(cameras), len(gaussians), 2, dtype=torch.int32, device=gaussians.means.device)
    for camera in range(len(cameras)):
        seen = project(
            gaussians,
            cameras.K[camera].to(gaussians.means),
            cameras.world_to_camera[camera].to(gaussians.means),
            size,
            mode,
        )
        radii[camera, seen.index] = seen.radii
        pictures.append(_composite(seen, size))
    blended = torch.stack(pictures) if pictures else gaussians.means.new_zeros(0, 5, *size)  # (C, 5, H, W)
    image, alpha = blended[:, :3], blended[:, 4:]
    if background is not None:
        image = image + (1 - alpha) * background.to(image).expand(len(cameras), 3)[:, :, None, None]
    return Rendering(image, alpha, blended[:, 3:4] / alpha.clamp(min=1e-10), radii)


def _composite(seen: Projection, size: tuple[int, int]) -> Tensor:
    """(5, H, W): colour, weighted depth and alpha, tile by tile."""
    height, width = size
    values = torch.cat([seen.colors, seen.depths[:, None]], dim=-1)  # (M, 4)
    low, high = (seen.means - seen.radii).detach(), (seen.means + seen.radii).detach()
    rows = []
    for top in range(0, height, TILE):
        in_row = ((high[:, 1] > top) & (low[:, 1] < top + TILE)).nonzero()[:, 0]
        tiles = []
        for left in range(0, width, TILE):
            chosen = in_row[(high[in_row, 0] > left) & (low[in_row, 0] < left + TILE)]
            tiles.append(_composite_tile(seen, values, chosen, (left, top), (height, width)))
        rows.append(torch.cat(tiles, dim=2))
    return torch.cat(rows, dim=1)


def _composite_tile(
    seen: Projection, values: Tensor, chosen: Tensor, corner: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """(5, h, w) of one tile; `chosen` (n,) are the Gaussians whose box meets it, nearest first."""
    x = (
        torch.arange(corner[0], min(corner[0] + TILE, size[1]), device=values.device, dtype=values.dtype)
        + 0.5
    )
    y = (
        torch.arange(corner[1], min(corner[1] + TILE, size[0]), device=values.device, dtype=values.dtype)
        + 0.5
    )
    means, (a, b, c) = seen.means[chosen], seen.conics[chosen].unbind(-1)
    dx = (x[None, :, None] - means[:, 0]).expand(len(y), len(x), -1)  # (h, w, n)
    dy = (y[:, None, None] - means[:, 1]).expand(len(y), len(x), -1)
    sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
    alpha = (seen.opacities[chosen] * torch.exp(-sigma)).clamp(max=ALPHA_MAX)
    alpha = torch.where((alpha >= ALPHA_MIN) & (sigma >= 0), alpha, 0.0)
    with torch.no_grad():  # transmittance only falls, so this ends each pixel's list once
        alive = (1 - alpha).cumprod(-1) > TRANSMITTANCE_MIN
    alpha = torch.where(alive, alpha, 0.0)
    behind = (1 - alpha).cumprod(-1)  # transmittance after each Gaussian
    before = torch.cat([behind.new_ones(len(y), len(x), 1), behind], dim=-1)
    blended = (alpha * before[..., :-1]) @ values[chosen]  # (h, w, 4)
    return torch.cat([blended, 1 - before[..., -1:]], dim=-1).permute(2, 0, 1)
