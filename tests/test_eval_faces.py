"""Landmark detectors and face embeddings on photographs that packages ship, against independent computations."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from scipy.ndimage import affine_transform
from skimage.transform import SimilarityTransform

from eval import faces, judging
from eval.faces import ARCFACE_POINTS, PIPNet, similarity_transform, warp
from eval.judging import NotAvailable, package_weights
from eval.metrics import (
    AKD_DLIB,
    AKD_MESH,
    AKD_MTCNN,
    AKD_PIPNET,
    CSIM_ARCFACE,
    CSIM_DLIB,
    Pictures,
)
from eval.networks import load_judge


@pytest.fixture(scope="module")
def astronaut():
    """(1, 3, 288, 288) around the face of scikit-image's astronaut, public domain (NASA)."""
    pixels = skimage.data.astronaut()[:288, 80:368]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def admiral():
    """(1, 3, 288, 288) around the face of matplotlib's portrait, public domain."""
    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as image:
        pixels = np.asarray(image.convert("RGB").crop((80, 20, 420, 360)).resize((288, 288)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.fixture
def weights_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADSPLAT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def bytes_of(picture: torch.Tensor) -> np.ndarray:
    return faces._pixels(Pictures(picture))[0]


@pytest.mark.parametrize("definition", [AKD_MTCNN, AKD_DLIB, AKD_MESH], ids=lambda d: d.key)
def test_akd_is_the_distance_of_points_and_counts_who_has_no_face(definition, astronaut):
    moved = astronaut.roll((3, 4), dims=(-2, -1))  # down 3, right 4: every point moves by 5
    black = torch.zeros_like(astronaut)
    same, shifted, no_prediction, no_target = load_judge(definition).measure(
        Pictures(torch.cat([astronaut, moved, black, astronaut])),
        Pictures(torch.cat([astronaut, astronaut, astronaut, black])),
    )
    assert same == 0
    assert shifted == pytest.approx(5, abs=1)
    assert no_prediction is None
    assert no_target is None


@pytest.mark.parametrize("person", ["astronaut", "admiral"])
def test_three_detectors_agree_on_eyes_nose_and_mouth(person, request):
    pixels = bytes_of(request.getfixturevalue(person))
    five = faces._mtcnn(AKD_MTCNN.weights, "cpu")[0](pixels).points
    dlib = faces._dlib(AKD_DLIB.weights, "cpu")[0](pixels).points
    mesh = faces._mesh(AKD_MESH.weights, "cpu")[0](pixels).points
    assert (five.shape, dlib.shape, mesh.shape) == ((5, 2), (68, 2), (468, 2))
    eyes = np.linalg.norm(dlib[45] - dlib[36])
    for index68, index468 in {36: 33, 45: 263, 48: 61, 54: 291, 33: 2}.items():
        assert np.linalg.norm(dlib[index68] - mesh[index468]) < 0.12 * eyes
    middle = [dlib[36:42].mean(0), dlib[42:48].mean(0), dlib[48], dlib[54]]
    for point, other in zip(five[[0, 1, 3, 4]], middle, strict=True):
        assert np.linalg.norm(point - other) < 0.12 * eyes


def test_csim_dlib_is_the_cosine_of_dlibs_own_descriptors(astronaut, admiral):
    import dlib

    noisy = (
        astronaut + 0.03 * torch.randn(astronaut.shape, generator=torch.Generator().manual_seed(0))
    ).clamp(0, 1)
    judge = load_judge(CSIM_DLIB)
    same, near, other, none = judge.measure(
        Pictures(torch.cat([astronaut, noisy, admiral, astronaut * 0])),
        Pictures(astronaut.expand(4, -1, -1, -1)),
    )
    assert same == pytest.approx(1, abs=1e-6)
    assert none is None
    assert other < 0.93 < near  # dlib's cosines live between 0.8 and 1
    paths = [str(package_weights(*faces.DLIB, name, "")[0]) for name, _ in CSIM_DLIB.weights]
    network, predictor = dlib.face_recognition_model_v1(paths[0]), dlib.shape_predictor(paths[1])
    described = []
    for picture in (astronaut, admiral):
        pixels = bytes_of(picture)
        (box,) = dlib.get_frontal_face_detector()(pixels, 1)
        described.append(np.array(network.compute_face_descriptor(pixels, predictor(pixels, box))))
    cosine = described[0] @ described[1] / np.prod([np.linalg.norm(d) for d in described])
    assert other == pytest.approx(cosine, abs=1e-4)
    assert set(judge.weights) == {name for name, _ in CSIM_DLIB.weights}


def test_the_alignment_is_scikit_images_similarity_and_the_cut_out_scipys():
    random = np.random.default_rng(0)
    points = ARCFACE_POINTS @ np.array([[1.3, 0.4], [-0.4, 1.3]]) + (30, 50) + random.normal(0, 2, (5, 2))
    found = similarity_transform(points, ARCFACE_POINTS)
    theirs = SimilarityTransform.from_estimate(points, ARCFACE_POINTS)
    np.testing.assert_allclose(found, theirs.params[:2], atol=1e-9)
    picture = skimage.data.astronaut()[:200, 100:300].astype(np.float64)
    cut = warp(torch.from_numpy(picture).permute(2, 0, 1), found, 112)
    back = np.linalg.inv(theirs.params)
    swapped = back[[1, 0]][:, [1, 0]]  # scipy counts rows first
    for channel in range(3):
        expected = affine_transform(picture[..., channel], swapped, back[[1, 0], 2], (112, 112), order=1)
        inside = affine_transform(np.ones((200, 200)), swapped, back[[1, 0], 2], (112, 112), order=1) > 0.999
        np.testing.assert_allclose(cut[channel].numpy()[inside], expected[inside], atol=0.05)
    mirrored = similarity_transform(ARCFACE_POINTS * (-1, 1), ARCFACE_POINTS)
    assert np.linalg.det(mirrored[:, :2]) > 0  # a face is never mirrored to fit


def arcface_file(path: Path, side: int = 112) -> np.ndarray:
    """An ONNX network in ArcFace's layout: a seeded linear map of the picture to 8 numbers."""
    from onnx import TensorProto, helper, numpy_helper, save

    matrix = np.random.default_rng(0).normal(size=(3 * side * side, 8)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input.1"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "matrix"], ["683"]),
        ],
        "arcface",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [None, 3, side, side])],
        [helper.make_tensor_value_info("683", TensorProto.FLOAT, [None, 8])],
        [numpy_helper.from_array(matrix, "matrix")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return matrix


def test_csim_arcface_is_the_cosine_of_aligned_faces_by_the_users_network(weights_folder, astronaut, admiral):
    matrix = arcface_file(weights_folder / "w600k_r50.onnx").astype(np.float64)
    judge = load_judge(CSIM_ARCFACE)
    same, other, none = judge.measure(
        Pictures(torch.cat([astronaut, admiral, astronaut * 0])), Pictures(astronaut.expand(3, -1, -1, -1))
    )
    assert same == pytest.approx(1, abs=1e-6)
    assert none is None
    embedded = []
    for picture in (astronaut, admiral):
        points = faces._mtcnn(AKD_MTCNN.weights, "cpu")[0](bytes_of(picture)).points
        back = np.linalg.inv(SimilarityTransform.from_estimate(points, ARCFACE_POINTS).params)
        chip = [
            affine_transform(
                bytes_of(picture)[..., c].astype(float),
                back[[1, 0]][:, [1, 0]],
                back[[1, 0], 2],
                (112, 112),
                order=1,
            )
            for c in range(3)
        ]
        embedded.append(((np.stack(chip) - 127.5) / 127.5).ravel() @ matrix)
    cosine = embedded[0] @ embedded[1] / np.prod([np.linalg.norm(e) for e in embedded])
    assert other == pytest.approx(cosine, abs=1e-2)


@pytest.mark.parametrize("damage", ["absent", "text", "size"])
def test_arcface_without_a_usable_file_is_not_available(weights_folder, damage):
    path = weights_folder / "w600k_r50.onnx"
    if damage == "text":
        path.write_text("not a network")
    elif damage == "size":
        arcface_file(path, 96)
    said = {"absent": r"w600k_r50\.onnx is not in", "text": "does not load as an ONNX", "size": "takes .* 96"}
    with pytest.raises(NotAvailable, match=said[damage]):
        load_judge(CSIM_ARCFACE)


def pipnet_files(folder: Path) -> np.ndarray:
    """A seeded PIPNet in the published layout; returns the mean face."""
    from torch import nn
    from torchvision.models import resnet18

    torch.manual_seed(0)
    state = {k: v for k, v in resnet18(weights=None).state_dict().items() if not k.startswith("fc.")}
    for name, channels in {"cls": 98, "x": 98, "y": 98, "nb_x": 980, "nb_y": 980}.items():
        layer = nn.Conv2d(512, channels, 1)
        state |= {f"{name}_layer.weight": layer.weight.data, f"{name}_layer.bias": layer.bias.data}
    torch.save(state, folder / AKD_PIPNET.weights[0][0])
    mean = np.random.default_rng(0).random((98, 2))
    (folder / AKD_PIPNET.weights[1][0]).write_text(" ".join(map(str, mean.ravel())))
    return mean


def test_pipnet_gathers_its_points_as_the_paper_says(weights_folder, astronaut):
    mean = pipnet_files(weights_folder)
    network = PIPNet(*(weights_folder / name for name, _ in AKD_PIPNET.weights[:2]))
    maps = {}
    for name in ("cls", "x", "y", "nb_x", "nb_y"):
        layer = getattr(network, f"{name}_layer")
        layer.register_forward_hook(lambda _, __, out, name=name: maps.__setitem__(name, out[0].numpy()))
    found = network(astronaut[..., :256, :256])[0].numpy()
    assert maps["cls"].shape == (98, 8, 8)
    nearest = [np.argsort(((mean - point) ** 2).sum(1))[1:11] for point in mean]
    cell = [np.unravel_index(m.argmax(), (8, 8)) for m in maps["cls"]]
    most = max(sum(i in near for near in nearest) for i in range(98))
    for i in (0, 17, 97):
        row, column = cell[i]
        votes = []
        for j in range(98):
            for slot, neighbour in enumerate(nearest[j]):
                if neighbour == i:
                    r, c = cell[j]
                    votes.append(
                        (c + maps["nb_x"][10 * j + slot, r, c], r + maps["nb_y"][10 * j + slot, r, c])
                    )
        repeated = [votes[k % len(votes)] for k in range(most)]
        own = (column + maps["x"][i, row, column], row + maps["y"][i, row, column])
        np.testing.assert_allclose(found[i], np.mean([own, *repeated], 0) / 8, atol=1e-5)
    same, none = load_judge(AKD_PIPNET).measure(
        Pictures(torch.cat([astronaut, astronaut * 0])), Pictures(astronaut.expand(2, -1, -1, -1))
    )
    assert same == 0
    assert none is None


def test_pipnet_with_other_files_is_not_available(weights_folder):
    with pytest.raises(NotAvailable, match=r"pipnet-wflw-r18-nb10\.pth is not in"):
        load_judge(AKD_PIPNET)
    pipnet_files(weights_folder)
    (weights_folder / AKD_PIPNET.weights[1][0]).write_text("1 2 3")
    with pytest.raises(NotAvailable, match="98 pairs of numbers"):
        load_judge(AKD_PIPNET)
    torch.save({}, weights_folder / AKD_PIPNET.weights[0][0])
    with pytest.raises(NotAvailable, match="does not load as PIPNet"):
        load_judge(AKD_PIPNET)


@pytest.mark.parametrize("definition", [AKD_DLIB, AKD_MESH, CSIM_DLIB], ids=lambda d: d.key)
def test_without_the_package_or_with_another_release_a_metric_is_not_available(definition, monkeypatch):
    changed = replace(definition, weights=((definition.weights[0][0], "0000"), *definition.weights[1:]))
    with pytest.raises(NotAvailable, match=r"has another .* than this metric is defined with"):
        load_judge(changed)
    monkeypatch.setattr(judging, "find_spec", lambda module: None)
    missing = replace(definition, weights=((definition.weights[0][0], "00"), *definition.weights[1:]))
    with pytest.raises(NotAvailable, match="which is not installed"):
        load_judge(missing)
