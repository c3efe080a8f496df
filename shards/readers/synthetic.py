"""Captures that `headsplat synth` made: `capture.json` beside folders of PNGs.

Also the mark of such a capture when it was written in another layout (`shards.synth.tracking`): `headsplat.json`, which
says that the codes in it are our head's.
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

__all__ = ["MARK", "SyntheticCapture", "own_codes"]

SCHEMA = 1
MARK = "headsplat.json"
MARK_LAYOUT = "headsplat-tracking"
MARK_SCHEMA = 1


def own_codes(capture: Capture, folder: Path) -> Capture:
    """Gives a capture of another layout its own codes back, where a mark says that it was a synthetic one.

    Args:
        capture: read in the other layout; changed in place.
        folder: of the capture.

    Raises:
        UserError: there is a mark and it cannot be read.
    """
    file = folder / MARK
    if not file.is_file():
        return capture
    try:
        mark = json.loads(file.read_text())
        if mark["layout"] != MARK_LAYOUT or mark["schema"] > MARK_SCHEMA:
            raise ValueError(f"layout {mark['layout']!r}, schema {mark['schema']}")
        capture.subject = str(mark["subject"])
        capture.expression_kind = str(mark["expression_kind"])
        capture.expressions = capture.expressions[:, : int(mark["expression_length"])].copy()
        capture.head = str(mark["head"])
        capture.identity = np.array(mark["identity"], np.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no mark of an exported capture ({error!r}). Export it again.") from None
    return capture


class SyntheticCapture(Capture):
    """A capture in the synthetic layout.

    Cameras are given once, in the studio's frame, and the head's pose at every timestep; `camera_matrices`
    joins the two. Depth is 16-bit in units of `depth_unit` metres. `background_linear` is the linear colour
    behind the head, black where it is left out; it is taken out of the pixels on the head's outline.
    """

    layout = "headsplat-synthetic"
    has_background = True

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        file = self.path / "capture.json"
        try:
            description: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is not readable JSON ({error}). Run `headsplat synth` again.") from None
        if description.get("layout") != self.layout:
            raise UserError(
                f"{file} has the layout {description.get('layout')!r}; this version reads {self.layout!r}."
            )
        if description.get("schema", 0) > SCHEMA:
            raise UserError(
                f"{file} has schema {description['schema']}, this version reads up to {SCHEMA}. Update"
                " headsplat."
            )
        try:
            self._describe(description, file)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{file} lacks a field or has one of the wrong shape: {error!r}. Run `headsplat synth` again."
            ) from None

    def _describe(self, description: dict[str, Any], file: Path) -> None:
        self.subject = str(description["subject"])
        self.capture_id = self.subject
        height, width = description["size"]
        self.size = (int(height), int(width))
        self.expression_kind = str(description["expression_kind"])
        self.camera_ids = [str(camera["id"]) for camera in description["cameras"]]
        self._K = np.array([c["K"] for c in description["cameras"]], np.float64).reshape(-1, 3, 3)
        self._studio = np.array([c["world_to_camera"] for c in description["cameras"]], np.float64).reshape(
            -1, 4, 4
        )
        check_matrices(self._K, self._studio, str(file))
        steps = description["timesteps"]
        if not steps:
            raise UserError(f"{file} has no timesteps. Run `headsplat synth` again.")
        self.timestep_ids = [str(step["id"]) for step in steps]
        for name, ids in (("cameras", self.camera_ids), ("timesteps", self.timestep_ids)):
            if len(set(ids)) < len(ids):
                raise UserError(f"{file} names one of its {name} twice. Run `headsplat synth` again.")
        self.expressions = np.array([step["expression"] for step in steps], np.float32)
        self._head_to_world = np.array([step["head_to_world"] for step in steps], np.float64).reshape(
            -1, 4, 4
        )
        if self.expressions.ndim != 2 or not np.isfinite(self.expressions).all():
            raise UserError(f"{file} has expression codes of different lengths or that are not finite.")
        check_matrices(
            np.broadcast_to(np.eye(3), (len(steps), 3, 3)), self._head_to_world, f"{file} (head_to_world)"
        )
        head = description.get("head")
        if head is not None:
            self.head = str(head["model"])
            self.identity = np.array(head["identity"], np.float32)
        self._background = np.array(description.get("background_linear", [0, 0, 0]), np.float64).reshape(3)
        self._depth_unit = float(description["depth_unit"])
        self.has_depth = (self.path / "depth").is_dir()

    def camera_matrices(self, t: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Intrinsics (V, 3, 3) in pixels and world-to-camera matrices (V, 4, 4) in the head frame of
        timestep `t`.
        """
        return self._K, self._studio @ self._head_to_world[t]

    def studio_cameras(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Intrinsics (V, 3, 3) in pixels and world-to-camera matrices (V, 4, 4) in the studio's frame."""
        return self._K, self._studio

    def head_to_world(self, t: int) -> NDArray[np.float64]:
        """The head's pose (4, 4) in the studio's frame."""
        return self._head_to_world[t]

    def view(self, t: int, v: int, depth: bool = True) -> View:
        """What camera `v` saw at timestep `t`; a rendered capture has every picture."""
        name = f"{self.timestep_ids[t]}/{self.camera_ids[v]}.png"
        z = None
        if depth and self.has_depth:
            stored = read_picture(self.path / "depth" / name, "I;16", self.size)
            z = stored.astype(np.float32) * np.float32(self._depth_unit)
        image = read_picture(self.path / "image" / name, "RGB", self.size)
        mask = read_picture(self.path / "mask" / name, "L", self.size)
        return View(image=_over_black(image, mask, self._background), mask=mask, depth=z)

    def uncut(self, t: int, v: int) -> NDArray[np.uint8]:
        """The picture as it was drawn, over the studio."""
        name = f"{self.timestep_ids[t]}/{self.camera_ids[v]}.png"
        return read_picture(self.path / "image" / name, "RGB", self.size)


def _over_black(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], background: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Takes the background's light, added in linear colour, out of a picture (H, W, 3)."""
    image = image * (mask > 0)[..., None]
    outline = (mask > 0) & (mask < 255)
    encoded = image[outline] / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear - (1 - mask[outline, None] / 255) * background, 0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    image[outline] = np.round(encoded * 255).astype(np.uint8)
    return image
