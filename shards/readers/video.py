"""Frames out of video files, through PyAV, which is needed for nothing else."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError

__all__ = ["Video"]


class Video:
    """A video file whose frames are asked for by number, in any order.

    Frames are numbered by their presentation times, which are read from the packets without decoding. A frame
    is decoded from the last key frame before it, or from the frame asked for last where that is nearer. Safe
    to use from several threads.

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
        self._frames: Iterator[tuple[int, NDArray[np.uint8]]] = iter(())
        self._last: tuple[int, NDArray[np.uint8]] | None = None  # number and picture
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                self.height, self.width = stream.codec_context.height, stream.codec_context.width
                packets = [p for p in container.demux(stream) if p.size]
                self._keys = sorted(p.pts for p in packets if p.is_keyframe and p.pts is not None)
                self._times = sorted(p.pts for p in packets if p.pts is not None)
        except (av.FFmpegError, OSError, IndexError) as error:
            raise UserError(f"{path} is not a readable video ({error}). Download it again.") from None
        if not self._times or len(set(self._times)) < len(packets):
            raise UserError(f"{path} has frames without a time of their own. Convert it to mp4 again.")

    def __len__(self) -> int:
        return len(self._times)

    def frame(self, t: int) -> NDArray[np.uint8]:
        """Frame `t` (H, W, 3) as RGB."""
        with self._lock:
            if self._last is None or self._last[0] > t or self._key(t) > self._last[0]:
                self._frames, self._last = self._decode(t), None
            while self._last is None or self._last[0] < t:
                self._last = next(self._frames, None)
                if self._last is None or self._last[0] > t:
                    self._last = None
                    raise UserError(f"{self.path} has no frame {t} of {len(self)}. Download it again.")
            return self._last[1]

    def _key(self, t: int) -> int:
        """Number of the last key frame up to frame `t`."""
        place = bisect_right(self._keys, self._times[t])
        return bisect_left(self._times, self._keys[place - 1]) if place else 0

    def _decode(self, t: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Numbers and pictures of the frames from a key frame before frame `t`."""
        import av

        numbers = {time: number for number, time in enumerate(self._times)}
        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                if t:
                    container.seek(self._times[self._key(t)], stream=stream)
                for frame in container.decode(stream):
                    if frame.pts in numbers:
                        yield numbers[frame.pts], np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
        except av.FFmpegError as error:
            raise UserError(f"{self.path} cannot be decoded ({error}). Download it again.") from None
