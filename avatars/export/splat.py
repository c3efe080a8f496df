"""The .splat layout (antimatter15's viewer): 32 bytes a splat, no header, no view dependence."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from avatars.errors import UserError
from avatars.export.arrays import as_array, make_gaussians
from avatars.files import write_whole
from avatars.gaussians import Gaussians, sh_to_rgb

__all__ = ["read_splat", "write_splat"]

_RECORD = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("quat", "u1", 4)])


def write_splat(gaussians: Gaussians, path: Path) -> None:
    """Writes a .splat file, the largest and most opaque first; no axis is turned. Harmonics above 0 are dropped."""
    rgb = gaussians.colors if gaussians.colors.ndim == 2 else sh_to_rgb(gaussians.colors[:, 0])
    scales, opacities = as_array(gaussians.scales), as_array(gaussians.opacities)
    quats = as_array(gaussians.quats)
    quats = quats / np.linalg.norm(quats, axis=1, keepdims=True)
    table = np.empty(len(gaussians), _RECORD)
    table["mean"] = as_array(gaussians.means)
    table["scale"] = scales
    table["rgba"] = np.clip(np.round(np.column_stack([as_array(rgb), opacities]) * 255), 0, 255)
    table["quat"] = np.clip(np.round(quats * 128 + 128), 0, 255)
    order = np.argsort(-scales.prod(axis=1) * opacities, kind="stable")
    write_whole(path, table[order].tobytes())


def read_splat(path: Path) -> Gaussians:
    """Reads a .splat file.

    Returns:
        Gaussians with (N, 3) colours.

    Raises:
        UserError: the size is no multiple of 32 bytes, or a number in it is none.
    """
    size = path.stat().st_size
    if size % _RECORD.itemsize:
        raise UserError(f"{path} is truncated or not a .splat file: {size} bytes are no multiple of 32.")
    table = np.fromfile(path, dtype=_RECORD)
    if (table["scale"] < 0).any():
        raise UserError(f"{path} is not a .splat file: it has negative scales.")
    rgba = table["rgba"] / 255
    quats = (table["quat"].astype(np.float64) - 128) / 128
    return make_gaussians(path, table["mean"], quats, table["scale"], rgba[:, 3], rgba[:, :3])
