"""gsplat's CUDA kernels behind the common interface. Imported only when there is a CUDA device to use."""

from __future__ import annotations

import fcntl
import importlib.util
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.gaussians import Gaussians
from avatars.rasterize.build import cache_folder
from avatars.rasterize.common import EPS_2D, FAR, NEAR, Mode, Rendering, check_values
from avatars.rasterize.reference import rasterize_reference

__all__ = ["gsplat_problem", "rasterize_gsplat"]


@cache
def gsplat_problem() -> str | None:
    """One sentence on why gsplat cannot be used, None if it can. Its first import may build kernels."""
    if not torch.cuda.is_available():
        return "There is no CUDA device."
    if importlib.util.find_spec("gsplat") is None:
        return "It is not installed: pip install gsplat."
    try:
        # Its build throws away what another process has begun to build, so the ranks of one host take turns.
        with _one_process_at_a_time(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from gsplat.cuda._backend import _C
    except Exception as error:  # a failed build raises whatever the compiler wrapper raises
        return f"Its CUDA kernels could not be built or loaded ({_reason(error)})."
    if _C is None:
        return "It found no CUDA toolkit to build its kernels with: install nvcc, or a prebuilt gsplat wheel."
    try:
        _draw_one()
    except Exception as error:  # such as kernels that were built for another kind of GPU
        return (
            f"Its CUDA kernels do not run here ({_reason(error)}). "
            "If they were built on another kind of GPU, delete gsplat_cuda in torch's extension folder."
        )
    return None


def _draw_one() -> None:
    """One Gaussian, forward and backward, waited for."""
    means = torch.tensor([[0.0, 0.0, 1.0]], device="cuda", requires_grad=True)
    ones = means.new_ones(1, 4)
    camera = Cameras(
        means.new_tensor([[[8.0, 0, 8], [0, 8, 8], [0, 0, 1]]]), torch.eye(4, device="cuda")[None]
    )
    gaussian = Gaussians(means, ones, ones[:, :3] * 0.1, ones[:, 0] * 0.5, ones[:, :3])
    rasterize_gsplat(gaussian, camera, (16, 16)).image.sum().backward()
    torch.cuda.synchronize()


@contextmanager
def _one_process_at_a_time() -> Iterator[None]:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gsplat.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # falls with the process, however that ends
        yield


def _reason(error: Exception) -> str:
    """The line of a message that says what is wrong: of a failed build the compiler's first error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"\b(fatal )?error\b ?(C\d+)?: ", line)]
    return (told or lines or [type(error).__name__])[0].rstrip(".")


def rasterize_gsplat(
    gaussians: Gaussians,
    cameras: Cameras,
    size: tuple[int, int],
    background: Tensor | None = None,
    mode: Mode = "classic",
) -> Rendering:
    """Pictures of Gaussians; the same arguments and result as `avatars.rasterize.rasterize`."""
    if not len(gaussians) or not len(cameras):  # its kernels expect something to do
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
