"""Where the mouth is in a picture, from the tracked head instead of a face parser."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.head.mesh import HeadMesh

__all__ = ["lip_points", "mouth_masks"]

OUTER_LIPS = slice(48, 60)
"""Of the 68 landmarks, in order around the mouth."""
MARGIN = 1.25
"""Their outline is widened by this about its centre: landmarks lie on the lips, a parser's mask goes to their edge."""


def lip_points(head: HeadMesh) -> tuple[Tensor, float]:
    """Vertices (L,) that span the mouth of a head, and by how much what they span is widened.

    They are the outer lips among its landmarks or, on a head without landmarks such as FLAME, the region "lips".

    Raises:
        UserError: the head has neither.
    """
    if len(head.landmarks68):
        return head.landmarks68[OUTER_LIPS], MARGIN
    if "lips" not in head.regions or not bool(head.regions["lips"].any()):
        raise UserError(
            "The head has no landmarks and no region 'lips' to find the mouth by; put FLAME_masks.pkl beside its model."
        )
    return head.faces[head.regions["lips"]].unique(), 1.0


def mouth_masks(lips: Tensor, cameras: Cameras, size: tuple[int, int]) -> Tensor:
    """The outline of the lips, filled, in each picture.

    A picture taken from beside or behind the head, from more than about 75 degrees off the face's axis, shows
    no mouth worth a weight and gets an empty mask. The inside of an open mouth belongs to the mask.

    Args:
        lips: (P, L, 3) points of the posed head of each picture that span its mouth, head frame, metres.
        cameras: P cameras.
        size: height and width.

    Returns:
        (P, 1, H, W) of 0 and 1.
    """
    middle = lips.mean(1)
    towards = cameras.centers - middle
    facing = towards[:, 2] / towards.norm(dim=-1)  # +z comes out of the face
    masks = torch.zeros(len(lips), 1, *size)
    for index in range(len(lips)):
        pixels, depth = cameras[index].project(lips[index])  # (1, L, 2), (1, L)
        if float(facing[index]) > 0.25 and bool((depth > 0).all()):
            points = pixels[0].double().cpu().numpy()
            try:
                outline = points[ConvexHull(points).vertices]
            except QhullError:  # less than a triangle: too far away to be seen
                continue
            canvas = Image.new("L", (size[1], size[0]))
            # Pillow's polygons have pixel centres at whole numbers, ours at halves.
            ImageDraw.Draw(canvas).polygon([(x - 0.5, y - 0.5) for x, y in outline.tolist()], fill=1)
            masks[index, 0] = torch.from_numpy(np.asarray(canvas, dtype=np.float32).copy())
    return masks.to(lips.device)
