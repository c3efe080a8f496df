"""Ava-256 captures as Meta's download script leaves them, with the extras that carry masks and expression
codes.

The layout is that of the 4TB release, and so are the larger ones: one folder `date--time--subject` a
capture, zips of AVIF by camera. What is peculiar to it, all of it tested:

- K and T in the calibration are stored transposed; T is world to camera in millimetres for 4096-pixel-high
pictures.
- Pictures are undistorted already and hold linear colour with an uncorrected white balance.
- Frame numbers are bare in the CSV and padded to six digits in file names; zips may or may not have a folder
inside.
- About one listed picture in a thousand is missing, cameras differ between subjects, and some zips are empty.

Expression codes, foreground masks and backgrounds are not part of the official script's download. Without
masks the parts segmentation, which is, gives a binary one; without codes there is nothing to drive an avatar
by.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avatars.errors import UserError
from shards.capture import Capture, View, check_matrices

__all__ = ["Ava256Capture", "linear_to_srgb", "read_codes"]

NATIVE_HEIGHT = 4096  # of the pictures that K is for
CODE_LENGTH = 256
CODES = "expression_codes/aeparams_1440000.pkl"
NOT_HEAD = (0, 3)  # background and chair, of the labels of segmentation_parts
MILLIMETRE = 1e-3

# Avat3r's author in issue 32 of facebookresearch/ava-256
GAIN = np.array([1.279545, 1.1059, 1.6], np.float32)
BLACK = np.array([4.4, 3.1, 4.2], np.float32) / 255
SCALE = 1 / 1.1059
GAMMA = 1 / 1.5254


def linear_to_srgb(linear: NDArray[np.float32]) -> NDArray[np.float32]:
    """The release's linear colours (..., 3) in [0, 1] as display colours in [0, 1]: white balance, black
    level, gamma.
    """
    balanced = (GAIN * linear - BLACK) * SCALE / (1 - BLACK)
    return np.clip(np.maximum(balanced, 1e-6) ** GAMMA, 0, 1).astype(np.float32)


def _bytes(linear: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.round(linear_to_srgb(linear) * 255).astype(np.uint8)


class Ava256Capture(Capture):
    """One capture of Ava-256.

    Timesteps are the listed frames that have a head pose and a code, in the order of the list; `segments`
    says which performance each belongs to. Cameras are those of the calibration that have pictures.

    Raises:
        UserError: a file that is needed is missing or wrong.
    """

    layout = "ava-256"
    expression_kind = "ava-256"
    has_background = True

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._decoder = self.path / "decoder"
        self.capture_id = self.path.name
        self.subject = self.path.name.split("--")[-1]
        self._zips: dict[Path, _Zip | None] = {}
        self._lock = threading.Lock()
        self._backgrounds: dict[int, NDArray[np.float32] | None] = {}
        self._read_cameras()
        self._read_frames()
        first = next(
            (
                image
                for v in range(len(self.camera_ids))
                if (image := self._picture("image", 0, v)) is not None
            ),
            None,
        )
        if first is None:
            raise UserError(
                f"{self._decoder / 'image'} has no picture of frame {self.timestep_ids[0]}. Download again."
            )
        self.size = first.shape[:2]
        self._K[:, :2] *= self.size[0] / NATIVE_HEIGHT
        if (self._decoder / "foreground_masks").is_dir():
            self._masks = "foreground_masks"
        elif (self._decoder / "segmentation_parts").is_dir():
            self._masks = "segmentation_parts"
        else:
            raise UserError(
                f"{self._decoder} has neither foreground_masks nor segmentation_parts, and packing needs"
                " one of them."
                " Download segmentation_parts with the release's script, or the masks of its pull request 19."
            )

    def camera_matrices(self, t: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Intrinsics (V, 3, 3) in pixels and world-to-camera matrices (V, 4, 4) in the head frame of
        timestep `t`.
        """
        matrices = self._world_to_camera @ self._head_to_world[t]
        matrices[:, :3, 3] *= MILLIMETRE
        return self._K, matrices

    def view(self, t: int, v: int, depth: bool = True) -> View | None:
        """What camera `v` saw at timestep `t`, without the studio; None for a dropped frame."""
        stored, cut = self._picture("image", t, v), self._picture(self._masks, t, v)
        if stored is None or cut is None:
            return None
        if cut.ndim == 3:
            cut = cut[..., 0]
        mask = (
            cut
            if self._masks == "foreground_masks"
            else np.where(np.isin(cut, NOT_HEAD), 0, 255).astype(np.uint8)
        )
        coverage = (mask[..., None] / 255).astype(np.float32)
        linear = (stored / 255).astype(np.float32)
        background = self._background(v)
        if background is None:
            linear = linear * coverage
        else:  # what of a pixel is studio is known and taken away, in the linear colours that light adds up in
            linear = np.clip(linear - (1 - coverage) * background, 0, 1).astype(np.float32)
        return View(image=_bytes(linear), mask=mask)

    def uncut(self, t: int, v: int) -> NDArray[np.uint8] | None:
        """The same picture with the studio in it."""
        stored = self._picture("image", t, v)
        return None if stored is None else _bytes((stored / 255).astype(np.float32))

    def _read_cameras(self) -> None:
        file = self._decoder / "camera_calibration.json"
        try:
            entries = json.loads(file.read_text())["KRT"]
            K = {str(e["cameraId"]): np.array(e["K"], np.float64).reshape(3, 3).T for e in entries}
            T = {str(e["cameraId"]): np.array(e["T"], np.float64).reshape(4, 4).T for e in entries}
        except FileNotFoundError:
            raise UserError(f"{file} is not there. Download the capture's camera_calibration.json.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is no calibration of Ava-256 ({error!r}). Download it again.") from None
        self.camera_ids = [c for c in sorted(K) if _has_members(self._decoder / "image" / f"cam{c}.zip")]
        if not self.camera_ids:
            raise UserError(
                f"{self._decoder / 'image'} has no zip with pictures of a calibrated camera. Download again."
            )
        self._K = np.stack([K[c] for c in self.camera_ids])
        self._world_to_camera = np.stack([T[c] for c in self.camera_ids])
        check_matrices(self._K, self._world_to_camera, str(file))

    def _read_frames(self) -> None:
        file = self._decoder / "frame_list.csv"
        try:
            with file.open(newline="") as rows:
                listed = [(row["seg_id"], int(row["frame_id"])) for row in csv.DictReader(rows)]
        except FileNotFoundError:
            raise UserError(f"{file} is not there. Download the capture's frame_list.csv.") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is no list of seg_id,frame_id ({error!r}). Download it again.") from None
        codes = read_codes(self._decoder / CODES)
        poses = self._head_poses([frame for _, frame in listed if frame in codes])
        kept = [
            (segment, frame) for segment, frame in dict.fromkeys(listed) if frame in codes and frame in poses
        ]
        if not kept:
            raise UserError(f"{file} lists no frame that has both a head pose and an expression code.")
        self.segments = [segment for segment, _ in kept]
        self.timestep_ids = [f"{frame:06d}" for _, frame in kept]
        self.expressions = np.stack([codes[frame] for _, frame in kept])
        self._head_to_world = np.stack([poses[frame] for _, frame in kept])
        check_matrices(
            np.broadcast_to(np.eye(3), (len(kept), 3, 3)),
            self._head_to_world,
            f"{self._decoder / 'head_pose'}",
        )

    def _head_poses(self, frames: list[int]) -> dict[int, NDArray[np.float64]]:
        path = self._decoder / "head_pose" / "head_pose.zip"
        if not _has_members(path):
            raise UserError(f"{path} is not there or empty, and the head frame needs it. Download head_pose.")
        archive, poses = _Zip(path), {}
        for frame in frames:
            data = archive.read(f"{frame:06d}.txt")
            if data is not None:
                pose = np.eye(4)
                try:
                    pose[:3] = np.loadtxt(io.BytesIO(data)).reshape(3, 4)
                except ValueError as error:
                    raise UserError(
                        f"{path}: {frame:06d}.txt is no 3 x 4 matrix ({error}). Download again."
                    ) from None
                poses[frame] = pose
        return poses

    def _picture(self, group: str, t: int, v: int) -> NDArray[np.uint8] | None:
        archive = self._zip(self._decoder / group / f"cam{self.camera_ids[v]}.zip")
        end = "png" if group == "segmentation_parts" else "avif"
        return None if archive is None else archive.picture(f"{self.timestep_ids[t]}.{end}")

    def _background(self, v: int) -> NDArray[np.float32] | None:
        if v not in self._backgrounds:
            archive = self._zip(self._decoder / "background_image" / "background_image.zip")
            picture = None if archive is None else archive.picture(f"{self.camera_ids[v]}.avif")
            self._backgrounds[v] = None if picture is None else (picture / 255).astype(np.float32)
        return self._backgrounds[v]

    def _zip(self, path: Path) -> _Zip | None:
        """The archive, opened when first asked for; None where there is none, as for a camera without
        masks.
        """
        with self._lock:
            if path not in self._zips:
                self._zips[path] = _Zip(path) if _has_members(path) else None
            return self._zips[path]


def read_codes(path: Path) -> dict[int, NDArray[np.float32]]:
    """Expression codes by frame number, out of a pickle that may hold arrays and nothing else.

    Raises:
        UserError: no file, a pickle of anything else, or codes of another length.
    """
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file).load()
        codes = {int(frame): np.asarray(code, np.float32).reshape(-1) for frame, code in content.items()}
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there, and training, fitting and driving need expression codes. They are among"
            " the extras"
            " of pull request 19 of facebookresearch/ava-256, not in its script's download."
        ) from None
    except Exception as error:  # a hostile pickle may raise anything
        raise UserError(f"{path} is no table of expression codes ({error}). Download it again.") from None
    wrong = [
        frame for frame, code in codes.items() if len(code) != CODE_LENGTH or not np.isfinite(code).all()
    ]
    if wrong or not codes:
        raise UserError(
            f"{path} must hold codes of {CODE_LENGTH} finite numbers; frame {wrong[:1] or 'none'} does not."
        )
    return codes


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, numpy arrays and torch tensors; refuses to call anything else."""

    ALLOWED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy.core.numeric", "_frombuffer"),
            ("torch._utils", "_rebuild_tensor_v2"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core", 1)
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core", 1), name)


def _load_storage(data: bytes) -> Any:
    """A tensor's storage inside a pickle, which is a pickle itself, loaded as restrictedly."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)


def _has_members(path: Path) -> bool:
    """Whether this is a zip that is not empty, by the record at its end."""
    return path.is_file() and path.stat().st_size > 22 and zipfile.is_zipfile(path)


class _Zip:
    """A zip whose members are found by base name, whatever folder they are in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is not a readable zip ({error}). Download it again.") from None
        self._members = {info.filename.rsplit("/", 1)[-1]: info for info in self._archive.infolist()}

    def read(self, name: str) -> bytes | None:
        """A member's bytes, or None where there is no such member."""
        info = self._members.get(name)
        if info is None:
            return None
        try:
            return self._archive.read(info)
        except (OSError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{self.path}: {name} cannot be read ({error}). Download it again.") from None

    def picture(self, name: str) -> NDArray[np.uint8] | None:
        """A member that is a picture, (H, W) or (H, W, 3) as it is stored."""
        data = self.read(name)
        if data is None:
            return None
        try:
            with Image.open(io.BytesIO(data)) as picture:
                return np.array(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(
                f"{self.path}: {name} is no readable picture ({error}). Download it again."
            ) from None
