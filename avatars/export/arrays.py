"""What the file formats share: activated tensors to the stored arrays, and checks of what was read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatars.errors import UserError
from avatars.gaussians import Gaussians

__all__ = ["as_array", "logit", "make_gaussians"]


def as_array(tensor: Tensor) -> NDArray[np.float32]:
    """float32 on the CPU, without a graph."""
    return tensor.detach().to(device="cpu", dtype=torch.float32).numpy()


def logit(opacities: NDArray[np.float32]) -> NDArray[np.float64]:
    """Inverse sigmoid; 0 and 1 become the nearest values that have one (about -16.6 and 16.6)."""
    p = np.clip(opacities.astype(np.float64), 2.0**-24, 1 - 2.0**-24)
    return np.log(p) - np.log1p(-p)


def make_gaussians(
    path: Path,
    means: NDArray[np.floating],
    quats: NDArray[np.floating],
    scales: NDArray[np.floating],
    opacities: NDArray[np.floating],
    colors: NDArray[np.floating],
) -> Gaussians:
    """Gaussians from activated arrays.

    Raises:
        UserError: NaN, infinity or a quaternion of length zero; names the field.
    """
    fields = {"means": means, "quats": quats, "scales": scales, "opacities": opacities, "colors": colors}
    for name, values in fields.items():
        if not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise UserError(f"{path}: {name} of splat {row} is not a finite number; the file is damaged.")
    if (quats == 0).all(axis=1).any():
        row = int(np.argmax((quats == 0).all(axis=1)))
        raise UserError(f"{path}: the rotation of splat {row} has length zero; the file is damaged.")
    return Gaussians(
        *(torch.from_numpy(np.array(values, dtype=np.float32, order="C")) for values in fields.values())
    )
