"""PSNR and SSIM of many measured pictures at once: compiled where pictures lie on a CPU, torch elsewhere.

The definitions are those of `eval.metrics`, whose `psnr` and `ssim` are the differentiable torch reference; a test
holds both to each other, to torchmetrics and to scikit-image. The compiled way makes one pass over the pictures.
"""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avatars.errors import UserError
from avatars.rasterize.build import BuildError, build
from eval.metrics import WINDOW, Pictures, ssim_map

__all__ = ["Similarity", "similarity", "similarity_torch"]

SOURCES = [Path(__file__).parent / "kernels.cpp"]


@dataclass(frozen=True)
class Similarity:
    """PSNR and SSIM of C pictures, each (C,) float64.

    Attributes:
        psnr: decibels, inf where the pictures are equal.
        ssim: mean of the whole SSIM map, border included.
        psnr_masked: over the pixels inside the mask; nan where it is empty.
        ssim_masked: mean of the SSIM map over the pixels inside the mask; nan where it is empty.
    """

    psnr: Tensor
    ssim: Tensor
    psnr_masked: Tensor
    ssim_masked: Tensor


def similarity(prediction: Pictures, target: Pictures, mask: Tensor | None = None) -> Similarity:
    """PSNR and SSIM of each picture; no number depends on the batch or on the number of threads.

    Args:
        prediction: C pictures.
        target: C pictures of the same size.
        mask: (C, 1, H, W); pixels of at least 0.5 are inside. None: all are.

    Raises:
        UserError: the shapes differ, or a side is shorter than 6 pixels.
    """
    x, y = prediction.tensor, target.tensor
    if x.shape != y.shape:
        raise UserError(
            f"The prediction is {tuple(x.shape)} and the target {tuple(y.shape)}; "
            "a metric compares pictures of one size. Render at the protocol's size."
        )
    count, _, height, width = x.shape
    if min(height, width) <= WINDOW // 2:
        raise UserError(f"SSIM needs pictures of at least 6 × 6 pixels; these are {height} × {width}.")
    if mask is not None and mask.shape != (count, 1, height, width):
        raise UserError(
            f"The mask is {tuple(mask.shape)}; pictures of {tuple(x.shape)} need {(count, 1, height, width)}."
        )
    kernel = _kernel() if x.device.type == "cpu" else None
    sums = _sums_torch(x, y, mask) if kernel is None else _sums_compiled(kernel, x, y, mask)
    return _means(sums, 3 * height * width, mask is not None)


def similarity_torch(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Similarity:
    """The same in plain torch on any device: (C, 3, H, W) pictures of one size and a (C, 1, H, W) mask."""
    _, _, height, width = prediction.shape
    return _means(_sums_torch(prediction, target, mask), 3 * height * width, mask is not None)


def _means(sums: Tensor, values: int, masked: bool) -> Similarity:
    squares, squares_inside, ssim, ssim_inside, inside = sums.unbind(1)
    psnr, whole = -10 * torch.log10(squares / values), ssim / values
    if not masked:
        return Similarity(psnr, whole, psnr, whole)
    return Similarity(psnr, whole, -10 * torch.log10(squares_inside / inside), ssim_inside / inside)


def _sums_torch(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """(C, 5) float64: squared differences, those inside, SSIM, SSIM inside, values inside."""
    rows = []
    for index in range(len(x)):  # one at a time: the planes stay in the processor's cache
        one = slice(index, index + 1)
        squares, ssim = (x[one].float() - y[one].float()).square().double(), ssim_map(x[one], y[one]).double()
        inside = torch.zeros_like(squares) if mask is None else (mask[one] >= 0.5).expand_as(squares).double()
        sums = (squares, squares * inside, ssim, ssim * inside, inside)
        rows.append(torch.stack([part.sum() for part in sums]))
    return torch.stack(rows).cpu()


def _sums_compiled(kernel: Any, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    x, y = x.detach().float().contiguous(), y.detach().float().contiguous()
    mask = None if mask is None else mask.detach().to("cpu", torch.float32).contiguous()
    count, _, height, width = x.shape
    sums = torch.empty(count, 5, dtype=torch.float64)
    inside = None if mask is None else mask.data_ptr()
    threads = torch.get_num_threads()
    if kernel(x.data_ptr(), y.data_ptr(), inside, count, height, width, threads, sums.data_ptr()):
        raise UserError("There is no memory left for SSIM: measure fewer pictures at once.")
    return sums


@cache
def _kernel() -> Any | None:
    """The compiled sums, or None where this machine cannot compile them, which is said once."""
    try:
        kernel = ctypes.CDLL(str(build(sources=SOURCES, name="similarity"))).headsplat_similarity
    except (BuildError, OSError) as error:
        warnings.warn(
            f"PSNR and SSIM run in plain torch, equal and slower: {error}.", RuntimeWarning, stacklevel=3
        )
        return None
    kernel.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int] * 4 + [ctypes.c_void_p]
    kernel.restype = ctypes.c_int
    return kernel
