"""Gaussians to files that other people's viewers open, and back: 3DGS PLY, .splat and SPZ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from avatars.errors import UserError
from avatars.export.ply import read_ply, write_ply
from avatars.export.splat import read_splat, write_splat
from avatars.export.spz import read_spz, write_spz
from avatars.gaussians import Gaussians
from avatars.rasterize.common import check_values

__all__ = [
    "load_gaussians",
    "read_ply",
    "read_splat",
    "read_spz",
    "save_gaussians",
    "write_ply",
    "write_splat",
    "write_spz",
]

Up = Literal["+y", "-y"]

_HALF_TURN = torch.diag(torch.tensor([1.0, -1.0, -1.0]))  # about x: y and z change sign


def save_gaussians(
    gaussians: Gaussians, path: str | Path, up: Up = "+y", provenance: Mapping[str, Any] | None = None
) -> None:
    """Writes Gaussians as .ply, .splat or .spz, by the path's ending, upright in the usual viewers.

    Args:
        gaussians: any number, RGB or spherical harmonics (.splat keeps only what is seen from all sides).
        path: the file; it appears complete or not at all.
        up: which way is up in the Gaussians' world: "+y" in the head frame, "-y" in OpenCV worlds.
        provenance: what they were made from; goes into a PLY's comments, and beside the other formats as
            `<path>.json`, because those have no room for it.

    Raises:
        UserError: an ending that names no format, or values that no reader could draw (NaN, a zero quaternion).
    """
    path = Path(path)
    writers = {".ply": write_ply, ".splat": write_splat, ".spz": write_spz}
    if path.suffix.lower() not in writers:
        raise UserError(f"{path} names no splat format: end it in .ply, .splat or .spz.")
    check_values(gaussians, None)
    opencv = gaussians.transform(_HALF_TURN) if up == "+y" else gaussians
    if path.suffix.lower() == ".ply":
        write_ply(opencv, path, [f"headsplat {json.dumps(provenance)}"] if provenance else [])
        return
    writers[path.suffix.lower()](opencv, path)
    if provenance:
        path.with_name(path.name + ".json").write_text(json.dumps(provenance, indent=1) + "\n")


def load_gaussians(path: str | Path, up: Up = "+y") -> Gaussians:
    """Reads a .ply, .splat or .spz file of anybody into a world where `up` is up.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    path = Path(path)
    readers = {".ply": read_ply, ".splat": read_splat, ".spz": read_spz}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} names no splat format: .ply, .splat and .spz can be read.")
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    try:
        gaussians = readers[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    return gaussians.transform(_HALF_TURN) if up == "+y" else gaussians
