"""Heads by the name that a tracked capture gives, and FLAME moved by all that metrical-tracker tells.

A tracker's code of a face is more than expression coefficients: FLAME's jaw and eyes turn on joints, and its eyelids
are shapes that are added after the joints. `TrackedFlame` takes the 135 numbers that the reader of tracked videos makes
of them and is otherwise a head like the others.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.gaussians import matrix_to_quaternion
from avatars.head.model import ParametricHead
from avatars.weights import WEIGHTS_VARIABLE

__all__ = ["CODE_LENGTH", "TrackedFlame", "load_head", "rotation_vectors"]

EXPRESSION, EYES, EYELIDS, JAW, NECK = (
    slice(0, 100),
    slice(100, 112),
    slice(112, 114),
    slice(114, 120),
    slice(120, 126),
)
CODE_LENGTH = 135
"""The places above and, last, nine of the head's pose, which is in the cameras."""
EYELID_FILES = ("l_eyelid.npy", "r_eyelid.npy")
TRACKED = "flame2020"


class TrackedFlame(nn.Module):
    """FLAME in the frame that its tracker's cameras look at, driven by codes of 135 numbers.

    Attributes:
        faces, uv, uv_faces, landmarks68: as `ParametricHead` has them.
        notes: what of a code moves nothing, for whoever fits to it.
    """

    eyelids: Tensor | None  # (2, V, 3) left and right, metres
    origin: Tensor  # (3,)

    def __init__(self, flame: ParametricHead, eyelids: Tensor | None) -> None:
        """Puts the joints and the lids under one code.

        Args:
            flame: a head that `ParametricHead.load("flame", …)` read.
            eyelids: (2, V, 3) metres that a closed left and right lid moves vertices, or None where they are not known.
        """
        super().__init__()
        self.flame = flame
        self.name, self.expression_kind = TRACKED, f"flame-{CODE_LENGTH}"
        self.n_identity, self.n_expression = flame.n_identity, CODE_LENGTH
        self.register_buffer("eyelids", eyelids)
        self.register_buffer("origin", torch.from_numpy(np.asarray(flame.arrays["origin"], np.float32)))
        self.notes = (
            []
            if eyelids is not None
            else [
                f"tracked eyelids move nothing: metrical-tracker's {' and '.join(EYELID_FILES)} are not with the model"
            ]
        )

    @classmethod
    def load(cls, folder: str | Path) -> TrackedFlame:
        """FLAME out of a folder of the user's files, as `avatars.head.flame` describes it.

        metrical-tracker's `l_eyelid.npy` and `r_eyelid.npy` are taken where they are there, in the folder or in its
        `blendshapes`.

        Raises:
            UserError: a file is missing or is not what its name says.
        """
        folder = Path(folder)
        flame = ParametricHead.load("flame", folder)
        places = [folder, folder / "blendshapes"]
        found = next((at for at in places if all((at / name).is_file() for name in EYELID_FILES)), None)
        if found is None:
            return cls(flame, None)
        lids = []
        for name in EYELID_FILES:
            try:
                lid = np.load(found / name, allow_pickle=False).astype(np.float32)
            except (OSError, ValueError) as error:
                raise UserError(f"{found / name} is no array of an eyelid ({error}).") from error
            if lid.shape != (flame.n_vertices, 3):
                raise UserError(
                    f"{found / name} has the shape {lid.shape} and the model {flame.n_vertices} vertices; use files of "
                    "one FLAME release."
                )
            lids.append(lid)
        return cls(flame, torch.from_numpy(np.stack(lids)))

    @property
    def faces(self) -> Tensor:
        """(F, 3) triangles."""
        return self.flame.faces

    @property
    def uv(self) -> Tensor:
        """(U, 2) texture coordinates."""
        return self.flame.uv

    @property
    def uv_faces(self) -> Tensor:
        """(F, 3) indices into them."""
        return self.flame.uv_faces

    @property
    def landmarks68(self) -> Tensor:
        """None: FLAME's landmarks lie inside triangles."""
        return self.flame.landmarks68

    @property
    def regions(self) -> dict[str, Tensor]:
        """Masks (F,) of its triangles by the names of FLAME's masks file."""
        return self.flame.regions

    def vertices(self, identity: Tensor, expression: Tensor) -> Tensor:
        """Vertices (B, V, 3) in metres, in FLAME's own frame.

        Args:
            identity: (B, I) shape coefficients.
            expression: (B, 135): 100 expression coefficients, eyes 2 x 6 (left, right), eyelids 2 (left, right; 1 is
                shut), jaw 6, neck 6, and 9 that move nothing. Six numbers are the first two rows of a rotation; all
                zeros are no turn, so that a code of zeros is the face at rest.

        Raises:
            UserError: a code has the wrong length.
        """
        if expression.dim() != 2 or expression.shape[1] != CODE_LENGTH:
            raise UserError(
                f"codes of tracked FLAME must be (B, {CODE_LENGTH}), not {tuple(expression.shape)}"
            )
        coefficients = expression[:, EXPRESSION][:, : self.flame.n_expression]
        posed = self.flame.vertices(
            identity,
            coefficients,
            neck=rotation_vectors(expression[:, NECK]),
            jaw=rotation_vectors(expression[:, JAW]),
            eyes=rotation_vectors(expression[:, EYES].reshape(-1, 6)).reshape(-1, 6),
        )
        if self.eyelids is not None:
            posed = posed + torch.einsum("bk,kvx->bvx", expression[:, EYELIDS], self.eyelids)
        return posed + self.origin


def rotation_vectors(rows: Tensor) -> Tensor:
    """Axis-angle vectors (B, 3) of rotations given by their first two rows (B, 6); six zeros are no turn.

    Zhou et al. 2019, "On the continuity of rotation representations", section 4: the rows need not be orthonormal.
    """
    rest = torch.eye(3, dtype=rows.dtype, device=rows.device)[:2].reshape(6)
    rows = torch.where((rows == 0).all(-1, keepdim=True), rest, rows)
    first = nn.functional.normalize(rows[:, :3], dim=-1)
    second = rows[:, 3:] - (first * rows[:, 3:]).sum(-1, keepdim=True) * first
    second = nn.functional.normalize(second, dim=-1)
    third = torch.linalg.cross(first, second)
    quaternion = matrix_to_quaternion(torch.stack([first, second, third], 1))  # w >= 0
    sine = quaternion[:, 1:].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, quaternion[:, :1])
    return quaternion[:, 1:] * torch.where(sine > 1e-7, angle / sine.clamp_min(1e-7), 2.0)


def load_head(name: str) -> Any:
    """The head that a capture says it was tracked with, ready to be posed by the capture's codes.

    Args:
        name: "makehuman", built in; "flame2020", what metrical-tracker tracks with, out of the folder of that name in
            the one that HEADSPLAT_WEIGHTS names.

    Raises:
        UserError: the name is unknown, or FLAME's files are not there or not whole.
    """
    if name == "makehuman":
        return ParametricHead.load()
    if name != TRACKED:
        raise UserError(
            f"This version poses tracked codes with the heads 'makehuman' and {TRACKED!r}, not with {name!r}; track "
            "the pictures with one of those."
        )
    given = os.environ.get(WEIGHTS_VARIABLE)
    if not given:
        raise UserError(
            f"The head {TRACKED!r} needs your FLAME 2020 in a folder {TRACKED} inside the one that {WEIGHTS_VARIABLE} "
            "names (generic_model.pkl, head_template_mesh.obj, FLAME_masks.pkl; https://flame.is.tue.mpg.de)."
        )
    return TrackedFlame.load(Path(given) / TRACKED)
