"""Tiny captures in the synthetic layout, with analytic pictures: data for tests that takes milliseconds to
make.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

DEPTH_UNIT = 6.25e-5
N_EXPRESSION = 52
CAMERA_DISTANCE = 1.0


def write_tiny_capture(
    folder: str | Path, subject: str, *, timesteps: int = 5, views: int = 8, size: int = 48, seed: int = 0
) -> Path:
    """Writes one capture of a shaded ellipsoid with eyes and a mouth; returns its folder, `folder / subject`.

    Codes 0, 1 and 2 open the mouth (and lengthen the head), lift the brows and widen the mouth; every other
    code tints the skin a little. Cameras stand on a dome around the head, the first one in front of the
    face; the head turns a little from timestep to timestep. Depth is that of the pixel's central ray.
    """
    rng = np.random.default_rng([seed, *subject.encode()])
    out = Path(folder) / subject
    radii = np.array([0.075, 0.105, 0.09]) * rng.uniform(0.9, 1.1, 3)
    skin = rng.uniform([0.6, 0.4, 0.3], [0.95, 0.75, 0.6])
    tint = rng.normal(0, 0.01, (N_EXPRESSION, 3))
    K = np.array([[3.8 * size, 0, size / 2], [0, 3.8 * size, size / 2], [0, 0, 1]])
    cameras = [
        {"id": f"c{v:02d}", "K": K.tolist(), "world_to_camera": _dome_camera(v, views).tolist()}
        for v in range(views)
    ]
    phase, speed = rng.uniform(0, 2 * np.pi, N_EXPRESSION), rng.uniform(0.5, 1.5, N_EXPRESSION)
    steps = []
    for t in range(timesteps):
        expression = 0.5 + 0.5 * np.sin(phase + speed * 2.4 * t)
        head_to_world = np.eye(4)
        head_to_world[:3, :3] = _turn(*rng.uniform(-0.15, 0.15, 2))
        head_to_world[:3, 3] = rng.uniform(-0.01, 0.01, 3)
        steps.append(
            {"id": f"{t:05d}", "expression": expression.tolist(), "head_to_world": head_to_world.tolist()}
        )
        for camera in cameras:
            to_camera = np.array(camera["world_to_camera"]) @ head_to_world
            image, mask, depth = _render(K, to_camera, size, radii, skin, expression, tint)
            for kind, picture in (("image", image), ("mask", mask), ("depth", depth)):
                path = out / kind / f"{t:05d}" / f"{camera['id']}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path, compress_level=1)
    description = {
        "schema": 1,
        "layout": "headsplat-synthetic",
        "subject": subject,
        "seed": seed,
        "size": [size, size],
        "expression_kind": "arkit-52",
        "expression_names": [f"code{i:02d}" for i in range(N_EXPRESSION)],
        "head": {"model": "makehuman", "identity": rng.normal(0, 1, 10).tolist()},
        "depth_unit": DEPTH_UNIT,
        "cameras": cameras,
        "timesteps": steps,
    }
    (out / "capture.json").write_text(json.dumps(description))
    return out


def write_tiny_captures(folder: str | Path, subjects: int = 3, **options: int) -> list[Path]:
    """Writes captures of `subjects` different people, named s00, s01, …"""
    return [write_tiny_capture(folder, f"s{i:02d}", **options) for i in range(subjects)]


def pack_tiny(
    folder: str | Path,
    *,
    subjects: int = 3,
    heldout: int = 1,
    timesteps: int = 6,
    views: int = 8,
    size: int = 48,
    input_sets: int = 2,
    seed: int = 0,
    **options: object,
) -> Path:
    """Writes tiny captures under `folder / "captures"`, packs them and returns the shard folder `folder /
    "shards"`.

    The last `heldout` subjects are held out. `options` go to `shards.pack`.
    """
    from shards import pack, read_capture

    paths = write_tiny_captures(
        Path(folder) / "captures", subjects, timesteps=timesteps, views=views, size=size, seed=seed
    )
    out = Path(folder) / "shards"
    pack(
        [read_capture(path) for path in paths],
        out,
        size=size,
        heldout=[path.name for path in paths[subjects - heldout :]],
        input_sets=input_sets,
        seed=seed,
        **options,  # type: ignore[arg-type]
    )
    return out


def _turn(yaw: float, pitch: float) -> np.ndarray:
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    return np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]) @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])


def _dome_camera(v: int, views: int) -> np.ndarray:
    """World-to-camera matrix of camera `v`: the golden spiral over the dome, most of it before the face."""
    yaw = v * np.pi * (3 - np.sqrt(5)) if v else 0.0
    polar = 1.9 * np.sqrt(v / max(views - 1, 1)) * 0.75  # angle from the face's axis, up to 82 degrees
    centre = np.array([np.sin(polar) * np.cos(yaw), 0.7 * np.sin(polar) * np.sin(yaw), np.cos(polar)])
    forward = -centre / np.linalg.norm(centre)
    centre = -CAMERA_DISTANCE * forward
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    return np.block([[rotation, -(rotation @ centre)[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]])


def _render(
    K: np.ndarray,
    head_to_camera: np.ndarray,
    size: int,
    radii: np.ndarray,
    skin: np.ndarray,
    expression: np.ndarray,
    tint: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (S, S, 3) uint8 on black, mask (S, S) uint8 (both averaged over 2 x 2 rays) and depth (S, S)
    uint16.
    """
    color, hit, _ = _trace(K, head_to_camera, size, 2, radii, skin, expression, tint)
    color = (color * hit[..., None]).reshape(size, 2, size, 2, 3).mean((1, 3))
    mask = hit.astype(float).reshape(size, 2, size, 2).mean((1, 3))
    _, hit, z = _trace(K, head_to_camera, size, 1, radii, skin, expression, tint)
    depth = np.where(hit, np.round(z / DEPTH_UNIT), 0).astype(np.uint16)
    return np.round(color * 255).astype(np.uint8), np.round(mask * 255).astype(np.uint8), depth


def _trace(
    K: np.ndarray,
    head_to_camera: np.ndarray,
    size: int,
    rays: int,
    radii: np.ndarray,
    skin: np.ndarray,
    expression: np.ndarray,
    tint: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour, hit and camera z of `rays` x `rays` rays a pixel against the head's ellipsoid."""
    radii = radii * np.array([1.0, 1.0 + 0.12 * expression[0], 1.0])
    grid = (np.arange(size * rays) + 0.5) / rays
    u, v = np.meshgrid(grid, grid)
    camera_rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)], -1)  # z = 1
    R, t = head_to_camera[:3, :3], head_to_camera[:3, 3]
    directions, origin = (
        camera_rays @ R / radii,
        -R.T @ t / radii,
    )  # in the space where the head is a unit sphere
    a, b, c = (directions**2).sum(-1), directions @ origin, origin @ origin - 1
    discriminant = b * b - a * c
    hit = discriminant > 0
    z = (
        -b - np.sqrt(np.where(hit, discriminant, 0))
    ) / a  # directions have camera z 1, so the parameter is depth
    unit = origin + z[..., None] * directions
    normal = unit / radii
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    shade = 0.55 + 0.45 * np.clip(normal @ np.array([0.3, 0.5, 0.81]), 0, 1)
    color = np.clip(skin + (expression - 0.5) @ tint, 0.1, 1) * shade[..., None]
    x, y, front = unit[..., 0], unit[..., 1], unit[..., 2] > 0

    def blob(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return np.where(front, np.exp(-(((x - cx) / rx) ** 2) - ((y - cy) / ry) ** 2), 0)[..., None]

    for side in (-0.35, 0.35):
        color = color + blob(side, 0.15, 0.14, 0.08) * (np.array([0.1, 0.1, 0.2]) - color)
        color = color + blob(side, 0.32 + 0.12 * expression[1], 0.2, 0.05) * (0.15 - color)
    mouth = blob(0.0, -0.45, 0.2 + 0.15 * expression[2], 0.05 + 0.15 * expression[0])
    color = color + mouth * (np.array([0.5, 0.05, 0.1]) - color)
    return np.clip(color, 0, 1), hit, z
