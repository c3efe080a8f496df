"""A synthetic person: identity code, complexion, hair, eyes and the studio they sit in, all drawn from one seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from avatars.head import ParametricHead
from avatars.head.geometry import catmull_clark, triangulate, vertex_normals
from avatars.head.makehuman import LABELS, boundary_loop
from shards.synth import raster
from shards.synth.hair import Hair, HairStyle, draw_style, grow
from shards.synth.light import Light, bake, draw_light
from shards.synth.skin import Complexion, albedo, draw_complexion

__all__ = ["Posed", "Subject", "draw_subject", "pose"]

Floats = NDArray[np.float32]
SKIN_LABELS = [LABELS.index(name) for name in ("skin", "scalp", "lips", "mouth", "socket")]


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
    texture: Floats  # (N, N, 3) linear albedo


@dataclass(frozen=True)
class Refined:
    """The head refined once by Catmull-Clark, without lashes: what is drawn."""

    operator: sparse.csr_matrix  # (V', V)
    faces: NDArray[np.int32]
    uv: Floats  # (F, 3, 2) v down
    material: NDArray[np.uint8]
    scalp: NDArray[np.bool_]  # (F,)
    n_cap: int  # the last faces close the neck


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
    rim = boundary_loop(fine[np.repeat(np.isin(label[drawn], SKIN_LABELS), 4)])
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
        np.append(np.repeat(label[drawn] == LABELS.index("scalp"), 8), np.zeros(len(fan), bool)),
        len(fan),
    )


def draw_subject(head: ParametricHead, seed: int) -> Subject:
    """The person of a seed; the same on every machine with the same numpy."""
    rng = np.random.default_rng([seed, 4711])
    identity = np.clip(rng.normal(size=head.n_identity), -2.5, 2.5).astype(np.float32)
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
    hair = subject.hair
    if hair is not None:
        neutral = head_vertices(head, subject.identity, np.zeros_like(expression))
        moved = (hair.points + (coarse - neutral)[hair.root]).astype(np.float32)
        points = np.concatenate([points, moved])
        shading_normals = np.concatenate([shading_normals, hair.normals.astype(np.float32)])
        draw_normals = np.concatenate([draw_normals, hair.tangents.astype(np.float32)])
        faces = np.concatenate([faces, (hair.faces + n_head).astype(np.int32)])
        uv = np.concatenate([uv, np.zeros((len(hair.faces), 3, 2), np.float32)])
        material = np.append(material, np.full(len(hair.faces), raster.HAIR, np.uint8))
        color = np.array(subject.look.hair_color) * hair.shade[:, None]
        tint = np.concatenate([tint, np.clip(color, 0.004, 0.8).astype(np.float32)])
        # Roots keep the scalp from shining like bare skin.
        material = material.copy()
        material[: len(mesh.faces)][mesh.scalp] = raster.CLOTH
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
