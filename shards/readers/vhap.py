"""Tracked multi-view captures as VHAP exports them, which is what GaussianAvatars trains on.

Pictures and masks by camera and timestep, a NeRF-style list of frames, and FLAME parameters for each
timestep. Cameras come as camera-to-world with OpenGL axes and a principal point counted from below; both are
turned to OpenCV. FLAME's own rotation and translation are taken as the head's pose, and its parameters make
the 135-number code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError
from shards.capture import Capture, View, check_matrices
from shards.pictures import read_picture

__all__ = ["VhapCapture", "flame_code", "rotation_matrix"]

LISTS = ("transforms_train.json", "transforms_val.json", "transforms_test.json")
CODE_LENGTH = 135


def rotation_matrix(axis_angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation matrices (..., 3, 3) of axis-angle vectors (..., 3), by Rodrigues' formula."""
    angle = np.linalg.norm(axis_angle, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(axis_angle, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    sine = np.sinc(angle / np.pi)  # sin(a) / a, also at 0
    versine = np.sinc(angle / (2 * np.pi)) ** 2 / 2  # (1 - cos(a)) / a^2
    return np.eye(3) + sine * cross + versine * (cross @ cross)


def flame_code(parameters: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    """The 135-number code of one timestep's FLAME parameters.

    100 expression coefficients, eyes 2 x 6, eyelids 2 (FLAME has none: 0), jaw 6, neck 6, head pose 9 (6 and
    a translation). Rotations are the first two rows of their matrices. The head pose is that of the head
    frame, hence
    constant: the pose itself is in the cameras.
    """

    def six(name: str, count: int) -> NDArray[np.float64]:
        vectors = np.asarray(parameters[name], np.float64).reshape(count, 3)
        return rotation_matrix(vectors)[:, :2].reshape(-1)

    expression = np.zeros(100)
    given = np.asarray(parameters["expr"], np.float64).reshape(-1)[:100]
    expression[: len(given)] = given
    identity = np.eye(3)[:2].reshape(-1)
    parts = (
        expression,
        six("eyes_pose", 2),
        np.zeros(2),
        six("jaw_pose", 1),
        six("neck_pose", 1),
        identity,
        np.zeros(3),
    )
    return np.concatenate(parts).astype(np.float32)


class VhapCapture(Capture):
    """A folder that VHAP exported: one sequence, or a union of sequences of one subject.

    The lists for training, validation and testing are read together; how to split a capture is not the
    capture's business. Files that a list names relative to itself may be in neighbouring folders.

    Raises:
        UserError: no list, a frame that lacks a field, FLAME parameters that are missing or wrong.
    """

    layout = "vhap"
    expression_kind = "flame-135"
    head = "flame2023"

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.capture_id = self.path.name
        parts = self.path.name.split("_")
        self.subject = next((part for part in parts if part.isdigit()), self.path.name)
        lists = [file for name in LISTS if (file := self.path / name).is_file()]
        if not lists:
            lists = [self.path / "transforms.json"]
        try:
            self._read_frames([frame for file in lists for frame in json.loads(file.read_text())["frames"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{lists[0]} is no list of frames as VHAP writes it ({error!r}). Export again."
            ) from None
        check_matrices(self._K, self._world_to_camera, str(lists[0]))
        self._read_flame()

    def _read_frames(self, frames: list[dict[str, Any]]) -> None:
        self._frames = {
            (int(f["timestep_index"]), str(f.get("camera_id", f["camera_index"]))): f for f in frames
        }
        cameras = {str(f.get("camera_id", f["camera_index"])): f for f in frames}
        self.camera_ids = sorted(cameras, key=lambda c: int(cameras[c]["camera_index"]))
        self._steps = sorted({t for t, _ in self._frames})
        self.timestep_ids = [f"{t:05d}" for t in self._steps]
        for f in frames:
            _ = f["file_path"], f["flame_param_path"]  # their lack is told before any picture is read
        self._masked = all("fg_mask_path" in f for f in frames)
        if not self._masked:
            self.lacks = {"masks": "its frames name no fg_mask_path. Matte the sequence and export it again"}
        first = frames[0]
        self.size = (int(first["h"]), int(first["w"]))
        K, poses = [], []
        for camera in self.camera_ids:
            f = cameras[camera]
            height = float(f["h"])
            K.append([[f["fl_x"], 0, f["cx"]], [0, f["fl_y"], height - f["cy"]], [0, 0, 1]])
            to_world = np.array(f["transform_matrix"], np.float64).reshape(4, 4)
            poses.append(np.linalg.inv(to_world * np.array([1.0, -1.0, -1.0, 1.0])))
        self._K = np.array(K, np.float64)
        self._world_to_camera = np.stack(poses)

    def _read_flame(self) -> None:
        by_step = {t: f for (t, _), f in self._frames.items()}
        codes, poses = [], []
        for t in self._steps:
            file = self.path / by_step[t]["flame_param_path"]
            try:
                with np.load(file, allow_pickle=False) as archive:
                    parameters = {name: archive[name] for name in archive.files}
                codes.append(flame_code(parameters))
                pose = np.eye(4)
                pose[:3, :3] = rotation_matrix(np.asarray(parameters["rotation"], np.float64).reshape(3))
                pose[:3, 3] = np.asarray(parameters["translation"], np.float64).reshape(3)
                poses.append(pose)
                self.identity = np.asarray(parameters["shape"], np.float32).reshape(-1)
            except FileNotFoundError:
                raise UserError(f"{file} is not there. Export the capture again.") from None
            except (OSError, ValueError, KeyError, EOFError) as error:
                raise UserError(
                    f"{file} holds no FLAME parameters ({error!r}). Export the capture again."
                ) from None
        self.expressions = np.stack(codes)
        self._head_to_world = np.stack(poses)
        if not (np.isfinite(self.expressions).all() and np.isfinite(self._head_to_world).all()):
            raise UserError(
                f"{self.path}: the FLAME parameters have numbers that are not finite. Track it again."
            )

    def camera_matrices(self, t: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Intrinsics (V, 3, 3) in pixels and world-to-camera matrices (V, 4, 4) in the head frame of
        timestep `t`.
        """
        return self._K, self._world_to_camera @ self._head_to_world[t]

    def view(self, t: int, v: int, depth: bool = True) -> View | None:
        """What camera `v` saw at timestep `t`, over black instead of the export's white, and as it is where
        there are no masks; None where not exported.
        """
        frame = self._frames.get((self._steps[t], self.camera_ids[v]))
        if frame is None:
            return None
        image = read_picture(self.path / frame["file_path"], "RGB", self.size)
        if not self._masked:
            return View(image=image, mask=np.full(self.size, 255, np.uint8))
        mask = read_picture(self.path / frame["fg_mask_path"], "L", self.size)
        white = 255 - mask.astype(np.int16)[..., None]
        return View(image=np.clip(image.astype(np.int16) - white, 0, 255).astype(np.uint8), mask=mask)
