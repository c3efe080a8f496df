"""LPIPS as a loss, where its weights are on this machine; nothing is downloaded from here."""

from __future__ import annotations

from torch import nn

from eval.metrics import LPIPS_VGG
from eval.networks import NotAvailable, find_weights, lpips_network

__all__ = ["load_lpips"]


def load_lpips() -> tuple[nn.Module | None, str]:
    """LPIPS over VGG-16, frozen, for pictures in [-1, 1].

    Returns:
        The network and an empty string, or None and the reason why there is none. Never random weights.
    """
    try:
        weights, _ = find_weights(*LPIPS_VGG.weights[0])
        return lpips_network("vgg", weights, "")[0], ""
    except NotAvailable as reason:
        return None, str(reason)
