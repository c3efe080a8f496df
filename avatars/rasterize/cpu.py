"""The compiled CPU rasterizer as a differentiable torch function."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gaussians import Gaussians
from avatars.rasterize.build import load_library
from avatars.rasterize.common import Mode, Rendering, check_values, value_error

__all__ = ["count_work", "rasterize_cpu"]

_FIELDS = ("means", "quats", "scales", "opacities", "colors")
_ERRORS = {
    -1: "The rasterizer ran out of memory: draw fewer cameras in one call, or smaller pictures.",
    -2: "More than 2^31 pairs of tiles and Gaussians in one picture: the Gaussians are far too large.",
}


def rasterize_cpu(
    gaussians: Gaussians,
    cameras: Cameras,
    size: tuple[int, int],
    background: Tensor | None = None,
    mode: Mode = "classic",
) -> Rendering:
    """Pictures of Gaussians; the same arguments and result as `avatars.rasterize.rasterize`.

    Computes in float32 on `torch.get_num_threads()` threads; the result does not depend on their number.
    Cameras get no gradient. Where nothing asks for one (`torch.no_grad`), nothing is done or kept for a backward.

    Raises:
        UserError: a value that cannot be drawn; names the field.
        BuildError: there is no compiled library and none can be made.
    """
    if background is not None:
        background = _plain(background.expand(len(cameras), 3))
    fields = [_plain(getattr(gaussians, name)) for name in _FIELDS]
    inputs = (*fields, background)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in inputs):
        return Rendering(*_forward(fields, background, cameras, size, mode, None))
    return Rendering(*_Rasterize.apply(*inputs, cameras, size, mode))


def count_work(
    gaussians: Gaussians, cameras: Cameras, size: tuple[int, int], mode: Mode = "classic"
) -> dict[str, int]:
    """How much one forward has to do: for benchmarks and capacity plans.

    Returns:
        visible: Gaussians seen, over all cameras.
        tile_pairs, block_pairs, pixel_pairs: (tile | block of `vector_width` pixels | pixel, Gaussian) pairs;
            the last two only where light is added.
        bytes: memory of the lists that a backward needs.
        vector_width: pixels that are computed at once.
    """
    with torch.no_grad():
        fields, lists = [_plain(getattr(gaussians, name)) for name in _FIELDS], _Lists()
        _forward(fields, None, cameras, size, mode, lists)
    counts = (ctypes.c_int64 * 5)()
    kernels = load_library()
    kernels.headsplat_count(lists.pointer, ctypes.addressof(counts))
    names = ("visible", "tile_pairs", "block_pairs", "pixel_pairs", "bytes")
    return dict(zip(names, counts, strict=True)) | {"vector_width": kernels.headsplat_vector_width()}


class _Lists:
    """Owner of the kernels' lists between a forward, which fills `pointer`, and its backward."""

    def __init__(self) -> None:
        self.pointer = ctypes.c_void_p()
        weakref.finalize(self, _release, self.pointer)


def _release(pointer: ctypes.c_void_p) -> None:
    if pointer:
        load_library().headsplat_release(pointer)


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        quats: Tensor,
        scales: Tensor,
        opacities: Tensor,
        colors: Tensor,
        background: Tensor | None,
        cameras: Cameras,
        size: tuple[int, int],
        mode: Mode,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        fields = [means, quats, scales, opacities, colors]
        ctx.lists = _Lists()
        image, alpha, depth, radii = _forward(fields, background, cameras, size, mode, ctx.lists)
        ctx.mark_non_differentiable(radii)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*fields, background)
        return image, alpha, depth, radii

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, v_image: Tensor | None, v_alpha: Tensor | None, v_depth: Tensor | None, _v_radii: None
    ) -> tuple[Tensor | None, ...]:
        *fields, background = ctx.saved_tensors
        given = next((v for v in (v_image, v_alpha, v_depth) if v is not None), None)
        if given is None:
            return (None,) * 9
        count, _, height, width = given.shape
        v_image = given.new_zeros(count, 3, height, width) if v_image is None else v_image
        v_outputs = [None if v is None else _plain(v) for v in (v_image, v_alpha, v_depth)]
        means, quats, scales, _, colors = fields
        gradients = [torch.empty_like(field) for field in fields]
        v_background = None if background is None else torch.empty_like(background)
        error = load_library().headsplat_backward(
            ctx.lists.pointer,
            torch.get_num_threads(),
            *map(_address, (means, quats, scales, colors, background)),
            *map(_address, v_outputs),
            *map(_address, (*gradients, v_background)),
        )
        if error:
            raise UserError(_ERRORS[error])
        return *gradients, v_background, None, None, None


def _forward(
    fields: list[Tensor],
    background: Tensor | None,
    cameras: Cameras,
    size: tuple[int, int],
    mode: Mode,
    lists: _Lists | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, alpha, depth and radii; with `lists`, what a backward needs. `fields` are those of `Gaussians`, plain."""
    if background is not None and not bool(background.isfinite().all()):
        check_values(Gaussians(*fields), background)
    means, *_, colors = fields
    height, width = size
    count, n = len(cameras), len(means)
    K, pose = _plain(cameras.K.detach()), _plain(cameras.world_to_camera.detach())
    centers = (
        _plain(cameras.centers.detach()) if colors.ndim == 3 else pose.new_zeros(count, 3)
    )  # for harmonics
    image = torch.empty(count, 3, height, width)
    alpha, depth = torch.empty(count, 1, height, width), torch.empty(count, 1, height, width)
    radii = torch.empty(count, n, 2, dtype=torch.int32)
    kernels = load_library()
    error = kernels.headsplat_forward(
        count,
        n,
        colors.shape[1] if colors.ndim == 3 else 0,
        height,
        width,
        mode == "antialiased",
        torch.get_num_threads(),
        *map(_address, (*fields, K, pose, centers, background)),
        *map(_address, (image, alpha, depth, radii)),
        None if lists is None else ctypes.addressof(lists.pointer),
    )
    if error > 0:
        raise value_error((error & -error).bit_length() - 1)
    if error:
        raise UserError(_ERRORS[error])
    return image, alpha, depth, radii


def _plain(tensor: Tensor) -> Tensor:
    """float32 in one piece, as the kernels read it."""
    return tensor.to(torch.float32).contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
