"""Studio light: an environment of soft area lights, and how much of it reaches each vertex."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.synth.raster import depth_buffer, visibility

__all__ = ["Bake", "Light", "bake", "draw_light", "sphere"]

Floats = NDArray[np.float32]

N_DIRECTIONS = 48
SHADOW_SIZE = 192
SHADOW_HALF = 0.22  # metres
# Light spreads under skin before it leaves again, red farthest: a wrapped cosine stands in for it.
SKIN_WRAP = np.array([0.32, 0.16, 0.10], np.float32)


def sphere(n: int = N_DIRECTIONS) -> Floats:
    """Fibonacci directions over the sphere, (n, 3), y up."""
    k = np.arange(n) + 0.5
    y, turn = 1 - 2 * k / n, np.pi * (1 + 5**0.5) * k
    radius = np.sqrt(1 - y * y)
    return np.stack([radius * np.cos(turn), y, radius * np.sin(turn)], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Light:
    """Light of one studio, in the studio frame.

    Attributes:
        radiance: (D, 3) radiance arriving from the D directions of `sphere()`, ambient and lamps together.
        lamps: (L, 3) unit directions towards the area lights, for highlights.
        colors: (L, 3) their irradiance / π.
    """

    radiance: Floats
    lamps: Floats
    colors: Floats


def draw_light(rng: np.random.Generator) -> Light:
    """A key light, a fill, sometimes rims and a top light, over a dim dome; exposed for a face of albedo 0.5."""
    directions = sphere()
    key = rng.uniform(-65, 65)
    lamps = [(key, rng.uniform(10, 55), 1.0, rng.uniform(0.25, 0.5))]
    lamps.append((-np.sign(key) * rng.uniform(25, 75), rng.uniform(-10, 35), rng.uniform(0.25, 0.7), 0.5))
    if rng.random() < 0.7:
        lamps.append(
            (rng.uniform(120, 240), rng.uniform(10, 50), rng.uniform(0.4, 1.0), rng.uniform(0.2, 0.4))
        )
    if rng.random() < 0.5:
        lamps.append((rng.uniform(-180, 180), rng.uniform(65, 90), rng.uniform(0.3, 0.8), 0.5))
    toward, colors, radiance = [], [], np.zeros((len(directions), 3))
    for azimuth, elevation, power, width in lamps:
        a, e = np.radians(azimuth), np.radians(elevation)
        d = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
        warmth = np.clip(rng.normal(0, 0.05), -0.05, 0.1)
        color = power * np.array([1 + warmth, 1.0, 1 - warmth])
        lobe = np.exp((directions @ d - 1) / width**2)
        radiance += lobe[:, None] / lobe.sum() * color * len(directions) / 4
        toward.append(d)
        colors.append(color)
    dome = rng.uniform(0.18, 0.45) * np.array([0.97, 1.0, 1.05]) * (0.75 + 0.25 * directions[:, 1:2])
    radiance += dome
    # Exposure: what a Lambertian face that looks forward would receive, on average over the front.
    front = np.array([[0, 0.1, 1], [0.6, 0.1, 0.8], [-0.6, 0.1, 0.8]])
    front /= np.linalg.norm(front, axis=1, keepdims=True)
    received = (np.maximum(front @ directions.T, 0) @ radiance).mean() * 4 / len(directions)
    gain = rng.uniform(0.78, 1.0) / received
    return Light(
        (radiance * gain).astype(np.float32),
        np.array(toward, np.float32),
        np.array(colors, np.float32) * np.float32(gain),
    )


@dataclass(frozen=True)
class Bake:
    """Light at the vertices: `diffuse` (V, 3) is irradiance / π, `gloss` (V, L) the visibility of each lamp."""

    diffuse: Floats
    gloss: Floats


def bake(
    light: Light,
    studio_to_head: Floats,
    points: Floats,
    normals: Floats,
    faces: NDArray[np.int32],
    n_head: int,
) -> Bake:
    """Cast the light on a head from all directions by shadow maps.

    Args:
        light: in the studio frame.
        studio_to_head: (3, 3) rotation.
        points: (V, 3) head frame; the first n_head are skin and the like, the rest hair.
        normals: (V, 3) unit, outwards (for hair: of the scalp below it).
        faces: (F, 3) everything that casts shadows.
        n_head: number of vertices that are not hair.
    """
    directions = sphere() @ studio_to_head.T
    lamps = light.lamps @ studio_to_head.T
    seen = np.empty(len(points), np.float32)
    diffuse = np.zeros((len(points), 3), np.float32)
    bounce = np.zeros(len(points), np.float32)
    gloss = np.zeros((len(points), len(lamps)), np.float32)
    lobes = np.exp((lamps @ directions.T - 1) / 0.25**2)
    lobes /= lobes.sum(axis=1, keepdims=True)
    share = np.float32(4 / len(directions))  # ∫ cosine / π over the sphere sums to one
    wrap = np.where(np.arange(len(points))[:, None] < n_head, SKIN_WRAP, np.float32(0.6))
    for k, d in enumerate(directions):
        right = np.cross([0.0, 1.0, 0.0] if abs(d[1]) < 0.9 else [1.0, 0.0, 0.0], d)
        right = (right / np.linalg.norm(right)).astype(np.float32)
        up = np.cross(d, right).astype(np.float32)
        buffer = np.full((SHADOW_SIZE, SHADOW_SIZE), -9, np.float32)
        triangle = np.empty((SHADOW_SIZE, SHADOW_SIZE), np.int32)
        scale = np.float32(SHADOW_SIZE / (2 * SHADOW_HALF))
        x, y = (
            (points @ right + np.float32(SHADOW_HALF)) * scale,
            (np.float32(SHADOW_HALF) - points @ up) * scale,
        )
        depth_buffer(x, y, points @ d, faces, 0, 0.02, buffer, triangle)
        visibility(points, right, up, d, SHADOW_HALF, buffer, 0.004, seen)
        seen[n_head:] = 0.25 + 0.75 * seen[n_head:]  # a lock hides what is behind it only in part
        cosine = (normals @ d)[:, None]
        wrapped = np.maximum((cosine + wrap) / (1 + wrap) ** 2, 0)
        diffuse += seen[:, None] * wrapped * light.radiance[k] * share
        bounce += (1 - seen) * np.maximum(cosine[:, 0], 0) * share
        gloss += seen[:, None] * lobes[:, k].astype(np.float32)
    # What is hidden sees other skin, not black: a little of the mean light comes back, reddened.
    back = light.radiance.mean(axis=0) * np.array([0.30, 0.18, 0.14], np.float32)
    return Bake(diffuse + bounce[:, None] * back, gloss)
