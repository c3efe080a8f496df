"""PSNR and SSIM against independent implementations, on photographs and on edge cases."""

from dataclasses import fields
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from avatars.errors import UserError
from eval import similarity as similarity_module
from eval.metrics import Pictures, psnr, ssim, ssim_map
from eval.similarity import Similarity, similarity, similarity_torch


def photograph(size: tuple[int, int]) -> torch.Tensor:
    """(1, 3, H, W) of the portrait that matplotlib ships, public domain."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((size[1], size[0])))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def noisy(picture: torch.Tensor, sigma: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (picture + sigma * torch.randn(picture.shape, generator=generator)).clamp(0, 1)


def ssim_by_scipy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """SSIM map of (H, W) float64 pictures, written from the paper's formula with scipy's Gaussian."""

    def blur(a: np.ndarray) -> np.ndarray:
        return gaussian_filter(a, 1.5, truncate=3.5, mode="mirror")  # radius 5: an 11 × 11 window

    c1, c2 = 0.01**2, 0.03**2
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    return (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))


@pytest.mark.parametrize("size", [(96, 96), (64, 41), (256, 256), (257, 300), (512, 480)])
@pytest.mark.parametrize("sigma", [0.02, 0.3])
def test_ssim_equals_the_formula_in_float64(size, sigma):
    target = photograph(size)
    prediction = noisy(target, sigma)
    expected = np.stack(
        [ssim_by_scipy(prediction[0, c].double().numpy(), target[0, c].double().numpy()) for c in range(3)]
    )
    torch.testing.assert_close(
        ssim_map(prediction, target)[0].double(), torch.from_numpy(expected), atol=1e-4, rtol=0
    )
    assert ssim(prediction, target).item() == pytest.approx(expected.mean(), abs=1e-6)


def test_a_batch_gives_each_picture_its_own_number():
    target = torch.cat([photograph((72, 72)), photograph((72, 72)).flip(-1)])
    prediction = torch.cat([noisy(target[:1], 0.05), noisy(target[1:], 0.2)])
    for metric in (psnr, ssim):
        together = metric(prediction, target)
        alone = torch.cat([metric(prediction[i : i + 1], target[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)
        assert together[0] > together[1]


def test_psnr_equals_the_formula_in_float64():
    target = photograph((80, 60))
    prediction = noisy(target, 0.1)
    error = np.mean((prediction.double().numpy() - target.double().numpy()) ** 2)
    assert psnr(prediction, target).item() == pytest.approx(-10 * np.log10(error), abs=1e-4)
    assert psnr(torch.full((1, 3, 8, 8), 0.5), torch.full((1, 3, 8, 8), 0.6)).item() == pytest.approx(
        20, abs=1e-4
    )


def test_equal_pictures_and_constant_pictures():
    picture = photograph((48, 48))
    assert psnr(picture, picture).item() == float("inf")
    assert ssim(picture, picture).item() == pytest.approx(1, abs=1e-6)
    grey, light = torch.full((1, 3, 32, 32), 0.25), torch.full((1, 3, 32, 32), 0.75)
    luminance = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim(grey, light).item() == pytest.approx(luminance, abs=1e-5)
    black = torch.zeros(1, 3, 32, 32)
    assert ssim(black, black).item() == pytest.approx(1, abs=1e-6)


def test_inside_the_mask_only_the_mask_counts():
    target = photograph((64, 64))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:40, 8:32] = 1
    mask[..., 16:40, 32:36] = 0.4  # a half covered edge is outside
    prediction = target.clone()
    prediction[..., 50:, :] = 0  # a mistake outside
    assert psnr(prediction, target, mask).item() == float("inf")
    assert psnr(prediction, target).item() < 40
    prediction[..., 20, 20] += 0.5
    expected = -10 * np.log10(0.25 / (24 * 24))
    assert psnr(prediction, target, mask).item() == pytest.approx(expected, abs=1e-3)
    whole = ssim_map(prediction, target)[..., 16:40, 8:32].mean().item()
    assert ssim(prediction, target, mask).item() == pytest.approx(whole, abs=1e-6)
    assert psnr(prediction, target, mask * 0).isnan().all()
    assert ssim(prediction, target, mask * 0).isnan().all()


@pytest.mark.parametrize("size", [(16, 13), (300, 16)])
def test_ssim_has_the_right_gradient(size):
    torch.manual_seed(0)
    target = torch.rand(1, 3, *size)
    prediction = (target + 0.2 * torch.randn_like(target)).requires_grad_()  # leaves [0, 1], as in training
    ssim(prediction, target).sum().backward()
    direction = torch.randn_like(target)
    step = 1e-3
    with torch.no_grad():
        ahead = ssim_map(prediction + step * direction, target).double().mean()
        behind = ssim_map(prediction - step * direction, target).double().mean()
    measured = (ahead - behind) / (2 * step)
    assert (prediction.grad * direction).sum().item() == pytest.approx(measured.item(), rel=2e-2, abs=1e-5)


def test_ssim_does_not_lose_digits_under_autocast():
    target = photograph((64, 64))
    prediction = noisy(target, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ssim(prediction, target)
    torch.testing.assert_close(inside, ssim(prediction, target), atol=0, rtol=0)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"\(1, 3, 8, 8\).*\(1, 3, 8, 9\)"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(UserError, match=r"need \(C, 3, H, W\)"):
        ssim(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))
    with pytest.raises(UserError, match="mask is"):
        psnr(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(1, 1, 8, 8))
    with pytest.raises(UserError, match="at least 6 × 6"):
        ssim(torch.zeros(1, 3, 5, 64), torch.zeros(1, 3, 5, 64))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.full((1, 3, 4, 4), float("nan")), "not finite"),
        (torch.full((1, 3, 4, 4), float("inf")), "not finite"),
        (torch.full((1, 3, 4, 4), 1.01), "need \\[0, 1\\]"),
        (torch.full((1, 3, 4, 4), -0.5), "need \\[0, 1\\]"),
        (torch.full((1, 3, 4, 4), 200.0), "1/255"),
        (torch.zeros(3, 4, 4), "need \\(C, 3, H, W\\)"),
        (torch.zeros(1, 1, 4, 4), "need \\(C, 3, H, W\\)"),
        (torch.zeros(0, 3, 4, 4), "need \\(C, 3, H, W\\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "divide 8-bit values by 255"),
    ],
)
def test_what_is_no_picture_cannot_be_measured(tensor, said):
    with pytest.raises(UserError, match=said):
        Pictures(tensor, "prediction")


def test_a_rendering_is_measured_as_a_viewer_would_save_it():
    values = torch.tensor([-0.2, 0.0, 0.4999, 0.5, 1.0, 1.7]).expand(1, 3, 1, 6)
    saved = Pictures.rendered(values).tensor[0, 0, 0]
    torch.testing.assert_close(saved, torch.tensor([0, 0, 127 / 255, 128 / 255, 1, 1]))
    with pytest.raises(UserError, match="not finite"):
        Pictures.rendered(torch.full((1, 3, 2, 2), float("inf")))


def assert_same(one: Similarity, other: Similarity) -> None:
    for field in fields(Similarity):
        torch.testing.assert_close(
            getattr(one, field.name), getattr(other, field.name), atol=1e-5, rtol=0, equal_nan=True
        )


@pytest.mark.parametrize("size", [(6, 6), (7, 19), (130, 41), (300, 257)])
def test_the_compiled_sums_are_those_of_torch(size):
    assert similarity_module._kernel() is not None
    target = torch.cat([photograph(size), photograph(size).flip(-1)])
    prediction = torch.cat([noisy(target[:1], 0.02), noisy(target[1:], 0.4)])
    mask = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))
    found = similarity(Pictures(prediction), Pictures(target), mask)
    assert_same(found, similarity_torch(prediction, target, mask))
    whole = similarity(Pictures(prediction), Pictures(target))
    assert_same(whole, Similarity(found.psnr, found.ssim, found.psnr, found.ssim))
    assert not torch.equal(found.ssim, found.ssim_masked)


def test_measured_ssim_and_psnr_are_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    target = torch.cat([photograph((96, 80)), photograph((96, 80)).flip(-1)])
    prediction = torch.cat([noisy(target[:1], 0.03), noisy(target[1:], 0.2)])
    found = similarity(Pictures(prediction), Pictures(target))
    theirs = structural_similarity_index_measure(prediction, target, data_range=1.0, reduction="none")
    torch.testing.assert_close(found.ssim.float(), theirs, atol=1e-5, rtol=0)
    each = [peak_signal_noise_ratio(p, t, data_range=1.0) for p, t in zip(prediction, target, strict=True)]
    torch.testing.assert_close(found.psnr.float(), torch.stack(each), atol=1e-5, rtol=0)
    pooled = peak_signal_noise_ratio(prediction, target, data_range=1.0)  # without dim: one MSE of the batch
    assert abs(pooled - found.psnr.mean()) > 1


def test_measured_psnr_and_the_map_without_its_border_are_scikit_image():
    import skimage.data
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    pixels = skimage.data.astronaut()
    target = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    prediction = noisy(target, 0.1)
    x, y = (picture[0].permute(1, 2, 0).double().numpy() for picture in (prediction, target))
    theirs = structural_similarity(
        x, y, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    inner = torch.zeros(1, 1, 512, 512)
    inner[..., 5:-5, 5:-5] = 1
    found = similarity(Pictures(prediction), Pictures(target), inner)
    assert found.ssim_masked.item() == pytest.approx(theirs, abs=1e-5)
    assert found.psnr.item() == pytest.approx(peak_signal_noise_ratio(y, x, data_range=1), abs=1e-5)


def test_no_number_depends_on_the_batch_or_the_threads():
    target = torch.cat([photograph((200, 72)), photograph((200, 72)).flip(-1), photograph((200, 72)) * 0.5])
    prediction = noisy(target, 0.1)
    mask = (target.mean(1, keepdim=True) > 0.3).float()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(similarity(Pictures(prediction), Pictures(target), mask))
    finally:
        torch.set_num_threads(threads)
    alone = [
        similarity(*(Pictures(p[i : i + 1]) for p in (prediction, target)), mask[i : i + 1]) for i in range(3)
    ]
    for field in fields(Similarity):
        one, *others = (getattr(result, field.name) for result in found)
        for other in [*others, torch.cat([getattr(result, field.name) for result in alone])]:
            assert torch.equal(one, other)


def test_edge_cases_are_measured_as_defined():
    picture = photograph((48, 48))
    dot = picture.clone()
    dot[0, :, 24, 24] = 1 - dot[0, :, 24, 24].round()
    error = (dot - picture)[0, :, 24, 24].double().square().sum().item() / (3 * 48 * 48)
    here = torch.zeros(1, 1, 48, 48)
    here[..., 24, 24] = 1
    one = similarity(Pictures(dot), Pictures(picture), here)
    assert one.psnr.item() == pytest.approx(-10 * np.log10(error), abs=1e-5)
    assert one.psnr_masked.item() == pytest.approx(-10 * np.log10(error * 48 * 48), abs=1e-5)
    assert one.ssim_masked < one.ssim < 1
    same = similarity(Pictures(picture), Pictures(picture), torch.zeros(1, 1, 48, 48))
    assert same.psnr.isinf().all()
    assert same.ssim.item() == pytest.approx(1, abs=1e-7)
    assert same.psnr_masked.isnan().all()
    assert same.ssim_masked.isnan().all()
    flat = similarity(Pictures(torch.full((1, 3, 32, 32), 0.2)), Pictures(torch.full((1, 3, 32, 32), 0.9)))
    luminance = (2 * 0.2 * 0.9 + 1e-4) / (0.2**2 + 0.9**2 + 1e-4)
    assert flat.ssim.item() == pytest.approx(luminance, abs=1e-5)
    assert flat.psnr.item() == pytest.approx(-20 * np.log10(0.7), abs=1e-5)


def test_measured_pictures_must_have_one_size():
    pictures = {size: Pictures(torch.zeros(1, 3, *size)) for size in ((8, 8), (8, 9), (5, 64))}
    with pytest.raises(UserError, match=r"\(1, 3, 8, 8\).*\(1, 3, 8, 9\)"):
        similarity(pictures[8, 8], pictures[8, 9])
    with pytest.raises(UserError, match="at least 6 × 6"):
        similarity(pictures[5, 64], pictures[5, 64])
    with pytest.raises(UserError, match="mask is"):
        similarity(pictures[8, 8], pictures[8, 8], torch.zeros(1, 1, 8, 9))


def test_without_a_compiler_torch_measures_the_same_and_says_so(monkeypatch):
    def no_compiler(**options):
        raise similarity_module.BuildError("no C++ compiler was found")

    target = photograph((40, 40))
    prediction = noisy(target, 0.1)
    expected = similarity(Pictures(prediction), Pictures(target))
    kernel = similarity_module._kernel
    kernel.cache_clear()
    monkeypatch.setattr(similarity_module, "build", no_compiler)
    try:
        with pytest.warns(RuntimeWarning, match=r"plain torch.*no C\+\+ compiler"):
            found = similarity(Pictures(prediction), Pictures(target))
    finally:
        kernel.cache_clear()
    assert_same(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_measures_the_same():
    target = torch.cat([photograph((96, 80)), photograph((96, 80)).flip(-1)])
    prediction = noisy(target, 0.1)
    mask = (target.mean(1, keepdim=True) > 0.3).float()
    there = [Pictures(pictures).to("cuda") for pictures in (prediction, target)]
    assert_same(similarity(*there, mask.cuda()), similarity(Pictures(prediction), Pictures(target), mask))
