"""PSNR and SSIM against independent float64 implementations, on photographs and on edge cases."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from avatars.errors import UserError
from eval.metrics import Pictures, psnr, ssim, ssim_map


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
