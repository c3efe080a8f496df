"""Gaussians to pictures: one function, three back-ends, gsplat's conventions in all of them.

- `gsplat`: gsplat's CUDA kernels, where there is a CUDA device and they build.
- `cpu`: compiled kernels of our own, multi-threaded; built on first use and kept.
- `reference`: plain torch, slow, any floating type and device; the oracle of the other two, and what is left
  on a machine without a compiler.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.gaussians import Gaussians
from avatars.rasterize.build import BuildError, load_library
from avatars.rasterize.common import Mode, Rendering, check_shapes
from avatars.rasterize.cpu import rasterize_cpu
from avatars.rasterize.gsplat_backend import gsplat_problem, rasterize_gsplat
from avatars.rasterize.reference import rasterize_reference

__all__ = ["Backend", "BackendReport", "Rendering", "backend_report", "rasterize", "rasterize_reference"]

Backend = Literal["auto", "gsplat", "cpu", "reference"]


@dataclass(frozen=True)
class BackendReport:
    """Which back-end draws on a kind of device, and why.

    Attributes:
        backend: "gsplat", "cpu" or "reference".
        reason: one sentence; says what is missing where a slower back-end is in use.
    """

    backend: Literal["gsplat", "cpu", "reference"]
    reason: str


@cache
def backend_report(device: str = "cpu") -> BackendReport:
    """Which back-end `rasterize` uses for tensors on `device` ("cpu", "cuda", …). Builds it if need be."""
    kind = torch.device(device).type
    if kind == "cpu":
        try:
            width = load_library().headsplat_vector_width()
        except BuildError as error:
            return BackendReport(
                "reference", f"The compiled rasterizer is not available: {error}. Drawing is slow."
            )
        return BackendReport(
            "cpu", f"Compiled kernels, {width} pixels at once, {torch.get_num_threads()} threads."
        )
    if kind == "cuda":
        problem = gsplat_problem()
        if problem:
            return BackendReport("reference", f"gsplat is not available: {problem} Drawing is slow.")
        return BackendReport("gsplat", "gsplat's CUDA kernels.")
    return BackendReport("reference", f"There is no compiled rasterizer for {kind} devices. Drawing is slow.")


def rasterize(
    gaussians: Gaussians,
    cameras: Cameras,
    size: tuple[int, int],
    background: Tensor | None = None,
    mode: Mode = "classic",
    backend: Backend = "auto",
) -> Rendering:
    """Draws N Gaussians for C cameras, with gradients to the Gaussians and the background.

    The conventions are gsplat's: EWA projection with a clamped Jacobian, 0.3 px² of blur, alpha at most 0.999
    and nothing below 1/255, a pixel stops before its transmittance would fall to 1e-4, Gaussians are sorted
    stably by depth for every camera, near plane at 0.01 m. float16 and bfloat16 are computed in float32.

    Args:
        gaussians: N Gaussians in the cameras' world, activated values.
        cameras: C cameras; they get no gradient except from the reference.
        size: height and width in pixels.
        background: (3,) or (C, 3) colour behind everything, on any device, black when None.
        mode: "antialiased" fades Gaussians that are smaller than the blur (Mip-Splatting's compensation).
        backend: "auto" takes the fastest that works on the tensors' device, see `backend_report`.

    Returns:
        image (C, 3, H, W), alpha (C, 1, H, W), expected depth (C, 1, H, W) in metres and radii (C, N, 2).

    Raises:
        UserError: NaN, a zero quaternion, a negative scale or an opacity outside [0, 1]; names the field.
        ValueError: shapes, devices or a mode that do not fit.
    """
    check_shapes(gaussians, cameras, size, background, mode)
    size = (int(size[0]), int(size[1]))
    device = gaussians.means.device
    if background is not None:
        background = background.to(device)
    if backend == "auto":
        backend = backend_report(device.type).backend
        if backend == "reference":
            _warn_slow(device.type)
    if backend == "reference":
        return rasterize_reference(_full_precision(gaussians), cameras, size, background, mode)
    if cameras.K.requires_grad or cameras.world_to_camera.requires_grad:
        raise ValueError(
            f"the {backend} back-end gives cameras no gradient: use backend='reference', or detach them"
        )
    if backend == "cpu":
        if device.type != "cpu":
            raise ValueError(f"the cpu back-end cannot draw tensors on {device}")
        return rasterize_cpu(gaussians, cameras, size, background, mode)
    if backend == "gsplat":
        return rasterize_gsplat(_full_precision(gaussians), cameras, size, background, mode)
    raise ValueError(f"backend must be 'auto', 'gsplat', 'cpu' or 'reference', not {backend!r}")


def _full_precision(gaussians: Gaussians) -> Gaussians:
    if gaussians.means.dtype in (torch.float16, torch.bfloat16):
        return gaussians.to(dtype=torch.float32)
    return gaussians


@cache
def _warn_slow(device: str) -> None:
    warnings.warn(backend_report(device).reason, RuntimeWarning, stacklevel=3)
