"""FLAME from the files that a user has registered for; nothing of it ships here.

Expected in one folder (Li et al. 2017, https://flame.is.tue.mpg.de):

- the model: `generic_model.pkl` (FLAME 2020), `flame2023.pkl`, `flame2023_no_jaw.pkl` or `flame2023_Open.pkl`;
- `head_template_mesh.obj` (or `head_template.obj`), for the UV layout;
- optionally `FLAME_masks.pkl`, for regions and the boundary of the neck.

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

__all__ = ["MODEL_FILES", "build", "load_pickle"]

MODEL_FILES = ("generic_model.pkl", "flame2023.pkl", "flame2023_no_jaw.pkl", "flame2023_Open.pkl")
N_SHAPE = 300
SKINNED = 5  # root, neck, jaw, left eye, right eye


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
    template = template - (template.min(axis=0) + template.max(axis=0)) / 2
    basis = directions.transpose(2, 0, 1)  # (C, V, 3)
    # Joints are regressed from the shaped vertices, expression included: linear, so they ride along as points.
    points = np.concatenate([template, regressor[1:] @ template])
    basis = np.concatenate([basis, np.einsum("jv,cvx->cjx", regressor[1:], basis)], axis=1)
    pose = np.asarray(model["posedirs"], float).reshape(n * 3, -1)  # (3V, 36)
    faces = np.asarray(model["f"]).astype(np.int64)
    uv, uv_faces = _read_uv(folder, faces)
    names, masks, boundary = _read_masks(folder, faces, n)
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
    }


def _read_uv(folder: Path, faces: NDArray) -> tuple[NDArray, NDArray]:
    """UVs and their faces out of the template's OBJ, in the order of the model's faces."""
    path = next(
        (p for p in (folder / "head_template_mesh.obj", folder / "head_template.obj") if p.is_file()), None
    )
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
                split = [word.split("/") for word in words[1:4]]
                vertices.append([int(corner[0]) - 1 for corner in split])
                corners.append([int(corner[1]) - 1 for corner in split])
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is not a Wavefront OBJ with UVs ({error}); download it again") from error
    if not np.array_equal(np.array(vertices), faces):
        raise UserError(
            f"{path} has other faces than the model beside it; use the files of one FLAME release"
        )
    return np.array(uv), np.array(corners)


def _read_masks(folder: Path, faces: NDArray, n: int) -> tuple[list[str], NDArray[np.bool_], NDArray]:
    """Region names, masks (R, F) of faces whose corners all lie in a region, and the vertices of the boundary.

    The boundary is wider, as FlashAvatar has it: faces with any corner on it, which get no Gaussians.
    """
    path = folder / "FLAME_masks.pkl"
    if not path.is_file():
        return ["skin"], np.ones((1, len(faces)), bool), np.zeros(0, np.int64)
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
    return list(regions), masks, regions.get("boundary", np.zeros(0, np.int64))
