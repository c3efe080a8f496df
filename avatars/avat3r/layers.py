"""Attention blocks and the upsampler of Avat3r's transformer.

Shape letters: B batch, N views, T tokens, D width, S expression tokens, G grid side, C channels.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CrossBlock", "Mlp", "SelfBlock", "Upsampler", "init_linear"]

LONGEST_PLAIN = 1024  # keys; scores of many more would fill the memory


def init_linear(module: nn.Module, std: float = 0.02) -> None:
    """Normal weights and zero biases for every linear layer and convolution inside `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Mlp(nn.Sequential):
    """Two linear layers with GELU between, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of (B, heads, T, d) over (B, heads, S, d), through PyTorch's fused kernels.

    They are slow for bfloat16 on processors: the backward pass of 768 windows of 64 tokens took 98 ms fused and 11 ms
    as plain products (one core with AVX-512 bf16), of 1024 tokens 25 and 16 ms. Float32 gains nothing by it.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[-2] <= LONGEST_PLAIN:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return scores.softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Multi-head attention from `x` to `context`; never causal."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """X (B, T, D), context (B, S, D) -> (B, T, D)."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(context).unflatten(-1, (2, self.heads, -1)).unbind(2)
        attended = attend(q, k.transpose(1, 2), v.transpose(1, 2))
        return self.out(attended.transpose(1, 2).flatten(2))


class SelfBlock(nn.Module):
    """Pre-norm self-attention over all tokens of all views, then an MLP."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, head_width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        h = self.norm1(x)
        x = x + self.attention(h, h)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """Pre-norm attention of the picture tokens to the expression tokens, then an MLP."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, head_width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, expression: Tensor) -> Tensor:
        """X (B, T, D), expression (B, S, D) -> (B, T, D)."""
        x = x + self.attention(self.norm1(x), expression)
        return x + self.mlp(self.norm2(x))


class WindowBlock(nn.Module):
    """Self-attention inside square windows of one view's grid, shifted by half a window in every second block."""

    def __init__(self, width: int, head_width: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.window = window
        self.shift = window // 2 if shifted else 0
        self.block = SelfBlock(width, head_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, G, G, C) -> (B, G, G, C). The shift wraps around the border, as the background there carries nothing."""
        batch, grid, _, width = x.shape
        window = math.gcd(self.window, grid)
        shift = self.shift if window == self.window and grid > window else 0
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
        cells = grid // window
        x = x.view(batch, cells, window, cells, window, width).transpose(2, 3)
        x = self.block(x.reshape(batch * cells * cells, window * window, width))
        x = (
            x.view(batch, cells, cells, window, window, width)
            .transpose(2, 3)
            .reshape(batch, grid, grid, width)
        )
        return torch.roll(x, (shift, shift), (1, 2)) if shift else x


class Upsampler(nn.Module):
    """Doubles a view's token grid `stages` times, with windowed attention after each doubling.

    Each view is treated alone, so any number of views works (GRM folds them into one grid, which does not).
    """

    def __init__(self, widths: list[int], head_width: int, blocks: int, window: int) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.expand = nn.ModuleList(nn.Linear(wide, 4 * narrow) for wide, narrow in pairs)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(WindowBlock(narrow, head_width, window, shifted=bool(i % 2)) for i in range(blocks))
            )
            for _, narrow in pairs
        )
        self.norm = nn.LayerNorm(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, G, G, C0) -> (B, C, G * 2**stages, G * 2**stages)."""
        for expand, blocks in zip(self.expand, self.blocks, strict=True):
            x = F.pixel_shuffle(expand(x).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
            x = blocks(x)
        return self.norm(x).permute(0, 3, 1, 2)
