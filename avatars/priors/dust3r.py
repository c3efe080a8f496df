"""DUSt3R: two pictures of one thing in, a 3D point for every pixel of both out, in the first camera's frame.

Our own network in plain PyTorch whose state dict has the names and shapes of the published checkpoints
(Wang et al., "DUSt3R: Geometric 3D Vision Made Easy", arXiv 2312.14132; the trunk is CroCo v2's, arXiv 2211.10408).

Shape letters: B batch, T tokens (h w of a patch grid), E encoder width, D decoder width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avatars.errors import UserError
from avatars.priors.checkpoints import DUSt3RConfig, fill, read_dust3r
from avatars.priors.dpt import DPTHead, LinearHead

__all__ = ["DUSt3R", "Encoded", "Pair", "Precision"]

Precision = Literal["fp32", "bf16"]
PATCH = 16
NORM_EPS = 1e-6


class Pair(NamedTuple):
    """What the network says about an ordered pair of pictures, both in the first camera's frame.

    OpenCV axes; the scale is the pair's own, and differs from pair to pair. Confidence is above 1, where 1 is
    no trust.
    """

    points1: Tensor  # (B, 3, H, W)
    confidence1: Tensor  # (B, 1, H, W)
    points2_in_1: Tensor  # (B, 3, H2, W2)
    confidence2: Tensor  # (B, 1, H2, W2)


@dataclass(frozen=True)
class Encoded:
    """Pictures after the encoder: all that the decoders need of them, so that each is encoded once.

    Attributes:
        tokens: (B, T, E), normalised.
        grid: rows h and columns w of the patch grid, T = h w.
    """

    tokens: Tensor
    grid: tuple[int, int]

    def __getitem__(self, index: int | slice | list[int]) -> Encoded:
        """Some of the pictures; an integer keeps the batch dimension."""
        return Encoded(self.tokens[[index] if isinstance(index, int) else index], self.grid)


class DUSt3R(nn.Module):
    """The network. `DUSt3R.load(path)` gives one with published weights.

    Args:
        config: its shape.
    """

    def __init__(self, config: DUSt3RConfig) -> None:
        super().__init__()
        self.config = config
        self.sha256 = ""
        E, D = config.enc_embed_dim, config.dec_embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))  # of the pretraining; in every published file
        self.patch_embed = PatchEmbed(E)
        self.enc_blocks = nn.ModuleList(Block(E, config.enc_num_heads) for _ in range(config.enc_depth))
        self.enc_norm = nn.LayerNorm(E, eps=NORM_EPS)
        self.decoder_embed = Linear(E, D)
        self.dec_blocks = nn.ModuleList(
            DecoderBlock(D, config.dec_num_heads) for _ in range(config.dec_depth)
        )
        self.dec_blocks2 = nn.ModuleList(
            DecoderBlock(D, config.dec_num_heads) for _ in range(config.dec_depth)
        )
        self.dec_norm = nn.LayerNorm(D, eps=NORM_EPS)
        self.downstream_head1, self.downstream_head2 = self._new_head(), self._new_head()

    @classmethod
    def load(cls, path: str | Path, *, precision: Precision = "fp32", device: str = "cpu") -> DUSt3R:
        """The network with the weights of a published file; nothing in the file is executed.

        Args:
            path: the `.pth` file of DUSt3R or MASt3R (whose descriptors are left aside), a hub folder with
                `config.json` and `model.safetensors`, or that `model.safetensors`.
            precision: "bf16" keeps the trunk's weights and products in bfloat16; the residual stream, the
                norms and the heads stay in fp32.
            device: where to put it.

        Raises:
            UserError: no such file, cut short, of another architecture, or with something in it that is no
                tensor.
        """
        config, weights, sha256 = read_dust3r(Path(path))
        with torch.device("meta"):
            model = cls(config)
        fill(model, weights, Path(path))
        model.sha256 = sha256
        if precision == "bf16":
            for layer in model.modules():
                if isinstance(layer, Linear):
                    layer.to(torch.bfloat16)
        return model.to(device).eval().requires_grad_(False)

    @property
    def size(self) -> int:
        """The longer side of the pictures that the weights were trained on, in pixels."""
        return max(self.config.img_size)

    def encode(self, images: Tensor) -> Encoded:
        """Encodes pictures.

        Args:
            images: (B, 3, H, W) float sRGB in [0, 1]; H and W multiples of 16.

        Raises:
            UserError: another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"DUSt3R takes pictures (B, 3, H, W), not {tuple(images.shape)}.")
        height, width = images.shape[-2:]
        if height % PATCH or width % PATCH or not height or not width:
            raise UserError(
                f"DUSt3R takes pictures whose sides are multiples of {PATCH} pixels, not {height} x {width}; "
                "resize or crop them."
            )
        grid = (height // PATCH, width // PATCH)
        rotation = self._rope(grid, self.config.enc_embed_dim // self.config.enc_num_heads, images.device)
        x = self.patch_embed((images.float() - 0.5) / 0.5)
        for block in self.enc_blocks:
            x = block(x, rotation)
        return Encoded(self.enc_norm(x), grid)

    def decode(self, first: Encoded, second: Encoded) -> Pair:
        """Points of B ordered pairs of encoded pictures."""
        tokens1, tokens2 = self.decoder_tokens(first, second)
        with _exact():
            points1, confidence1 = self.downstream_head1(tokens1, first.grid)
            points2, confidence2 = self.downstream_head2(tokens2, second.grid)
        return Pair(points1, confidence1, points2, confidence2)

    def forward(self, image1: Tensor, image2: Tensor) -> Pair:
        """Points of B ordered pairs of pictures (B, 3, H, W), float sRGB in [0, 1]."""
        if image1.shape == image2.shape:
            both = self.encode(torch.cat([image1, image2]))
            return self.decode(both[: len(image1)], both[len(image1) :])
        return self.decode(self.encode(image1), self.encode(image2))

    def decoder_tokens(self, first: Encoded, second: Encoded) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens of both views that the heads look at: the encoder's (B, T, E), then each decoder block's
        (B, T, D).
        """
        head_width = self.config.dec_embed_dim // self.config.dec_num_heads
        rotation1 = self._rope(first.grid, head_width, first.tokens.device)
        rotation2 = self._rope(second.grid, head_width, second.tokens.device)
        x1, x2 = self.decoder_embed(first.tokens), self.decoder_embed(second.tokens)
        kept1, kept2 = [first.tokens], [second.tokens]
        for block1, block2 in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            # Both sides look at what the other was before this depth, not at what it has just become.
            x1, x2 = block1(x1, x2, rotation1, rotation2), block2(x2, x1, rotation2, rotation1)
            kept1.append(x1)
            kept2.append(x2)
        kept1[-1], kept2[-1] = self.dec_norm(x1), self.dec_norm(x2)
        return kept1, kept2

    def _new_head(self) -> nn.Module:
        config = self.config
        if config.head == "linear":
            return LinearHead(config.dec_embed_dim)
        return DPTHead(config.enc_embed_dim, config.dec_embed_dim, config.dec_depth)

    def _rope(self, grid: tuple[int, int], head_width: int, device: torch.device) -> Rotation:
        """Angles of `grid` for heads of `head_width`: row positions turn the first half, columns the second."""
        frequencies = self.config.rope_base ** (
            -torch.arange(0, head_width // 2, 2, device=device, dtype=torch.float32) / (head_width // 2)
        )
        rows, columns = (torch.arange(n, device=device)[:, None] * frequencies for n in grid)
        rows = rows[:, None].expand(grid[0], grid[1], -1)
        columns = columns[None].expand(grid[0], grid[1], -1)
        angles = torch.stack([rows, columns], 2).flatten(0, 1)  # (T, 2, head_width / 4)
        return angles.cos(), angles.sin()


Rotation = tuple[Tensor, Tensor]
"""Cosines and sines (T, 2, head_width / 4): of the row's turn and of the column's."""


class Linear(nn.Linear):
    """A linear layer that works in its weights' precision whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the weights' type."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class PatchEmbed(nn.Module):
    """A 16 x 16 convolution: pictures to tokens, row by row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, T, E)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention to the other view's tokens, each side with its own rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projq, self.projk = Linear(width, width), Linear(width, width)
        self.projv, self.proj = Linear(width, width), Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, x_rotation: Rotation, y_rotation: Rotation) -> Tensor:
        """X (B, T, D), y (B, T2, D) -> (B, T, D)."""
        q, k, v = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.projq, x), (self.projk, y), (self.projv, y))
        )
        attended = F.scaled_dot_product_attention(rotate(q, x_rotation), rotate(k, y_rotation), v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """An encoder block: self-attention, MLP, each after a norm and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=NORM_EPS), nn.LayerNorm(width, eps=NORM_EPS)
        self.attn, self.mlp = Attention(width, heads), Mlp(width)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        x = x + self.attn(self.norm1(x), rotation)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """A decoder block: self-attention, attention to the other view, MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=NORM_EPS), nn.LayerNorm(width, eps=NORM_EPS)
        self.norm3, self.norm_y = nn.LayerNorm(width, eps=NORM_EPS), nn.LayerNorm(width, eps=NORM_EPS)
        self.attn, self.cross_attn = Attention(width, heads), CrossAttention(width, heads)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, y: Tensor, x_rotation: Rotation, y_rotation: Rotation) -> Tensor:
        """X (B, T, D) with the other view's y (B, T2, D) -> (B, T, D)."""
        x = x + self.attn(self.norm1(x), x_rotation)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y), x_rotation, y_rotation)
        return x + self.mlp(self.norm3(x))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns (B, heads, T, head_width) by its tokens' positions (RoPE, arXiv 2104.09864, in two dimensions)."""
    cosine, sine = rotation
    # head_width = (row half, column half) x (real, imaginary) x frequencies
    parts = x.unflatten(-1, (2, 2, -1)).float()
    real, imaginary = parts.unbind(-2)
    turned = torch.stack([real * cosine - imaginary * sine, imaginary * cosine + real * sine], -2)
    return turned.flatten(-3).to(x.dtype)


@contextmanager
def _exact() -> Iterator[None]:
    """The heads end in exponentials: they run in fp32 even where the caller has switched autocast on."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
