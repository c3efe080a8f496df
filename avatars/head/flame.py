"""FLAME from the files that a user has registered for; nothing of it ships here.

Expected in one folder (Li et al. 2017, https://flame.is.tue.mpg.de):

- the model: `generic_model.pkl` (FLAME 2020), `flame2023.pkl`, `flame2023_no_jaw.pkl` or `flame2023_Open.pkl`;
- `head_template_mesh.obj` (or `head_template.obj`), for the UV layout; or FlashAvatar's `FlameMesh.obj`, which is the
  same mesh with 30 more triangles across the mouth;
- optionally `FLAME_masks.pkl`, for regions and the boundary of the neck.

FLAME's mesh ends at the inner lips. What samples it by its UV map needs something there, so the mouth is closed: by the
triangles of `FlameMesh.obj` where that file is, with which the map gives the 3,348 / 13,453 / 53,678 samples of
FlashAvatar's Table 2; otherwise by a strip of as many triangles between the two lips, on a free place of the map.

The files are Python 2 pickles. They are read by an unpickler that knows arrays and sparse matrices and nothing else,
so that a file from an untrusted place cannot run code.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError
from avatars.head.geometry import close_rim, free_box, open_rims

__all__ = ["MODEL_FILES", "build", "load_pickle"]

MODEL_FILES = ("generic_model.pkl", "flame2023.pkl", "flame2023_no_jaw.pkl", "flame2023_Open.pkl")
N_SHAPE = 300
SKINNED = 5  # root, neck, jaw, left eye, right eye
UV_FILES = ("FlameMesh.obj", "head_template_mesh.obj", "head_template.obj")
MOUTH_WIDTH = 0.15  # of the UV map, at most: about the face's own share of it for an open mouth


class _Chumpy:
    """Stands in for the arrays of the abandoned package chumpy; only their numbers are kept."""

    def __init__(self, *_: object) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state

    def array(self) -> NDArray:
        """The numbers, shaped as they were."""
        value = self.state.get("x", self.state.get("a"))
        return np.asarray(value.array() if isinstance(value, _Chumpy) else value)


class _Restricted(pickle.Unpickler):
    """An unpickler that makes numpy arrays, scipy sparse matrices and chumpy stand-ins, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("chumpy"):
            return _Chumpy
        root = module.replace("numpy.core", "numpy._core")
        if (root, name) in {
            ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar"), ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:  # fmt: skip
            return super().find_class(root, name)
        if module.startswith("scipy.sparse") and name in ("csc_matrix", "csr_matrix", "coo_matrix"):
            return super().find_class("scipy.sparse", name)
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes bytes
            return super().find_class(module, name)
        if (module, name) in {("copy_reg", "_reconstructor"), ("copyreg", "_reconstructor")}:
            return _reconstructor
        if (module, name) in {("__builtin__", "object"), ("builtins", "object")}:
            return object
        raise pickle.UnpicklingError(f"it wants {module}.{name}")


def _reconstructor(cls: Any, base: type, state: object) -> object:
    """`copyreg._reconstructor` for the classes allowed here and plain objects only."""
    if base is not object:
        raise pickle.UnpicklingError(f"it rebuilds a {getattr(base, '__name__', base)}")
    return object.__new__(cls)


def load_pickle(path: Path) -> dict[str, Any]:
    """A FLAME pickle as a dict of arrays.

    Raises:
        UserError: the file is missing, is cut short, or holds anything but arrays.
    """
    try:
        with path.open("rb") as file:
            content = _Restricted(file, encoding="latin1").load()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a broken pickle fails in any way it likes
        raise UserError(
            f"{path} is not a FLAME file that can be read safely ({error}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not FLAME's dictionary")
    return {
        str(key): value.array() if isinstance(value, _Chumpy) else value for key, value in content.items()
    }


def build(folder: Path) -> dict[str, NDArray]:
    """The arrays of a `ParametricHead` from FLAME's files in a folder.

    Vertices are moved from FLAME's origin to the middle of its template, so that the head frame is about the same as
    that of the built-in head; axes and metres are FLAME's own (+y up, +z forward).

    Raises:
        UserError: a file is missing or lacks a field.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; head 'flame' needs one that holds {MODEL_FILES[0]}")
    model_path = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    if model_path is None:
        raise UserError(f"{folder} holds no FLAME model; expected one of {', '.join(MODEL_FILES)}")
    model = load_pickle(model_path)
    for key in ("f", "v_template", "shapedirs", "posedirs", "J_regressor", "weights"):
        if key not in model:
            raise UserError(f"{model_path} has no field {key!r}; it is not a FLAME model")
    template = np.asarray(model["v_template"], float)
    n = len(template)
    directions = np.asarray(model["shapedirs"], float)  # (V, 3, 300 + 100)
    regressor = model["J_regressor"]
    regressor = np.asarray(regressor.todense() if hasattr(regressor, "todense") else regressor, float)
    weights = np.asarray(model["weights"], float)
    if directions.shape[:2] != (n, 3) or weights.shape != (n, SKINNED) or regressor.shape != (SKINNED, n):
        raise UserError(f"{model_path} has arrays of unexpected shapes; it is not a FLAME head")
    n_shape = N_SHAPE if directions.shape[2] > N_SHAPE else directions.shape[2] // 2
    origin = (template.min(axis=0) + template.max(axis=0)) / 2
    template = template - origin
    basis = directions.transpose(2, 0, 1)  # (C, V, 3)
    # Joints are regressed from the shaped vertices, expression included: linear, so they ride along as points.
    points = np.concatenate([template, regressor[1:] @ template])
    basis = np.concatenate([basis, np.einsum("jv,cvx->cjx", regressor[1:], basis)], axis=1)
    pose = np.asarray(model["posedirs"], float).reshape(n * 3, -1)  # (3V, 36)
    faces = np.asarray(model["f"]).astype(np.int64)
    head = len(faces)
    faces, uv, uv_faces = _read_uv(folder, faces, n)
    faces, uv, uv_faces = _close_mouth(template, faces, uv, uv_faces, folder)
    names, masks, boundary = _read_masks(folder, faces, n, head)
    return {
        "template": points.astype(np.float32),
        "identity_basis": basis[:n_shape].astype(np.float32),
        "identity_std": np.ones(n_shape, np.float32),
        "expression_basis": basis[n_shape:].astype(np.float32),
        "pose_basis": np.ascontiguousarray(pose.T).astype(np.float32),
        "skinning": weights.astype(np.float32),
        "faces": faces,
        "uv": uv.astype(np.float32),
        "uv_faces": uv_faces,
        "region_names": np.array(names),
        "region_masks": masks,
        "landmarks68": np.zeros(0, np.int64),
        "boundary_vertices": boundary,
        "origin": origin.astype(np.float32),  # what brings vertices back to FLAME's own frame
    }


def _read_uv(folder: Path, faces: NDArray, n: int) -> tuple[NDArray, NDArray, NDArray]:
    """Faces (F, 3), UVs (U, 2) and the faces' UV ids (F, 3) out of the OBJ that has FLAME's layout.

    The model's own faces come first, in their order, and then what the file has more.
    """
    path = next((folder / name for name in UV_FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(
            f"{folder} has no head_template_mesh.obj, which holds FLAME's UV layout; put it beside the model"
        )
    uv, corners, vertices = [], [], []
    try:
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] == ["vt"]:
                uv.append([float(words[1]), float(words[2])])
            elif words[:1] == ["f"]:
                split = [word.split("/") for word in words[1:]]
                vertices.append([int(corner[0]) - 1 for corner in split])
                corners.append([int(corner[1]) - 1 for corner in split])
        found, texture = np.array(vertices).reshape(-1, 3), np.array(corners).reshape(-1, 3)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{path} is not a Wavefront OBJ of triangles with UVs ({error}); download it again"
        ) from error
    # An editor may have turned a triangle's corners or sorted the triangles; which ones there are is what counts.
    place = {
        tuple(face): (k, r) for k, row in enumerate(found.tolist()) for r, face in enumerate(_turns(row))
    }
    ours = [place.get(tuple(face)) for face in faces.tolist()]
    there = np.array([(-1, 0) if entry is None else entry for entry in ours])
    rest = np.setdiff1d(np.arange(len(found)), there[:, 0])
    if (there[:, 0] < 0).any() or len(rest) + len(faces) != len(found) or found.max() >= n:
        raise UserError(
            f"{path} has other faces than the model beside it; use the files of one FLAME release"
        )
    turned = (np.arange(3) + there[:, 1:]) % 3
    own = np.take_along_axis(texture[there[:, 0]], turned, axis=1)
    return np.concatenate([faces, found[rest]]), np.array(uv), np.concatenate([own, texture[rest]])


def _turns(face: list[int]) -> list[list[int]]:
    """The three ways to write one triangle, by how many corners it is turned."""
    return [face[k:] + face[:k] for k in range(3)]


def _close_mouth(
    template: NDArray, faces: NDArray, uv: NDArray, uv_faces: NDArray, folder: Path
) -> tuple[NDArray, NDArray, NDArray]:
    """Adds triangles on the rim of the lips, with a place of their own in the UV map; a closed mesh stays as it is.

    Of the rims that FLAME has, the neck's cut is the lowest and the eyes' do not reach across the middle of the face.
    """
    rims = open_rims(faces)
    lowest = min(rims, key=lambda rim: template[rim, 1].mean(), default=None)
    for rim in rims:
        x = template[rim, 0]
        if rim is lowest or not x.min() < 0 < x.max():
            continue
        closing = close_rim(rim, template)
        try:
            u0, v0, u1, v1 = free_box(uv, uv_faces, width=MOUTH_WIDTH)
        except ValueError as error:
            raise UserError(
                f"the UV layout in {folder} leaves no place for the mouth's triangles ({error});"
                " put FlashAvatar's FlameMesh.obj beside the model"
            ) from error
        layout = _lens(template[rim]) * (u1 - u0, v1 - v0) + (u0, v0)
        local = np.zeros(len(template), np.int64)
        local[rim] = np.arange(len(rim)) + len(uv)
        faces = np.concatenate([faces, closing])
        uv, uv_faces = np.concatenate([uv, layout]), np.concatenate([uv_faces, local[closing]])
    return faces, uv, uv_faces


def _lens(points: NDArray) -> NDArray:
    """A rim (n, 3), seen from the front, as an ellipse in the unit square, (n, 2): each lip is half of it.

    A convex outline keeps any triangles on it apart, also of lips that touch.
    """
    n, first, last = len(points), int(points[:, 0].argmin()), int(points[:, 0].argmax())
    layout = np.zeros((n, 2))
    for step, end in ((1, (last - first) % n), (-1, (first - last) % n)):
        lip = (first + step * np.arange(end + 1)) % n
        along = np.append(0, np.linalg.norm(np.diff(points[lip], axis=0), axis=1).cumsum())
        angle = np.pi * along / along[-1]
        # Outward faces run clockwise around what they leave open, seen from the front: the upper lip leads on.
        layout[lip] = np.stack([1 - np.cos(angle), 1 + step * np.sin(angle)], axis=1) / 2
    return layout


def _read_masks(
    folder: Path, faces: NDArray, n: int, head: int
) -> tuple[list[str], NDArray[np.bool_], NDArray]:
    """Region names, masks (R, F) of faces whose corners all lie in a region, and the vertices of the boundary.

    The boundary is wider, as FlashAvatar has it: faces with any corner on it, which get no Gaussians. The faces from
    `head` on, which close the mouth, are the region "mouth" and in no other.
    """
    path = folder / "FLAME_masks.pkl"
    mouth = (np.arange(len(faces)) >= head)[None]
    if not path.is_file():
        return ["skin", "mouth"], np.concatenate([~mouth, mouth]), np.zeros(0, np.int64)
    regions = {name: np.asarray(ids).astype(np.int64) for name, ids in load_pickle(path).items()}
    if any(len(ids) and (ids.min() < 0 or ids.max() >= n) for ids in regions.values()):
        raise UserError(
            f"{path} names vertices that the model does not have; use the files of one FLAME release"
        )
    masks = np.stack(
        [
            np.isin(faces, ids).any(axis=1) if name == "boundary" else np.isin(faces, ids).all(axis=1)
            for name, ids in regions.items()
        ]
    )
    masks = np.concatenate([masks & ~mouth, mouth])
    return [*regions, "mouth"], masks, regions.get("boundary", np.zeros(0, np.int64))
