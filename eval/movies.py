"""Moving pictures of avatars: where the camera stands, frames rendered in order, and a video file of them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.files import write_whole
from avatars.method import Avatar, render
from avatars.rasterize import rasterize

__all__ = ["frames", "portrait_cameras", "write_turntable", "write_video"]

DISTANCE = 1.1  # metres from the head's middle, as a capture dome's cameras stand
EXTENT = 0.31  # metres that a picture spans at the head: hair and neck included
TARGET = (0.0, -0.01, 0.0)
AT_ONCE = 8  # expressions in one pass of a network: enough to fill a device, little enough to stay in memory
TURN_FRAMES, TURN_SIZE, TURN_SWEEP, TURN_MS = (
    24,
    160,
    60.0,
    83,
)  # pictures, pixels, degrees, milliseconds each


def portrait_cameras(count: int, size: int, sweep: float = 0.0) -> Cameras:
    """Cameras for a clip: they look at the head from straight ahead, or swing around it once.

    Args:
        count: frames, C.
        size: side of the square pictures in pixels.
        sweep: degrees to either side that the camera swings; 0 keeps it straight ahead.
    """
    azimuth = math.radians(sweep) * torch.sin(torch.arange(count) * (2 * math.pi / max(count, 1)))
    target = torch.tensor(TARGET)
    positions = target + DISTANCE * torch.stack([azimuth.sin(), torch.zeros(count), azimuth.cos()], 1)
    focal = size * DISTANCE / EXTENT
    K = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    return Cameras.look_at(K, positions, target, torch.tensor([0.0, 1.0, 0.0]))


@torch.no_grad()
def frames(
    avatar: Avatar, expressions: Tensor, cameras: Cameras, size: int, background: Tensor | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Pictures (H, W, 3) of an avatar, one an expression, each from its own camera.

    Args:
        avatar: whom to drive.
        expressions: (T, E) codes of the avatar's kind.
        cameras: T cameras in the head frame.
        size: side of the square pictures in pixels.
        background: (3,) colour, black when None.
    """
    for start in range(0, len(expressions), AT_ONCE):
        chunk = expressions[start : start + AT_ONCE]
        for offset, gaussians in enumerate(avatar.sequence(chunk)):
            camera = cameras[start + offset].to(device=gaussians.means.device)
            image = rasterize(gaussians, camera, (size, size), background).image[0]
            yield (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


@torch.no_grad()
def write_turntable(avatar: Avatar, expression: Tensor, path: Path) -> None:
    """Writes an animated WebP of one face seen from a camera that swings around it, without an end.

    Args:
        avatar: whom to show.
        expression: (E,) its face.
        path: the file.
    """
    cameras = portrait_cameras(TURN_FRAMES, TURN_SIZE, TURN_SWEEP).to(device=expression.device)
    images = render(avatar, expression, cameras, (TURN_SIZE, TURN_SIZE)).image  # (C, 3, H, W)
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    first, *others = (Image.fromarray(picture) for picture in pixels)
    content = io.BytesIO()
    first.save(content, "WEBP", save_all=True, append_images=others, duration=TURN_MS, loop=0, quality=80)
    write_whole(path, content.getvalue())


def write_video(pictures: Iterable[NDArray[np.uint8]], path: str | Path, fps: int) -> int:
    """Writes pictures (H, W, 3) as an H.264 video that every browser plays; returns how many there were.

    Raises:
        UserError: PyAV is not installed, or a picture's side is odd, which the format does not know.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise UserError(f"Writing {path} needs PyAV: pip install 'headsplat[video]'.") from None
    count, content = 0, io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = None
        for picture in pictures:
            if stream is None:
                height, width = picture.shape[:2]
                if height % 2 or width % 2:
                    raise UserError(
                        f"A video's sides must be even, not {height} x {width}; choose another --size."
                    )
                stream = container.add_stream("libx264", rate=fps)
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                stream.options = {"crf": "16"}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            count += 1
        if stream is not None:
            container.mux(stream.encode())
    write_whole(Path(path), content.getvalue())
    return count
