"""Hair as ribbons: locks that grow from the scalp, are combed, fall under gravity and stay outside the head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from avatars.head import ParametricHead
from avatars.head.geometry import vertex_normals
from avatars.head.makehuman import hairline
from shards.synth.skin import smoothstep

__all__ = ["STYLES", "Hair", "HairStyle", "draw_style", "grow"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class HairStyle:
    """Parameters of one haircut; lengths in metres."""

    name: str
    locks: int
    segments: int
    length: float
    spread: float  # relative deviation of the length
    width: float  # of a lock at its root
    lift: float  # 1 grows straight out of the skin, 0 lies along it
    gravity: float
    comb: tuple[float, float, float]  # head-frame direction the hair is combed to; x is away from the parting
    curl: float  # radius of curls relative to the step
    taper: float  # how much shorter sides and back are (fade)


STYLES: dict[str, HairStyle] = {
    style.name: style
    for style in (
        HairStyle("buzz", 8000, 1, 0.007, 0.2, 0.0011, 0.7, 0.0, (0, -0.2, 0.6), 0.1, 0.3),
        HairStyle("crop", 5000, 3, 0.024, 0.25, 0.0020, 0.50, 0.1, (0.2, 0.1, 0.9), 0.12, 0.55),
        HairStyle("swept back", 4200, 5, 0.050, 0.2, 0.0022, 0.30, 0.15, (0.1, 0.1, -1.0), 0.06, 0.5),
        HairStyle("side parting", 4200, 5, 0.060, 0.2, 0.0022, 0.30, 0.25, (1.0, 0.1, 0.15), 0.06, 0.5),
        HairStyle("curls", 4500, 6, 0.050, 0.25, 0.0024, 0.50, 0.35, (0.3, 0.0, 0.0), 0.7, 0.2),
        HairStyle("afro", 6500, 4, 0.030, 0.15, 0.0028, 1.0, 0.0, (0, 0.2, 0.0), 0.6, 0.15),
        HairStyle("bob", 2600, 7, 0.150, 0.10, 0.0034, 0.20, 2.2, (0.8, -0.1, -0.25), 0.05, 0.0),
        HairStyle("long", 2600, 9, 0.230, 0.12, 0.0036, 0.20, 2.2, (0.7, -0.1, -0.5), 0.08, 0.0),
        HairStyle("tied back", 2800, 5, 0.110, 0.1, 0.0030, 0.10, 0.6, (0.0, 0.15, -1.0), 0.03, 0.0),
    )
}
TIED = "tied back"
TAIL = 4  # further segments that fall from the knot
FRONT_TOP = 0.138  # metres: hair grows no higher, so that pictures hold all of it


def draw_style(rng: np.random.Generator, masculinity: float, age: float) -> HairStyle | None:
    """A haircut that goes with sex and age, or none (bald)."""
    names = list(STYLES)
    male = np.array([2.0, 3, 2, 2, 1.2, 1, 0.2, 0.3, 0.3])
    female = np.array([0.3, 0.5, 0.6, 0.8, 2, 1.2, 2.5, 3, 2])
    chance = male * masculinity + female * (1 - masculinity)
    if rng.random() < masculinity * (0.10 + 0.25 * age) + 0.02:
        return None
    base = STYLES[names[rng.choice(len(names), p=chance / chance.sum())]]
    scale = rng.uniform(0.8, 1.2)
    mirrored = rng.choice([-1.0, 1.0])
    return HairStyle(
        **{
            **base.__dict__,
            "length": base.length * scale,
            "lift": base.lift * rng.uniform(0.85, 1.15),
            "curl": base.curl * rng.uniform(0.7, 1.4) * (2.5 if rng.random() < 0.2 else 1.0),
            "comb": (base.comb[0] * mirrored, base.comb[1], base.comb[2]),
        }
    )


@dataclass(frozen=True)
class Hair:
    """Ribbons bound to the head's vertices.

    Attributes:
        points: (P, 3) on the neutral head; tangents, normals: (P, 3) unit; the normal is the head's below the lock.
        faces: (F, 3); root: (P,) head vertex each point moves with.
        shade: (P,) brightness of the lock at the point.
    """

    points: Array
    tangents: Array
    normals: Array
    faces: NDArray[np.int64]
    root: NDArray[np.int64]
    shade: Array


def grow(
    head: ParametricHead,
    neutral: Array,
    style: HairStyle,
    rng: np.random.Generator,
    hairline_shift: float = 0.0,
) -> Hair:
    """Grow a haircut on one neutral head (V, 3)."""
    faces = head.faces.numpy()
    template = head.template.numpy()[: head.n_vertices].astype(float)
    regions = head.regions
    candidates = faces[(regions["scalp"] | (regions["skin"] & ~regions["neck"] & ~regions["ears"])).numpy()]
    corners = template[candidates]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    pick = rng.choice(len(candidates), size=style.locks * 3, p=area / area.sum())
    bary = rng.dirichlet([1, 1, 1], len(pick))
    place = (bary[..., None] * corners[pick]).sum(axis=1)
    above = hairline(place) - hairline_shift
    keep = np.flatnonzero(rng.random(len(pick)) < smoothstep(-0.004, 0.008, above))[: style.locks]
    pick, bary, place, above = pick[keep], bary[keep], place[keep], above[keep]

    normals = vertex_normals(neutral, faces).astype(float)
    root = (bary[..., None] * neutral[candidates[pick]]).sum(axis=1)
    normal = _unit((bary[..., None] * normals[candidates[pick]]).sum(axis=1))
    n, steps = len(root), style.segments
    low = smoothstep(0.075, -0.01, place[:, 1])
    length = style.length * np.clip(1 + style.spread * rng.normal(size=n), 0.3, 1.6)
    length *= (1 - style.taper * low) * (0.35 + 0.65 * smoothstep(0.0, 0.03, above))
    touched = _above_shoulders(head, neutral)
    obstacle = Obstacle(neutral[touched], normals[touched])
    layer = 0.001 + min(0.007, 0.12 * style.length) * rng.random(n) ** 2  # locks lie over each other
    if style.name == TIED:
        points, outward = _tie(root, normal, obstacle, layer, length, steps, rng)
        steps += TAIL
    else:
        points, outward = _fall(root, normal, _combed(style, place), obstacle, layer, length, style, rng)
    centre, up = np.stack(points, axis=1), np.stack(outward, axis=1)  # (n, steps + 1, 3)
    tangent = np.gradient(centre, axis=1)
    tangent = _unit(tangent)
    side = _unit(np.cross(tangent, up + 0.5 * rng.normal(size=(n, 1, 3))))
    taper = np.interp(np.linspace(0, 1, steps + 1), [0, 0.2, 0.75, 1], [0.8, 1, 0.8, 0.25])
    half = 0.5 * style.width * rng.uniform(0.6, 1.3, (n, 1, 1)) * taper[None, :, None] * side
    ribbon = np.stack([centre - half, centre + half], axis=2).reshape(-1, 3)  # (n · (steps + 1) · 2, 3)
    first = (np.arange(n)[:, None] * (steps + 1) + np.arange(steps)).reshape(-1) * 2
    quads = np.stack([first, first + 1, first + 3, first + 2], axis=1)
    lock_shade = np.exp(rng.normal(0, 0.28, (n, 1, 1))) * np.linspace(0.75, 1.2, steps + 1)[None, :, None]
    shade = np.broadcast_to(lock_shade, (n, steps + 1, 2)).reshape(-1)
    nearest = candidates[pick, bary.argmax(axis=1)]
    return Hair(
        points=ribbon,
        tangents=np.repeat(tangent.reshape(-1, 3), 2, axis=0),
        normals=np.repeat(up.reshape(-1, 3), 2, axis=0),
        faces=np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]),
        root=np.repeat(nearest, (steps + 1) * 2),
        shade=shade,
    )


@dataclass(frozen=True)
class Obstacle:
    """The skin that hair lies on: points and outward normals, (V, 3)."""

    points: Array
    normals: Array

    def push_out(self, points: Array, clearance: Array) -> tuple[Array, Array]:
        """Points (n, 3) moved to at least `clearance` (n,) above the nearest skin, and that skin's normals."""
        _, near = cKDTree(self.points).query(points)
        up = self.normals[near]
        height = ((points - self.points[near]) * up).sum(axis=1)
        return points - np.minimum(height - clearance, 0)[:, None] * up, up

    def settle(self, points: Array, clearance: Array, share: Array) -> Array:
        """Points (n, 3) moved by a share (n,) of the way down to `clearance` (n,) above the nearest skin."""
        _, near = cKDTree(self.points).query(points)
        up = self.normals[near]
        height = ((points - self.points[near]) * up).sum(axis=1)
        return points - (share * np.maximum(height - clearance, 0))[:, None] * up


def _above_shoulders(head: ParametricHead, neutral: Array) -> NDArray[np.int64]:
    """Skin vertices that hair can touch: without the flare of the neck, which would throw long hair outwards."""
    regions = head.regions
    ids = np.unique(head.faces.numpy()[(regions["skin"] | regions["scalp"]).numpy()])
    return ids[neutral[ids, 1] > -0.125]


def _combed(style: HairStyle, place: Array) -> Array:
    """The direction each lock is combed to, (n, 3); hair falls to the two sides of a parting."""
    parting = -0.02 * np.sign(style.comb[0]) if style.name == "side parting" else 0.0
    sideways = np.tanh((place[:, 0] - parting) / 0.004) * abs(style.comb[0])
    return np.stack(
        [sideways, np.full(len(place), style.comb[1]), np.full(len(place), style.comb[2])], axis=1
    )


def _fall(
    root: Array, normal: Array, comb: Array, obstacle: Obstacle, layer: Array, length: Array, style: HairStyle,
    rng: np.random.Generator,
) -> tuple[list[Array], list[Array]]:  # fmt: skip
    """Locks as chains of steps that turn from the skin's normal to the comb's direction and then downwards."""
    n, steps = len(root), style.segments
    step = (length / steps)[:, None]
    along = _unit(comb - (comb * normal).sum(axis=1, keepdims=True) * normal + 1e-9)
    direction = _unit(style.lift * normal + (1 - style.lift) * along + 0.12 * rng.normal(size=(n, 3)))
    points, outward = [root - 0.001 * normal], [normal]
    up = normal
    phase, axis_a = rng.uniform(0, 2 * np.pi, n), _unit(np.cross(normal, direction) + 1e-6)
    for k in range(steps):
        grown = (k + 1) / steps
        # Over the head hair slides along the skin; beyond it, it falls.
        down = np.array([0.0, -1.0, 0.0]) - np.minimum(-up[:, 1:2], 0) * up
        down = down * style.gravity * (0.25 + grown)
        combing = 0.5 * (1 - style.lift) * (1 - grown) * along
        direction = _unit(direction + down + combing + 0.04 * rng.normal(size=(n, 3)))
        axis_b, turn = np.cross(direction, axis_a), phase + 2.1 * k
        swing = style.curl * step * (np.cos(turn)[:, None] * axis_a + np.sin(turn)[:, None] * axis_b)
        new = points[-1] + direction * step + swing
        new[:, 1] = np.minimum(new[:, 1], np.maximum(FRONT_TOP - 0.006 * rng.random(n), root[:, 1] + 0.004))
        clearance = layer * (0.4 + 0.6 * grown) + 0.001
        new, up = obstacle.push_out(new, clearance)
        if style.length > 0.1:  # long hair is heavy: above the ears it rests on what is below it
            new = obstacle.settle(new, clearance, 0.75 * smoothstep(-0.06, 0.02, new[:, 1]))
        direction = _unit(new - points[-1] - swing * 0.8)
        points.append(new)
        outward.append(_unit(up + 0.15 * rng.normal(size=(n, 3))))
        along = _unit(along - (along * up).sum(axis=1, keepdims=True) * up + 1e-9)
    return points, outward


def _tie(
    root: Array,
    normal: Array,
    obstacle: Obstacle,
    layer: Array,
    length: Array,
    steps: int,
    rng: np.random.Generator,
) -> tuple[list[Array], list[Array]]:
    """Locks drawn tightly over the head to a knot at its back, from which their ends fall as a tail."""
    back = obstacle.points[:, 2].min()
    knot = np.array([0.0, 0.035, back - 0.010]) + rng.normal(0, 0.004, (len(root), 3))
    points, outward = [root - 0.001 * normal], [normal]
    for k in range(steps):
        share = (k + 1) / steps
        new, up = obstacle.push_out(
            root + (knot - root) * share, (0.001 + 0.4 * layer) * min(1.0, 3 * (1 - share) + 0.3)
        )
        points.append(new)
        outward.append(up)
    heading = np.array([0.0, 0.15, -1.0]) + 0.25 * rng.normal(size=(len(root), 3))
    for _ in range(TAIL):
        heading = _unit(heading + np.array([0.0, -0.75, 0.15]) + 0.08 * rng.normal(size=heading.shape))
        new, _ = obstacle.push_out(points[-1] + heading * length[:, None] / TAIL, layer + 0.002)
        points.append(new)
        outward.append(_unit(new - knot - np.array([0.0, -0.04, 0.03])))
    return points, outward


def _unit(v: Array) -> Array:
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
