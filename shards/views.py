"""Which cameras to look through: k-farthest sampling on view directions (Avat3r, section on training)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.draws import Draws

__all__ = ["facing", "k_farthest", "view_directions"]


def view_directions(world_to_camera: ArrayLike) -> NDArray[np.float64]:
    """Unit directions (..., V, 3) from the head's origin to the cameras with matrices (..., V, 4, 4) in the
    head frame.
    """
    matrices = np.asarray(world_to_camera, dtype=np.float64)
    centers = -np.einsum("...ij,...i->...j", matrices[..., :3, :3], matrices[..., :3, 3])
    return centers / np.linalg.norm(centers, axis=-1, keepdims=True)


def facing(directions: ArrayLike, max_degrees: float) -> NDArray[np.bool_]:
    """Which of the directions (..., V, 3) are at most `max_degrees` away from straight before the face
    (+z).
    """
    return np.asarray(directions)[..., 2] >= np.cos(np.radians(max_degrees)) - 1e-12


def k_farthest(
    directions: ArrayLike,
    count: int,
    k: int,
    draws: Draws,
    allowed: ArrayLike | None = None,
    repeat: bool = False,
) -> list[int]:
    """Draws `count` cameras, different ones unless told otherwise, that look from well spread directions.

    The first is drawn uniformly. Each further one is drawn uniformly among the `k` cameras whose smallest
    angle to those chosen so far is largest, so `k=1` is farthest-point sampling and a large `k` is uniform
    sampling.

    Args:
        directions: (V, 3) unit vectors from the head to the cameras, or (count, V, 3) when the i-th pick
            looks at a head that is turned otherwise (pictures of different timesteps).
        count: how many cameras to draw.
        k: how many of the farthest cameras to draw among.
        draws: the source of randomness.
        allowed: (V,) or (count, V) which cameras may be drawn; all when None.
        repeat: whether a camera may be drawn again, for heads that turn before few cameras.

    Returns:
        Indices of the cameras in the order drawn.

    Raises:
        ValueError: fewer than `count` cameras are allowed.
    """
    towards = np.asarray(directions, dtype=np.float64)
    towards = np.broadcast_to(towards, (count, *towards.shape[-2:]))
    usable = np.ones(towards.shape[:2], bool) if allowed is None else np.asarray(allowed, bool)
    usable = np.broadcast_to(usable, towards.shape[:2])
    chosen: list[int] = []
    for i in range(count):
        free = [v for v in np.flatnonzero(usable[i]).tolist() if repeat or v not in chosen]
        if not free:
            raise ValueError(f"only {i} of {count} cameras could be drawn: too few are allowed")
        if chosen:
            picked = np.stack([towards[j, v] for j, v in enumerate(chosen)])
            nearest = np.arccos(np.clip(towards[i, free] @ picked.T, -1, 1)).min(axis=1)
            # a stable sort on rounded angles: the last bit of a matrix product must not decide a draw
            free = [free[j] for j in np.argsort(-np.round(nearest, 9), kind="stable")[:k]]
        chosen.append(draws.choice(free))
    return chosen
