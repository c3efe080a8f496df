"""Avat3r: driving from the cache against the whole forward, creation by part, and what a training step costs.

    python benchmarks/avat3r.py [--out FOLDER] [--rounds 15]

Arithmetic is counted at every recipe's scale on the meta device. Times are measured at the scale of `avat3r-cpu`
where there is no CUDA device, and at the paper's where there is one; random weights and pictures, half of the pixels
kept.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from record import arguments, medians, write
from torch.utils.flop_counter import FlopCounterMode

from avatars.avat3r import Avat3r, Avat3rAvatar, Avat3rConfig, Views
from avatars.avat3r.model import activate
from avatars.cameras import Cameras
from avatars.rasterize import rasterize
from launch.recipes import RECIPES, find_recipe
from train.flops import measured_peak

EXPRESSIONS = 8


def random_views(config: Avat3rConfig, n: int, device: str) -> Views:
    """Pictures from cameras side by side before a cloud of points; half of the pixels are trusted."""
    size = config.size
    K = torch.tensor([[3.5 * size, 0, size / 2], [0, 3.5 * size, size / 2], [0, 0, 1]], device=device)
    target = torch.zeros(3, device=device)
    centres = torch.tensor([[0.3 * i, 0.0, 1.1] for i in range(n)], device=device)
    cameras = Cameras.look_at(K, centres, target, torch.tensor([0.0, 1.0, 0.0], device=device))
    confidence = 1 + 2 * (torch.rand(1, n, 1, size, size, device=device) > 0.5).float()
    return Views(
        images=torch.rand(1, n, 3, size, size, device=device),
        K=cameras.K[None],
        world_to_camera=cameras.world_to_camera[None],
        positions=torch.randn(1, n, 3, size, size, device=device) * 0.05,
        confidence=confidence,
        features=torch.randn(1, n, config.feature_dim, 64, 64, device=device) if config.feature_dim else None,
    )


def counted(config: Avat3rConfig, n: int = 4) -> dict[str, float]:
    """GFLOP of one creation, one driven expression and the whole forward, a multiply-add counted as two."""
    with torch.device("meta"):
        model, views = Avat3r(config), random_views(config, n, "meta")
        parts = {}
        with FlopCounterMode(display=False) as counter:
            tokens = model.encode(views)
        parts["encode_gflop"] = counter.get_total_flops() / 1e9
        with FlopCounterMode(display=False) as counter:
            model.decode(tokens, torch.empty(1, config.expression_dim))
        parts["decode_gflop"] = counter.get_total_flops() / 1e9
    whole = parts["encode_gflop"] + parts["decode_gflop"]
    return {name: round(value, 3) for name, value in parts.items()} | {
        "parameters_million": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "whole_over_cached": round(whole / parts["decode_gflop"], 3),
    }


@torch.no_grad()
def measured(config: Avat3rConfig, device: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Milliseconds of creation by part, of one picture driven from the cache and of the whole forward."""
    torch.manual_seed(0)
    model = Avat3r(config).to(device, dtype).eval()
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, std=0.02)
    views = random_views(config, 4, device)
    camera = Cameras(views.K[0, :1], views.world_to_camera[0, :1])
    codes = torch.rand(EXPRESSIONS, config.expression_dim, device=device)
    size = (config.size, config.size)
    tokens, anchors = model.encode(views), model.anchors(views).kept(0)
    avatar = Avat3rAvatar(model, tokens, anchors, views.images[0], camera, "benchmark", {})
    raw = model.decode(tokens, codes[:1])[0]
    gaussians = activate(raw, anchors, config.position_unit)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def waited(action: Any) -> Any:
        return lambda: (action(), wait())

    without_self_attention = copy.copy(model)
    without_self_attention.config = replace(
        config, interleave=True
    )  # its `encode` stops before any attention
    actions = {
        "create_tokens": lambda: without_self_attention.encode(views),
        "create_self_attention": lambda: model.encode(views),  # with the tokens, taken off below
        "create_anchors": lambda: model.anchors(views).kept(0),
        "drive_network": lambda: model.decode(tokens, codes[:1]),
        "drive_activation": lambda: activate(raw, anchors, config.position_unit),
        "drive_rasterize": lambda: rasterize(gaussians, camera, size),
        "drive_picture": lambda: rasterize(avatar.gaussians(codes[0]), camera, size),
        "drive_batch": lambda: [rasterize(g, camera, size) for g in avatar.sequence(codes)],
        "whole_picture": lambda: rasterize(model(views, codes[:1]).gaussians(0), camera, size),
    }
    seconds = medians({name: waited(action) for name, action in actions.items()}, rounds)
    seconds["create_self_attention"] -= seconds["create_tokens"]
    seconds["drive_batch"] /= EXPRESSIONS
    flops = counted(config)["decode_gflop"] * 1e9
    return {
        **{f"{name}_ms": round(1e3 * value, 3) for name, value in seconds.items()},
        "gaussians": len(anchors.pixels),
        "whole_over_cached": round(seconds["whole_picture"] / seconds["drive_picture"], 3),
        "drive_fps": round(1 / seconds["drive_picture"], 2),
        "drive_batch_fps": round(1 / seconds["drive_batch"], 2),
        "drive_network_share_of_peak": round(
            flops / seconds["drive_network"] / measured_peak(device, dtype), 3
        ),
    }


def main() -> None:
    """Counts, measures, writes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=15, help="repetitions of which the median is taken")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = "avat3r" if device == "cuda" else "avat3r-cpu"
    networks = [name for name in RECIPES if name.startswith("avat3r")]
    content: dict[str, Any] = {
        "what": "Avat3r, 4 views: arithmetic of every recipe; times of one",
        "counted": {name: counted(find_recipe(name).model) for name in networks},
        "timed_recipe": recipe,
        "threads": torch.get_num_threads(),
    }
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        content[name] = measured(find_recipe(recipe).model, device, dtype, options.rounds)
        content[name]["peak_gflops"] = round(measured_peak(device, dtype) / 1e9, 1)
    write("avat3r", content, ("torch", "gsplat"), options.out)


if __name__ == "__main__":
    main()
