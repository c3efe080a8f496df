"""gsplat's CUDA kernels behind the common interface. Imported only when there is a CUDA device to use."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.gaussians import Gaussians
from avatars.rasterize.common import EPS_2D, FAR, NEAR, Mode, Rendering, check_values
from avatars.rasterize.reference import rasterize_reference

__all__ = ["gsplat_problem", "rasterize_gsplat"]


@cache
def gsplat_problem() -> str | None:
    """One sentence on why gsplat cannot be used, None if it can. Its first import may build kernels."""
    if not torch.cuda.is_available():
        return "There is no CUDA device."
    try:
        from gsplat.cuda._backend import _C
    except Exception as error:  # a failed build raises whatever the compiler wrapper raises
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"Its CUDA kernels could not be built or loaded ({first_line})."
    if _C is None:
        return "It found no CUDA toolkit to build its kernels with: install nvcc, or a prebuilt gsplat wheel."
    return None


def rasterize_gsplat(
    gaussians: Gaussians,
    cameras: Cameras,
    size: tuple[int, int],
    background: Tensor | None = None,
    mode: Mode = "classic",
) -> Rendering:
    """Pictures of Gaussians; the same arguments and result as `avatars.rasterize.rasterize`."""
    if not len(gaussians):  # its kernels expect something to do
        return rasterize_reference(gaussians, cameras, size, background, mode)
    from gsplat import rasterization

    check_values(gaussians, background)
    height, width = size
    count = len(cameras)
    g = gaussians.to(dtype=torch.float32)
    if background is not None:
        background = background.to(g.means).expand(count, 3).contiguous()
    rendered, alpha, info = rasterization(
        g.means,
        g.quats,
        g.scales,
        g.opacities,
        g.colors,
        cameras.world_to_camera.to(g.means),
        cameras.K.to(g.means),
        width,
        height,
        near_plane=NEAR,
        far_plane=FAR,
        eps2d=EPS_2D,
        sh_degree=gaussians.sh_degree,
        packed=False,
        backgrounds=background,
        render_mode="RGB+ED",
        rasterize_mode=mode,
    )
    channels = rendered.permute(0, 3, 1, 2)  # (C, 4, H, W)
    return Rendering(channels[:, :3], alpha.permute(0, 3, 1, 2), channels[:, 3:], info["radii"])
