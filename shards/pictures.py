"""Pictures cut to size: crop windows, resampling, and the PNGs of masks.

Masks are ordinary 8-bit gray PNGs whose rows are stored unfiltered. Any PNG reader opens them; `decode_mask`
inflates them with zlib alone, which releases the interpreter lock and takes a third of the time.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avatars.errors import UserError
from shards.codecs import PNG_SIGNATURE
from shards.tarfiles import Data

__all__ = [
    "CROPS",
    "crop_and_resize",
    "crop_window",
    "decode_mask",
    "encode_mask",
    "fit_intrinsics",
    "read_picture",
    "resample_depth",
]

CROPS = ("head", "full")


def crop_window(
    K: NDArray, head_to_camera: NDArray, size: tuple[int, int], crop: str = "head"
) -> tuple[int, int, int]:
    """The square that is made of a picture, with the projected head as near to its middle as it goes.

    Args:
        K: (3, 3) intrinsics in pixels.
        head_to_camera: (4, 4) camera in the head frame.
        size: height and width of the picture.
        crop: "head": the largest square inside the picture; "full": the smallest square around all of it.

    Returns:
        left, top and side in whole pixels. A square picture is returned whole. With "full" the square begins left
        of a picture that is higher than wide, above one that is wider than high, and ends beyond it.
    """
    height, width = size
    side = max(height, width) if crop == "full" else min(height, width)
    x, y, z = K @ head_to_camera[:3, 3]
    center = (x / z, y / z) if z > 0 else (width / 2, height / 2)
    left, top = (
        round(float(np.clip(middle - side / 2, min(0, length - side), max(0, length - side))))
        for middle, length in zip(center, (width, height), strict=True)
    )
    return left, top, side


def fit_intrinsics(K: NDArray, window: tuple[int, int, int], size: int) -> NDArray:
    """Intrinsics (3, 3) of a picture that was cut to `window` (left, top, side) and resampled to `size`
    pixels.
    """
    left, top, side = window
    fitted = np.array(K, dtype=np.float64)
    fitted[0, 2] -= left
    fitted[1, 2] -= top
    fitted[:2] *= size / side
    return fitted


def crop_and_resize(picture: NDArray[np.uint8], window: tuple[int, int, int], size: int) -> NDArray[np.uint8]:
    """Cuts `window` out of a picture (H, W, 3) or (H, W), zeros where it goes beyond, and resamples it to `size` with
    an antialiasing filter.
    """
    cut = _cut(picture, window)
    if window[2] == size:
        return np.ascontiguousarray(cut)
    resampled = Image.fromarray(np.ascontiguousarray(cut)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resampled)


def resample_depth(
    depth: NDArray[np.float32], window: tuple[int, int, int], size: int
) -> NDArray[np.float32]:
    """Cuts `window` out of a depth map (H, W), zeros where it goes beyond, and takes the nearest depth of each new
    pixel's centre.

    Depths are never averaged: between the nose and the cheek behind it there is no surface half-way.
    """
    side = window[2]
    nearest = np.minimum(((np.arange(size) + 0.5) * side / size).astype(int), side - 1)
    return _cut(depth, window)[nearest][:, nearest]


def _cut(picture: NDArray[Any], window: tuple[int, int, int]) -> NDArray[Any]:
    """The square of a picture (H, W, ...), with zeros around it where the square is larger; a view where it is not."""
    left, top, side = window
    height, width = picture.shape[:2]
    if 0 <= left <= width - side and 0 <= top <= height - side:
        return picture[top : top + side, left : left + side]
    cut = np.zeros((side, side, *picture.shape[2:]), picture.dtype)
    inside = picture[max(top, 0) : top + side, max(left, 0) : left + side]
    at_y, at_x = max(-top, 0), max(-left, 0)
    cut[at_y : at_y + inside.shape[0], at_x : at_x + inside.shape[1]] = inside
    return cut


def encode_mask(mask: NDArray[np.uint8]) -> bytes:
    """PNG bytes of a gray picture (H, W) uint8, rows unfiltered.

    The lowest level of compression makes masks a quarter larger than the usual one and decoding three times
    faster.
    """
    height, width = mask.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row starts with its filter type, 0 = none
    rows[:, 1:] = mask
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def decode_mask(data: Data, out: NDArray[np.uint8], name: str) -> None:
    """Decodes a gray PNG into `out` (H, W), which also says what size it must have.

    Raises:
        UserError: not such a PNG, cut short, or of another size; the sentence starts with `name`.
    """
    height, width = out.shape
    try:
        if data[:8] != PNG_SIGNATURE or data[12:16] != b"IHDR":
            raise ValueError("no PNG header")
        png_width, png_height, *kind = struct.unpack(">IIBBBBB", data[16:29])
        if (png_height, png_width) != (height, width):
            raise UserError(
                f"{name} is a mask of {png_height} x {png_width} pixels where {height} x {width} are"
                " declared."
                " Pack the shards again."
            )
        if kind != [8, 0, 0, 0, 0]:
            raise ValueError("not an 8-bit gray picture without interlacing")
        deflated = _image_data(data)
        if len(deflated) > 2 * height * (width + 1) + 1024:  # also bounds what a hostile one inflates to
            raise ValueError("more data than pixels")
        # Past zlib's header and as raw deflate: its checksum would take as long as inflating does. One byte
        # more than there should be spares zlib a second look and a copy.
        inflated = zlib.decompress(deflated[2:], -15, height * (width + 1) + 1)
        if len(inflated) != height * (width + 1):
            raise ValueError("cut short")
        rows = np.frombuffer(inflated, np.uint8).reshape(height, width + 1)
        if not rows[:, 0].any():
            out[:] = rows[:, 1:]
        else:
            out[:] = np.asarray(Image.open(io.BytesIO(data)))
    except (ValueError, OSError, struct.error, zlib.error) as error:
        raise UserError(f"{name} is not a readable mask ({error}). Pack the shards again.") from None


def _image_data(png: Data) -> Data:
    """The IDAT chunks of a PNG, joined."""
    at, parts = 8, []
    while at + 8 <= len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            parts.append(png[at + 8 : at + 8 + length])
        at += 12 + length
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_picture(path: Path, mode: str, size: tuple[int, int]) -> NDArray:
    """Reads a picture file of a capture as "RGB" (H, W, 3) uint8, "L" (H, W) uint8 or "I;16" (H, W) uint16.

    Raises:
        UserError: the file is not there, is not a picture of this kind, or has another size.
    """
    try:
        with Image.open(path) as picture:
            if (picture.height, picture.width) != size:
                raise UserError(
                    f"{path} has {picture.height} x {picture.width} pixels where the capture declares"
                    f" {size[0]} x {size[1]}. Export or render the capture again."
                )
            if mode == "I;16" and picture.mode != "I;16":
                raise UserError(
                    f"{path} is not a 16-bit gray picture ({picture.mode}). Export the depth again."
                )
            return np.array(picture if picture.mode == mode else picture.convert(mode))
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there: the capture is incomplete. Export or render it again."
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a readable picture ({error}). Export or render it again.") from None
