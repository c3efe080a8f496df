"""The position prior: DUSt3R over all pairs of an input set, aligned to its cameras."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor
from torch.nn import functional as F

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.priors.alignment import PairMaps, align, check_overlap
from avatars.priors.dust3r import PATCH, DUSt3R

__all__ = ["DUSt3RPrior", "pair_maps"]

LARGEST = 6e4
"""Positions and confidence are kept in 16 bits; beyond this they mean nothing anyway."""


class DUSt3RPrior:
    """A `PositionPrior`.

    Args:
        network: DUSt3R or MASt3R.
        kind: "dust3r" or "mast3r".
        batch: pairs that go through the decoders together.
    """

    def __init__(self, network: DUSt3R, kind: str = "dust3r", batch: int = 1) -> None:
        self.network, self.batch = network, batch
        self.name = f"{kind}:{network.sha256[:8]}"

    @torch.no_grad()
    def __call__(
        self, images: Tensor | Sequence[Tensor], cameras: Cameras, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Positions (N, 3, H, W) and confidence (N, 1, H, W), as `PositionPrior`.

        `images` may also be a list of N pictures (3, H, W).

        Pictures whose longer side is not what the network was trained on are resized to it, with their
        cameras; a 512 x 512 picture stays as it is (the published loader would crop it).

        Raises:
            UserError: one picture, pictures of mixed sizes or as many as there are no cameras of, cameras that do
                not see each other, sides that are no multiples of 16 pixels
                after resizing, or pairs that contradict the cameras.
        """
        if len(images) < 2:
            raise UserError(
                "DUSt3R's position maps need at least two pictures of an input set: one picture does not tell the "
                "distance. Use the depth prior, or none."
            )
        images = stacked(images, len(cameras))
        height, width = images.shape[-2:]
        check_overlap(cameras, (height, width))
        resized, scaled = resize(images, cameras, self.network.size)
        there = None if masks is None else F.interpolate(masks, resized.shape[-2:], mode="nearest-exact")
        aligned = align(pair_maps(self.network, resized, self.batch), scaled, there)
        if resized.shape == images.shape:
            positions, confidence = aligned.positions, aligned.confidence
        else:
            # Depths are picked, not mixed, so that no point floats between the head and what is behind it.
            depth = F.interpolate(aligned.depth, (height, width), mode="nearest-exact")
            positions = cameras.unproject(depth)
            confidence = F.interpolate(aligned.confidence, (height, width), mode="nearest-exact")
        if masks is not None:
            confidence = torch.where(masks > 0, confidence, torch.ones_like(confidence))
        return positions.clamp(-LARGEST, LARGEST), confidence.clamp(1, LARGEST)


def pair_maps(network: DUSt3R, images: Tensor, batch: int = 1) -> PairMaps:
    """DUSt3R over all ordered pairs of pictures; every picture goes through the encoder once.

    Args:
        network: on the device of `images`.
        images: (N, 3, H, W) float sRGB in [0, 1]; H and W multiples of 16.
        batch: pictures, or pairs, at a time.
    """
    pairs = list(permutations(range(len(images)), 2))
    encoded = [network.encode(images[start : start + batch]) for start in range(0, len(images), batch)]
    tokens = torch.cat([part.tokens for part in encoded])
    everything = type(encoded[0])(tokens, encoded[0].grid)
    points, confidence = [], []
    for start in range(0, len(pairs), batch):
        first, second = zip(*pairs[start : start + batch], strict=True)
        pair = network.decode(everything[list(first)], everything[list(second)])
        points.append(torch.stack([pair.points1, pair.points2_in_1], 1))
        confidence.append(torch.stack([pair.confidence1, pair.confidence2], 1))
    return PairMaps(pairs, torch.cat(points), torch.cat(confidence))


def stacked(images: Tensor | Sequence[Tensor], cameras: int) -> Tensor:
    """Pictures as one tensor (N, 3, H, W).

    Raises:
        UserError: they differ in size, or their number is not that of the cameras.
    """
    if len(images) != cameras:
        raise UserError(
            f"There are {len(images)} pictures and {cameras} cameras; each picture needs its own."
        )
    if isinstance(images, Tensor):
        return images
    for number, image in enumerate(images):
        if image.shape != images[0].shape:
            raise UserError(
                f"Picture {number} is {tuple(image.shape)} and picture 0 is {tuple(images[0].shape)}; crop or resize "
                "them to one size, with their cameras."
            )
    return torch.stack(list(images))


def resize(images: Tensor, cameras: Cameras, side: int) -> tuple[Tensor, Cameras]:
    """Pictures and cameras with the longer side at `side` pixels.

    Raises:
        UserError: the shorter side would be no multiple of 16.
    """
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    new = (round(height * scale), round(width * scale))
    if new[0] % PATCH or new[1] % PATCH:
        raise UserError(
            f"Pictures of {height} x {width} become {new[0]} x {new[1]} for DUSt3R, whose sides must be multiples "
            f"of {PATCH}; crop them to another shape, for example a square."
        )
    if new == (height, width):
        return images, cameras
    shrink = scale < 1
    images = F.interpolate(images, new, mode="bicubic", align_corners=False, antialias=shrink).clamp(0, 1)
    return images, cameras.resize(new[1] / width, new[0] / height)
