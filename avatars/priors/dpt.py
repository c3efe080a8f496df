"""DUSt3R's heads: tokens of a decoder to a point and a confidence for every pixel.

The dense prediction transformer's head (Ranftl et al., arXiv 2103.13413) and the linear one, with the names and
shapes of the published state dicts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DPTHead", "LinearHead"]

LEVELS = (96, 192, 384, 768)
WIDTH = 256
PATCH = 16


def points_and_confidence(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Of raw (B, 4, H, W): points (B, 3, H, W) at distance expm1(‖x‖) along x, confidence (B, 1, H, W) 1 + exp(c)."""
    direction, confidence = raw[:, :3], raw[:, 3:]
    length = direction.norm(dim=1, keepdim=True)
    return direction / length.clamp_min(1e-8) * length.expm1(), 1 + confidence.exp()


class LinearHead(nn.Module):
    """Every token becomes its 16 x 16 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 4 * PATCH**2)

    def forward(self, tokens: list[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Points (B, 3, H, W) and confidence (B, 1, H, W) out of the last layer's tokens (B, T, D)."""
        maps = _to_map(self.proj(tokens[-1].float()), grid)
        return points_and_confidence(F.pixel_shuffle(maps, PATCH))


class DPTHead(nn.Module):
    """Tokens of four depths, brought to four resolutions and merged from coarse to fine."""

    def __init__(self, encoder_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.dpt = DPT(encoder_width, width)
        self.hooks = (0, depth // 2, 3 * depth // 4, depth)

    def forward(self, tokens: list[Tensor], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Points (B, 3, H, W) and confidence (B, 1, H, W) out of all layers' tokens."""
        maps = [_to_map(tokens[hook].float(), grid) for hook in self.hooks]
        return points_and_confidence(self.dpt(maps))


class DPT(nn.Module):
    """The convolutions of the head."""

    def __init__(self, encoder_width: int, width: int) -> None:
        super().__init__()
        a, b, c, d = LEVELS
        self.act_postprocess = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(encoder_width, a, 1), nn.ConvTranspose2d(a, a, 4, 4)),
                nn.Sequential(nn.Conv2d(width, b, 1), nn.ConvTranspose2d(b, b, 2, 2)),
                nn.Sequential(nn.Conv2d(width, c, 1)),
                nn.Sequential(nn.Conv2d(width, d, 1), nn.Conv2d(d, d, 3, 2, 1)),
            ]
        )
        self.scratch = nn.Module()
        for level, channels in enumerate(LEVELS, 1):
            self.scratch.add_module(f"layer{level}_rn", nn.Conv2d(channels, WIDTH, 3, padding=1, bias=False))
            self.scratch.add_module(f"refinenet{level}", Fusion())
        self.head = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(WIDTH // 2, WIDTH // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH // 2, 4, 1),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four token maps (B, C, h, w) -> (B, 4, 16 h, 16 w)."""
        levels = [
            self.scratch.get_submodule(f"layer{level}_rn")(resize(x))
            for level, (resize, x) in enumerate(zip(self.act_postprocess, maps, strict=True), 1)
        ]
        x = self.scratch.get_submodule("refinenet4")(levels[3])
        x = x[..., : levels[2].shape[-2], : levels[2].shape[-1]]  # an odd token grid was rounded up
        for level in (3, 2, 1):
            x = self.scratch.get_submodule(f"refinenet{level}")(x, levels[level - 1])
        return self.head(x)


class Fusion(nn.Module):
    """Adds a finer level to what came from the coarser ones and doubles the resolution.

    The coarsest one has no finer level to add; its first unit's weights are in the files and not used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(WIDTH, WIDTH, 1)
        self.resConfUnit1, self.resConfUnit2 = ResidualUnit(), ResidualUnit()

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, C, h, w) -> (B, C, 2 h, 2 w)."""
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        # Published: interpolation, then the 1 x 1 convolution. They commute, and this way it has a quarter to do.
        x = self.out_conv(self.resConfUnit2(x))
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class ResidualUnit(nn.Module):
    """Two convolutions, each after a ReLU, added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return x + self.conv2(torch.relu(self.conv1(torch.relu(x))))


def _to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, T, C) -> (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(-1, grid)
