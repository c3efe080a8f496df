"""The networks that judge pictures: LPIPS, MTCNN faces, FaceNet embeddings.

Weights come from the packages themselves or from files that the user put into the folder HEADSPLAT_WEIGHTS
(or that torch already keeps in its hub folder). Nothing is downloaded and nothing runs on random weights:
what is missing raises `NotAvailable` with the reason, which stands in rows, tables and the tracker for a
number.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatars.weights import MissingWeights, file_sha256, find_file
from eval.metrics import DEFINITIONS, Definition, Pictures

__all__ = [
    "Face",
    "Judge",
    "NotAvailable",
    "available_weights",
    "find_weights",
    "load_judge",
    "lpips_network",
]

SMALLEST_LPIPS = 64
FACENET_SIZE = 160
FACENET_MARGIN = 14
FACES_REMEMBERED = 4096


class NotAvailable(Exception):
    """A metric cannot be measured here; the message says why and what would change that."""


@dataclass(frozen=True)
class Face:
    """The largest face of a picture.

    Attributes:
        box: (4,) left, top, right, bottom in pixels.
        points: (5, 2) left eye, right eye, nose, left and right mouth corner as the viewer sees them, pixels.
    """

    box: np.ndarray
    points: np.ndarray


@dataclass(frozen=True)
class Judge:
    """A loaded network metric.

    Attributes:
        measure: (prediction, target) to one value a picture, None where it cannot judge the pair.
        weights: weight file to its full sha256.
    """

    measure: Callable[[Pictures, Pictures], list[float | None]]
    weights: dict[str, str]


def available_weights(device: str | torch.device = "cpu") -> Iterator[tuple[str, bool, str]]:
    """Of each network: the metric, whether it can be measured here, and its weights or the reason why not."""
    for definition in DEFINITIONS.values():
        if definition.network is None:
            continue
        try:
            judge = load_judge(definition, device)
        except NotAvailable as reason:
            yield definition.label, False, str(reason)
        else:
            found = ", ".join(f"{name} {digest[:12]}" for name, digest in judge.weights.items())
            yield definition.label, True, found


def load_judge(definition: Definition, device: str | torch.device = "cpu") -> Judge:
    """The network behind a definition.

    Raises:
        NotAvailable: a package or a weight file is missing, or a file is not the published one.
    """
    if definition.network in ("alex", "vgg", "squeeze"):
        return _lpips(definition, device)
    if definition.network == "mtcnn-5":
        return _akd_mtcnn(definition, device)
    if definition.network == "facenet-vggface2":
        return _csim_facenet(definition, device)
    raise NotAvailable(f"this version knows no network called {definition.network!r}")


def find_weights(name: str, prefix: str) -> tuple[Path, str]:
    """A weight file by name (see `avatars.weights`) and its sha256.

    Args:
        name: file name as published.
        prefix: start of the published sha256; empty where none was published.

    Raises:
        NotAvailable: no such file, or one with another hash.
    """
    try:
        found = find_file(name, prefix)
    except MissingWeights as reason:
        raise NotAvailable(str(reason)) from reason
    return found.path, found.sha256


def _lpips(definition: Definition, device: str | torch.device) -> Judge:
    trunk_name, heads_name = definition.weights[0], definition.weights[1]
    path, digest = find_weights(*trunk_name)
    network, heads_digest = lpips_network(str(definition.network), path, heads_name[1])
    network.to(device)

    @torch.no_grad()
    def measure(prediction: Pictures, target: Pictures) -> list[float | None]:
        if min(prediction.tensor.shape[-2:]) < SMALLEST_LPIPS:
            raise NotAvailable(f"LPIPS needs pictures of at least {SMALLEST_LPIPS} pixels a side")
        # normalize=True is the package's word for "these are in [0, 1]", which Pictures guarantees.
        distance = network(prediction.tensor.to(device), target.tensor.to(device), normalize=True)
        return [float(value) for value in distance.flatten()]

    return Judge(measure, {trunk_name[0]: digest, heads_name[0]: heads_digest})


def lpips_network(net: str, trunk: Path, heads_prefix: str) -> tuple[nn.Module, str]:
    """The package's network, frozen, with every trunk weight read from a file.

    Args:
        net: "alex", "vgg" or "squeeze".
        trunk: torchvision's weights of the whole network.
        heads_prefix: start of the sha256 that the package's linear heads must have.

    Returns:
        The network, which takes pictures in [-1, 1], and the sha256 of its linear heads.

    Raises:
        NotAvailable: the package or a weight is missing.
    """
    try:
        import lpips
    except ImportError as error:
        raise NotAvailable(f"the package lpips cannot be imported ({error})") from error
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    heads_digest = file_sha256(heads)
    if not heads_digest.startswith(heads_prefix):
        raise NotAvailable(
            f"the installed lpips has other linear heads ({heads_digest[:12]}…) than version 0.1"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by an argument that is deprecated
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    _fill_trunk(network.net, trunk)
    return network.eval().requires_grad_(False), heads_digest


def _fill_trunk(trunk: nn.Module, path: Path) -> None:
    """Copies torchvision's weights into lpips' slices, whose modules keep their index in `features`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
        raise NotAvailable(f"{path} cannot be read as weights ({type(error).__name__})") from error
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():  # slice2.3.weight is features.3.weight
            key = f"features.{name.split('.', 1)[1]}"
            if key not in state or state[key].shape != parameter.shape:
                raise NotAvailable(f"{path} lacks {key}, so it is not the trunk that this metric needs")
            parameter.copy_(state[key])


def _akd_mtcnn(definition: Definition, device: str | torch.device) -> Judge:
    detect, weights = _mtcnn(definition.weights, str(device))

    def measure(prediction: Pictures, target: Pictures) -> list[float | None]:
        distances: list[float | None] = []
        for mine, theirs in zip(detect(prediction), detect(target), strict=True):
            if mine is None or theirs is None:
                distances.append(None)
            else:
                distances.append(float(np.linalg.norm(mine.points - theirs.points, axis=1).mean()))
        return distances

    return Judge(measure, weights)


def _csim_facenet(definition: Definition, device: str | torch.device) -> Judge:
    path, digest = find_weights(*definition.weights[0])
    detect, weights = _mtcnn(definition.weights[1:], str(device))
    network = _facenet(path).to(device)

    @torch.no_grad()
    def measure(prediction: Pictures, target: Pictures) -> list[float | None]:
        similarities: list[float | None] = []
        for index, face in enumerate(detect(target)):
            if face is None:
                similarities.append(None)
                continue
            chips = [_chip(pictures.tensor[index], face.box) for pictures in (prediction, target)]
            mine, theirs = network(torch.stack(chips).to(device))  # unit length
            similarities.append(float(mine @ theirs))
        return similarities

    return Judge(measure, {definition.weights[0][0]: digest, **weights})


def _facenet(path: Path) -> nn.Module:
    from facenet_pytorch import InceptionResnetV1

    network = InceptionResnetV1(pretrained=None, classify=False)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {key: value for key, value in state.items() if not key.startswith("logits.")}
        network.load_state_dict(state)
    except Exception as error:
        raise NotAvailable(f"{path} does not load as InceptionResnetV1 ({type(error).__name__})") from error
    return network.eval().requires_grad_(False)


def _chip(picture: Tensor, box: np.ndarray) -> Tensor:
    """(3, 160, 160) cut-out of (3, H, W) around a face box, scaled as FaceNet was trained."""
    height, width = picture.shape[-2:]
    margin = FACENET_MARGIN / (FACENET_SIZE - FACENET_MARGIN) / 2
    grow_x, grow_y = (box[2] - box[0]) * margin, (box[3] - box[1]) * margin
    left, top = max(int(box[0] - grow_x), 0), max(int(box[1] - grow_y), 0)
    right, bottom = min(int(box[2] + grow_x) + 1, width), min(int(box[3] + grow_y) + 1, height)
    cut = picture[None, :, top:bottom, left:right]
    resized = F.interpolate(cut, (FACENET_SIZE, FACENET_SIZE), mode="bilinear", antialias=True)[0]
    return (resized * 255 - 127.5) / 128


@lru_cache(maxsize=4)
def _mtcnn(
    expected: tuple[tuple[str, str], ...], device: str
) -> tuple[Callable[[Pictures], list[Face | None]], dict[str, str]]:
    """facenet-pytorch's detector, whose weights ship in its wheel; remembers the pictures it has seen."""
    try:
        import facenet_pytorch
    except ImportError as error:
        raise NotAvailable(f"the package facenet-pytorch cannot be imported ({error})") from error
    folder = Path(facenet_pytorch.__file__).parent / "data"
    weights = {}
    for name, prefix in expected:
        digest = file_sha256(folder / name)
        if not digest.startswith(prefix):
            raise NotAvailable(
                f"the installed facenet-pytorch has another {name} ({digest[:12]}…) than 2.6.0"
            )
        weights[name] = digest
    detector = facenet_pytorch.MTCNN(select_largest=True, device=torch.device(device))
    remembered: dict[bytes, Face | None] = {}

    def detect(pictures: Pictures) -> list[Face | None]:
        found: list[Face | None] = []
        for picture in pictures.tensor:  # one at a time: a face does not depend on its neighbours in a batch
            pixels = (picture * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()
            key = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest() + bytes(
                str(pixels.shape), "ascii"
            )
            if key not in remembered:
                if len(remembered) >= FACES_REMEMBERED:
                    remembered.clear()
                remembered[key] = _largest_face(detector, pixels)
            found.append(remembered[key])
        return found

    return detect, weights


def _largest_face(detector: Any, pixels: np.ndarray) -> Face | None:
    boxes, _, points = detector.detect(pixels, landmarks=True)
    if boxes is None:
        return None
    return Face(np.asarray(boxes[0], np.float64), np.asarray(points[0], np.float64))
