"""LPIPS as a loss, where its weights are on this machine; nothing is downloaded from here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

__all__ = ["load_lpips"]

VGG16 = "vgg16-397923af.pth"
"""torchvision's ImageNet weights; the linear heads come with the lpips package."""


def load_lpips() -> tuple[nn.Module | None, str]:
    """LPIPS over VGG-16, frozen, for pictures in [-1, 1].

    Returns:
        The network and an empty string, or None and the reason why there is none. Never random weights.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / VGG16
    if not weights.is_file():
        return None, f"{weights} is not there."
    from lpips import LPIPS

    return LPIPS(net="vgg", verbose=False).eval().requires_grad_(False), ""
