"""The PLY layout of 3D Gaussian Splatting (Kerbl et al. 2023): float32, logarithmic scales, logits of opacity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avatars.errors import UserError
from avatars.export.arrays import as_array, logit, make_gaussians
from avatars.files import write_whole
from avatars.gaussians import Gaussians, rgb_to_sh

__all__ = ["read_ply", "write_ply"]

MAX_HEADER = 1 << 20
_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "<i2"),
    **dict.fromkeys(("ushort", "uint16"), "<u2"),
    **dict.fromkeys(("int", "int32"), "<i4"),
    **dict.fromkeys(("uint", "uint32"), "<u4"),
    **dict.fromkeys(("float", "float32"), "<f4"),
    **dict.fromkeys(("double", "float64"), "<f8"),
}


def write_ply(gaussians: Gaussians, path: Path, comments: Sequence[str] = ()) -> None:
    """Writes a 3DGS PLY with normals of zero, as the original code does; no axis is turned.

    Args:
        gaussians: RGB is written as the constant harmonic.
        path: the file.
        comments: lines for the header.
    """
    colors = gaussians.colors if gaussians.colors.ndim == 3 else rgb_to_sh(gaussians.colors)[:, None]
    harmonics = as_array(colors)  # (N, K, 3)
    # all of red, then green, then blue
    rest = harmonics[:, 1:].transpose(0, 2, 1).reshape(len(gaussians), 3 * harmonics.shape[1] - 3)
    columns = {
        "x y z": as_array(gaussians.means),
        "nx ny nz": np.zeros((len(gaussians), 3), np.float32),
        "f_dc_0 f_dc_1 f_dc_2": harmonics[:, 0],
        " ".join(f"f_rest_{i}" for i in range(rest.shape[1])): rest,
        "opacity": logit(as_array(gaussians.opacities))[:, None],
        "scale_0 scale_1 scale_2": np.log(np.maximum(as_array(gaussians.scales), 1e-20)),
        "rot_0 rot_1 rot_2 rot_3": as_array(gaussians.quats),
    }
    names = " ".join(columns).split()
    header = ["ply", "format binary_little_endian 1.0"]
    header += [f"comment {' '.join(comment.split())}" for comment in comments]
    header += [
        f"element vertex {len(gaussians)}",
        *(f"property float {name}" for name in names),
        "end_header",
    ]
    body = np.concatenate(list(columns.values()), axis=1).astype("<f4")
    write_whole(path, ("\n".join(header) + "\n").encode() + body.tobytes())


def read_ply(path: Path) -> Gaussians:
    """Reads a 3DGS PLY; extra properties are ignored, missing normals are fine.

    Returns:
        Gaussians with (N, K, 3) colours.

    Raises:
        UserError: not a binary little-endian 3DGS PLY, or shorter than its header says.
    """
    with path.open("rb") as file:
        count, properties = _read_header(path, file.read(MAX_HEADER).split(b"end_header\n", 1))
        kind = np.dtype(properties)
        size = path.stat().st_size
        start = _header_length(path)
        if size - start < count * kind.itemsize:
            raise UserError(
                f"{path} is truncated: its header claims {count} splats of {kind.itemsize} bytes, "
                f"and {max(0, size - start)} bytes follow."
            )
        file.seek(start)
        table = np.fromfile(file, dtype=kind, count=count)

    def columns(names: Sequence[str]) -> np.ndarray:
        missing = [name for name in names if name not in (kind.names or ())]
        if missing:
            hint = (
                " It looks like SuperSplat's compressed PLY."
                if "packed_position" in (kind.names or ())
                else ""
            )
            raise UserError(
                f"{path} is not a 3D Gaussian Splatting PLY: it has no {', '.join(missing)}.{hint}"
            )
        with np.errstate(invalid="ignore"):  # a NaN is named by make_gaussians
            return np.stack([table[name].astype(np.float64) for name in names], axis=1)

    rest = sum(name.startswith("f_rest_") for name in kind.names or ())
    if rest not in (0, 9, 24, 45):
        raise UserError(
            f"{path} has {rest} f_rest properties; spherical harmonics of degree 0 to 3 have 0, 9, 24 or 45."
        )
    means, dc = columns(["x", "y", "z"]), columns(["f_dc_0", "f_dc_1", "f_dc_2"])
    opacities, scales = columns(["opacity"])[:, 0], columns([f"scale_{i}" for i in range(3)])
    quats = columns([f"rot_{i}" for i in range(4)])
    higher = columns([f"f_rest_{i}" for i in range(rest)]) if rest else np.zeros((count, 0))
    harmonics = np.concatenate([dc[:, None], higher.reshape(count, 3, rest // 3).transpose(0, 2, 1)], axis=1)
    with np.errstate(over="ignore"):  # an overflow is infinite and is named by make_gaussians
        return make_gaussians(path, means, quats, np.exp(scales), 1 / (1 + np.exp(-opacities)), harmonics)


def _header_length(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(MAX_HEADER).index(b"end_header\n") + len(b"end_header\n")


def _read_header(path: Path, parts: list[bytes]) -> tuple[int, list[tuple[str, str]]]:
    """Number of vertices and their properties."""
    lines = parts[0].decode("ascii", errors="replace").splitlines()
    if len(parts) < 2 or not lines or lines[0].strip() != "ply":
        raise UserError(f"{path} is not a PLY file: it does not start with 'ply' and a header of text.")
    count, element = -1, ""
    properties: list[tuple[str, str]] = []
    for line in lines[1:]:
        words = line.split()
        if not words or words[0] in ("comment", "obj_info"):
            continue
        if words[0] == "format" and words[1:2] != ["binary_little_endian"]:
            raise UserError(
                f"{path} has the format {' '.join(words[1:])}; only binary_little_endian can be read."
            )
        if words[0] == "element" and len(words) == 3:
            if count < 0 and words[1] != "vertex":
                raise UserError(f"{path} starts with the element {words[1]!r}; splats are in 'vertex'.")
            element = words[1]
            if element == "vertex":
                count = (
                    int(words[2]) if words[2].isascii() and words[2].isdigit() and len(words[2]) < 16 else -1
                )
        if words[0] == "property" and element == "vertex":
            if len(words) != 3 or words[1] not in _TYPES or words[2] in dict(properties):
                raise UserError(f"{path} has a property that splats do not have: {line.strip()!r}.")
            properties.append((words[2], _TYPES[words[1]]))
    if count < 0 or not properties:
        raise UserError(f"{path} has no usable 'element vertex' with properties in its header.")
    return count, properties
