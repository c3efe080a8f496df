"""The one contract for all captures, and the door to its readers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError

if TYPE_CHECKING:
    from avatars.cameras import Cameras

__all__ = ["Capture", "View", "find_captures", "read_capture"]


@dataclass(frozen=True)
class View:
    """What one camera saw at one timestep.

    Attributes:
        image: (H, W, 3) uint8 sRGB over black: colours are those of the foreground times its coverage.
        mask: (H, W) uint8 foreground coverage, 255 = head.
        depth: (H, W) float32 camera z in metres, 0 = no surface; None when not there or not asked for.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    depth: NDArray[np.float32] | None = None


class Capture(ABC):
    """One recording of one subject. Pictures are read when asked for; the rest is small and in memory.

    Attributes:
        subject: name of the person.
        capture_id: name of the recording, unique among captures.
        layout: name of the source layout.
        expression_kind: what the codes mean: "arkit-52", "ava-256" or "flame-135".
        expressions: (T, E) float32 codes.
        timestep_ids: T names, unique, in the order of time.
        camera_ids: V names, unique.
        size: height and width of the pictures, the same for all views.
        head: name of the parametric head that tracked the capture, or None.
        identity: (I,) float32 identity code of that head, or None.
        has_depth: whether views come with depth.
        has_background: whether `uncut` can show what is behind the head.
        lacks: what a capture of this layout does not have and others have, each with the reason and the
            remedy.
    """

    subject: str
    capture_id: str
    layout: str
    expression_kind: str
    expressions: NDArray[np.float32]
    timestep_ids: list[str]
    camera_ids: list[str]
    size: tuple[int, int]
    head: str | None = None
    identity: NDArray[np.float32] | None = None
    has_depth: bool = False
    has_background: bool = False
    lacks: Mapping[str, str] = MappingProxyType({})

    def require(self, what: str, purpose: str) -> None:
        """Refuses a capture that lacks `what` ("expressions", "head pose", "masks").

        Raises:
            UserError: it does; the sentence says what for it is needed and what to do.
        """
        if what in self.lacks:
            raise UserError(f"{self.capture_id} cannot be used for {purpose}: {self.lacks[what]}.")

    @abstractmethod
    def camera_matrices(self, t: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Intrinsics (V, 3, 3) in pixels and world-to-camera matrices (V, 4, 4) in the head frame of
        timestep `t`.
        """

    @abstractmethod
    def view(self, t: int, v: int, depth: bool = True) -> View | None:
        """What camera `v` saw at timestep `t`, or None where the source has no picture (a dropped frame).

        Raises:
            UserError: the picture is there but cannot be read.
        """

    def uncut(self, t: int, v: int) -> NDArray[np.uint8] | None:
        """The picture (H, W, 3) of a view, sRGB, with what is behind the head; None where `view` is None.

        Raises:
            UserError: the layout has no such pictures, or this one cannot be read.
        """
        raise UserError(f"{self.capture_id} has no pictures with what is behind the head ({self.layout}).")

    def cameras(self, t: int) -> Cameras:
        """The V cameras in the head frame of timestep `t`, float32."""
        import torch

        from avatars.cameras import Cameras

        K, world_to_camera = self.camera_matrices(t)
        return Cameras(torch.from_numpy(K).float(), torch.from_numpy(world_to_camera).float())


def find_captures(folder: str | Path, sequence: str | None = None) -> list[Path]:
    """The captures in a folder: its folders, and of those that are participants of NeRSemble one sequence each.

    Args:
        folder: whose folders are captures, or participants with a folder `sequences`.
        sequence: which sequence to take of each participant; may be left out where they have only one.

    Raises:
        UserError: the folder is not there or holds no folders, or it is not clear which sequence is meant.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not there. Name a folder of captures, or make one: headsplat synth.")
    found = []
    for path in _folders(folder):
        names = (
            [other.name for other in _folders(path / "sequences")] if (path / "sequences").is_dir() else None
        )
        if names is None:
            found.append(path)
        elif sequence in names or (sequence is None and len(names) == 1):
            found.append(path / "sequences" / (sequence or names[0]))
        else:
            raise UserError(
                f"{path} has the sequences {', '.join(names) or '(none)'}; name one that every participant has"
                " with --sequence."
            )
    if not found:
        raise UserError(f"{folder} holds no captures. Make some with `headsplat synth {folder}`.")
    return found


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def read_capture(path: str | Path) -> Capture:
    """Opens a capture of any layout that this version knows.

    Args:
        path: the folder of one recording.

    Raises:
        UserError: the folder is not there, holds no known layout, or its description is wrong.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder. Give the folder of one capture.")
    capture = _open(path)
    if (path / "headsplat.json").is_file():
        from shards.readers.synthetic import own_codes

        return own_codes(capture, path)  # a synthetic capture in the layout of a tracker
    return capture


def _open(path: Path) -> Capture:
    """A folder through the reader of its layout."""
    if (path / "capture.json").is_file():
        from shards.readers.synthetic import SyntheticCapture

        return SyntheticCapture(path)
    if (path / "decoder" / "camera_calibration.json").is_file() or "--" in path.name:
        from shards.readers.ava256 import Ava256Capture

        return Ava256Capture(path)
    if any((path / name).is_file() for name in ("transforms_train.json", "transforms.json")):
        from shards.readers.vhap import VhapCapture

        return VhapCapture(path)
    if (path / "imgs").is_dir():
        from shards.readers.metrical import MetricalCapture

        return MetricalCapture(path)
    if path.resolve().parent.name == "sequences":
        from shards.readers.nersemble import NersembleV1Capture, NersembleVideoCapture

        layout = NersembleVideoCapture if (path / "images").is_dir() else NersembleV1Capture
        return layout(path.resolve())
    raise UserError(
        f"{path} is not a capture: it holds no capture.json (synthetic), no decoder folder (Ava-256), no"
        " transforms.json (VHAP) and no imgs (metrical-tracker), and is no sequence of NeRSemble"
        " (<participant>/sequences/<sequence>)."
        " A synthetic capture without it was not finished: run `headsplat synth` again."
    )


def check_matrices(K: NDArray, world_to_camera: NDArray, where: str) -> None:
    """Refuses cameras (V, 3, 3), (V, 4, 4) that cannot be: not finite, no focal length, no rotation.

    Raises:
        UserError: the sentence starts with `where`.
    """
    if len(K) == 0:
        raise UserError(f"{where} has no cameras. A capture needs at least one view.")
    if not (np.isfinite(K).all() and np.isfinite(world_to_camera).all()):
        raise UserError(
            f"{where} has a camera with numbers that are not finite. Export the calibration again."
        )
    if (K[:, 0, 0] <= 0).any() or (K[:, 1, 1] <= 0).any():
        raise UserError(
            f"{where} has a camera whose focal length is not positive. Export the calibration again."
        )
    rotation = world_to_camera[:, :3, :3]
    off = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max()
    if off > 1e-3 or (np.linalg.det(rotation) < 0).any():
        raise UserError(
            f"{where} has a world_to_camera whose 3 x 3 part is no rotation (off by {off:.2g})."
            " Matrices are row-major, OpenCV axes."
        )
