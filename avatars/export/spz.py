"""Niantic's SPZ, versions 2 and 3: gzip over fixed-point arrays, about a tenth of a PLY.

Stored axes are x right, y up, z backward; Gaussians come and go in OpenCV axes like in a PLY, so y and z change
sign here, with the rotations and the harmonics that are odd in them.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from avatars.errors import UserError
from avatars.export.arrays import as_array, make_gaussians
from avatars.files import write_whole
from avatars.gaussians import Gaussians, rgb_to_sh, sh_basis

__all__ = ["read_spz", "write_spz"]

MAGIC = 0x5053474E  # "NGSP"
HEADER = struct.Struct("<IIIBBBB")  # magic, version, splats, SH degree, fractional bits, flags, reserved
COLOR_SCALE = 0.15
MAX_FRACTIONAL_BITS = 20
MAX_RATIO = 1040  # gzip cannot pack tighter
_SH_FLIP_PROBE = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)


def write_spz(gaussians: Gaussians, path: Path, version: int = 3) -> None:
    """Writes an SPZ file.

    Args:
        gaussians: means within 2²³ units of the origin; RGB is written as the constant harmonic.
        path: the file.
        version: 3 (rotations to about 0.1 degrees) or 2 (about 0.5 degrees, for old readers).
    """
    if version not in (2, 3):
        raise ValueError(f"SPZ version must be 2 or 3, not {version}")
    count = len(gaussians)
    means = as_array(gaussians.means).astype(np.float64) * [1, -1, -1]
    reach = np.abs(means).max(initial=0.0)
    # As many fractional bits as 24-bit positions allow: 12, the usual number, is 0.24 mm in metres.
    bits = (
        MAX_FRACTIONAL_BITS
        if reach == 0
        else min(MAX_FRACTIONAL_BITS, math.floor(math.log2((2**23 - 1) / reach)))
    )
    if bits < 0:
        raise UserError(
            f"{path}: means reach {reach:.3g} units from the origin; SPZ holds at most {2**23 - 1}."
        )
    fixed = np.round(means * 2.0**bits).astype("<i4")
    colors = gaussians.colors if gaussians.colors.ndim == 3 else rgb_to_sh(gaussians.colors)[:, None]
    degree = math.isqrt(colors.shape[1]) - 1
    harmonics = as_array(colors)
    logs = np.log(np.maximum(as_array(gaussians.scales), 1e-20))
    quats = as_array(gaussians.quats)[:, [1, 2, 3, 0]].astype(np.float64) * [1, -1, -1, 1]  # xyzw
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    parts = [
        HEADER.pack(MAGIC, version, count, degree, bits, 0, 0),
        np.ascontiguousarray(fixed.view(np.uint8).reshape(count, 3, 4)[:, :, :3]).tobytes(),
        _bytes(as_array(gaussians.opacities) * 255),
        _bytes(harmonics[:, 0] * (COLOR_SCALE * 255) + 127.5),
        _bytes((logs + 10) * 16),
        _smallest_three(quats) if version == 3 else _first_three(quats),
        _pack_harmonics(harmonics[:, 1:] * _sh_flip(degree)[:, None]),
    ]
    write_whole(path, gzip.compress(b"".join(parts), compresslevel=6, mtime=0))


def read_spz(path: Path) -> Gaussians:
    """Reads an SPZ file of version 2 or 3.

    Returns:
        Gaussians with (N, K, 3) colours.

    Raises:
        UserError: another version, or the content is not what the header claims.
    """
    packed = path.read_bytes()
    if packed[:4] == struct.pack("<I", MAGIC):
        raise UserError(f"{path} is an SPZ file of version 4 or later; versions 2 and 3 can be read.")
    header, _ = _unpack(path, packed, HEADER.size)
    if len(header) < HEADER.size:
        raise UserError(f"{path} is truncated: it ends inside its header.")
    magic, version, count, degree, bits, _flags, _reserved = HEADER.unpack(header)
    if magic != MAGIC:
        raise UserError(f"{path} is not an SPZ file: its first bytes are not those of the format.")
    if version not in (2, 3) or degree > 3 or bits > 23:
        raise UserError(
            f"{path} has version {version}, harmonics of degree {degree} and {bits} fractional bits; "
            "versions 2 and 3 up to degree 3 and 23 bits can be read."
        )
    rest = (degree + 1) ** 2 - 1
    widths = [9, 1, 3, 3, 4 if version == 3 else 3, 3 * rest]
    expected = HEADER.size + count * sum(widths)
    if expected > len(packed) * MAX_RATIO:
        raise UserError(
            f"{path} is truncated: its header claims {count} splats, more than {len(packed)} bytes can hold."
        )
    content, ended = _unpack(path, packed, expected + 1)
    if len(content) != expected or not ended:
        raise UserError(
            f"{path} is damaged: {count} splats need {expected} bytes, and it holds another number."
        )
    arrays, start = [], HEADER.size
    for width in widths:
        arrays.append(np.frombuffer(content, np.uint8, count * width, start).reshape(count, width))
        start += count * width
    fixed, alphas, dc, logs, rotations, harmonics = arrays
    words = np.zeros((count, 3, 4), np.uint8)
    words[:, :, 1:] = fixed.reshape(count, 3, 3)  # in the high bytes: the shift down then keeps the sign
    means = (words.view("<i4")[..., 0] >> 8) / 2.0**bits * [1, -1, -1]
    quats = _from_smallest_three(rotations) if version == 3 else _from_first_three(rotations)
    colors = np.concatenate(
        [
            ((dc / 255 - 0.5) / COLOR_SCALE)[:, None],
            (harmonics.reshape(count, rest, 3) - 128.0) / 128 * _sh_flip(degree)[:, None],
        ],
        axis=1,
    )
    turned = quats[:, [3, 0, 1, 2]] * [1, 1, -1, -1]
    return make_gaussians(path, means, turned, np.exp(logs / 16.0 - 10), alphas[:, 0] / 255, colors)


def _unpack(path: Path, packed: bytes, limit: int) -> tuple[bytes, bool]:
    """At most `limit` bytes of gzip content, however much there is, and whether it ended with its checksum."""
    try:
        stream = zlib.decompressobj(wbits=31)
        return stream.decompress(packed, limit), stream.eof
    except zlib.error as error:
        raise UserError(f"{path} is not an SPZ file, or damaged: {error}.") from error


def _bytes(values: NDArray[np.floating]) -> bytes:
    return np.clip(np.round(values), 0, 255).astype(np.uint8).tobytes()


def _sh_flip(degree: int) -> NDArray[np.float64]:
    """Signs of the harmonics above the constant when y and z change sign: each is odd or even in both together."""
    flipped = _SH_FLIP_PROBE * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    return torch.sign(sh_basis(degree, flipped) / sh_basis(degree, _SH_FLIP_PROBE))[1:].numpy()


def _pack_harmonics(rest: NDArray[np.floating]) -> bytes:
    """(N, K, 3) to bytes: 5 bits for degree 1 and 4 for the others, which is what compresses well; 0 stays 0."""
    steps = np.array([8] * min(3, rest.shape[1]) + [16] * max(0, rest.shape[1] - 3))[:, None]
    levels = np.floor((np.round(rest * 128 + 128) + steps // 2) / steps) * steps
    return _bytes(levels)


def _smallest_three(quats: NDArray[np.float64]) -> bytes:
    """(N, 4) xyzw to 4 bytes: which is largest, and sign with 9 bits of size for the others."""
    largest = np.abs(quats).argmax(axis=1)
    rows = np.arange(len(quats))
    negate = quats[rows, largest] < 0
    word = largest.astype(np.uint32)
    for axis in range(4):
        size = np.minimum(np.floor(511 * np.abs(quats[:, axis]) * math.sqrt(2) + 0.5), 511).astype(np.uint32)
        sign = ((quats[:, axis] < 0) ^ negate).astype(np.uint32)
        word = np.where(largest == axis, word, word << 10 | sign << 9 | size)
    return word.astype("<u4").tobytes()


def _from_smallest_three(packed: NDArray[np.uint8]) -> NDArray[np.float64]:
    word = np.ascontiguousarray(packed).view("<u4")[:, 0]
    largest = word >> 30
    quats = np.zeros((len(word), 4))
    for axis in (3, 2, 1, 0):
        here = largest != axis
        value = (word & 511) / 511 * math.sqrt(0.5) * np.where(word & 512, -1.0, 1.0)
        quats[:, axis] = np.where(here, value, 0.0)
        word = np.where(here, word >> 10, word)
    quats[np.arange(len(word)), largest] = np.sqrt(np.maximum(0.0, 1 - (quats**2).sum(axis=1)))
    return quats


def _first_three(quats: NDArray[np.float64]) -> bytes:
    positive = quats * np.where(quats[:, 3:] < 0, -1.0, 1.0)
    return _bytes(positive[:, :3] * 127.5 + 127.5)


def _from_first_three(packed: NDArray[np.uint8]) -> NDArray[np.float64]:
    xyz = packed / 127.5 - 1
    w = np.sqrt(np.maximum(0.0, 1 - (xyz**2).sum(axis=1)))
    return np.column_stack([xyz, w])
