"""NeRSemble recordings: the v2 download, the older v1 research layout, and the benchmark's packages.

One capture is one sequence of one participant, given by its folder, `<participant>/sequences/<sequence>`.
The benchmark's package for avatars comes with FLAME tracking and can be packed. The others hold neither
expression codes nor head poses, so they are read to be looked at and to be tracked; what tracking exports
(`shards.readers.vhap`) can be packed. Their cameras stay in the studio's frame.

Intrinsics are those of pictures 3208 pixels high, one matrix for all cameras in v1 and v2 and one for each
in the benchmark; world-to-camera matrices have OpenCV axes and metres.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError
from shards.capture import Capture, View, check_matrices
from shards.pictures import read_picture
from shards.readers.vhap import flame_code
from shards.readers.video import Video

__all__ = ["NersembleV1Capture", "NersembleVideoCapture", "correct_colors", "polynomial_terms"]

TRACKING = ("flame2023_tracking_v2.npz", "flame2023_tracking.npz")
NATIVE_HEIGHT = 3208
DEPTH_STEPS = 32767  # 16-bit depth counts these to a metre; 0 is no surface and 1 is zero metres
NOT_TRACKED = (
    "it is not tracked: NeRSemble's recordings come without expression codes and head poses. Track it with"
    " VHAP and"
    " read the folder that VHAP exports"
)
NO_MASKS = (
    "it has no foreground masks. Matte it against the BACKGROUND stills, or track it with VHAP, which does"
)

# Monomials in the order of Cheung et al. 2004 and Westland and Ripamonti 2004, table 8.2; "" is the constant.
_QUADRATIC = ["R", "G", "B", "RG", "RB", "GB", "RR", "GG", "BB"]
_CUBIC = [*_QUADRATIC, "RGB", "RRG", "GGB", "BBR"]
_CUBES = ["RRR", "GGG", "BBB"]
_MIXED = [*_CUBIC, "RRB", "GGR", "BBG", *_CUBES]
_QUARTIC = ["RRRG", "RRRB", "GGGR", "GGGB", "BBBR", "BBBG", "RRGB", "RGGB", "RGBB", "RRGG", "RRBB", "GGBB"]
TERMS: dict[int, list[str]] = {
    3: _QUADRATIC[:3],
    4: [*_QUADRATIC[:3], ""],
    5: [*_QUADRATIC[:3], "RGB", ""],
    7: [*_QUADRATIC[:6], ""],
    8: [*_QUADRATIC[:6], "RGB", ""],
    10: [*_QUADRATIC, ""],
    11: [*_QUADRATIC, "RGB", ""],
    14: [*_QUADRATIC, "RGB", *_CUBES, ""],
    16: [*_CUBIC, *_CUBES],
    17: [*_CUBIC, *_CUBES, ""],
    19: _MIXED,
    20: [*_MIXED, ""],
    22: [*_MIXED, "RRGB", "RGGB", "RGBB"],
    35: [*_MIXED, *_QUARTIC, "RRRR", "GGGG", "BBBB", ""],
}


def polynomial_terms(colors: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Monomials (..., count) of colours (..., 3), in the order of Cheung et al. 2004.

    Raises:
        UserError: there is no expansion of that many terms.
    """
    if count not in TERMS:
        raise UserError(
            f"A colour calibration of {count} terms is unknown; known are {', '.join(map(str, TERMS))}."
        )
    channel = {name: colors[..., i] for i, name in enumerate("RGB")}
    one = np.ones(colors.shape[:-1])
    return np.stack([np.prod([one, *(channel[c] for c in term)], axis=0) for term in TERMS[count]], -1)


def correct_colors(image: NDArray[np.uint8], matrix: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Applies a camera's colour calibration (3, terms), which acts on linear colours, to an sRGB picture (H,
    W, 3).
    """
    encoded = image.astype(np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    corrected = np.clip(polynomial_terms(linear, matrix.shape[1]) @ matrix.T, 0, 1)
    encoded = np.where(corrected <= 0.0031308, corrected * 12.92, 1.055 * corrected ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255).astype(np.uint8)


class _Nersemble(Capture):
    """What the layouts have in common: where things are, and the calibration."""

    expression_kind = "none"

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.subject = self.path.parents[1].name
        self.capture_id = f"{self.subject}/{self.path.name}"
        self.lacks: dict[str, str] = {"expressions": NOT_TRACKED, "head pose": NOT_TRACKED}

    def _read_calibration(self, file: Path, cameras: list[str]) -> None:
        try:
            content: dict[str, Any] = json.loads(file.read_text())
            poses, intrinsics = content["world_2_cam"], content["intrinsics"]
            self.camera_ids = [c for c in poses if c in cameras]
            shared = not isinstance(intrinsics, dict)
            K = [intrinsics if shared else intrinsics[c] for c in self.camera_ids]
            self._K = np.array(K, np.float64).reshape(-1, 3, 3)
            self._poses = np.array([poses[c] for c in self.camera_ids], np.float64).reshape(-1, 4, 4)
        except FileNotFoundError:
            raise UserError(f"{file} is not there. Download the participant's calibration.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is no calibration of NeRSemble ({error!r}). Download it again."
            ) from None
        check_matrices(self._K, self._poses, str(file))

    def _measure(self, height: int, width: int) -> None:
        self.size = (height, width)
        self._K[:, :2] *= height / NATIVE_HEIGHT

    def camera_matrices(self, t: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Intrinsics (V, 3, 3) in pixels and world-to-camera matrices (V, 4, 4) in the studio's frame."""
        return self._K, self._poses


class NersembleVideoCapture(_Nersemble):
    """A sequence whose pictures are one mp4 a camera: the v2 download, or a package of the benchmark.

    The v2 download has no masks and gets its colours calibrated; the benchmark's pictures have no background
    any more and come with videos of coverage.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        root = self.path.parents[1]
        files = _by_serial(self.path / "images", "mp4")
        if not files:
            raise UserError(f"{self.path / 'images'} holds no cam_<serial>.mp4. Download the sequence again.")
        self._read_calibration(root / "calibration" / "camera_params.json", list(files))
        self._images = [Video(files[c]) for c in self.camera_ids]
        alphas = _by_serial(self.path / "alpha_maps", "mp4")
        self._alphas = [Video(alphas[c]) for c in self.camera_ids if c in alphas]
        self._masked = len(self._alphas) == len(self.camera_ids)
        self.layout = "nersemble-benchmark" if self._masked else "nersemble-v2"
        if not self._masked:
            self.lacks["masks"] = NO_MASKS
        self._colors = (
            {} if self._masked else self._read_colors(root / "calibration" / "color_calibration.json")
        )
        self._measure(self._images[0].height, self._images[0].width)
        self._numbers = list(range(min(len(video) for video in self._images)))
        self.expressions = np.zeros((len(self._numbers), 0), np.float32)
        tracking = next(
            (file for name in TRACKING if (file := self.path / "tracking" / name).is_file()), None
        )
        self._head_to_world: NDArray[np.float64] | None = None
        if tracking is not None:
            self._read_tracking(tracking)
        self.timestep_ids = [f"{t:05d}" for t in self._numbers]

    def _read_tracking(self, file: Path) -> None:
        """FLAME parameters of the benchmark's package for avatars. World = scale R v + t, with v in FLAME's
        metres: R and t are the head's pose, and the scale stays with the head.
        """
        try:
            with np.load(file, allow_pickle=False) as archive:
                flame = {name: np.asarray(archive[name], np.float64) for name in archive.files}
            tracked = [(i, int(t)) for i, t in enumerate(flame["frames"].reshape(-1))]
            tracked = [(i, t) for i, t in tracked if 0 <= t < len(self._numbers)]
            names = {"expr": "expression", "eyes_pose": "eyes", "jaw_pose": "jaw", "neck_pose": "neck"}
            codes = [
                flame_code({ours: flame[theirs][i] for ours, theirs in names.items()}) for i, _ in tracked
            ]
            poses = np.tile(np.eye(4), (len(tracked), 1, 1))
            for place, (i, _) in enumerate(tracked):
                poses[place, :3, :3] = flame["rotation_matrices"][i].reshape(3, 3)
                poses[place, :3, 3] = flame["translation"][i].reshape(3)
            self.expressions = np.stack(codes)
            self.identity = flame["shape"].reshape(-1).astype(np.float32)
        except (OSError, ValueError, KeyError, IndexError, EOFError) as error:
            raise UserError(
                f"{file} is no FLAME tracking of the benchmark ({error!r}). Download it again."
            ) from None
        if not np.isfinite(self.expressions).all():
            raise UserError(f"{file} has codes that are not finite. Download it again.")
        check_matrices(np.broadcast_to(np.eye(3), (len(poses), 3, 3)), poses, str(file))
        self._numbers, self._head_to_world = [t for _, t in tracked], poses
        self.expression_kind, self.head = "flame-135", "flame2023"
        for what in ("expressions", "head pose"):
            del self.lacks[what]

    def camera_matrices(self, t: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Intrinsics (V, 3, 3) in pixels and world-to-camera matrices (V, 4, 4), in the head frame of
        timestep `t` where the head is tracked and in the studio's elsewhere.
        """
        poses = self._poses if self._head_to_world is None else self._poses @ self._head_to_world[t]
        return self._K, poses

    def _read_colors(self, file: Path) -> dict[str, NDArray[np.float64]]:
        try:
            content = json.loads(file.read_text())
            matrices = {c: np.array(content[c], np.float64).reshape(3, -1) for c in self.camera_ids}
        except FileNotFoundError:
            raise UserError(f"{file} is not there. Download the participant's calibration.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is no colour calibration of NeRSemble ({error!r}). Download it again."
            ) from None
        return matrices

    def view(self, t: int, v: int, depth: bool = True) -> View:
        """What camera `v` saw at timestep `t`; without masks, the whole picture counts as foreground."""
        number = self._numbers[t]
        image = self._images[v].frame(number)
        if not self._masked:
            corrected = correct_colors(image, self._colors[self.camera_ids[v]])
            return View(image=corrected, mask=np.full(image.shape[:2], 255, np.uint8))
        mask = self._alphas[v].frame(number)[..., 0]
        return View(image=image * (mask > 0)[..., None], mask=mask)


class NersembleV1Capture(_Nersemble):
    """A sequence of the older research layout: a folder of PNGs for each timestep, at half size, with masks.

    Timesteps need not be contiguous. Colours are corrected by an affine map where there is one.
    """

    layout = "nersemble-v1"
    has_background = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        root = self.path.parents[1]
        frames = {p.name.removeprefix("frame_"): p for p in sorted(self.path.glob("frame_*"))}
        self._frames = {
            t: p for t, p in frames.items() if t.isdigit() and _folder(p, "images-2x") is not None
        }
        if not self._frames:
            raise UserError(
                f"{self.path} holds no frame_<number> with pictures. Download the sequence again."
            )
        self.timestep_ids = sorted(self._frames, key=int)
        self.expressions = np.zeros((len(self.timestep_ids), 0), np.float32)
        first = self._frames[self.timestep_ids[0]]
        pictures = _by_serial(_folder(first, "images-2x"), "png")
        self._read_calibration(root / "camera_params.json", list(pictures))
        from PIL import Image

        try:
            with Image.open(pictures[self.camera_ids[0]]) as picture:
                self._measure(picture.height, picture.width)
        except OSError as error:
            raise UserError(
                f"{pictures[self.camera_ids[0]]} is no picture ({error}). Download it again."
            ) from None
        self.has_depth = _depths(first) is not None
        if _folder(first, "alpha_map") is None:
            self.lacks["masks"] = NO_MASKS
        colors = root / "annotations" / self.path.name / "color_correction"
        self._colors = {
            c: _affine(colors / f"{c}.npy") for c in self.camera_ids if (colors / f"{c}.npy").is_file()
        }

    def view(self, t: int, v: int, depth: bool = True) -> View | None:
        """What camera `v` saw at timestep `t`; None where there is no picture."""
        frame, name = self._frames[self.timestep_ids[t]], f"cam_{self.camera_ids[v]}.png"
        pictures, masks = _folder(frame, "images-2x"), _folder(frame, "alpha_map")
        if pictures is None or not (pictures / name).is_file():
            return None
        image = self._corrected(pictures / name, v)
        mask = (
            np.full(self.size, 255, np.uint8) if masks is None else read_picture(masks / name, "L", self.size)
        )
        covered = np.round(image * (mask[..., None] / np.float32(255))).astype(np.uint8)
        z = None
        depths = _depths(frame) if depth and self.has_depth else None
        if depths is not None:
            stored = read_picture(depths / name, "I;16", self.size).astype(np.float32)
            z = np.where(stored > 0, (stored - 1) / DEPTH_STEPS, 0).astype(np.float32)
        return View(image=covered, mask=mask, depth=z)

    def uncut(self, t: int, v: int) -> NDArray[np.uint8] | None:
        """The same picture, in corrected colours too, as a whole."""
        pictures = _folder(self._frames[self.timestep_ids[t]], "images-2x")
        path = None if pictures is None else pictures / f"cam_{self.camera_ids[v]}.png"
        return None if path is None or not path.is_file() else self._corrected(path, v)

    def _corrected(self, path: Path, v: int) -> NDArray[np.uint8]:
        image = read_picture(path, "RGB", self.size)
        affine = self._colors.get(self.camera_ids[v])
        if affine is None:
            return image
        corrected = image.astype(np.float64) / 255 @ affine[:3, :3] + affine[:3, 3]
        return np.round(np.clip(corrected, 0, 1) * 255).astype(np.uint8)


def _by_serial(folder: Path | None, end: str) -> dict[str, Path]:
    """Files `cam_<serial>.<end>` of a folder by serial number; other files are passed over."""
    if folder is None or not folder.is_dir():
        return {}
    pattern = re.compile(rf"cam_(\d+)\.{end}")
    found = ((pattern.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    return {match[1]: path for match, path in found if match}


def _folder(parent: Path, name: str) -> Path | None:
    """The folder `name`, with or without the frame rate that the research code puts behind it."""
    return next((parent / n for n in (f"{name}-73fps", name) if (parent / n).is_dir()), None)


def _depths(frame: Path) -> Path | None:
    """The folder of a timestep's depth maps."""
    colmap = _folder(frame, "colmap")
    return None if colmap is None else _folder(colmap, "depth_maps_compressed")


def _affine(file: Path) -> NDArray[np.float64]:
    try:
        matrix = np.load(file, allow_pickle=False).astype(np.float64)
        if matrix.shape not in ((3, 4), (4, 4)):
            raise ValueError(f"shape {matrix.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} is no affine colour correction ({error}). Download it again.") from None
    return matrix
