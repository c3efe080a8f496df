"""Frames out of video files, through PyAV, which is needed for nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError

__all__ = ["Video"]


class Video:
    """A video file whose frames are decoded in sequence, which is how they are wanted.

    Asking for a frame before the last one starts from the beginning: seeking by time misses frames in files
    whose time stamps are not regular. Safe to use from several threads.

    Raises:
        UserError: PyAV is not installed, or the file is no video.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import av
        except ModuleNotFoundError:
            raise UserError(
                f"{path} is a video, and reading it needs PyAV: pip install 'headsplat[video]'."
            ) from None
        self._lock = threading.Lock()
        self._frames: Iterator[NDArray[np.uint8]] = iter(())
        self._next = -1
        self._last: NDArray[np.uint8] | None = None
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                self.height, self.width = stream.codec_context.height, stream.codec_context.width
                self._count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        except (av.FFmpegError, OSError, IndexError) as error:
            raise UserError(f"{path} is not a readable video ({error}). Download it again.") from None

    def __len__(self) -> int:
        return self._count

    def frame(self, t: int) -> NDArray[np.uint8]:
        """Frame `t` (H, W, 3) as RGB."""
        with self._lock:
            if self._last is None or t < self._next - 1:
                self._frames, self._next, self._last = self._decode(), 0, None
            for frame in self._frames if self._next <= t else ():
                self._last, self._next = frame, self._next + 1
                if self._next > t:
                    break
            if self._last is None or self._next <= t:
                raise UserError(f"{self.path} ends before frame {t} of {self._count}. Download it again.")
            return self._last

    def _decode(self) -> Iterator[NDArray[np.uint8]]:
        import av

        try:
            with av.open(str(self.path)) as container:
                for frame in container.decode(video=0):
                    yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
        except av.FFmpegError as error:
            raise UserError(f"{self.path} cannot be decoded ({error}). Download it again.") from None
