"""Pictures in and out of bytes: JPEG, PNG and WebP.

Every decoder releases the interpreter lock, looks at the header before it makes room for pixels, and writes into an
array whose size is what was declared. JPEG goes through libjpeg-turbo (simplejpeg), which decodes into that array
itself; the others go through Pillow and a copy.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from avatars.errors import UserError
from shards.tarfiles import Data

__all__ = ["CODECS", "PNG_SIGNATURE", "decode_picture", "encode_picture", "extension"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class _Codec:
    """How a codec is called in sentences, in members' names, and by Pillow with what options."""

    title: str
    extension: str
    pillow: dict[str, Any]


CODECS = {
    "jpeg": _Codec("JPEG", "jpg", {}),
    "png": _Codec("PNG", "png", {"format": "PNG", "compress_level": 6}),
    "webp": _Codec("WebP", "webp", {"format": "WEBP", "method": 4}),
    # Quality is the encoder's effort here. Twice this effort takes twice the time for a fiftieth of the bytes.
    "webp-lossless": _Codec("WebP", "webp", {"format": "WEBP", "lossless": True, "method": 2, "quality": 20}),
}


def extension(codec: str) -> str:
    """What the names of a codec's members end with."""
    return CODECS[codec].extension


def encode_picture(
    image: NDArray[np.uint8], codec: str, quality: int = 95, subsampling: str = "444"
) -> bytes:
    """Bytes of an RGB picture (H, W, 3).

    Args:
        image: the pixels.
        codec: one of `CODECS`; "png" and "webp-lossless" give the same pixels back.
        quality: of "jpeg" and "webp", 1 to 100.
        subsampling: of the chroma of "jpeg": "444", "422" or "420". "webp" always has "420".
    """
    pixels = np.ascontiguousarray(image)
    if codec == "jpeg":
        return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling=subsampling)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **{"quality": quality, **CODECS[codec].pillow})
    return buffer.getvalue()


def decode_picture(data: Data, out: NDArray[np.uint8], name: str, codec: str) -> None:
    """Decodes a picture into `out` (H, W, 3), which also says what size it must have.

    The header is read first, so a file that announces a huge picture costs nothing.

    Raises:
        UserError: not such a picture, cut short, or of another size; the sentence starts with `name`.
    """
    title = CODECS[codec].title
    try:
        size = _HEADERS[title](data)
        if size != out.shape[:2]:
            raise UserError(
                f"{name} is a picture of {size[0]} x {size[1]} pixels where {out.shape[0]} x {out.shape[1]}"
                " are declared."
                " Pack the shards again."
            )
        if codec == "jpeg":
            simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out)
        else:
            with _READERS[title](io.BytesIO(data)) as picture:
                if (picture.mode, *picture.size) != ("RGB", size[1], size[0]):  # a second header, for example
                    raise ValueError(
                        f"it becomes {picture.mode} of {picture.height} x {picture.width} pixels"
                    )
                out[:] = np.asarray(picture)
    except (ValueError, OSError, SyntaxError, struct.error) as error:
        raise UserError(f"{name} is not a readable {title} ({error}). Pack the shards again.") from None


def _jpeg_size(data: Data) -> tuple[int, int]:
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return int(height), int(width)


def _png_size(data: Data) -> tuple[int, int]:
    """Height and width of an 8-bit RGB picture, the one kind that is packed."""
    if data[:8] != PNG_SIGNATURE or data[12:16] != b"IHDR":
        raise ValueError("no PNG header")
    width, height, *kind = struct.unpack(">IIBBBBB", data[16:29])
    if kind != [8, 2, 0, 0, 0]:
        raise ValueError("not an 8-bit RGB picture without interlacing")
    return height, width


def _webp_size(data: Data) -> tuple[int, int]:
    """Height and width of a picture without alpha, animation or metadata, the one kind that is packed."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("no WebP header")
    if data[12:16] == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", data[26:30])
        return height & 0x3FFF, width & 0x3FFF
    if data[12:16] == b"VP8L" and data[20:21] == b"\x2f":
        (bits,) = struct.unpack("<I", data[21:25])
        if bits >> 28 & 1:
            raise ValueError("it has an alpha channel")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    raise ValueError("not a plain picture")


# Named rather than found by `Image.open`, which imports all of Pillow's formats at the first WebP.
_READERS = {"PNG": PngImageFile, "WebP": WebPImageFile}
_HEADERS = {"JPEG": _jpeg_size, "PNG": _png_size, "WebP": _webp_size}
