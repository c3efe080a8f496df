"""The picture that an avatar is made from: whether it shows one face, the square around it, face recognisers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avatars.errors import UserError

__all__ = ["FROZEN", "crops", "face_boxes", "head_box", "recogniser"]

FROZEN = {"dlib": 128, "arcface": 512}
"""Face recognition networks that may serve as a backbone, with the length of what they say."""
SMALLEST = 32
"""Side in pixels below which a picture is refused."""
SECOND = 0.3
"""A second foreground region of this share of the largest one's area is another person."""
ROOM = 1.05
"""Side of the square around a head, as a share of the longer side of its matte."""
AROUND_FACE = 2.4
"""The same for a detector's box, which ends at the brows and the chin."""

FILES = ("dlib_face_recognition_resnet_model_v1.dat", "shape_predictor_68_face_landmarks.dat")
GET_DLIB = "install the extra with pip install 'headsplat[faces]'"
# Where ArcFace's training put the eyes, the nose and the corners of the mouth (Deng et al. 2019), of 112 pixels.
ARCFACE_POINTS = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
FIVE_OF_68 = (range(36, 42), range(42, 48), (30,), (48,), (54,))  # iBUG's numbers of those five points


def head_box(image: Tensor, mask: Tensor, who: str) -> Tensor:
    """The square (4,) left, top, right, bottom around the one head of a picture.

    With a matte the head is its foreground. A picture without one (a mask of ones) is looked at by dlib's detector.

    Args:
        image: (3, H, W).
        mask: (1, H, W) coverage.
        who: whose picture it is, for messages.

    Raises:
        UserError: no head, several, or a picture too small.
    """
    height, width = image.shape[-2:]
    if min(height, width) < SMALLEST:
        raise UserError(
            f"The picture of {who} is {width}x{height} pixels; FastAvatar needs at least {SMALLEST} to a side."
        )
    if bool((mask > 0.99).all()):
        return _detected(image, who)
    from scipy import ndimage

    labels, count = ndimage.label(mask[0].cpu().numpy() > 0.5)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    if not count or areas.max() < 0.005 * height * width:
        raise UserError(
            f"The picture of {who} shows no face: its mask is empty. Give a picture with a head in it."
        )
    if (several := int((areas >= SECOND * areas.max()).sum())) > 1:
        raise UserError(
            f"The picture of {who} shows {several} heads (regions of its mask); cut it to one of them."
        )
    largest = torch.from_numpy(labels == 1 + int(areas.argmax()))[None, None].float()
    return face_boxes(largest)[0].to(image.device)


def face_boxes(masks: Tensor) -> Tensor:
    """Squares (B, 4) around the foreground of masks (B, 1, H, W), in pixels; the whole picture where there is none."""
    found = masks[:, 0] > 0.5
    height, width = found.shape[1:]
    edges = []
    for lines, length in ((found.any(1), width), (found.any(2), height)):  # columns, then rows
        places = torch.arange(length, device=masks.device)
        low = torch.where(lines, places, length).amin(1)
        high = torch.where(lines, places + 1, 0).amax(1)
        empty = high <= low
        edges.append((torch.where(empty, 0, low).float(), torch.where(empty, length, high).float()))
    (left, right), (top, bottom) = edges
    half = 0.5 * ROOM * torch.maximum(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    return torch.stack([x - half, y - half, x + half, y + half], 1)


def crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Squares (B, 3, size, size) cut out of (B, 3, H, W), averaged where they shrink; repeated edges outside."""
    from torchvision.ops import roi_align

    places = torch.arange(len(boxes), device=boxes.device, dtype=images.dtype)[:, None]
    return roi_align(images, torch.cat([places, boxes.to(images)], 1), size, aligned=True)


def _pixels(image: Tensor) -> np.ndarray:
    """A picture (3, H, W) in [0, 1] as dlib takes it."""
    return (image.permute(1, 2, 0) * 255).round().clamp(0, 255).byte().cpu().contiguous().numpy()


def _detected(image: Tensor, who: str) -> Tensor:
    """The square around the only face of a picture without a matte."""
    try:
        detector = _dlib()[0]
    except UserError as reason:
        raise UserError(
            f"The picture of {who} has no mask, and finding its face needs dlib: {reason}"
        ) from reason
    boxes = detector(_pixels(image), 1)
    if len(boxes) != 1:
        what = f"{len(boxes)} faces" if len(boxes) else "no face that dlib finds"
        raise UserError(f"The picture of {who} shows {what}; cut it to one face, or give it a mask.")
    box = boxes[0]
    center = box.center()
    half = 0.5 * AROUND_FACE * max(box.width(), box.height())
    return torch.tensor([center.x - half, center.y - half, center.x + half, center.y + half]).to(image)


@lru_cache(maxsize=1)
def _dlib() -> tuple[Any, Any, Path]:
    """The frontal detector of dlib, its 68 landmarks, and the file of its embedding.

    Raises:
        UserError: the packages are not there.
    """
    # Importing the package of the models needs pkg_resources, which setuptools no longer has.
    spec = importlib.util.find_spec("face_recognition_models")
    try:
        import dlib
    except ImportError as error:
        raise UserError(f"the package dlib-bin cannot be imported; {GET_DLIB}.") from error
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package face-recognition-models is not there; {GET_DLIB}.")
    folder = Path(spec.submodule_search_locations[0]) / "models"
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {missing[0]}; install face-recognition-models again.")
    predictor = dlib.shape_predictor(str(folder / FILES[1]))
    return dlib.get_frontal_face_detector(), predictor, folder / FILES[0]


@lru_cache(maxsize=2)
def recogniser(name: str) -> Callable[[Tensor], Tensor | None]:
    """A frozen face recognition network: a picture (3, H, W) to its embedding (D,), None where no face is found.

    "dlib" is the 128-d network of the package face-recognition-models, "arcface" the user's ONNX file of 512-d. Both
    see the largest face that dlib's detector finds, which is frontal within some 40 degrees.

    Raises:
        UserError: a package or a weight file is missing.
    """
    detector, predictor, file = _dlib()
    import dlib

    describe = _arcface() if name == "arcface" else None
    network = dlib.face_recognition_model_v1(str(file)) if describe is None else None

    def look(image: Tensor) -> Tensor | None:
        pixels = _pixels(image)
        boxes = detector(pixels, 1)  # one doubling: faces from 40 pixels on
        if not boxes:
            return None
        points = predictor(pixels, max(boxes, key=lambda box: (box.area(), -box.left(), -box.top())))
        if describe is not None:
            return describe(pixels, points)
        assert network is not None
        chip = dlib.get_face_chip(pixels, points, size=150, padding=0.25)
        return torch.tensor(list(network.compute_face_descriptor(chip)))

    return look


def _arcface() -> Callable[[np.ndarray, Any], Tensor]:
    """ArcFace by the user's ONNX file, on a face aligned by five of dlib's points."""
    from PIL import Image

    from avatars.weights import find

    path = find("arcface").path
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"ArcFace needs the package onnxruntime; {GET_DLIB}.") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0].name

    def describe(pixels: np.ndarray, found: Any) -> Tensor:
        all68 = np.array([(point.x, point.y) for point in found.parts()], np.float64)
        five = np.stack([all68[list(places)].mean(0) for places in FIVE_OF_68])
        # The least-squares similarity from the aligned face back into the picture, as complex numbers.
        goal, there = ARCFACE_POINTS @ [1, 1j], five @ [1, 1j]
        a, b = goal - goal.mean(), there - there.mean()
        turn = (a.conj() @ b) / (a.conj() @ a)
        shift = there.mean() - turn * goal.mean()
        matrix = (turn.real, -turn.imag, shift.real, turn.imag, turn.real, shift.imag)
        chip = Image.fromarray(pixels).transform(
            (112, 112), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
        scaled = (np.asarray(chip, np.float32).transpose(2, 0, 1)[None] - 127.5) / 127.5
        return torch.from_numpy(np.asarray(session.run(None, {source: scaled})[0][0], np.float32))

    return describe
