"""A synthetic person: identity code, complexion, hair, eyes and the studio they sit in, all drawn from one seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from avatars.head import ParametricHead
from avatars.head.geometry import catmull_clark, triangulate, vertex_normals
from avatars.head.makehuman import LABELS, boundary_loop
from shards.synth import raster
from shards.synth.hair import Hair, HairStyle, draw_style, grow
from shards.synth.light import Light, bake, draw_light
from shards.synth.skin import Complexion, albedo, draw_complexion

__all__ = ["Posed", "Subject", "draw_identity", "draw_subject", "pose"]

Floats = NDArray[np.float32]
SKIN_LABELS = [LABELS.index(name) for name in ("skin", "scalp", "lips", "mouth", "socket")]
UPPER_LASHES = 0.0127  # metres: the height between the lash bands of the mean head


@dataclass(frozen=True)
class Subject:
    """A person ready to be posed."""

    seed: int
    identity: Floats  # (I,)
    masculinity: float
    age: float
    look: Complexion
    style: HairStyle | None
    hair: Hair | None
    light: Light
    texture: Floats  # (N, N, 4) linear albedo, strength of highlights


@dataclass(frozen=True)
class Refined:
    """The head refined once by Catmull-Clark, without lashes: what is drawn."""

    operator: sparse.csr_matrix  # (V', V)
    faces: NDArray[np.int32]
    uv: Floats  # (F, 3, 2) v down
    material: NDArray[np.uint8]
    n_cap: int  # the last faces close the neck
    lash_operator: sparse.csr_matrix  # (P, V) corners of single lashes
    lash_faces: NDArray[np.int32]


@lru_cache(maxsize=2)
def refined(head: ParametricHead) -> Refined:
    """Refinement operator, faces, corner UVs and materials of the drawn mesh."""
    label = head.arrays["label"]
    # The neck's cap is not smoothed with the skin (its corners would pull at the rim) but put back as a flat fan.
    cap_quads = head.arrays["quads"][label == LABELS.index("boundary")]
    drawn = ~np.isin(label, [LABELS.index("lashes"), LABELS.index("boundary")])
    quads = head.arrays["quads"][drawn].astype(np.int64)
    uv_quads = head.arrays["uv_quads"][drawn].astype(np.int64)
    operator, fine = catmull_clark(quads, head.n_vertices)
    uv_operator, uv_fine = catmull_clark(uv_quads, len(head.uv), smooth=False)
    uv = uv_operator @ head.uv.numpy().astype(float)
    uv[:, 1] = 1 - uv[:, 1]
    table = np.full(len(LABELS), raster.SKIN, np.uint8)
    for name, kind in (("eye", raster.EYE), ("teeth", raster.TEETH), ("tongue", raster.WET), ("mouth", raster.WET),
                       ("boundary", raster.CLOTH)):  # fmt: skip
        table[LABELS.index(name)] = kind
    material = np.repeat(table[label[drawn]], 8)
    rim = boundary_loop(fine.astype(np.int64)[np.repeat(np.isin(label[drawn], SKIN_LABELS), 4)])
    centre = np.setdiff1d(cap_quads, head.boundary_vertices.numpy())
    fan = np.stack([np.full(len(rim), centre[0]), rim, np.roll(rim, -1)], axis=1)
    cap_uv = (
        head.arrays["uv"][head.arrays["uv_quads"][label == LABELS.index("boundary")]]
        .reshape(-1, 2)
        .mean(axis=0)
    )
    return Refined(
        operator.astype(np.float32),
        np.concatenate([triangulate(fine), fan]).astype(np.int32),
        np.concatenate(
            [uv[triangulate(uv_fine)], np.broadcast_to([cap_uv[0], 1 - cap_uv[1]], (len(fan), 3, 2))]
        ).astype(np.float32),
        np.append(material, np.full(len(fan), raster.CLOTH, np.uint8)),
        len(fan),
        *_lashes(head),
    )


def _lashes(head: ParametricHead) -> tuple[sparse.csr_matrix, NDArray[np.int32]]:
    """Thin strips along the columns of the upper lash bands, which drawn whole would look like painted-on bars.

    Returns:
        An operator (P, V) that makes the strips' corners from head vertices, and their triangles.
    """
    quads = head.arrays["quads"][head.arrays["label"] == LABELS.index("lashes")].astype(np.int64)
    vertices = head.template.numpy()[: head.n_vertices]
    quads = quads[vertices[quads, 1].mean(axis=1) > UPPER_LASHES]
    faces = head.faces.numpy()
    lids = np.intersect1d(faces[head.regions["skin"].numpy()], faces[head.regions["socket"].numpy()])
    away = cKDTree(vertices[lids]).query(vertices)[0]
    # Turn each quad so that its sides 0-1 and 3-2 run from the lid outwards.
    height = away[quads]
    across = np.abs(height[:, [0, 3]] - height[:, [1, 2]]).sum(axis=1) < np.abs(
        height[:, [1, 0]] - height[:, [2, 3]]
    ).sum(axis=1)
    quads = np.where(across[:, None], np.roll(quads, -1, axis=1), quads)
    height = away[quads]
    upside_down = height[:, [0, 3]].sum(axis=1) > height[:, [1, 2]].sum(axis=1)
    quads = np.where(upside_down[:, None], quads[:, [1, 0, 3, 2]], quads)
    longest = away[quads].max()
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for quad in quads:
        for place in (0.2, 0.5, 0.8):
            for low, high in ((quad[0], quad[3]), (quad[1], quad[2])):
                half = 0.09 * (1 - 0.8 * min(away[low] / longest, 1.0))
                for share in (place - half, place + half):
                    rows += [rows[-1] + 1 if rows else 0] * 2
                    columns += [low, high]
                    values += [1 - share, share]
    operator = sparse.csr_matrix((values, (rows, columns)), (rows[-1] + 1, head.n_vertices), dtype=np.float32)
    first = np.arange(0, rows[-1] + 1, 4)
    strip = np.stack([first, first + 1, first + 3, first + 2], axis=1)
    return operator, triangulate(strip).astype(np.int32)


def draw_identity(rng: np.random.Generator, length: int) -> Floats:
    """An identity code (length,) of the population: normal with unit variance, cut at 2.5 deviations."""
    return np.clip(rng.normal(size=length), -2.5, 2.5).astype(np.float32)


def draw_subject(head: ParametricHead, seed: int) -> Subject:
    """The person of a seed; the same on every machine with the same numpy."""
    rng = np.random.default_rng([seed, 4711])
    identity = draw_identity(rng, head.n_identity)
    masculinity, age = np.clip(np.append(identity, 1) @ head.arrays["attribute_map"].astype(float), 0, 1)
    look = draw_complexion(rng, masculinity, age)
    style = draw_style(rng, masculinity, age)
    if style is None:
        look = replace(look, scalp_shade=0.25 * look.stubble + 0.05)
    light = draw_light(rng)
    neutral = head_vertices(head, identity, np.zeros(head.n_expression, np.float32)).astype(float)
    hair = None if style is None else grow(head, neutral, style, rng, look.hairline_shift)
    return Subject(
        seed, identity, float(masculinity), float(age), look, style, hair, light, albedo(head, look)
    )


def head_vertices(head: ParametricHead, identity: Floats, expression: Floats) -> Floats:
    """Vertices (V, 3) of one head."""
    with torch.no_grad():
        return head.vertices(torch.from_numpy(identity)[None], torch.from_numpy(expression)[None])[0].numpy()


@dataclass(frozen=True)
class Posed:
    """One instant of a person, in the head frame, with the light on it; the arrays `raster.draw` reads."""

    points: Floats
    normals: Floats
    faces: NDArray[np.int32]
    n_head_faces: int
    uv: Floats
    material: NDArray[np.uint8]
    diffuse: Floats
    gloss: Floats
    tint: Floats
    texture: Floats
    lamp_directions: Floats
    lamp_colors: Floats


def pose(
    head: ParametricHead, subject: Subject, expression: Floats, head_to_studio: NDArray[np.float64]
) -> Posed:
    """Deform, refine, add hair, and bake the studio's light onto the person.

    Args:
        head: the parametric head.
        subject: the person.
        expression: (52,) weights.
        head_to_studio: (4, 4) rigid; only its rotation matters, for the light.
    """
    mesh = refined(head)
    coarse = head_vertices(head, subject.identity, expression)
    points = np.ascontiguousarray(mesh.operator @ coarse)
    shading_normals = vertex_normals(points, mesh.faces[: -mesh.n_cap]).astype(np.float32)
    draw_normals, faces, n_head = shading_normals, mesh.faces, len(points)
    uv, material = mesh.uv, mesh.material
    tint = np.zeros((n_head, 3), np.float32)
    lashes = mesh.lash_operator @ coarse
    strands: list[tuple[NDArray, NDArray, NDArray, NDArray, NDArray]] = [
        (
            lashes,
            np.full_like(lashes, 0.577),
            np.full_like(lashes, 0.577),
            mesh.lash_faces,
            np.full_like(lashes, 0.008),
        )
    ]
    hair = subject.hair
    if hair is not None:
        neutral = head_vertices(head, subject.identity, np.zeros_like(expression))
        moved = hair.points + (coarse - neutral)[hair.root]
        color = np.clip(np.array(subject.look.hair_color) * hair.shade[:, None], 0.004, 0.8)
        strands.append((moved, hair.normals, hair.tangents, hair.faces, color))
    for strand_points, outward, along, strand_faces, strand_tint in strands:
        faces = np.concatenate([faces, (strand_faces + len(points)).astype(np.int32)])
        points = np.concatenate([points, strand_points.astype(np.float32)])
        shading_normals = np.concatenate([shading_normals, outward.astype(np.float32)])
        draw_normals = np.concatenate([draw_normals, along.astype(np.float32)])
        tint = np.concatenate([tint, strand_tint.astype(np.float32)])
    n_strand = len(faces) - len(mesh.faces)
    uv = np.concatenate([uv, np.zeros((n_strand, 3, 2), np.float32)])
    material = np.append(material, np.full(n_strand, raster.HAIR, np.uint8))
    rotation = head_to_studio[:3, :3].T.astype(np.float32)
    lit = bake(subject.light, rotation, points, shading_normals, faces, n_head)
    return Posed(
        points=points,
        normals=draw_normals,
        faces=faces,
        n_head_faces=len(mesh.faces),
        uv=uv,
        material=material,
        diffuse=lit.diffuse,
        gloss=lit.gloss,
        tint=tint,
        texture=subject.texture,
        lamp_directions=np.ascontiguousarray(subject.light.lamps @ rotation.T),
        lamp_colors=subject.light.colors,
    )
