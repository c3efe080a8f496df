"""One posed person and one camera to a picture, a mask and a depth map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.synth.raster import depth_buffer, draw
from shards.synth.subject import Posed

__all__ = ["Picture", "encode_srgb", "render"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Picture:
    """image (H, W, 3) uint8 sRGB over the studio's dark background, mask (H, W) uint8 coverage, depth (H, W) metres."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    depth: NDArray[np.float32]


# Encoding of linear light in sRGB, by table: 4,096 steps are finer than 8 bits everywhere but the deepest black.
_LINEAR = np.linspace(0, 1, 4096)
_SRGB = np.where(_LINEAR <= 0.0031308, 12.92 * _LINEAR, 1.055 * _LINEAR ** (1 / 2.4) - 0.055)
_TABLE = np.round(_SRGB * 255).astype(np.uint8)
HIDDEN = 0.012  # of 1/z: hair 1.5 cm behind something else, seen from a metre, is not drawn
BACKGROUND = np.array([0.010, 0.010, 0.012], np.float32)  # linear


def encode_srgb(linear: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Linear light as 8-bit sRGB, clipped at white."""
    return _TABLE[np.clip(linear * 4095 + 0.5, 0, 4095).astype(np.int32)]


def render(posed: Posed, K: Array, world_to_camera: Array, size: int, *, samples: int = 3) -> Picture:
    """Draw a person with `samples`² samples a pixel (odd, so that the middle one is the pixel centre).

    Args:
        posed: the person in the head frame.
        K: (3, 3) in pixels.
        world_to_camera: (4, 4) for points in the head frame.
        size: height and width.
        samples: samples a pixel along each axis.
    """
    rotation, translation = (
        world_to_camera[:3, :3].astype(np.float32),
        world_to_camera[:3, 3].astype(np.float32),
    )
    camera = posed.points @ rotation.T + translation
    inverse = (1 / camera[:, 2]).astype(np.float32)
    x = (camera[:, 0] * inverse * np.float32(K[0, 0]) + np.float32(K[0, 2])) * samples
    y = (camera[:, 1] * inverse * np.float32(K[1, 1]) + np.float32(K[1, 2])) * samples
    buffer = np.zeros((size * samples, size * samples), np.float32)
    triangle = np.full(buffer.shape, -1, np.int32)
    depth_buffer(x, y, inverse, posed.faces, posed.n_head_faces, HIDDEN, buffer, triangle)
    linear, coverage = np.empty((size, size, 3), np.float32), np.empty((size, size), np.float32)
    centre = (-rotation.T @ translation).astype(np.float32)
    draw(
        buffer, triangle, samples, x, y, inverse, posed.faces, posed.uv, posed.material, posed.points, posed.normals,
        posed.diffuse, posed.tint, posed.gloss, posed.texture, posed.lamp_directions, posed.lamp_colors, centre,
        linear, coverage,
    )  # fmt: skip
    linear += (1 - coverage[..., None]) * BACKGROUND
    image = encode_srgb(linear)
    middle = buffer[samples // 2 :: samples, samples // 2 :: samples]
    depth = np.divide(1, middle, out=np.zeros_like(middle), where=middle > 0)
    return Picture(image, np.round(coverage * 255).astype(np.uint8), depth)
