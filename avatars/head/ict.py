"""ICT-FaceKit's light model (Li et al. 2020, MIT licence) from the user's copy of its `FaceXModel` folder.

Read are `generic_neutral_mesh.obj`, `identity000.obj` to `identity099.obj`, the OBJ files of the expressions and the
landmarks in `vertex_indices.json`. Identity shapes have unit variance. The 53 expressions are mapped to ARKit's 52
names: `_L` and `_R` to Left and Right; the model's separate halves of `browInnerUp` and `cheekPuff` move together; it
has no tongue to put out, so `tongueOut` moves nothing. There is no rig in the files: eyes turn about the middle of
their balls, the neck bends evenly between the bust's edge and the chin, and the jaw opens by expression only.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError
from avatars.head.makehuman import ARKIT_NAMES, hairline

__all__ = ["FILES", "build"]

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

N_VERTICES, N_POLYGONS, N_IDENTITY = 26719, 26384, 100
# Part: first vertex, first polygon, label, and its box (u0, v0, u1, v1) in our UV map; the published parts lie on tiles
# of their own. From the model's README. The polygons that follow are left out: wet films, blending strips and
# lashes of a renderer's eye.
PARTS: tuple[tuple[int, int, str, tuple[float, float, float, float]], ...] = (
    (0, 0, "skin", (0.005, 0.255, 0.695, 0.995)),
    (9409, 9230, "skin", (0.705, 0.505, 0.995, 0.995)),
    (11248, 11144, "mouth", (0.705, 0.255, 0.845, 0.495)),
    (13294, 13226, "socket", (0.855, 0.380, 0.995, 0.495)),
    (13678, 13630, "socket", (0.855, 0.255, 0.995, 0.370)),
    (14062, 14034, "tongue", (0.005, 0.005, 0.245, 0.245)),
    (17039, 17006, "teeth", (0.255, 0.005, 0.495, 0.245)),
    (21451, 21496, "eye", (0.505, 0.130, 0.745, 0.245)),  # the left eye's white, then its iris
    (22221, 22296, "eye", (0.505, 0.005, 0.745, 0.120)),
    (23021, 23094, "eye", (0.755, 0.130, 0.995, 0.245)),
    (23791, 23894, "eye", (0.755, 0.005, 0.995, 0.120)),
)
END = (24591, 24692)
LABELS = ("skin", "scalp", "eye", "teeth", "tongue", "mouth", "socket", "boundary")
EYES = np.array([0.0, 0.0127, 0.0731])  # metres: where the built-in head has the middle of its eyes


def _expression_files() -> dict[str, list[str]]:
    """ARKit name to the OBJ files whose shapes it adds."""
    out: dict[str, list[str]] = {}
    for name in ARKIT_NAMES:
        if name == "tongueOut":
            out[name] = []
        elif name in ("browInnerUp", "cheekPuff"):
            out[name] = [f"{name}_L", f"{name}_R"]
        else:
            sided = name.removesuffix("Left"), name.removesuffix("Right")
            # jawLeft and mouthRight are directions of one shape, not sides of the face.
            plain = name in ("jawLeft", "jawRight", "mouthLeft", "mouthRight")
            out[name] = [name if plain or sided == (name, name) else
                         f"{sided[0]}_L" if sided[0] != name else f"{sided[1]}_R"]  # fmt: skip
    return out


EXPRESSIONS = _expression_files()
FILES = (
    "generic_neutral_mesh.obj",
    "vertex_indices.json",
    *(f"identity{k:03d}.obj" for k in range(N_IDENTITY)),
    *(f"{file}.obj" for files in EXPRESSIONS.values() for file in files),
)


def build(folder: Path) -> dict[str, NDArray]:
    """The arrays of a `ParametricHead` from the model's files (some 10 s of parsing; the caller caches them).

    Args:
        folder: `FaceXModel`, or the folder that holds it. Units are centimetres, y up, the face towards +z.

    Raises:
        UserError: a file is missing or is not of the light model.
    """
    folder = _face_x_model(folder)
    neutral, uv, polygons, uv_polygons = _read_mesh(folder / "generic_neutral_mesh.obj")
    landmarks = _read_landmarks(folder / "vertex_indices.json")
    label, faces, corners, packed = _cut(polygons, uv, uv_polygons)
    template = neutral * 0.01
    template += EYES - template[landmarks[36:48]].mean(axis=0)

    def shape(name: str) -> Array:
        return (_read_vertices(folder / f"{name}.obj") - neutral) * 0.01

    identity = np.stack([shape(f"identity{k:03d}")[: END[0]] for k in range(N_IDENTITY)])
    expression = np.stack(
        [
            sum((shape(file)[: END[0]] for file in files), start=np.zeros((END[0], 3)))
            for files in EXPRESSIONS.values()
        ]
    )
    template = template[: END[0]]
    boundary = _bust_edge(faces[np.isin(label, (0, LABELS.index("mouth"), LABELS.index("socket")))], template,
                          template[landmarks[8], 1])  # fmt: skip
    skin = label == LABELS.index("skin")
    middle = template[faces].mean(axis=1)
    label = np.where(skin & (hairline(middle) > 0), LABELS.index("scalp"), label)
    label = np.where(np.isin(faces, boundary).any(axis=1) & skin, LABELS.index("boundary"), label)
    # Behind the vertices the pivots of neck, jaw, left and right eye, which move with the shapes as vertices do.
    balls = [np.arange(PARTS[7][0], PARTS[9][0]), np.arange(PARTS[9][0], END[0])]
    balls.sort(key=lambda ids: -template[ids, 0].mean())  # +x is the subject's left
    pivots = [boundary, landmarks[[0, 16]], *balls]

    def with_pivots(values: Array) -> Array:  # (..., V, 3) -> (..., V + 4, 3)
        means = [values[..., ids, :].mean(axis=-2, keepdims=True) for ids in pivots]
        return np.concatenate([values, *means], axis=-2)

    return {
        "template": with_pivots(template).astype(np.float32),
        "identity_basis": with_pivots(identity).astype(np.float32),
        "identity_std": np.ones(N_IDENTITY, np.float32),
        "expression_basis": with_pivots(expression).astype(np.float32),
        "skinning": _skinning(template, balls, boundary, template[landmarks[8], 1]).astype(np.float32),
        "faces": faces.astype(np.int32),
        "uv": packed.astype(np.float32),
        "uv_faces": corners.astype(np.int32),
        "region_names": np.array(LABELS),
        "region_masks": np.stack([label == k for k in range(len(LABELS))]),
        "landmarks68": landmarks.astype(np.int32),
        "boundary_vertices": boundary.astype(np.int32),
    }


def _face_x_model(folder: Path) -> Path:
    for place in (folder, folder / "FaceXModel"):
        missing = [name for name in FILES if not (place / name).is_file()]
        if not missing:
            return place
        if len(missing) < len(FILES):
            raise UserError(
                f"{place} lacks {missing[0]} of ICT-FaceKit's light model; copy the whole FaceXModel folder"
            )
    raise UserError(
        f"{folder} holds no ICT-FaceKit; head 'ict' needs the FaceXModel folder of github.com/ICT-VGL/ICT-FaceKit"
    )


def _read_vertices(path: Path) -> Array:
    """The vertices (26719, 3) of an OBJ file, centimetres."""
    rows = [line[2:] for line in path.read_bytes().splitlines() if line.startswith(b"v ")]
    try:
        points = np.array(b" ".join(rows).split(), dtype=float).reshape(-1, 3)
    except ValueError as error:
        raise UserError(f"{path} is not a Wavefront OBJ ({error}); copy it again") from error
    if len(points) != N_VERTICES or not np.isfinite(points).all():
        raise UserError(
            f"{path} has {len(points)} vertices; ICT-FaceKit's light model has {N_VERTICES}. Copy the file again"
        )
    return points


def _read_mesh(path: Path) -> tuple[Array, Array, list[list[int]], list[list[int]]]:
    """Vertices, UVs (U, 2), and per polygon its vertex and UV ids (triangles and quads)."""
    uv, polygons, corners = [], [], []
    try:
        for line in path.read_text().splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "vt":
                uv.append(rest.split()[:2])
            elif kind == "f":
                split = [corner.split("/") for corner in rest.split()]
                polygons.append([int(corner[0]) - 1 for corner in split])
                corners.append([int(corner[1]) - 1 for corner in split])
        texture = np.array(uv, float)
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is not a Wavefront OBJ with UVs ({error}); copy it again") from error
    if len(polygons) != N_POLYGONS:
        raise UserError(f"{path} has {len(polygons)} polygons; ICT-FaceKit's light model has {N_POLYGONS}")
    return _read_vertices(path), texture, polygons, corners


def _read_landmarks(path: Path) -> Ints:
    try:
        ids = np.array(json.loads(path.read_text())["idx_to_landmark_verts"], np.int64)
        if ids.shape != (68,) or ids.min() < 0 or ids.max() >= END[0]:
            raise ValueError(f"landmarks of shape {ids.shape}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} has no 68 landmarks in idx_to_landmark_verts ({error}); copy it again"
        ) from error
    return ids


def _cut(
    polygons: list[list[int]], uv: Array, uv_polygons: list[list[int]]
) -> tuple[Ints, Ints, Ints, Array]:
    """Triangles of the parts that stay: label (F,), vertices and UV corners (F, 3), and UVs packed into one map."""
    labels, faces, corners, boxes, total = [], [], [], [], 0
    ends = [part[1] for part in PARTS[1:]] + [END[1]]
    for (_, first, label, (u0, v0, u1, v1)), end in zip(PARTS, ends, strict=True):
        triangles = []
        for p in range(first, end):
            for k in range(1, len(polygons[p]) - 1):
                faces.append((polygons[p][0], polygons[p][k], polygons[p][k + 1]))
                triangles.append((uv_polygons[p][0], uv_polygons[p][k], uv_polygons[p][k + 1]))
        labels += [LABELS.index(label)] * len(triangles)
        used, index = np.unique(np.array(triangles), return_inverse=True)
        low, high = uv[used].min(axis=0), uv[used].max(axis=0)
        boxes.append((uv[used] - low) / np.maximum(high - low, 1e-9) * (u1 - u0, v1 - v0) + (u0, v0))
        corners.append(index.reshape(-1, 3) + total)
        total += len(used)
    vertices = np.array(faces)
    if vertices.min() < 0 or vertices.max() >= END[0]:
        raise UserError(
            "the polygons of generic_neutral_mesh.obj are not in the order of ICT-FaceKit's light model; copy it again"
        )
    return np.array(labels), vertices, np.concatenate(corners), np.concatenate(boxes)


def _bust_edge(faces: Ints, template: Array, chin: float) -> Ints:
    """Vertices on the open border of the skin that lie below the chin."""
    sides = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    unique, count = np.unique(np.sort(sides, axis=1), axis=0, return_counts=True)
    border = np.unique(unique[count == 1])
    border = border[template[border, 1] < chin]
    if not len(border):
        raise UserError(
            "the mesh of generic_neutral_mesh.obj has no open edge below the chin; copy the file again"
        )
    return border


def _skinning(template: Array, balls: list[Ints], boundary: Ints, chin: float) -> Array:
    """Weights (V, 5) of root, neck, jaw, left and right eye; the jaw has none."""
    floor = template[boundary, 1].mean()
    share = np.clip((template[:, 1] - floor) / max(chin - floor, 1e-6), 0, 1)
    out = np.zeros((len(template), 5))
    out[:, 1] = share * share * (3 - 2 * share)
    out[boundary, 1] = 0
    out[:, 0] = 1 - out[:, 1]
    for column, ids in zip((3, 4), balls, strict=True):
        out[ids] = 0
        out[ids, column] = 1
    return out
