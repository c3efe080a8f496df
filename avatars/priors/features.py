"""Feature priors: vision transformers whose patch tokens say what is in a picture.

Sapiens v1 (Khirodkar et al., "Sapiens: Foundation for Human Vision Models", arXiv 2408.12569) is a plain pre-norm
ViT: timm's `VisionTransformer` with renamed weights computes exactly the published features. DINOv2 and Sapiens2 are
timm's own models, which read the published files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avatars.errors import UserError
from avatars.priors.checkpoints import fill, read_pickle, read_safetensors
from avatars.priors.dust3r import Precision
from avatars.weights import file_sha256

__all__ = ["DINOV2", "SAPIENS", "SAPIENS2", "Features", "Sapiens", "load_dinov2", "load_sapiens2"]

SAPIENS = {"0.3b": (1024, 24, 16), "0.6b": (1280, 32, 16), "1b": (1536, 40, 24), "2b": (1920, 48, 32)}
"""Width, layers and heads of the published sizes."""
DINOV2 = {
    f"{size}{registers}": f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2"
    for size in ("small", "base", "large", "giant")
    for registers in ("", "-registers")
}
"""timm's names of the sizes, without and with registers."""
SAPIENS2 = {"0.1b": "base", "0.4b": "large", "0.8b": "huge", "1b": "giant", "5b": "5b"}
"""timm's names of the sizes."""

LITE_MEAN, LITE_STD = (123.5, 116.5, 103.5), (58.5, 57.0, 57.5)  # as in Sapiens-Lite; of 255
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH = 16
RENAMED = (
    (re.compile(r"^patch_embed\.projection\."), "patch_embed.proj."),
    (re.compile(r"^layers\.(\d+)\.ln([12])\."), r"blocks.\1.norm\2."),
    (re.compile(r"^layers\.(\d+)\.ffn\.layers\.0\.0\."), r"blocks.\1.mlp.fc1."),
    (re.compile(r"^layers\.(\d+)\.ffn\.layers\.1\."), r"blocks.\1.mlp.fc2."),
    (re.compile(r"^layers\."), "blocks."),
    (re.compile(r"^ln1\."), "norm."),
)
"""Sapiens' names to timm's."""


class Features(nn.Module):
    """A network that is asked for its patch tokens: a `FeaturePrior`.

    Args:
        name: kind and size, for example "dinov2-small".
        vit: a timm vision transformer without a head, with its weights.
        dim: channels of its tokens.
        pixels: side of the square pictures that it takes.
        mean: of the training pictures, RGB in [0, 1].
        std: of the same.
        interpolation: how the authors resize pictures: "bilinear" or "bicubic".
        sha256: of the weight file.
        precision: of weights and products.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        vit: nn.Module,
        *,
        dim: int,
        pixels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        interpolation: str,
        sha256: str,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.kind, self.sha256 = name, sha256
        self.name = f"{name}:{sha256[:8]}"
        self.dim, self.pixels, self.interpolation = dim, pixels, interpolation
        self.vit = (
            vit.to(torch.bfloat16 if precision == "bf16" else torch.float32).eval().requires_grad_(False)
        )
        side = pixels // vit.get_parameter("patch_embed.proj.weight").shape[-1]
        self.grid = (side, side)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Feature maps (B, D, h, w) float32 of pictures (B, 3, H, W), float sRGB in [0, 1].

        Raises:
            UserError: pictures of another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"{self.kind} takes pictures (B, 3, H, W), not {tuple(images.shape)}.")
        size = (self.pixels, self.pixels)
        if images.shape[-2:] != size:  # the aspect ratio is not kept, as in the authors' scripts
            images = F.interpolate(images, size, mode=self.interpolation, align_corners=False)
        normalised = (images - self.mean) / self.std
        weight = self.vit.get_parameter("patch_embed.proj.weight")
        tokens = self.vit.forward_features(normalised.to(weight.dtype))  # type: ignore[operator]
        patches = tokens[:, -self.grid[0] * self.grid[1] :]  # class and register tokens stand before them
        return patches.float().transpose(1, 2).unflatten(-1, self.grid)


class Sapiens(Features):
    """Sapiens v1. `Sapiens.load(path)` finds its size in the file."""

    @classmethod
    def load(cls, path: str | Path, *, precision: Precision = "fp32", device: str = "cpu") -> Sapiens:
        """The network with the weights of a published file.

        Args:
            path: `sapiens_…_clean.pth`, a full checkpoint (`state_dict` with `backbone.` names), or a folder with
                one of them.
            precision: of weights and products; features come out in fp32.
            device: where to put it.

        Raises:
            UserError: no such file, cut short, of another architecture, or with something in it that is no tensor.
        """
        from timm.models.vision_transformer import VisionTransformer

        file = _file_in(Path(path), ("*_clean.pth", "*.pth"))
        weights = sapiens_weights(read_pickle(file), file)
        table = weights.get("pos_embed")
        width = weights["patch_embed.proj.weight"].shape[0] if "patch_embed.proj.weight" in weights else 0
        depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
        side = 0 if table is None or table.ndim != 3 else round((table.shape[1] - 1) ** 0.5)
        size = next((size for size, shape in SAPIENS.items() if shape[:2] == (width, depth)), None)
        heads = SAPIENS[size][2] if size else width // 64
        if not width or not side or width % max(heads, 1) or table is None or table.shape[1] != side**2 + 1:
            raise UserError(
                f"{file} is of another architecture than Sapiens v1: it lacks its patch_embed and pos_embed. Give "
                "sapiens_2b_epoch_660_clean.pth or another size's file."
            )
        with torch.device("meta"):
            vit = VisionTransformer(
                img_size=side * PATCH, patch_size=PATCH, embed_dim=width, depth=depth, num_heads=heads,
                num_classes=0, global_pool="", norm_layer=partial(nn.LayerNorm, eps=1e-6),
            )  # fmt: skip
        fill(vit, weights, file)
        model = cls(
            f"sapiens-{size or f'{width}x{depth}'}",
            vit,
            dim=width,
            pixels=side * PATCH,
            mean=tuple(value / 255 for value in LITE_MEAN),
            std=tuple(value / 255 for value in LITE_STD),
            interpolation="bilinear",
            sha256=file_sha256(file),
            precision=precision,
        )
        return model.to(device)


def sapiens_weights(content: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """Sapiens v1's weights under timm's names, from a clean file or a full checkpoint.

    Raises:
        UserError: something among them is no tensor.
    """
    content = content.get("state_dict", content)
    if any(key.startswith("backbone.") for key in content):  # necks and task heads are not features
        content = {
            key.removeprefix("backbone."): value for key, value in content.items() if "backbone." in key
        }
    found = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{file} is of another architecture than Sapiens v1: {key!r} is {type(value).__name__} and no tensor."
            )
        for pattern, name in RENAMED:
            key = pattern.sub(name, key)
        found[key] = value.float()
    return found


def load_dinov2(
    path: str | Path, size: str, *, precision: Precision = "fp32", device: str = "cpu"
) -> Features:
    """DINOv2 (Oquab et al., arXiv 2304.07193) at its own 518 pixels.

    Args:
        path: Meta's `dinov2_vit…_pretrain.pth` or timm's safetensors file.
        size: key in `DINOV2`.
        precision: of weights and products.
        device: where to put it.

    Raises:
        UserError: as `Sapiens.load`.
    """
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    file = _file_in(Path(path), ("*.pth", "*.safetensors"))
    with torch.device("meta"):
        vit = timm.create_model(DINOV2[size], pretrained=False, num_classes=0)
    return _timm_features(
        f"dinov2-{size}", vit, checkpoint_filter_fn, file, 518, "bicubic", precision, device
    )


def load_sapiens2(
    path: str | Path, size: str, *, precision: Precision = "fp32", device: str = "cpu"
) -> Features:
    """Sapiens2 (arXiv 2604.21681) at 1024 x 1024. Its licence bars biometric processing and impersonation.

    Args:
        path: Meta's `sapiens2_…_pretrain.safetensors`.
        size: key in `SAPIENS2`.
        precision: of weights and products.
        device: where to put it.

    Raises:
        UserError: as `Sapiens.load`.
    """
    import timm
    from timm.models.eva import checkpoint_filter_fn

    file = _file_in(Path(path), ("*.safetensors", "*.pth"))
    # Its rotary tables are in no file, so it is built whole and not on the meta device.
    vit = timm.create_model(
        f"vit_{SAPIENS2[size]}_patch16_sapiens2", pretrained=False, num_classes=0, img_size=(1024, 1024)
    )
    return _timm_features(
        f"sapiens2-{size}", vit, checkpoint_filter_fn, file, 1024, "bilinear", precision, device
    )


def _timm_features(
    name: str,
    vit: nn.Module,
    rename: Any,
    file: Path,
    pixels: int,
    interpolation: str,
    precision: Precision,
    device: str,
) -> Features:
    """A timm model with the weights of a file under the authors' or timm's own names."""
    weights = dict(read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file))
    if not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{file} is of another architecture than {name}: it holds more than tensors.")
    try:
        weights = rename(weights, vit)
    except (KeyError, RuntimeError, IndexError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is of another architecture than {name} ({error}).") from None
    fill(vit, {key: value.float() for key, value in weights.items()}, file)
    model = Features(
        name,
        vit,
        dim=int(vit.num_features),  # type: ignore[arg-type]
        pixels=pixels,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        interpolation=interpolation,
        sha256=file_sha256(file),
        precision=precision,
    )
    return model.to(device)


def _file_in(path: Path, patterns: tuple[str, ...]) -> Path:
    """The file itself, or the one weight file in a folder."""
    if not path.is_dir():
        return path
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{path} holds {len(found)} files {pattern}; give one of them.")
    raise UserError(f"{path} holds no weight file {patterns[0]}.")
