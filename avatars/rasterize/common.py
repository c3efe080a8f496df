"""What all rasterizers share: gsplat's constants, the result, and the checks of what goes in."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gaussians import Gaussians

__all__ = [
    "ALPHA_MAX",
    "ALPHA_MIN",
    "EPS_2D",
    "EXTENT_MAX",
    "FAR",
    "NEAR",
    "TRANSMITTANCE_MIN",
    "Mode",
    "Rendering",
    "check_shapes",
    "check_values",
    "value_error",
]

NEAR, FAR = 0.01, 1e10
"""Camera z in metres outside of which a Gaussian's centre hides it."""
EPS_2D = 0.3
"""Blur added to both variances of a projected Gaussian, pixels²."""
ALPHA_MAX = 0.999
ALPHA_MIN = 1 / 255
"""A Gaussian adds nothing to a pixel where its alpha is lower."""
TRANSMITTANCE_MIN = 1e-4
"""A pixel is finished before the Gaussian that would take its transmittance to this value or lower."""
EXTENT_MAX = 3.33
"""Standard deviations that a Gaussian can reach; less for faint ones (sqrt(2 log(opacity / ALPHA_MIN)))."""

SIZE_MAX = 1 << 16
"""Pixels that a picture can be high or wide."""

Mode = Literal["classic", "antialiased"]


@dataclass
class Rendering:
    """Pictures of Gaussians.

    Attributes:
        image: (C, 3, H, W) colours over the background.
        alpha: (C, 1, H, W) coverage, 1 - transmittance.
        depth: (C, 1, H, W) expected camera z of the surface in metres, 0 where nothing is.
        radii: (C, N, 2) int32 half sizes of each Gaussian's box in pixels, 0 where a camera cannot see it.
    """

    image: Tensor
    alpha: Tensor
    depth: Tensor
    radii: Tensor


def check_shapes(
    gaussians: Gaussians, cameras: Cameras, size: tuple[int, int], background: Tensor | None, mode: str
) -> None:
    """Refuses what no back-end can draw, whatever the values.

    Raises:
        ValueError: a shape, a mode or a device that does not fit.
        UserError: a camera matrix that is not finite, has skew or no rotation.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be 'classic' or 'antialiased', not {mode!r}")
    if len(size) != 2 or not all(isinstance(pixels, Integral) and 0 < pixels <= SIZE_MAX for pixels in size):
        raise ValueError(f"size must be (height, width), whole pixels up to {SIZE_MAX}, not {tuple(size)}")
    count = len(cameras)
    if background is not None and background.shape not in ((3,), (count, 3)):
        raise ValueError(f"background must be (3,) or ({count}, 3), not {tuple(background.shape)}")
    tensors = (*vars(gaussians).values(), cameras.K, cameras.world_to_camera)
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"Gaussians and cameras are on different devices: {sorted(devices)}")
    K, pose = cameras.K.detach(), cameras.world_to_camera.detach()
    focal = K[:, :2].diagonal(dim1=1, dim2=2)
    flags = [
        ~K.isfinite().all(),
        ~pose.isfinite().all(),
        (K[:, 0, 1] != 0).any() | (focal <= 0).any(),
        (torch.linalg.det(pose[:, :3, :3].float()) == 0).any(),
    ]
    wrong = torch.stack(flags).nonzero().flatten().tolist()  # one wait for the device
    if wrong:
        raise UserError(_CAMERA_PROBLEMS[wrong[0]])


def check_values(gaussians: Gaussians, background: Tensor | None) -> None:
    """Refuses values that would poison a picture or its gradient.

    Raises:
        UserError: names the field.
    """
    fields = [getattr(gaussians, name).detach() for name in _FIELDS]
    flags = [~field.isfinite().all() for field in fields]
    flags += [
        (fields[1] == 0).all(-1).any(),
        (fields[2] < 0).any(),
        ((fields[3] < 0) | (fields[3] > 1)).any(),
    ]
    if background is not None:
        flags.append(~background.detach().isfinite().all().to(flags[0].device))
    wrong = torch.stack(flags).nonzero().flatten().tolist()  # one wait for the device
    if wrong:
        raise value_error(wrong[0])


def value_error(code: int) -> UserError:
    """The error for check number `code`, in the order that all back-ends check in."""
    return UserError(_PROBLEMS[code])


_FIELDS = ("means", "quats", "scales", "opacities", "colors")
_CAMERA_PROBLEMS = [
    *(
        f"cameras.{name} holds NaN or infinite values: check the calibration that it was read from."
        for name in ("K", "world_to_camera")
    ),
    "cameras.K must have zero skew and positive focal lengths: undistort the pictures first.",
    "cameras.world_to_camera holds a matrix that turns nothing: its rotation has determinant 0.",
]
_PROBLEMS = [
    *(
        f"gaussians.{name} holds NaN or infinite values: training diverged, or their file is damaged."
        for name in _FIELDS
    ),
    "gaussians.quats holds quaternions of length zero, which are no rotation.",
    "gaussians.scales holds negative values: pass linear scales in metres (exp of the stored logarithms).",
    "gaussians.opacities holds values outside [0, 1]: pass activated ones (sigmoid of the stored logits).",
    "background holds NaN or infinite values.",
]
