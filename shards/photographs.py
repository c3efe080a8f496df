"""Somebody's own pictures, with cameras, as an input set: `pictures.json` beside the pictures.

    {"subject": "ada", "expression_kind": "arkit-52", "pictures": [
      {"image": "0.jpg", "mask": "0.png", "K": [[…]×3]×3, "world_to_camera": [[…]×4]×4, "expression": […],
       "position": "0.position.npy", "confidence": "0.confidence.npy"}, …]}

The world is the person's head frame in metres, axes as OpenCV's cameras have them. `mask`, `expression`,
`position` (3, H, W) with `confidence` (1, H, W) and `subject` may be left out; pictures may have any size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.inputs import Background, InputSet
from shards.pictures import crop_and_resize, crop_window, fit_intrinsics, resample_depth

__all__ = ["read_photographs"]


def read_photographs(
    folder: str | Path,
    size: int,
    expression_kind: str,
    expression_length: int,
    background: Background = "masked",
) -> InputSet:
    """Reads `pictures.json` and what it names, cuts every picture to the head and resamples it.

    Args:
        folder: where `pictures.json` lies.
        size: side of the square pictures that a method takes, in pixels.
        expression_kind: the kind of code of the method; pictures of another kind are refused.
        expression_length: its length; pictures without a code count as neutral (zeros).
        background: "masked" to make black what masks exclude, where there are masks; "kept" to leave it.

    Raises:
        UserError: a file is missing or damaged, or a field is not what it must be.
    """
    folder = Path(folder)
    described = _read_json(folder / "pictures.json")
    entries = described.get("pictures")
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{folder / "pictures.json"} names no pictures; list them under "pictures".')
    kind = described.get("expression_kind", expression_kind)
    if kind != expression_kind:
        raise UserError(
            f"{folder / 'pictures.json'} has {kind} expression codes and the method takes {expression_kind}."
        )
    kept = background == "kept"
    read = [_picture(folder, i, entry, size, expression_length, kept) for i, entry in enumerate(entries)]
    with_prior = [p["position"] is not None for p in read]
    if any(with_prior) and not all(with_prior):
        raise UserError(
            f"{folder / 'pictures.json'}: only some pictures have a position map; give one to all or to none."
        )

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([picture[name] for picture in read])).float()

    inputs = InputSet(
        images=stacked("image"),
        masks=stacked("mask"),
        cameras=Cameras(stacked("K"), stacked("world_to_camera")),
        positions=stacked("position") if all(with_prior) else None,
        confidence=stacked("confidence") if all(with_prior) else None,
        features=None,
        expressions=stacked("expression"),
        expression_kind=kind,
        subject=str(described.get("subject", folder.resolve().name)),
        provenance={"layout": "photographs", "pictures": [str(entry["image"]) for entry in entries]},
        background=background,
    )
    inputs.check()
    return inputs


def _read_json(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there; it tells the cameras of the pictures, see docs/avatars.md."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}).") from None
    if not isinstance(described, dict):
        raise UserError(f"{path} is a {type(described).__name__} where an object is expected.")
    return described


def _picture(
    folder: Path, number: int, entry: Any, size: int, expression_length: int, kept: bool
) -> dict[str, Any]:
    """One entry of `pictures.json` as arrays, with what is behind the head where that is `kept`."""
    where = f"{folder / 'pictures.json'}, picture {number}"
    if not isinstance(entry, dict):
        raise UserError(f"{where} is no object.")
    K = _numbers(entry, "K", (3, 3), where)
    world_to_camera = _numbers(entry, "world_to_camera", (4, 4), where)
    image = _open(folder, entry, "image", "RGB", where)
    height, width = image.shape[:2]
    mask = (
        _open(folder, entry, "mask", "L", where)
        if "mask" in entry
        else np.full((height, width), 255, np.uint8)
    )
    if mask.shape != (height, width):
        raise UserError(f"{where}: the mask is {mask.shape} pixels and the picture {(height, width)}.")
    window = crop_window(K, world_to_camera, (height, width))
    mask = crop_and_resize(mask, window, size)
    picture = crop_and_resize(image, window, size) * (kept | (mask > 0))[..., None]
    code = np.zeros(expression_length)
    if "expression" in entry:
        code = _numbers(entry, "expression", (expression_length,), where)
    position, confidence = (_map(folder, entry, name, c, (height, width), where) for name, c in _MAPS)
    if (position is None) != (confidence is None):
        raise UserError(f"{where} has only one of position and confidence; give both or none.")
    return {
        "image": picture.transpose(2, 0, 1).astype(np.float32) / 255,
        "mask": mask[None].astype(np.float32) / 255,
        "K": fit_intrinsics(K, window, size),
        "world_to_camera": world_to_camera,
        "expression": code,
        "position": None
        if position is None
        else np.stack([resample_depth(p, window, size) for p in position]),
        "confidence": None if confidence is None else resample_depth(confidence[0], window, size)[None],
    }


_MAPS = (("position", 3), ("confidence", 1))


def _numbers(entry: dict[str, Any], name: str, shape: tuple[int, ...], where: str) -> NDArray[np.float64]:
    try:
        values = np.asarray(entry[name], np.float64)
    except KeyError:
        raise UserError(f"{where} has no {name}.") from None
    except (TypeError, ValueError):
        raise UserError(f"{where}: {name} is not made of numbers.") from None
    if values.shape != shape or not np.isfinite(values).all():
        raise UserError(f"{where}: {name} must be {shape} finite numbers, not {values.shape}.")
    return values


def _open(folder: Path, entry: dict[str, Any], name: str, mode: str, where: str) -> NDArray[np.uint8]:
    if name not in entry:
        raise UserError(f"{where} has no {name}.")
    path = folder / str(entry[name])
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert(mode))
    except FileNotFoundError:
        raise UserError(f"{where}: {path} is not there.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: {path} is not a readable picture ({error}).") from None


def _map(
    folder: Path, entry: dict[str, Any], name: str, channels: int, size: tuple[int, int], where: str
) -> NDArray[np.float32] | None:
    """A prior's map (channels, H, W) of the picture's own size, or None where the entry names none."""
    if name not in entry:
        return None
    path = folder / str(entry[name])
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{where}: {path} cannot be read ({error}).") from None
    if values.shape != (channels, *size):
        raise UserError(f"{where}: {path} is {values.shape} where {(channels, *size)} is needed.")
    return values.astype(np.float32)
