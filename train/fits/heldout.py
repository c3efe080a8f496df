"""How good a fit is on the pictures of its capture that were kept from it."""

from __future__ import annotations

import math
from typing import Any

import torch

from avatars.method import Avatar, render
from eval.meter import Meter
from eval.metrics import LPIPS, PSNR, PSNR_MASKED, SSIM, Pictures
from train.fits.pictures import FitPictures

__all__ = ["measure_held_out", "off_axis_degrees"]


@torch.no_grad()
def measure_held_out(
    avatar: Avatar, held: FitPictures, device: str = "cpu"
) -> tuple[dict[str, Any], list[dict[str, float | None]]]:
    """Measures an avatar over black on pictures that it was not fitted to.

    Args:
        avatar: on `device`.
        held: the pictures.
        device: where to render and measure.

    Returns:
        Means with the number of pictures and the reasons for what could not be measured, and each picture's values.
    """
    meter = Meter((PSNR, SSIM, PSNR_MASKED, LPIPS), device)
    measured: list[dict[str, float | None]] = []
    for picture in range(len(held)):
        image, mask = held.take([picture])
        expression = held.expressions[picture].to(device)
        rendered = render(avatar, expression, held.cameras[picture].to(device=device), held.size).image
        name = f"{held.subject}, held-out picture {picture}"
        measured += meter.measure(Pictures.rendered(rendered.cpu(), name), Pictures(image, name), mask)
    score = meter.score(measured)
    means = {key: round(value, 5) for key, value in score.values.items()}
    return {"pictures": len(held), **means, "missing": score.missing}, measured


def off_axis_degrees(held: FitPictures) -> list[float]:
    """How far from straight before the face each picture was taken, in degrees."""
    towards = torch.nn.functional.normalize(held.cameras.centers, dim=-1)
    return [math.degrees(math.acos(max(-1.0, min(1.0, z)))) for z in towards[:, 2].tolist()]
