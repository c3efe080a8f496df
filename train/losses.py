"""The picture loss that several methods share: L1, SSIM and, from some step on, LPIPS."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avatars.errors import UserError
from eval.metrics import ssim
from train.config import LossConfig
from train.perceptual import load_lpips

__all__ = ["PictureLoss", "picture_loss"]


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


class PictureLoss:
    """`picture_loss` with LPIPS in the last phase of a training.

    It is no module: the frozen network is neither trained nor spread, saved or exported with what it judges.
    """

    def __init__(self, weights: LossConfig) -> None:
        self.weights = weights
        self._network: nn.Module | None = None

    def check_weights(self) -> None:
        """LPIPS may set in late, and its weights must be there from the start.

        Raises:
            UserError: they are not.
        """
        if self.weights.lpips and (found := load_lpips())[0] is None:
            raise UserError(
                f"--loss.lpips {self.weights.lpips} needs weights at {self.weights.lpips_start:.0%} of the steps: "
                f"{found[1]} Bring them now, or take --loss.lpips 0."
            )

    def __call__(
        self, prediction: Tensor, target: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of pictures (P, 3, H, W) after the share `progress` of all steps, and its parts as detached scalars.

        Raises:
            UserError: LPIPS sets in and its weights have gone since `check_weights`.
        """
        loss, parts = picture_loss(prediction, target, self.weights)
        if self.weights.lpips and progress >= self.weights.lpips_start:
            distance = self._lpips(prediction.device)(prediction * 2 - 1, target * 2 - 1).mean()
            loss = loss + self.weights.lpips * distance
            parts["lpips"] = distance.detach()
        return loss, parts

    def _lpips(self, device: torch.device) -> nn.Module:
        if self._network is None:
            network, reason = load_lpips()
            if network is None:
                raise UserError(f"LPIPS sets in now, and its weights have gone: {reason}")
            self._network = network.to(device)
        return self._network
