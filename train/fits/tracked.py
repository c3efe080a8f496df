"""Whether a person's pictures and the head that was tracked in them belong together."""

from __future__ import annotations

import torch
from torch import Tensor

from avatars.errors import UserError
from avatars.head.mesh import HeadMesh
from train.fits.mouth import lip_points
from train.fits.pictures import FitPictures

__all__ = ["check_tracking", "tracked_identity"]

MOST_LOOKED_AT = 64
"""Pictures that are looked at; evenly spread where there are more."""
INNER_FACE = slice(17, 68)
"""Landmarks inside the face: brows, nose, eyes, mouth. Those of the jaw lie on the edge of a mask."""
FACING = 0.05
"""Least cosine between the way to the camera and the way out of the face: 87 degrees. An input picture from 80 degrees
off the middle of the head, the furthest that shards have by default, is 85 degrees off the face."""
ON_MASK = 0.75
"""Share of a face's landmarks that must fall on the mask."""


def tracked_identity(inputs: FitPictures, head: str, method: str) -> Tensor:
    """The person's identity code (I,), after a look at whether these pictures are tracked with this head.

    Args:
        inputs: the pictures.
        head: name of the head that the fit stands on.
        method: for the sentence.

    Raises:
        UserError: they are not, or something that belongs to every picture is missing for some.
    """
    who = inputs.subject
    if inputs.identity is None or inputs.head is None:
        raise UserError(
            f"{method} needs a tracked head and the pictures of {who} have none (no identity code); track the capture "
            "with a parametric head, or use a method that needs no tracking, such as avat3r."
        )
    if inputs.head != head:
        raise UserError(
            f"The pictures of {who} are tracked with the head {inputs.head!r} and this fit of {method} stands on "
            f"{head!r}; track them with that head, or fit with one made for theirs."
        )
    parts = (len(inputs.masks), len(inputs.cameras), len(inputs.expressions))
    if len(inputs) == 0 or any(count != len(inputs) for count in parts):
        raise UserError(
            f"{who} has {len(inputs)} pictures, {parts[0]} masks, {parts[1]} cameras and {parts[2]} expression codes; "
            "a fit needs one of each for every picture."
        )
    return inputs.identity


def face_points(head: HeadMesh) -> Tensor:
    """Vertices (L,) inside the face: landmarks, or the lips of a head that has none.

    Raises:
        UserError: the head has neither.
    """
    return head.landmarks68[INNER_FACE] if len(head.landmarks68) else lip_points(head)[0]


def check_tracking(inputs: FitPictures, head: HeadMesh) -> None:
    """Refuses pictures that a fit would only be spoiled by.

    Args:
        inputs: the pictures, on the head's device.
        head: the head that was tracked in them.

    Raises:
        UserError: a mask is empty, no picture shows the face, or the tracked face is not where the masks are.
    """
    who, identity = inputs.subject, inputs.identity
    if identity is None:
        raise ValueError("these pictures have no tracked head")
    chosen = torch.linspace(0, len(inputs) - 1, min(len(inputs), MOST_LOOKED_AT)).long().unique().tolist()
    _, masks = inputs.take(chosen)
    empty = (masks.flatten(1).amax(1) < 0.5).nonzero()[:, 0].tolist()
    if empty:
        raise UserError(
            f"The mask of picture {chosen[empty[0]]} of {who} is empty; make its mask again, or leave the picture out."
        )
    codes = inputs.expressions[chosen]
    vertices = head.vertices(identity.expand(len(codes), -1), codes)
    landmarks = vertices[:, face_points(head)]  # (P, L, 3)
    height, width = inputs.size
    shares = []
    for place, picture in enumerate(chosen):
        camera, points = inputs.cameras[picture], landmarks[place]
        towards = torch.nn.functional.normalize(camera.centers[0] - points.mean(0), dim=-1)
        pixels, depth = camera.project(points)
        x, y = pixels[0].floor().long().unbind(-1)
        inside = (depth[0] > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
        if float(towards[2]) < FACING or float(inside.float().mean()) < 0.5:
            continue
        on_mask = masks[place, 0, y.clamp(0, height - 1), x.clamp(0, width - 1)] > 0.5
        shares.append(float((on_mask & inside).float().mean()))
    if not shares:
        raise UserError(
            f"The face of {who} is in none of the {len(inputs)} pictures: all show it from behind or from outside the "
            "picture, or the cameras or head poses belong to other pictures."
        )
    share = sum(shares) / len(shares)
    if share < ON_MASK:
        raise UserError(
            f"The tracking of {who} does not reproject: only {share:.0%} of the face's landmarks fall on the "
            "mask. Its cameras, head poses, identity code or masks belong to other pictures."
        )
