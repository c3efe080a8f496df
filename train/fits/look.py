"""The first look of Gaussians on a surface: size from their neighbours, direction from it, colour from the
pictures.

The paper starts grey, round and nearly transparent, which minutes of video forgive; four pictures leave much
of the head unseen, so these starts are ours: an opaque skin whose unseen parts borrow from the nearest seen
ones.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from avatars.cameras import Cameras

__all__ = ["neighbour_distance", "sample_colors", "spread_colors"]

MIN_COSINE = 0.2
"""A surface seen at a more grazing angle gives no colour: its pixels mix with what is beside it."""


def neighbour_distance(points: Tensor) -> Tensor:
    """Root mean square distance of each point (N, 3) to its three nearest neighbours, (N,)."""
    cloud = points.detach().cpu().double().numpy()
    distance, _ = cKDTree(cloud).query(cloud, k=min(4, len(cloud)))
    mean_square = np.square(distance[:, 1:]).mean(1)
    return torch.from_numpy(np.sqrt(np.maximum(mean_square, 1e-7))).to(points)


def sample_colors(
    centers: Tensor,
    normals: Tensor,
    images: Tensor,
    masks: Tensor,
    depths: Tensor,
    cameras: Cameras,
    slack: float,
) -> tuple[Tensor, Tensor]:
    """Colours of surface points as the pictures show them.

    Args:
        centers: (P, N, 3) places of the points in each picture.
        normals: (P, N, 3) unit, out of the surface.
        images: (P, 3, H, W).
        masks: (P, 1, H, W).
        depths: (P, 1, H, W) camera z of the surface as seen in each picture, 0 where there is none.
        cameras: P cameras.
        slack: metres that a point may lie behind the seen surface and still be called visible.

    Returns:
        (N, 3) colours, and (N,) weights: the sum of the cosines' fourth powers, 0 for a point never
        seen.
    """
    height, width = images.shape[-2:]
    scale = torch.tensor([2 / width, 2 / height]).to(centers)
    colors, weights = torch.zeros_like(centers[0]), torch.zeros_like(centers[0, :, 0])
    for index in range(len(images)):
        camera = cameras[index]
        pixels, depth = camera.project(centers[index])
        grid = (pixels * scale - 1)[:, None]  # (1, 1, N, 2): pixel 0.5 is the centre of the first one
        layers = torch.cat([images[index], masks[index], depths[index]])[None]
        seen = nn.functional.grid_sample(layers, grid, align_corners=False)[0, :, 0].T  # (N, 5)
        towards = nn.functional.normalize(camera.centers - centers[index], dim=-1)
        cosine = (towards * normals[index]).sum(-1)
        visible = (
            (cosine > MIN_COSINE) & (depth[0] > 0) & (seen[:, 3] > 0.99) & (depth[0] < seen[:, 4] + slack)
        )
        weight = torch.where(visible, cosine**4, 0.0)  # the picture that looks straightest counts most
        colors = colors + weight[:, None] * seen[:, :3]
        weights = weights + weight
    return colors / weights.clamp_min(1e-6)[:, None], weights


def spread_colors(points: Tensor, colors: Tensor, weights: Tensor, mirror: bool) -> Tensor:
    """Gives points that no picture shows the colour of those nearest to them.

    Args:
        points: (N, 3) on the neutral head, whose plane of symmetry is x = 0.
        colors: (N, 3).
        weights: (N,), 0 for a point never seen.
        mirror: also look on the other side of the face, which is often the better guess.

    Returns:
        (N, 3); grey everywhere when nothing was seen.
    """
    seen = weights > 0
    if not bool(seen.any()):
        return torch.full_like(colors, 0.5)
    cloud = points.detach().cpu().double().numpy()
    known = cloud[seen.cpu().numpy()]
    known_colors = colors[seen].cpu().double().numpy()
    if mirror:
        # A mirrored point counts as a little further away, so that a seen neighbour on the same side wins a
        # tie.
        known = np.concatenate([known, known * [-1, 1, 1]])
        known_colors = np.concatenate([known_colors, known_colors])
    unseen = ~seen.cpu().numpy()
    if not unseen.any():
        return colors
    distance, index = cKDTree(known).query(cloud[unseen], k=min(8, len(known)))
    distance, index = distance.reshape(unseen.sum(), -1), index.reshape(unseen.sum(), -1)
    if mirror:
        distance = distance + 0.005 * (index >= len(known) // 2)
    nearness = 1 / (distance + 1e-4)
    filled = (known_colors[index] * nearness[..., None]).sum(1) / nearness.sum(1, keepdims=True)
    result = colors.clone()
    result[~seen] = torch.from_numpy(filled).to(colors)
    return result
