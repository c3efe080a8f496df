"""LPIPS as a loss, where its weights are on this machine; nothing is downloaded from here."""

from __future__ import annotations

from torch import nn

from eval.networks import NotAvailable, find_weights, lpips_network

__all__ = ["load_lpips"]

VGG16 = ("vgg16-397923af.pth", "397923af")
"""torchvision's ImageNet weights and the start of their hash; the linear heads come with the lpips
package."""


def load_lpips() -> tuple[nn.Module | None, str]:
    """LPIPS over VGG-16, frozen, for pictures in [-1, 1].

    Returns:
        The network and an empty string, or None and the reason why there is none. Never random weights.
    """
    try:
        weights, _ = find_weights(*VGG16)
        return lpips_network("vgg", weights, "")[0], ""
    except NotAvailable as reason:
        return None, str(reason)
