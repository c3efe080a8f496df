"""Metrics that need a network: LPIPS against its formula, faces on a portrait, what is said without weights."""

import hashlib
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.meter import Meter
from eval.metrics import (
    AKD_MTCNN,
    CSIM_FACENET,
    LPIPS,
    LPIPS_SQUEEZE,
    PSNR,
    PSNR_CAP,
    PSNR_MASKED,
    SSIM,
    Pictures,
)
from eval.networks import NotAvailable, available_weights, find_weights, load_judge, lpips_network
from eval.perceptual import Perceptual


@pytest.fixture
def weights_folder(tmp_path, monkeypatch):
    """An empty folder of weights, and no hub folder of this machine's user."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("HEADSPLAT_WEIGHTS", str(folder))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return folder


@pytest.fixture(scope="module")
def portrait():
    """(1, 3, 304, 256): the portrait that matplotlib ships, public domain."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((256, 304)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def trunk():
    """AlexNet's convolutions with seeded weights, as torchvision names them."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    return {key: value for key, value in alexnet().state_dict().items() if key.startswith("features.")}


def given(folder: Path, state: dict, definition=LPIPS):
    """`definition` with the hash of a trunk that was just put into `folder`."""
    path = folder / definition.weights[0][0]
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(definition, weights=((path.name, digest[:8]), *definition.weights[1:]))


def lpips_by_formula(x: torch.Tensor, y: torch.Tensor, trunk: dict) -> torch.Tensor:
    """Zhang et al. 2018, equation 1, over AlexNet's five rectified layers; x, y in [0, 1]."""
    import lpips

    heads = torch.load(
        Path(lpips.__file__).parent / "weights/v0.1/alex.pth", map_location="cpu", weights_only=True
    )
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]

    def features(picture: torch.Tensor) -> list[torch.Tensor]:
        h = (picture * 2 - 1 - shift) / scale
        found = []
        for index, (stride, padding) in {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}.items():
            if index in (3, 6):
                h = F.max_pool2d(h, 3, 2)
            weight, bias = trunk[f"features.{index}.weight"], trunk[f"features.{index}.bias"]
            h = F.relu(F.conv2d(h, weight, bias, stride, padding))
            found.append(F.normalize(h, dim=1, eps=1e-10))
        return found

    total = torch.zeros(len(x))
    for layer, (a, b) in enumerate(zip(features(x), features(y), strict=True)):
        total += F.conv2d((a - b) ** 2, heads[f"lin{layer}.model.1.weight"]).mean(dim=(1, 2, 3))
    return total


def test_lpips_is_the_formula_with_the_users_trunk(weights_folder, trunk, portrait):
    judge = load_judge(given(weights_folder, trunk))
    target = torch.cat([portrait, portrait.flip(-1)])
    prediction = (target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))).clamp(
        0, 1
    )
    found = judge.measure(Pictures(prediction), Pictures(target))
    np.testing.assert_allclose(found, lpips_by_formula(prediction, target, trunk).numpy(), rtol=1e-4)
    # the mistake of the field: pictures in [0, 1] taken for [-1, 1] score better than they are
    wrong = lpips_by_formula((prediction + 1) / 2, (target + 1) / 2, trunk)
    assert (wrong < 0.8 * torch.tensor(found)).all()
    assert judge.measure(Pictures(target), Pictures(target)) == [0, 0]
    assert all(len(digest) == 64 for digest in judge.weights.values())
    with pytest.raises(NotAvailable, match="at least 64 pixels"):
        judge.measure(Pictures(target[..., :40]), Pictures(target[..., :40]))


def test_targets_are_remembered_and_shared_without_changing_a_number(weights_folder, trunk, portrait):
    definition = given(weights_folder, trunk)
    network = lpips_network("alex", weights_folder / definition.weights[0][0], "")[0]
    small = portrait[..., :96, :80]
    targets = torch.cat([small, small.flip(-1)])
    random = torch.Generator().manual_seed(2)
    predictions = (targets[[0, 0, 1]] + 0.1 * torch.randn(3, *small.shape[1:], generator=random)).clamp(0, 1)
    with torch.no_grad():
        expected = network(predictions, targets[[0, 0, 1]], normalize=True).flatten().tolist()
    for remembered in (0, 10**9):  # the first keeps one target only
        perceptual = Perceptual(network, remembered)
        seen: list[int] = []
        handle = network.net.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        shared = perceptual.distances(Pictures(predictions[:2]), Pictures(targets[:1]))
        assert len(seen) == 3  # one target, two predictions
        paired = perceptual.distances(Pictures(predictions), Pictures(targets[[0, 0, 1]]))
        assert len(seen) == 3 + 4
        again = perceptual.distances(Pictures(predictions[:1]), Pictures(targets[:1]))
        assert len(seen) == 7 + (1 if remembered else 2)
        handle.remove()
        assert paired[:2] == shared
        assert again == shared[:1]
        np.testing.assert_allclose(paired, expected, rtol=1e-4)


def test_another_trunk_is_the_users_too(weights_folder):
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    features = squeezenet1_1().features
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    definition = given(weights_folder, state, LPIPS_SQUEEZE)
    x, y = torch.rand(2, 1, 3, 64, 64)
    (found,) = load_judge(definition).measure(Pictures(x), Pictures(y))
    network = lpips_network("squeeze", weights_folder / definition.weights[0][0], "")[0]
    with torch.no_grad():
        torch.testing.assert_close(network.net(x)[-1], features(x))
        assert found == pytest.approx(network(2 * x - 1, 2 * y - 1).item(), rel=1e-5)


def test_lpips_without_weights_is_not_available(weights_folder, trunk):
    with pytest.raises(NotAvailable, match=r"alexnet-owt-7be5be79.pth is not in .*HEADSPLAT_WEIGHTS"):
        load_judge(LPIPS)
    given(weights_folder, trunk)
    with pytest.raises(NotAvailable, match="the published file starts with 7be5be79"):
        load_judge(LPIPS)


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_lpips_with_a_damaged_trunk_is_not_available(weights_folder, trunk, damage):
    path = weights_folder / LPIPS.weights[0][0]
    if damage == "other":
        torch.save({key: value for key, value in trunk.items() if "10" not in key}, path)
    else:
        torch.save(trunk, path)
        path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else b"not weights")
    definition = replace(LPIPS, weights=((path.name, ""), LPIPS.weights[1]))
    with pytest.raises(NotAvailable, match=r"cannot be read as weights|lacks features\.10\.weight"):
        load_judge(definition)


def test_other_linear_heads_are_not_taken(weights_folder, trunk):
    definition = given(weights_folder, trunk)
    definition = replace(definition, weights=(definition.weights[0], ("lpips-v0.1-alex.pth", "00000000")))
    with pytest.raises(NotAvailable, match="other linear heads"):
        load_judge(definition)


def test_weights_are_found_in_torchs_hub_folder_too(weights_folder, tmp_path):
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "net.pth").write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    assert find_weights("net.pth", digest[:8]) == (hub / "net.pth", digest)
    (weights_folder / "net.pth").write_bytes(b"abc")
    assert find_weights("net.pth", "")[0] == weights_folder / "net.pth"


def test_akd_is_the_distance_of_landmarks_in_pixels(portrait):
    judge = load_judge(AKD_MTCNN)
    moved = portrait.roll((3, 4), dims=(-2, -1))  # down 3, right 4: every point moves by 5
    same, shifted, none = judge.measure(
        Pictures(torch.cat([portrait, moved, torch.zeros_like(portrait)])),
        Pictures(portrait.expand(3, -1, -1, -1)),
    )
    assert same == 0
    assert shifted == pytest.approx(5, abs=1)
    assert none is None
    assert set(judge.weights) == {"pnet.pt", "rnet.pt", "onet.pt"}


def test_csim_is_the_cosine_of_embeddings(weights_folder, portrait):
    from facenet_pytorch import InceptionResnetV1

    torch.manual_seed(0)
    network = InceptionResnetV1(classify=True, num_classes=2)  # published files carry a classifier as well
    path = weights_folder / CSIM_FACENET.weights[0][0]
    torch.save(network.state_dict(), path)
    judge = load_judge(CSIM_FACENET)
    noise = torch.rand(portrait.shape, generator=torch.Generator().manual_seed(0))
    prediction = Pictures(torch.cat([portrait, noise, portrait]))
    target = Pictures(torch.cat([portrait, portrait, torch.zeros_like(portrait)]))
    same, other, none = judge.measure(prediction, target)
    assert same == pytest.approx(1, abs=1e-5)
    assert -1 <= other < 0.99999  # seeded weights tell little apart
    assert none is None
    path.write_bytes(b"not weights")
    with pytest.raises(NotAvailable, match="does not load as InceptionResnetV1"):
        load_judge(CSIM_FACENET)


def test_a_meter_measures_what_it_can_and_says_why_not(weights_folder, portrait):
    unknown = replace(AKD_MTCNN, key="akd99", network="points-99")
    formula = replace(PSNR, key="psnr_hvs")
    meter = Meter((PSNR, PSNR_MASKED, SSIM, LPIPS, AKD_MTCNN, CSIM_FACENET, unknown, formula))
    masks = torch.ones(3, 1, *portrait.shape[-2:])
    masks[2] = 0
    target = Pictures(torch.cat([portrait, torch.zeros_like(portrait), portrait]))
    prediction = Pictures(torch.cat([portrait, torch.zeros_like(portrait), portrait * 0.9]))
    measured = meter.measure(prediction, target, masks)
    assert measured[0]["psnr"] == PSNR_CAP
    assert measured[2]["psnr_masked"] is None
    score = meter.score(measured)
    assert score.left_out == {"psnr_masked": 1, "akd/mtcnn-5": 1}
    assert score.values["psnr"] == pytest.approx(sum(one["psnr"] for one in measured) / 3)
    assert score.values["psnr_masked"] == PSNR_CAP
    assert set(score.values) == {"psnr", "psnr_masked", "ssim", "akd/mtcnn-5"}
    assert set(score.missing) == {"lpips", "csim/facenet-vggface2", "akd99", "psnr_hvs"}
    assert all(reason.startswith("not available: ") for reason in score.missing.values())
    assert set(meter.weights) == {"akd/mtcnn-5"}


def test_a_metric_that_judged_no_picture_has_no_number():
    meter = Meter((PSNR_MASKED, AKD_MTCNN))
    black = Pictures(torch.zeros(2, 3, 64, 64))
    score = meter.score(meter.measure(black, black, torch.zeros(2, 1, 64, 64)))
    assert score.values == {}
    assert score.missing["akd/mtcnn-5"] == "not available: a face was found in none of the 2 pictures"
    assert score.missing["psnr_masked"] == "not available: the mask covers anything in none of the 2 pictures"


def test_doctor_hears_of_every_network(weights_folder):
    found = {name: (works, told) for name, works, told in available_weights()}
    assert found["AKD-5 (MTCNN)"][0]
    assert not found["LPIPS (alex)"][0]
    assert "alexnet" in found["LPIPS (alex)"][1]
