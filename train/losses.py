"""Picture losses that several methods share."""

from __future__ import annotations

from torch import Tensor

from eval.metrics import ssim
from train.config import LossConfig

__all__ = ["picture_loss"]


def picture_loss(prediction: Tensor, target: Tensor, weights: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """0.8 L1 + 0.2 (1 - SSIM) by default (Avat3r section 4.1).

    Args:
        prediction: (P, 3, H, W), not clamped, so that values outside [0, 1] still have a gradient.
        target: (P, 3, H, W) in [0, 1].
        weights: of the parts.

    Returns:
        The weighted sum, and the parts as detached scalars.
    """
    l1 = (prediction - target).abs().mean()
    dissimilarity = 1 - ssim(prediction, target).mean()
    loss = weights.l1 * l1 + weights.ssim * dissimilarity
    return loss, {"l1": l1.detach(), "ssim": 1 - dissimilarity.detach()}
