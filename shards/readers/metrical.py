"""Monocular videos that metrical-tracker tracked, laid out as FlashAvatar reads them.

`dataset/<id>/imgs/00001.jpg …` and `alpha/` (and, where there, `parsing/*_neckhead.png`) beside the tracker's
`metrical-tracker/output/<id>/checkpoint/00000.frame …`; the picture of frame `t` is number `t + 1`. The
head's pose is in the camera, so the tracker's world is the head frame already.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError
from shards.capture import Capture, View, check_matrices
from shards.pictures import read_picture
from shards.readers.vhap import rotation_matrix

__all__ = ["MetricalCapture", "checkpoint_folder"]


def checkpoint_folder(path: Path) -> Path | None:
    """Where the tracker's frames of `dataset/<id>` are: in the folder itself, or where the tracker leaves
    them.
    """
    path = path.resolve()
    places = [path / "checkpoint"]
    if len(path.parents) > 1:
        places.append(path.parents[1] / "metrical-tracker" / "output" / path.name / "checkpoint")
    return next((place for place in places if place.is_dir()), None)


class MetricalCapture(Capture):
    """One tracked video: a camera, many timesteps.

    Codes are those of `shards.readers.vhap.flame_code`: 100 expression coefficients, eyes 12, eyelids 2, jaw
    6, neck 6 and head pose 9, the last two constant.

    Raises:
        UserError: no frames, frames that are no tensors of the right shapes, no alpha masks.
    """

    layout = "metrical-tracker"
    has_background = True
    expression_kind = "flame-135"
    head = "flame2020"

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.subject = self.capture_id = self.path.resolve().name
        folder = checkpoint_folder(self.path)
        frames = sorted(folder.glob("*.frame")) if folder is not None else []
        frames = [frame for frame in frames if self._image(frame.stem).is_file()]
        if not frames:
            raise UserError(
                f"{self.path} has no tracked frame with a picture in imgs. Run metrical-tracker on it."
            )
        if not (self.path / "alpha").is_dir():
            raise UserError(
                f"{self.path / 'alpha'} is not there, and packing needs masks. Matte the video first."
            )
        codes: list[NDArray[np.float32]] = []
        K, poses = [], []
        for frame in frames:
            code, intrinsics, pose, size, identity = _read_frame(frame)
            if not codes:
                self.size, self.identity = size, identity
            codes.append(code)
            K.append(intrinsics)
            poses.append(pose)
        self.timestep_ids = [frame.stem for frame in frames]
        self.camera_ids = ["video"]
        self.expressions = np.stack(codes)
        self._K, self._poses = np.stack(K), np.stack(poses)
        check_matrices(self._K, self._poses, str(folder))
        if not np.isfinite(self.expressions).all():
            raise UserError(f"{folder} has codes that are not finite. Track the video again.")

    def camera_matrices(self, t: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Intrinsics (1, 3, 3) in pixels and the world-to-camera matrix (1, 4, 4) in the head frame."""
        return self._K[t : t + 1], self._poses[t : t + 1]

    def view(self, t: int, v: int, depth: bool = True) -> View:
        """The picture of timestep `t` over black; alpha times the parsed head and neck, where parsed, is its
        mask.
        """
        stem = self.timestep_ids[t]
        name = self._image(stem).stem
        mask = read_picture(self.path / "alpha" / f"{name}.jpg", "L", self.size)
        parsed = self.path / "parsing" / f"{name}_neckhead.png"
        if parsed.is_file():
            mask = np.where(read_picture(parsed, "L", self.size) > 127, mask, 0).astype(np.uint8)
        image = read_picture(self._image(stem), "RGB", self.size)
        return View(image=np.round(image * (mask[..., None] / np.float32(255))).astype(np.uint8), mask=mask)

    def uncut(self, t: int, v: int) -> NDArray[np.uint8]:
        """The video's frame as it is."""
        return read_picture(self._image(self.timestep_ids[t]), "RGB", self.size)

    def _image(self, stem: str) -> Path:
        number = int(stem) + 1 if stem.isdigit() else 0
        return self.path / "imgs" / f"{number:05d}.jpg"


def _read_frame(
    file: Path,
) -> tuple[
    NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], tuple[int, int], NDArray[np.float32]
]:
    """Code (135,), K (3, 3), world-to-camera (4, 4), size (H, W) and identity (300,) of one of the tracker's
    files.
    """
    import torch

    try:
        with torch.serialization.safe_globals(_array_globals()):
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        flame, camera = content["flame"], content["opencv"]
        straight = np.eye(3)[:2].reshape(-1)
        code = np.concatenate(
            [
                np.asarray(flame["exp"], np.float64).reshape(100),
                _rows(flame["eyes"], 2),
                np.asarray(flame["eyelids"], np.float64).reshape(2),
                _rows(flame["jaw"], 1),
                straight,
                straight,
                np.zeros(3),
            ]
        )
        pose = np.eye(4)
        pose[:3, :3] = np.asarray(camera["R"], np.float64).reshape(3, 3)
        pose[:3, 3] = np.asarray(camera["t"], np.float64).reshape(3)
        K = np.asarray(camera["K"], np.float64).reshape(3, 3)
        height, width = np.asarray(content["img_size"]).reshape(2).tolist()
        identity = np.asarray(flame["shape"], np.float32).reshape(-1)
    except Exception as error:  # what a file that is no checkpoint, or a hostile one, raises is anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} is no frame of metrical-tracker ({reason}). Track the video again."
        ) from None
    return code.astype(np.float32), K, pose, (int(height), int(width)), identity


def _rows(joints: Any, count: int) -> NDArray[np.float64]:
    """The first two rows of each joint's rotation, (6 count,), as the tracker keeps them; axis-angle vectors, which
    other trackers of this layout write, are turned into them.
    """
    numbers = np.asarray(joints, np.float64)
    if numbers.size == 3 * count:
        return rotation_matrix(numbers.reshape(count, 3))[:, :2].reshape(-1)
    return numbers.reshape(6 * count)


def _array_globals() -> list[Any]:
    """What the tracker's files call besides torch's own: numpy arrays, under the old and the new name."""
    from numpy._core import multiarray

    reconstruct, scalar = multiarray._reconstruct, multiarray.scalar
    kinds = [type(np.dtype(name)) for name in ("float32", "float64", "int64", "int32")]
    return [
        np.ndarray,
        np.dtype,
        *kinds,
        reconstruct,
        scalar,
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (scalar, "numpy.core.multiarray.scalar"),
    ]
