"""Where the mouth is in a picture, from the tracked head instead of a face parser."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from avatars.cameras import Cameras

__all__ = ["OUTER_LIPS", "mouth_masks"]

OUTER_LIPS = slice(48, 60)
"""Of the 68 landmarks, in order around the mouth."""
MARGIN = 1.25
"""The outline is widened by this about its centre: landmarks lie on the lips, a parser's mask goes to their
edge."""


def mouth_masks(landmarks: Tensor, cameras: Cameras, size: tuple[int, int]) -> Tensor:
    """The outline of the outer lips, filled, in each picture.

    A picture taken from beside or behind the head, from more than about 75 degrees off the face's axis, shows
    no mouth worth a weight and gets an empty mask. The inside of an open mouth belongs to the mask.

    Args:
        landmarks: (P, 68, 3) points of the posed head of each picture, head frame, metres.
        cameras: P cameras.
        size: height and width.

    Returns:
        (P, 1, H, W) of 0 and 1.
    """
    lips = landmarks[:, OUTER_LIPS]  # (P, 12, 3)
    middle = lips.mean(1, keepdim=True)
    outline = middle + MARGIN * (lips - middle)
    towards = cameras.centers - middle[:, 0]
    facing = towards[:, 2] / towards.norm(dim=-1)  # +z comes out of the face
    masks = torch.zeros(len(landmarks), 1, *size)
    for index in range(len(landmarks)):
        pixels, depth = cameras[index].project(outline[index])  # (1, 12, 2), (1, 12)
        if float(facing[index]) > 0.25 and bool((depth > 0).all()):
            canvas = Image.new("L", (size[1], size[0]))
            # Pillow's polygons have pixel centres at whole numbers, ours at halves.
            corners = [(float(x) - 0.5, float(y) - 0.5) for x, y in pixels[0].cpu()]
            ImageDraw.Draw(canvas).polygon(corners, fill=1)
            masks[index, 0] = torch.from_numpy(np.asarray(canvas, dtype=np.float32).copy())
    return masks.to(landmarks.device)
