"""Weight files in the layouts that DUSt3R, MASt3R, Sapiens and DINOv2 are published in, with numbers out of a hat.

The numbers are a pure function of seed, key and shape, so that the golden outputs in `golden/` (what the published
DUSt3R network computed with them) can be reproduced without a checkpoint. Only tests and benchmarks make weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch

from avatars.priors.checkpoints import DUSt3RConfig

TINY = DUSt3RConfig(
    enc_depth=3, dec_depth=12, enc_embed_dim=64, dec_embed_dim=48, enc_num_heads=4, dec_num_heads=4, img_size=(128, 128)
)  # fmt: skip
"""The network of the golden outputs."""
TINY_LINEAR = DUSt3RConfig(
    enc_depth=2, dec_depth=2, enc_embed_dim=32, dec_embed_dim=32, enc_num_heads=2, dec_num_heads=2, img_size=(32, 32),
    head="linear",
)  # fmt: skip
"""The smallest one, for what does not depend on the head: a quarter of a megabyte."""
LEVELS = (96, 192, 384, 768)


def seeded_tensor(key: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Matrices: normal over sqrt(fan in); norms' weights: around 1; biases: small; heads' last layers: mild."""
    for level in range(4):
        key = key.replace(f".scratch.layer_rn.{level}.", f".scratch.layer{level + 1}_rn.")
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    numbers = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    drawn = numbers.standard_normal(tuple(shape), dtype=np.float32)
    if len(shape) >= 2:
        gain = {"downstream_head1.proj.weight": 0.5, "downstream_head2.proj.weight": 0.5}.get(key, 1.0)
        gain = 0.1 if key.endswith("dpt.head.4.weight") else gain
        drawn = drawn * np.float32(gain / np.sqrt(math.prod(shape[1:])))
    elif "norm" in key.split(".")[-2] and key.endswith("weight"):
        drawn = np.float32(1.0) + np.float32(0.1) * drawn
    else:
        drawn = drawn * np.float32(0.02)
    return torch.from_numpy(np.ascontiguousarray(drawn, dtype=np.float32))


def dust3r_shapes(config: DUSt3RConfig, *, twice: bool) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published DUSt3R file; `twice` with the second names that only `.pth` files have."""
    E, D = config.enc_embed_dim, config.dec_embed_dim
    shapes: dict[str, tuple[int, ...]] = {"mask_token": (1, 1, D)}

    def both(name: str, *weight: int, bias: int | None = None) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = (weight[0] if bias is None else bias,)

    both("patch_embed.proj", E, 3, 16, 16)
    for n in range(config.enc_depth):
        for name, *weight in (
            ("norm1", E), ("attn.qkv", 3 * E, E), ("attn.proj", E, E), ("norm2", E), ("mlp.fc1", 4 * E, E),
            ("mlp.fc2", E, 4 * E),
        ):  # fmt: skip
            both(f"enc_blocks.{n}.{name}", *weight)
    both("enc_norm", E)
    both("decoder_embed", D, E)
    for blocks in ("dec_blocks", "dec_blocks2"):
        for n in range(config.dec_depth):
            for name, *weight in (
                ("norm1", D), ("norm2", D), ("norm3", D), ("norm_y", D), ("attn.qkv", 3 * D, D), ("attn.proj", D, D),
                ("cross_attn.projq", D, D), ("cross_attn.projk", D, D), ("cross_attn.projv", D, D),
                ("cross_attn.proj", D, D), ("mlp.fc1", 4 * D, D), ("mlp.fc2", D, 4 * D),
            ):  # fmt: skip
                both(f"{blocks}.{n}.{name}", *weight)
    both("dec_norm", D)
    for head in ("downstream_head1", "downstream_head2"):
        if config.head == "linear":
            both(f"{head}.proj", 4 * 16 * 16, D)
            continue
        a, b, c, d = LEVELS
        dpt = f"{head}.dpt"
        for name, *weight in (
            ("0.0", a, E, 1, 1), ("0.1", a, a, 4, 4), ("1.0", b, D, 1, 1), ("1.1", b, b, 2, 2), ("2.0", c, D, 1, 1),
            ("3.0", d, D, 1, 1), ("3.1", d, d, 3, 3),
        ):  # fmt: skip
            both(f"{dpt}.act_postprocess.{name}", *weight)
        for level, channels in enumerate(LEVELS):
            shapes[f"{dpt}.scratch.layer{level + 1}_rn.weight"] = (256, channels, 3, 3)
            if twice:
                shapes[f"{dpt}.scratch.layer_rn.{level}.weight"] = (256, channels, 3, 3)
            refine = f"{dpt}.scratch.refinenet{level + 1}"
            both(f"{refine}.out_conv", 256, 256, 1, 1)
            for unit in (1, 2):
                for conv in (1, 2):
                    both(f"{refine}.resConfUnit{unit}.conv{conv}", 256, 256, 3, 3)
        both(f"{dpt}.head.0", 128, 256, 3, 3)
        both(f"{dpt}.head.2", 128, 128, 3, 3)
        both(f"{dpt}.head.4", 4, 128, 1, 1)
    return shapes


def dust3r_weights(config: DUSt3RConfig, *, twice: bool = True) -> dict[str, torch.Tensor]:
    """Seeded weights under a published file's names."""
    return {key: seeded_tensor(key, shape) for key, shape in dust3r_shapes(config, twice=twice).items()}


def model_string(config: DUSt3RConfig) -> str:
    """What a published `.pth` says about its network."""
    c = config
    return (
        f"AsymmetricCroCo3DStereo(enc_depth={c.enc_depth}, dec_depth={c.dec_depth}, enc_embed_dim={c.enc_embed_dim}, "
        f"dec_embed_dim={c.dec_embed_dim}, enc_num_heads={c.enc_num_heads}, dec_num_heads={c.dec_num_heads}, "
        f"pos_embed='RoPE100', patch_embed_cls='ManyAR_PatchEmbed', img_size={c.img_size}, head_type='{c.head}', "
        "output_mode='pts3d', depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf))"
    )


def write_dust3r(path: Path, config: DUSt3RConfig = TINY_LINEAR, **changes: object) -> Path:
    """A `.pth` as published: `args` with the model string, `model` with the weights, what training left behind.

    `model` among the changes replaces the model string, `weights` the weights.
    """
    weights = changes.get("weights") or dust3r_weights(config)
    args = argparse.Namespace(model=changes.get("model", model_string(config)), batch_size=4, lr=1e-4)
    torch.save({"args": args, "model": weights, "epoch": 90, "best_so_far": 0.5}, path)
    return path


def write_dust3r_hub(folder: Path, config: DUSt3RConfig = TINY_LINEAR) -> Path:
    """A folder as on the hub: the constructor's arguments and the weights, each under one name."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arguments = {
        "conf_mode": ["exp", 1, math.inf], "dec_depth": config.dec_depth, "dec_embed_dim": config.dec_embed_dim,
        "dec_num_heads": config.dec_num_heads, "depth_mode": ["exp", -math.inf, math.inf],
        "enc_depth": config.enc_depth, "enc_embed_dim": config.enc_embed_dim, "enc_num_heads": config.enc_num_heads,
        "head_type": config.head, "img_size": list(config.img_size), "landscape_only": False,
        "output_mode": "pts3d", "patch_embed_cls": "PatchEmbedDust3R", "pos_embed": "RoPE100",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(arguments, indent=2))
    save_file(dust3r_weights(config, twice=False), folder / "model.safetensors")
    return folder


def sapiens_shapes(width: int, depth: int, grid: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a clean Sapiens v1 file."""
    D = width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, D), "pos_embed": (1, 1 + grid * grid, D),
        "patch_embed.projection.weight": (D, 3, 16, 16), "patch_embed.projection.bias": (D,),
    }  # fmt: skip
    for n in range(depth):
        for name, *weight in (
            ("ln1", D), ("attn.qkv", 3 * D, D), ("attn.proj", D, D), ("ln2", D), ("ffn.layers.0.0", 4 * D, D),
            ("ffn.layers.1", D, 4 * D),
        ):  # fmt: skip
            shapes[f"layers.{n}.{name}.weight"] = tuple(weight)
            shapes[f"layers.{n}.{name}.bias"] = (weight[0],)
    return shapes | {"ln1.weight": (D,), "ln1.bias": (D,)}


def sapiens_weights(width: int = 128, depth: int = 2, grid: int = 6) -> dict[str, torch.Tensor]:
    """Seeded weights under Sapiens' names: pictures of 16 `grid` pixels, heads of 64."""
    return {
        key: seeded_tensor(key, shape) + float(".ln" in f".{key}" and key.endswith("weight"))
        for key, shape in sapiens_shapes(width, depth, grid).items()
    }


def write_sapiens(path: Path, **shape: int) -> Path:
    """A clean file: the bare state dict."""
    torch.save(sapiens_weights(**shape), path)
    return path
