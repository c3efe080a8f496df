"""`ParametricHead`: identity and expression codes to head vertices."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.head import makehuman
from avatars.head.cache import cache_folder, save_npz_atomically
from avatars.head.geometry import triangulate

__all__ = ["ParametricHead"]

CACHE_VERSION = 1


class ParametricHead(nn.Module):
    """A head that is linear in identity and expression, with rotating neck, jaw and eyes.

    Vertices are metres in the head frame (+x the subject's left, +y up, +z out of the face). An identity code has
    unit variance over the population the basis was made from; expression weights are those of `expression_names`.

    Attributes:
        faces: (F, 3) triangles; two in a row share a quad where the source has quads.
        uv, uv_faces: (U, 2) coordinates, v up, and (F, 3) indices into them.
        regions: bool masks (F,) by name; see `makehuman.REGION_NAMES`.
        landmarks68: (68,) vertex ids in the iBUG order.
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
    _loaded: ClassVar[dict[tuple[str, str], ParametricHead]] = {}

    def __init__(
        self, arrays: dict[str, np.ndarray], *, name: str, expression_names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.name = name
        self.expression_names = expression_names
        self.expression_kind = "arkit-52"
        for key in ("template", "identity_std", "skinning", "uv"):
            self.register_buffer(key, torch.from_numpy(np.asarray(arrays[key], np.float32)))
        basis = arrays["identity_basis"]
        self.register_buffer("identity_basis", torch.from_numpy(basis.reshape(len(basis), -1)))
        basis = arrays["expression_basis"]
        self.register_buffer("expression_basis", torch.from_numpy(basis.reshape(len(basis), -1)))
        for key in ("landmarks68", "boundary_vertices"):
            self.register_buffer(key, torch.from_numpy(arrays[key].astype(np.int64)))
        self.register_buffer("faces", torch.from_numpy(triangulate(arrays["quads"]).astype(np.int64)))
        self.register_buffer("uv_faces", torch.from_numpy(triangulate(arrays["uv_quads"]).astype(np.int64)))
        label = np.repeat(arrays["label"], 2)
        masks = [label == k for k in range(len(makehuman.LABELS))]
        masks += [np.repeat(arrays[key], 2) for key in ("ears", "neck")]
        self.region_names = makehuman.REGION_NAMES
        self.register_buffer("region_masks", torch.from_numpy(np.stack(masks)))
        self.arrays = arrays

    @classmethod
    def load(cls, name: str = "makehuman") -> ParametricHead:
        """The named head. The first call on a machine parses the source (about 5 s), later ones read a cache.

        Raises:
            UserError: the name is unknown or the source files are missing.
        """
        if name != "makehuman":
            raise UserError(f"unknown head {name!r}; there is 'makehuman'")
        path = cache_path()
        key = (name, str(path))
        if key not in cls._loaded:
            cls._loaded[key] = cls(_cached(path), name=name, expression_names=makehuman.ARKIT_NAMES)
        return cls._loaded[key]

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
        """Face masks (F,) bool. The labels up to 'boundary' share out all faces; 'ears' and 'neck' lie within skin."""
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
            UserError: a code has the wrong length.
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
        return self._pose(points, neck, jaw, eyes)

    def _pose(self, points: Tensor, neck: Tensor | None, jaw: Tensor | None, eyes: Tensor | None) -> Tensor:
        """Rotate eyes and jaw about their pivots, then everything above the neck about its own."""
        n = self.n_vertices
        out, pivots = points[:, :n], points[:, n:]
        turns = [
            (2, None if eyes is None else eyes[:, :3]),
            (3, None if eyes is None else eyes[:, 3:]),
            (1, jaw),
            (0, neck),
        ]
        for joint, turn in turns:
            if turn is None:
                continue
            pivot = pivots[:, joint : joint + 1]
            turned = (out - pivot) @ _rotation(turn).transpose(1, 2) + pivot
            out = out + self.skinning[:, joint, None] * (turned - out)
        return out


def _rotation(axis_angle: Tensor) -> Tensor:
    """Rotation matrices (B, 3, 3) of axis-angle vectors (B, 3), by the matrix exponential (smooth at zero)."""
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)
    return torch.linalg.matrix_exp(skew)


def cache_path() -> Path:
    """Where the parsed built-in head is kept."""
    return cache_folder() / f"head-makehuman-v{CACHE_VERSION}-{makehuman.DATA_SHA256[:12]}.npz"


def _cached(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the built-in head, parsed when the cache does not have them."""
    if not path.is_file():
        save_npz_atomically(path, makehuman.build(makehuman.data_folder()))
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the head cache {path} cannot be read ({error}); delete it and run again") from error
