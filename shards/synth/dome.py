"""Camera rigs: a dome like Ava-256's with 80 cameras, and an arc like NeRSemble's with 16.

OpenCV axes, metres, world-to-camera; the studio frame is the head frame of a head at rest.

Published of Ava-256: 80 cameras a subject out of a dome of 172, and one calibration, camera 400940 of the sample data.
Taken from it: its place, direction and principal point as they are (one of our 80 is that camera), and its focal length
and distance for all others. The other 79 positions are not in any published file that we have and are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError

__all__ = ["RIGS", "Rig", "look_at", "rig"]

Array = NDArray[np.float64]

TARGET = np.array([0.0, -0.010, 0.0])  # the middle of a head with neck and hair
EXTENT = 0.31  # metres that a picture of the nersemble rig spans at the head

# Camera 400940: millimetres, pixels of a picture 2,668 wide; world axes x to the subject's left, y down, z backwards.
NATIVE_WIDTH = 2668
GOLDEN_FOCAL = np.array([10355.0888, 10348.6305])
GOLDEN_PRINCIPAL = np.array([1413.0679, 1783.6005])
GOLDEN_CENTRE = np.array([493.3398, -968.1090, 926.9017])
GOLDEN_TRANSLATION = np.array([-854.7404, 576.3865, 988.4146])
GOLDEN_FORWARD = np.array([-0.481672, 0.870695, 0.099408])  # third row of its rotation
MEAN_HEAD = np.array([-60.4, 29.5, 993.3])  # where the data set's heads are on average
MEAN_HEAD_SEEN = np.array([-41.0451, 23.6707, 1141.9349])  # the same point in the camera's axes
DOME_RADIUS = float(np.linalg.norm(GOLDEN_CENTRE - MEAN_HEAD)) / 1000  # 1.143 m


@dataclass(frozen=True)
class Rig:
    """K (C, 3, 3) in pixels of a square picture, world_to_camera (C, 4, 4), ids (C)."""

    K: Array
    world_to_camera: Array
    ids: list[str]


def look_at(centre: Array, target: Array) -> Array:
    """World-to-camera (4, 4) of a camera that is upright (world +y is up)."""
    forward = (target - centre) / np.linalg.norm(target - centre)
    up = np.array([0.0, 1.0, 0.0]) if abs(forward[1]) < 0.99 else np.array([0.0, 0.0, -1.0])
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = rotation, -rotation @ centre
    return out


def _directions(count: int) -> Array:
    """Unit directions (count, 3) from the head: two thirds within 75° of straight ahead, the rest around and behind.

    Elevations run from 35° below to 65° above; a low-discrepancy sequence keeps neighbours apart, and the order is by
    farthest point, so that any leading part of the list is spread over the dome too. The first looks straight on.
    """
    k = np.arange(count * 4)
    a, b = (k * 0.7548776662466927 + 0.5) % 1, (k * 0.5698402909980532 + 0.5) % 1  # R2 sequence
    side = 2 * a - 1
    azimuth = np.where(
        np.abs(side) < 0.68, side / 0.68 * 75, np.sign(side) * (75 + (np.abs(side) - 0.68) / 0.32 * 100)
    )
    elevation = -35 + 100 * b**1.15
    azimuth, elevation = np.radians(azimuth), np.radians(elevation)
    pool = np.stack(
        [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)], axis=1
    )[:count]
    pool[0] = (0.0, 0.05, np.sqrt(1 - 0.05**2))
    chosen = [0]
    distance = np.linalg.norm(pool - pool[0], axis=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(pool - pool[chosen[-1]], axis=1))
    return pool[chosen]


def golden_camera(size: int) -> tuple[Array, Array]:
    """Ava-256's published camera: K (3, 3) of the square crop around the head, world-to-camera (4, 4) in the studio.

    The crop is as wide as the published picture and centred on the head's projection, as readers of the data cut it.
    """
    # The rows of R from what is known of it: R c = -t, and where the head's centre is seen.
    known = np.stack([GOLDEN_CENTRE, MEAN_HEAD, GOLDEN_FORWARD])
    first = np.linalg.solve(known, [-GOLDEN_TRANSLATION[0], (MEAN_HEAD_SEEN - GOLDEN_TRANSLATION)[0], 0.0])
    first /= np.linalg.norm(first)
    rotation = np.stack([first, np.cross(GOLDEN_FORWARD, first), GOLDEN_FORWARD])
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3] = rotation @ np.diag([1.0, -1.0, -1.0])  # the studio has y up and z forward
    world_to_camera[:3, 3] = MEAN_HEAD_SEEN / 1000 - world_to_camera[:3, :3] @ TARGET
    head = GOLDEN_FOCAL * MEAN_HEAD_SEEN[:2] / MEAN_HEAD_SEEN[2] + GOLDEN_PRINCIPAL
    K = np.eye(3)
    K[0, 0], K[1, 1] = GOLDEN_FOCAL / NATIVE_WIDTH * size
    K[:2, 2] = (GOLDEN_PRINCIPAL - head + NATIVE_WIDTH / 2) / NATIVE_WIDTH * size
    return K, world_to_camera


def dome(views: int, size: int) -> Rig:
    """The leading `views` cameras of the 80-camera dome (more when asked), about 1.14 m from the head."""
    count = max(views, 80)
    directions = _directions(count)
    rng = np.random.default_rng(256)  # the rig is the same for every capture, as a real one is
    distance = DOME_RADIUS * rng.uniform(0.97, 1.03, count)
    zoom = rng.uniform(0.99, 1.01, count)
    shift = rng.uniform(-0.004, 0.004, (count, 2))
    focal = GOLDEN_FOCAL.mean() / NATIVE_WIDTH
    out = _rig(directions, distance, focal * zoom, shift, size, [f"c{i:02d}" for i in range(count)])
    K, pose = golden_camera(size)
    direction = -pose[:3, :3].T @ pose[:3, 3] - TARGET
    nearest = int((directions @ direction).argmax())
    out.K[nearest], out.world_to_camera[nearest] = K, pose
    return Rig(out.K[:views], out.world_to_camera[:views], out.ids[:views])


def nersemble(views: int, size: int) -> Rig:
    """Up to 16 cameras on a frontal arc, about 95° wide and 35° high, like NeRSemble's."""
    if views > 16:
        raise UserError(f"the nersemble rig has 16 cameras, not {views}; ask for --views 16 or the dome")
    azimuth = np.radians(np.linspace(-47, 47, 8)).repeat(2)
    elevation = np.radians(np.tile([-12.0, 22.0], 8) + np.resize([0.0, 0.0, 4.0, 4.0], 16))
    directions = np.stack(
        [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)], axis=1
    )
    order = np.argsort(np.abs(azimuth), kind="stable")[:views]
    ids = [f"2222{i:05d}" for i in range(views)]
    return _rig(
        directions[order], np.full(views, 1.0), np.full(views, 1 / EXTENT), np.zeros((views, 2)), size, ids
    )


def _rig(directions: Array, distance: Array, focal: Array, shift: Array, size: int, ids: list[str]) -> Rig:
    """Cameras (n) that look at the target; `focal` (n) and `shift` (n, 2) are in widths of the picture."""
    n = len(directions)
    K = np.zeros((n, 3, 3))
    K[:, 0, 0] = K[:, 1, 1] = size * focal
    K[:, :2, 2] = size / 2 + shift * size
    K[:, 2, 2] = 1
    poses = [look_at(TARGET + d * r, TARGET) for d, r in zip(directions, distance, strict=True)]
    return Rig(K, np.stack(poses), ids)


RIGS = {"dome": dome, "nersemble": nersemble}


def rig(name: str, views: int, size: int) -> Rig:
    """The named rig for square pictures of `size` pixels.

    Raises:
        UserError: the rig is unknown or has fewer cameras.
    """
    if name not in RIGS:
        raise UserError(f"unknown camera rig {name!r}; there are {', '.join(sorted(RIGS))}")
    return RIGS[name](views, size)
