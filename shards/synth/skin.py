"""Procedural albedo of a head: skin of any tone, brows, lips, stubble, freckles, eyes, teeth and mouth.

Everything is a function of the mean head's surface position at each texel, so patterns run across UV seams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from avatars.head import ParametricHead
from avatars.head.geometry import rasterize_uv
from avatars.head.makehuman import LABELS, MASKS, hairline
from shards.synth.raster import sample_lattice

__all__ = ["Complexion", "albedo", "draw_complexion"]

Array = NDArray[np.float64]

# sRGB of forearm-like skin from lightest to darkest; a person lies between two neighbours.
TONES = np.array(
    [(231, 190, 166), (222, 175, 146), (208, 158, 126), (192, 138, 104), (162, 108, 78), (124, 80, 56),
     (92, 58, 42), (66, 43, 33)]
) / 255  # fmt: skip
# Linear albedo of hair.
HAIR_COLORS: dict[str, tuple[float, float, float]] = {
    "black": (0.014, 0.012, 0.011),
    "dark brown": (0.030, 0.020, 0.014),
    "brown": (0.062, 0.041, 0.027),
    "light brown": (0.130, 0.088, 0.056),
    "blond": (0.330, 0.245, 0.145),
    "red": (0.170, 0.066, 0.030),
    "grey": (0.300, 0.290, 0.280),
    "white": (0.560, 0.550, 0.530),
}
IRIS_COLORS = {
    "dark brown": (0.030, 0.016, 0.009),
    "brown": (0.085, 0.042, 0.018),
    "hazel": (0.140, 0.095, 0.035),
    "green": (0.110, 0.150, 0.080),
    "grey": (0.190, 0.220, 0.240),
    "blue": (0.110, 0.190, 0.310),
}
TEXTURE = 640


@dataclass(frozen=True)
class Complexion:
    """What the surface of one person looks like; colours are linear."""

    tone: float  # index into TONES
    warmth: float
    redness: float
    freckles: float
    stubble: float
    brows: float  # strength, 0 to 1
    brow_width: float
    lip_color: tuple[float, float, float]
    lipstick: float
    hair_color: tuple[float, float, float]
    iris_color: tuple[float, float, float]
    hairline_shift: float  # metres the hairline lies higher
    scalp_shade: float  # how much hair colour shows on the scalp itself
    wrinkles: float
    seed: int


def draw_complexion(rng: np.random.Generator, masculinity: float, age: float) -> Complexion:
    """A random complexion that goes with sex and age (both 0 to 1)."""
    tone = rng.uniform(0, len(TONES) - 1)
    dark = tone > 3.2
    if age > 0.62 and rng.random() < 0.8:
        hair = "grey" if age < 0.8 else "white"
    else:
        names = list(HAIR_COLORS)[:6]
        chance = np.array([10, 3, 0.2, 0, 0, 0.0]) if dark else np.array([2, 3, 3, 2, 2, 1.0])
        hair = names[rng.choice(6, p=chance / chance.sum())]
    iris_chance = np.array([6, 2, 0.3, 0, 0, 0.0]) if dark else np.array([1, 3, 2, 1.5, 1, 3])
    iris = list(IRIS_COLORS)[rng.choice(6, p=iris_chance / iris_chance.sum())]
    male = masculinity > 0.5
    jitter = np.exp(rng.normal(0, 0.15) + rng.normal(0, 0.04, 3))
    return Complexion(
        tone=tone,
        warmth=float(np.clip(rng.normal(0.01, 0.03), -0.02, 0.07)),  # no corpses
        redness=rng.uniform(0.3, 1.2),
        freckles=max(rng.normal(-0.2, 0.5), 0.0) * (0.3 if dark else 1.0),
        stubble=float(np.clip(rng.normal(0.35, 0.35), 0, 1)) if male else 0.0,
        brows=rng.uniform(0.6, 0.95),
        brow_width=rng.uniform(0.8, 1.35) if male else rng.uniform(0.55, 1.0),
        lip_color=(1.0, rng.uniform(0.55, 0.72), rng.uniform(0.56, 0.74)),
        lipstick=0.0 if male or rng.random() < 0.6 else rng.uniform(0.3, 0.9),
        hair_color=tuple(np.array(HAIR_COLORS[hair]) * jitter),
        iris_color=tuple(np.array(IRIS_COLORS[iris]) * np.exp(rng.normal(0, 0.15))),
        hairline_shift=max(rng.normal(0.0, 0.008), -0.006) + (0.02 * age if male else 0.0),
        scalp_shade=1.0,
        wrinkles=age,
        seed=int(rng.integers(2**31)),
    )


@dataclass(frozen=True)
class Layout:
    """The mean head's surface per texel."""

    position: Array  # (N, N, 3) metres
    label: NDArray[np.int64]  # (N, N) index into LABELS
    masks: dict[str, Array]  # (N, N) in [0, 1]
    uv: Array  # (N, N, 2)
    eye_axis: Array  # (N, N, 3) position on the eyeball relative to its front pole, its own side


@lru_cache(maxsize=2)
def layout(head: ParametricHead, size: int = TEXTURE) -> Layout:
    """Texel positions and labels; texels outside all islands copy the nearest one inside."""
    uv, uv_faces = head.uv.numpy(), head.uv_faces.numpy()
    triangle, weights = rasterize_uv(uv, uv_faces, size)
    _, (rows, columns) = ndimage.distance_transform_edt(triangle < 0, return_indices=True)
    triangle, weights = triangle[rows, columns], weights[rows, columns]
    vertices = head.template.numpy()[: head.n_vertices].astype(float)
    position = (weights[..., None] * vertices[head.faces.numpy()[triangle]]).sum(axis=-2)
    label = np.repeat(head.arrays["label"], 2).astype(np.int64)[triangle]
    masks = {}
    for k, name in enumerate(MASKS):
        mask = head.arrays["masks"][k].astype(float) / 255
        masks[name] = ndimage.zoom(mask, size / mask.shape[0], order=1, grid_mode=True, mode="nearest")[
            rows, columns
        ]
    u, v = np.meshgrid((np.arange(size) + 0.5) / size, 1 - (np.arange(size) + 0.5) / size)
    eye = np.zeros_like(position)
    eye_faces = head.regions["eye"].numpy()
    ids = np.unique(head.faces.numpy()[eye_faces])
    for side in (1, -1):
        ball = vertices[ids[vertices[ids, 0] * side > 0]]
        centre = (ball.min(axis=0) + ball.max(axis=0)) / 2
        pole = np.array([centre[0], centre[1], ball[:, 2].max()])
        here = (label == LABELS.index("eye")) & (position[..., 0] * side > 0)
        eye[here] = position[here] - pole
    return Layout(position, label, masks, np.stack([u, v], axis=-1), eye)


def noise(position: Array, frequency: float, rng: np.random.Generator) -> Array:
    """Band-limited value noise in about [−1, 1] of points (..., 3), `frequency` in lumps per metre."""
    lattice = ndimage.gaussian_filter(rng.normal(size=(24, 24, 24)), 0.6, mode="wrap")
    lattice /= 2 * lattice.std()  # two deviations reach one
    offset = rng.uniform(0, 24, (3, 1))[:, 0]
    return sample_lattice(lattice, position.reshape(-1, 3), frequency, offset).reshape(position.shape[:-1])


def blob(position: Array, centre: tuple[float, float, float], radius: float) -> Array:
    """A Gaussian around a point and its mirror image."""
    x, y, z = centre
    p = np.stack([np.abs(position[..., 0]) - x, position[..., 1] - y, position[..., 2] - z], axis=-1)
    return np.exp(-(p**2).sum(axis=-1) / (2 * radius**2))


def smoothstep(low: float, high: float, value: Array) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def to_linear(srgb: Array) -> Array:
    """SRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def brow_field(p: Array, width: float) -> Array:
    """Density of the brows in [0, 1] at positions on the mean head."""
    x = np.abs(p[..., 0])
    along = (x - 0.0115) / (0.0500 - 0.0115)
    middle = np.interp(
        x, [0.010, 0.0135, 0.024, 0.034, 0.043, 0.050], [0.0262, 0.0272, 0.0300, 0.0312, 0.0285, 0.0232]
    )
    half = np.interp(along, [0, 0.15, 0.6, 1.0], [0.0034, 0.0040, 0.0031, 0.0010]) * width
    across = np.abs(p[..., 1] - middle) / half
    inside = smoothstep(-0.04, 0.10, along) * smoothstep(1.04, 0.86, along) * smoothstep(1.15, 0.45, across)
    return inside * (p[..., 2] > 0.03)


def beard_field(p: Array) -> Array:
    """Where a beard grows: moustache, chin, jaw and the front of the throat."""
    x, y, z = np.abs(p[..., 0]), p[..., 1], p[..., 2]
    upper = np.interp(
        x, [0, 0.022, 0.03, 0.045, 0.06, 0.075], [-0.0365, -0.0400, -0.052, -0.047, -0.030, -0.005]
    )
    below = smoothstep(0.004, -0.004, y - upper) * smoothstep(-0.118, -0.098, y)
    return below * smoothstep(-0.002, 0.02, z)


def albedo(head: ParametricHead, look: Complexion, size: int = TEXTURE) -> NDArray[np.float32]:
    """Linear albedo and strength of highlights (N, N, 4) of one person in the head's UV, row 0 at v = 1."""
    lay = layout(head, size)
    p, rng = lay.position, np.random.default_rng(look.seed)
    low = int(np.clip(np.floor(look.tone), 0, len(TONES) - 2))
    base = to_linear(TONES[low] + (TONES[low + 1] - TONES[low]) * (look.tone - low))
    base = base * np.array([1 + look.warmth, 1.0, 1 - look.warmth])
    mottle = 0.05 * noise(p, 45, rng) + 0.035 * noise(p, 160, rng) + 0.03 * noise(p, 520, rng)
    color = base * (1 + mottle)[..., None]

    def tint(amount: Array, factor: tuple[float, float, float]) -> None:
        nonlocal color
        color = color * (1 + amount[..., None] * (np.array(factor) - 1))

    light = np.clip(1.2 - look.tone / 6, 0.35, 1.1)
    red = look.redness * light
    flush = blob(p, (0.040, -0.018, 0.068), 0.017) + 0.9 * blob(p, (0.0, -0.024, 0.098), 0.012)
    flush += 0.5 * blob(p, (0.0, -0.082, 0.085), 0.014) + 0.5 * lay.masks["ears"]
    tint(red * flush * (1 + 0.4 * noise(p, 90, rng)), (1.02, 0.86, 0.87))
    tint(blob(p, (0.028, -0.001, 0.070), 0.008) * 0.5 + lay.masks["eyelids"] * 0.35, (0.86, 0.76, 0.78))
    tint(0.35 * smoothstep(-0.095, -0.13, p[..., 1]), (0.86, 0.82, 0.80))
    # Lines that deepen with age: forehead, beside the eyes, from the nose to the mouth.
    x, y = np.abs(p[..., 0]), p[..., 1]
    lines = (np.sin((y + 0.10 * x * x / 0.05 + 0.001 * noise(p, 60, rng)) * 2 * np.pi / 0.0085) > 0.80) * smoothstep(
        0.038, 0.045, y
    ) * smoothstep(0.085, 0.075, y) * smoothstep(0.05, 0.03, x)  # fmt: skip
    fold = np.exp(-(((x - np.interp(y, [-0.055, -0.03], [0.030, 0.0195])) / 0.0016) ** 2))
    fold *= smoothstep(-0.062, -0.05, y) * smoothstep(-0.024, -0.032, y)
    tint(look.wrinkles * (0.5 * lines + 0.7 * fold) * (p[..., 2] > 0.02), (0.80, 0.74, 0.72))
    spots = smoothstep(0.55, 0.8, noise(p, 430, rng)) * np.clip(look.freckles, 0, 1)
    tint(spots * (blob(p, (0.032, -0.012, 0.075), 0.024) + 0.3), (0.72, 0.58, 0.48))
    tint(_moles(lay, rng), (0.45, 0.36, 0.32))

    lips = lay.masks["lips"]
    lip = base * np.array(look.lip_color) * 0.92
    lip = lip * (1 - look.lipstick) + look.lipstick * np.array([0.38, 0.045, 0.06])
    lip = (
        lip
        * np.where(y > -0.0525, 0.86, 1.0)[..., None]
        * (1 + 0.10 * noise(p * [1, 0.15, 1], 900, rng))[..., None]
    )
    color += (smoothstep(0.25, 0.8, lips) * 0.9)[..., None] * (lip - color)

    hair = np.array(look.hair_color)
    fine = noise(p, 1100, rng)
    beard = beard_field(p) * (1 - smoothstep(0.1, 0.5, lips))
    beard = beard * look.stubble * (0.62 + 0.3 * fine + 0.15 * noise(p, 120, rng))
    color += np.clip(beard, 0, 0.9)[..., None] * (0.6 * hair + 0.25 * color - color)
    strokes = noise(p * [0.45, 1.4, 0.45], 700, rng) + 0.4 * noise(p, 300, rng)
    brow = np.clip(brow_field(p, look.brow_width) * (look.brows + 0.22 * strokes), 0, 0.94)
    color += brow[..., None] * (np.minimum(hair * 0.8 + 0.005, 0.42 * base) - color)
    scalp = smoothstep(-0.006, 0.008, hairline(p) - look.hairline_shift + 0.004 * noise(p, 140, rng))
    scalp *= np.isin(lay.label, [LABELS.index("skin"), LABELS.index("scalp")]) * (
        1 - smoothstep(0.1, 0.4, lay.masks["ears"])
    )
    scalp *= look.scalp_shade * (0.97 + 0.04 * fine)
    color += np.clip(scalp, 0, 1)[..., None] * (hair * 0.8 - color)

    oil = (
        0.8
        + 0.3 * noise(p, 60, rng)
        + 0.5 * blob(p, (0.0, -0.01, 0.095), 0.02)
        + 0.5 * smoothstep(0.25, 0.8, lips)
    )
    oil *= (1 - 0.85 * np.clip(scalp, 0, 1)) * (1 - 0.6 * brow) * (1 - 0.5 * beard)
    here = {name: lay.label == k for k, name in enumerate(LABELS)}
    for name, flesh in (("mouth", (0.20, 0.055, 0.05)), ("tongue", (0.42, 0.16, 0.15))):
        color[here[name]] = np.array(flesh) * (1 + mottle[here[name]])[:, None]
    color[here["socket"]] = base * np.array([0.80, 0.50, 0.48])
    color[here["teeth"]] = _teeth(p[here["teeth"]], lay.uv[here["teeth"]])
    color[here["eye"]] = _eyes(lay.eye_axis[here["eye"]], look)
    color[here["boundary"]] = 0.02
    rgb = np.clip(color, 0.002, 0.95)
    return np.concatenate([rgb, np.clip(oil, 0, 2)[..., None]], axis=-1).astype(np.float32)


def _moles(lay: Layout, rng: np.random.Generator) -> Array:
    """Up to eight small dark spots on the skin, (N, N) in [0, 1]."""
    rows, columns = np.nonzero(lay.label == LABELS.index("skin"))
    out = np.zeros(lay.label.shape)
    for k in rng.integers(0, len(rows), rng.integers(0, 9)):
        distance = np.linalg.norm(lay.position - lay.position[rows[k], columns[k]], axis=-1)
        radius = rng.uniform(0.0006, 0.0014)
        out = np.maximum(out, smoothstep(radius * 1.3, radius * 0.7, distance))
    return out


def _teeth(p: Array, uv: Array) -> Array:
    """Enamel with dark gaps between the teeth, gums towards the roots, at positions (n, 3) with uv (n, 2)."""
    angle = np.arctan2(p[..., 0], p[..., 2] - 0.03)
    gap = np.exp(-(((np.abs(np.sin(angle * 10.5)) - 0.0) / 0.10) ** 2))
    upper = uv[..., 1] > 0.1435
    root = np.where(upper, smoothstep(-0.0410, -0.0380, p[..., 1]), smoothstep(-0.0600, -0.0630, p[..., 1]))
    enamel = np.array([0.66, 0.61, 0.50]) * (1 - 0.5 * gap)[..., None]
    return enamel + root[..., None] * (np.array([0.42, 0.17, 0.16]) - enamel)


def _eyes(d: Array, look: Complexion) -> Array:
    """Sclera, limbal ring, iris with radial fibres, pupil; d (n, 3) is the place from the front pole in metres."""
    radius = np.hypot(d[..., 0], d[..., 1])
    angle = np.arctan2(d[..., 1], d[..., 0])
    behind = d[..., 2] < -0.0145
    fibre = 0.5 * np.sin(angle * 31 + 3 * np.sin(angle * 5)) + 0.5 * np.sin(angle * 57 + radius * 2500)
    iris = np.array(look.iris_color) * (1 + 0.35 * fibre)[..., None]
    iris = iris * (1 + 0.5 * smoothstep(0.0042, 0.0024, radius))[..., None]
    iris = iris * (1 - 0.75 * smoothstep(0.0050, 0.0062, radius))[..., None]
    sclera = np.array([0.70, 0.655, 0.62]) * (
        1 - np.array([0.05, 0.22, 0.24]) * smoothstep(0.007, 0.013, radius)[..., None]
    )
    white = np.where(behind, 1.0, smoothstep(0.0057, 0.0065, radius))[..., None]
    pupil = (smoothstep(0.0024, 0.0019, radius) * ~behind)[..., None]
    return (sclera * white + iris * (1 - white)) * (1 - pupil) + 0.004 * pupil
