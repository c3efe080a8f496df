"""The Avat3r network: four posed pictures and an expression code to 3D Gaussians, in one forward pass.

Shape letters: B batch, N views, H W picture, T tokens of one view, D width, E expression code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from avatars.avat3r.config import Avat3rConfig, ConfidenceSpace
from avatars.avat3r.layers import CrossBlock, SelfBlock, Upsampler, init_linear
from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gaussians import Gaussians

__all__ = ["ATTRIBUTES", "Anchors", "Avat3r", "GaussianMaps", "KeptAnchors", "Views", "activate", "confident"]

ATTRIBUTES = {"position": 3, "color": 3, "opacity": 1, "scale": 3, "rotation": 4}
OPACITY_SHIFT = -2.0  # GRM: sigmoid(x - 2), so that training starts with 0.12 everywhere
LOG_SCALE_LIMIT = 3.0  # a Gaussian may grow or shrink 20 times from its pixel's footprint
FOOTPRINT = 0.7  # standard deviation of a fresh Gaussian in pixels: neighbours overlap without blurring
METRES_PER_UNIT = 0.1  # positions enter the network in head sizes


@dataclass
class Views:
    """The pictures as the network takes them.

    Attributes:
        images: (B, N, 3, H, W) in [0, 1].
        K: (B, N, 3, 3) pixels.
        world_to_camera: (B, N, 4, 4) head frame, metres.
        positions: (B, N, 3, H, W) position maps, metres, or None.
        confidence: (B, N, 1, H, W) DUSt3R's raw confidence (>= 1), or None.
        features: (B, N, F, h, w) semantic features, or None.
    """

    images: Tensor
    K: Tensor
    world_to_camera: Tensor
    positions: Tensor | None = None
    confidence: Tensor | None = None
    features: Tensor | None = None


@dataclass
class Anchors:
    """What each pixel's Gaussian starts from. No expression changes it, so driving makes it once.

    Attributes:
        positions: (B, N, 3, H, W) metres.
        footprints: (B, N, 1, H, W) standard deviation of a fresh Gaussian, metres.
        colors: (B, N, 3, H, W) RGB.
        keep: (B, N, 1, H, W) bool: confident enough to be a Gaussian.
    """

    positions: Tensor
    footprints: Tensor
    colors: Tensor
    keep: Tensor

    def kept(self, index: int) -> KeptAnchors:
        """Those of batch element `index` that become Gaussians, views one after the other."""
        chosen = self.keep[index, :, 0].flatten().nonzero()[:, 0]

        def take(maps: Tensor) -> Tensor:
            return maps[index].transpose(0, 1).flatten(1)[:, chosen].T

        return KeptAnchors(chosen, take(self.positions), take(self.footprints), take(self.colors))


@dataclass
class KeptAnchors:
    """Anchors of one person's n Gaussians.

    Attributes:
        pixels: (n,) where they are among the N * H * W pixels of all views.
        positions: (n, 3) metres.
        footprints: (n, 1) metres.
        colors: (n, 3) RGB.
    """

    pixels: Tensor
    positions: Tensor
    footprints: Tensor
    colors: Tensor


@dataclass
class GaussianMaps:
    """One Gaussian per pixel of every input view, as the heads give it, and what it starts from.

    Attributes:
        raw: (B X, N, 14, H, W) head outputs for X expressions of each of B people, one person after the other, channels
            in the order of `ATTRIBUTES`.
        anchors: where each pixel starts.
        position_unit: metres that one unit of the position output means.
    """

    raw: Tensor
    anchors: Anchors
    position_unit: float

    def gaussians(self, index: int) -> Gaussians:
        """The kept Gaussians of row `index` of `raw`, views one after the other."""
        expressions = len(self.raw) // len(self.anchors.keep)
        return activate(self.raw[index], self.anchors.kept(index // expressions), self.position_unit)


def activate(raw: Tensor, anchors: KeptAnchors, position_unit: float) -> Gaussians:
    """Head outputs of the kept pixels to Gaussians, with the position and colour skips.

    Args:
        raw: (N, 14, H, W) head outputs of one person.
        anchors: where its n kept pixels start.
        position_unit: metres that one unit of the position output means.
    """
    # Geometry is in metres and pixels: half precision would quantise it to visible steps.
    values = raw.transpose(0, 1).flatten(1)[:, anchors.pixels].T.float()  # (n, 14)
    position, color, opacity, scale, rotation = values.split(list(ATTRIBUTES.values()), 1)
    identity = torch.tensor([1.0, 0.0, 0.0, 0.0], device=values.device)
    return Gaussians(
        means=anchors.positions + position * position_unit,
        quats=F.normalize(rotation + identity, dim=1),
        scales=anchors.footprints * scale.clamp(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT).exp(),
        opacities=torch.sigmoid(opacity + OPACITY_SHIFT)[:, 0],
        colors=anchors.colors + color,
    )


def confident(confidence: Tensor, threshold: float, space: ConfidenceSpace) -> Tensor:
    """Which pixels are trusted.

    Args:
        confidence: (..., 1, H, W) in DUSt3R's raw space (>= 1).
        threshold: tau.
        space: where tau acts. "log" is what DUSt3R's own aligner reports; "min-max" scales each picture to [0, 1].

    Returns:
        Bool, same shape.
    """
    if space == "log":
        return confidence.clamp(min=1e-12).log() > threshold
    if space == "minus-one":
        return confidence - 1 > threshold
    if space == "raw":
        return confidence > threshold
    low = confidence.amin((-1, -2), keepdim=True)
    high = confidence.amax((-1, -2), keepdim=True)
    return (confidence - low) > threshold * (high - low)


class Avat3r(nn.Module):
    """Avat3r. `encode` sees no expression and may be cached; `decode` brings the expression in.

    Source: arXiv 2502.20220 section 3; block details after GRM, see `Avat3rConfig`.
    """

    def __init__(self, config: Avat3rConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patchify = nn.Conv2d(config.input_channels, width, config.patch, config.patch, bias=False)
        self.grid_embedding = nn.Parameter(
            torch.zeros(config.grid**2, width)
        )  # one view's, shared by all views
        self.merge_features = (
            nn.Linear(width + config.feature_dim, width) if config.feature_dim else nn.Identity()
        )
        self.norm_in = nn.LayerNorm(width)
        self.self_blocks = nn.ModuleList(
            SelfBlock(width, config.head_width) for _ in range(config.self_layers)
        )
        self.cross_blocks = nn.ModuleList(
            CrossBlock(width, config.head_width) for _ in range(config.cross_layers)
        )
        self.expression_tokens = nn.Sequential(
            nn.Linear(config.expression_dim, config.expression_hidden),
            nn.ReLU(),
            nn.Linear(config.expression_hidden, config.expression_hidden),
            nn.ReLU(),
            nn.Linear(config.expression_hidden, config.expression_tokens * width),
        )
        self.norm_out = nn.LayerNorm(width)
        widths = [width, *(config.stage_width(s) for s in range(1, config.upsample_stages + 1))]
        self.upsampler = Upsampler(widths, config.head_width, config.upsample_blocks, config.upsample_window)
        ratio = config.patch >> config.upsample_stages
        self.heads = nn.ModuleDict(
            {name: nn.Conv2d(widths[-1], channels * ratio**2, 1) for name, channels in ATTRIBUTES.items()}
        )
        self.shuffle = nn.PixelShuffle(ratio)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal weights; residual branches shrunk with depth; heads at zero; features come in beside the tokens.

        With the heads at zero the network starts as the coloured position maps, rendered from anywhere.
        """
        # 0.02 at the width of a base transformer: a narrower one hardly tells its tokens apart with it.
        std = 0.02 * (768 / self.config.width) ** 0.5
        init_linear(self, std)
        nn.init.normal_(self.grid_embedding, std=0.02)
        if isinstance(
            self.merge_features, nn.Linear
        ):  # the tokens as they would be without features, and a little
            nn.init.eye_(self.merge_features.weight[:, : self.config.width])
        # The expression MLP sees small codes without any norm before it: keep its signal's size.
        for layer in self.expression_tokens:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        depth = max(self.config.self_layers + self.config.cross_layers, 1)
        for block in [*self.self_blocks, *self.cross_blocks]:
            for layer in (block.attention.out, block.mlp[2]):
                nn.init.normal_(layer.weight, std=std / (2 * depth) ** 0.5)
        for head in self.heads.values():
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def expect_codes(self, mean: Tensor, std: Tensor) -> None:
        """Lets fresh weights take expression codes as if they were standardised: the codes of Ava-256 are small, and
        those of few people hardly move some of their numbers.

        It is the first layer that changes, so the network's form, its files and what drives it stay as they are.

        Args:
            mean: (E,) of the training people's codes.
            std: (E,) of the same. What moves less than a tenth of the liveliest number counts as moving that much.
        """
        first = self.expression_tokens[0]
        assert isinstance(first, nn.Linear)  # for mypy: it is made above
        if std.max() > 0:
            first.weight /= std.clamp(min=0.1 * float(std.max()))
            first.bias.sub_(first.weight @ mean)

    @property
    def drive_prefixes(self) -> tuple[str, ...]:
        """Names of the parameters that driving needs when the encoder's result is cached."""
        return ("cross_blocks.", "expression_tokens.", "norm_out.", "upsampler.", "heads.")

    def _run(self, block: Callable[..., Tensor], *args: Tensor) -> Tensor:
        if self.config.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def tokens(self, views: Views) -> Tensor:
        """Patch tokens before any attention.

        Args:
            views: N views of B people.

        Returns:
            (B, N * T, D).
        """
        images = views.images
        batch, n_views, _, height, width = images.shape
        cameras = Cameras(views.K.flatten(0, 1), views.world_to_camera.flatten(0, 1))
        channels = [images.flatten(0, 1) * 2 - 1, cameras.plucker((height, width)).to(images.dtype)]
        if self.config.position_prior:
            keep = self.keep(views).flatten(0, 1)
            assert views.positions is not None  # `keep` has checked it
            channels.append(torch.where(keep, views.positions.flatten(0, 1), 0) / METRES_PER_UNIT)
        x = self.patchify(torch.cat(channels, 1).to(self.patchify.weight.dtype))  # (B * N, D, G, G)
        if self.config.feature_dim:
            if views.features is None:
                raise UserError("This Avat3r was built for semantic features, and the input set has none.")
            sampled = sample_at_patch_centres(views.features.flatten(0, 1), self.config.grid)
            x = torch.cat([x, sampled.to(x.dtype)], 1)
        x = self.merge_features(x.flatten(2).transpose(1, 2)) + self.grid_embedding
        return self.norm_in(x).unflatten(0, (batch, n_views)).flatten(1, 2)

    def keep(self, views: Views) -> Tensor:
        """(B, N, 1, H, W) bool: the pixels that become Gaussians; all of them without a position prior."""
        if not self.config.position_prior:
            return torch.ones_like(views.images[:, :, :1], dtype=torch.bool)
        if views.positions is None or views.confidence is None:
            raise UserError(
                "This Avat3r needs position maps with confidence, and the input set has none: "
                "pack the shards with a position prior."
            )
        return confident(views.confidence, self.config.confidence_threshold, self.config.confidence_space)

    def encode(self, views: Views) -> Tensor:
        """What does not depend on the expression.

        Returns:
            (B, N * T, D): tokens after all self-attention layers, or before any when layers are interleaved.
        """
        x = self.tokens(views)
        if not self.config.interleave:
            for block in self.self_blocks:
                x = self._run(block, x)
        return x

    def decode(self, x: Tensor, expression: Tensor) -> Tensor:
        """Head outputs of the face that `expression` describes.

        Args:
            x: (B, N * T, D) from `encode`.
            expression: (B, E).

        Returns:
            (B, N, 14, H, W) at the pictures' resolution, channels in the order of `ATTRIBUTES`.
        """
        config = self.config
        if expression.shape[-1] != config.expression_dim:
            raise UserError(
                f"The expression code has {expression.shape[-1]} numbers and this Avat3r was trained on "
                f"{config.expression_dim}; use codes of the kind that it was trained on."
            )
        code = self.expression_tokens(expression.to(x.dtype)).unflatten(-1, (config.expression_tokens, -1))
        if config.interleave:
            for i in range(max(config.self_layers, config.cross_layers)):
                if i < config.self_layers:
                    x = self._run(self.self_blocks[i], x)
                if i < config.cross_layers:
                    x = self._run(self.cross_blocks[i], x, code)
        else:
            for block in self.cross_blocks:
                x = self._run(block, x, code)
        grid = self.norm_out(x).view(-1, config.grid, config.grid, config.width)  # (B * N, G, G, D)
        features = self.upsampler(grid)
        raw = torch.cat([self.shuffle(head(features)) for head in self.heads.values()], 1)
        return raw.unflatten(0, (x.shape[0], -1))

    def anchors(self, views: Views) -> Anchors:
        """Where each pixel's Gaussian starts: position map, pixel footprint and colour."""
        height, width = views.images.shape[-2:]
        keep = self.keep(views)
        if self.config.position_skip:
            assert views.positions is not None  # `keep` has checked it
            positions = views.positions.float()
        else:
            # GRM's start: on each ray, as far from the camera as the head's centre is.
            cameras = Cameras(views.K.flatten(0, 1).float(), views.world_to_camera.flatten(0, 1).float())
            origins, directions = cameras.rays((height, width))
            positions = origins + directions * origins.norm(dim=1, keepdim=True)
            positions = positions.unflatten(0, views.images.shape[:2])
        # The footprint of a pixel at its anchor, so that resolution and distance need no learning.
        z_row = views.world_to_camera[..., 2, :].float()  # (B, N, 4)
        depth = torch.einsum("bnj,bnjhw->bnhw", z_row[..., :3], positions) + z_row[..., 3, None, None]
        focal = (views.K[..., 0, 0] + views.K[..., 1, 1]).float()[..., None, None] / 2
        return Anchors(
            positions=positions,
            footprints=(FOOTPRINT * depth.clamp(min=1e-3) / focal)[:, :, None],
            colors=views.images.float() if self.config.color_skip else torch.full_like(positions, 0.5),
            keep=keep,
        )

    def forward(self, views: Views, expression: Tensor) -> GaussianMaps:
        """Views (B, N, …) and expressions (B X, E), X of each person, to Gaussian maps."""
        tokens = self.encode(views)
        tokens = tokens.repeat_interleave(len(expression) // len(tokens), 0)
        return GaussianMaps(self.decode(tokens, expression), self.anchors(views), self.config.position_unit)

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes `model.safetensors` (float32) and `model.json` (configuration and provenance)."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            name: tensor.detach().float().cpu().contiguous() for name, tensor in self.state_dict().items()
        }
        save_file(state, folder / "model.safetensors")
        description = {"method": "avat3r", "config": self.config.to_json(), "provenance": provenance}
        (folder / "model.json").write_text(json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Avat3r:
        """Reads what `save` wrote; every name must match.

        Raises:
            UserError: the folder holds no model, or another method's.
        """
        folder = Path(folder)
        description = folder / "model.json"
        if not description.is_file():
            raise UserError(
                f"{folder} holds no model.json. Train one with `make train`, or name its export folder."
            )
        values = json.loads(description.read_text())
        if values.get("method") != "avat3r":
            raise UserError(f"{description} describes a model of {values.get('method')!r}, not of avat3r.")
        model = cls(Avat3rConfig.from_json(values["config"]))
        file = folder / "model.safetensors"
        try:
            model.load_state_dict(load_file(file))
        except FileNotFoundError:
            raise UserError(f"{file} is not there; export the checkpoint again.") from None
        except (RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{file} does not fit its model.json: it is of another recipe or was changed. Export the checkpoint "
                "again."
            ) from error
        return model


def sample_at_patch_centres(features: Tensor, grid: int) -> Tensor:
    """Bilinear samples of a feature map of any resolution at the centres of a `grid` x `grid` patch grid.

    Args:
        features: (B, F, h, w) covering the same picture.
        grid: patches along a side.

    Returns:
        (B, F, grid, grid).
    """
    centres = (torch.arange(grid, device=features.device, dtype=features.dtype) + 0.5) / grid * 2 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    where = torch.stack([x, y], -1).expand(features.shape[0], -1, -1, -1)
    return F.grid_sample(features, where, mode="bilinear", padding_mode="border", align_corners=False)
