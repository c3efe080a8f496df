"""What keeps Gaussians near the surface that carries them, and small."""

from __future__ import annotations

from torch import Tensor

__all__ = ["displacement_penalty", "size_penalty"]


def displacement_penalty(offsets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean square of how far Gaussians are off the surface.

    Args:
        offsets: (..., N, 3).
        weights: (N,) how much each counts: less where hair grows.
    """
    return (offsets.square().mean(-1) * weights).mean()


def size_penalty(log_scales: Tensor, largest: float, unit: float) -> Tensor:
    """Mean square of how far standard deviations are above a size that costs nothing.

    Args:
        log_scales: (..., 3) logarithms of metres.
        largest: metres.
        unit: metres that count as one.
    """
    return ((log_scales.exp() - largest).clamp_min(0) / unit).square().mean()
