"""Avat3r: driving from the cache against the whole forward, creation by part, and what a training step costs.

    python benchmarks/avat3r.py [--out FOLDER] [--rounds 15] [--step-rounds 5]

Arithmetic and memory are counted at every scale on the meta device. Creation and driving are measured at the scale of
`avat3r-cpu` where there is no CUDA device, and at the paper's where there is one; training steps at `avat3r-cpu` and
`avat3r-small`, and with a CUDA device at the paper's scale, too. Weights and pictures are random, half of the pixels
are kept.

A training step is forward, backward and AdamW of one rank in the recipe's precision, without data, DeepSpeed and other
ranks (`benchmarks/training.py` measures those). The eager baseline is the same network and loss as one would write them
first: float32, attention spelled out as softmax(q k' / sqrt(d)) v, and on the CPU also the plain-torch rasterizer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from record import arguments, medians, write
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from avatars.avat3r import Avat3r, Avat3rAvatar, Avat3rConfig, Views
from avatars.avat3r.model import activate
from avatars.cameras import Cameras
from avatars.rasterize import rasterize
from avatars.rasterize.reference import rasterize_reference
from launch.plan import measure_need, state_bytes
from launch.recipes import find_recipe
from train.config import TrainConfig
from train.flops import measured_peak, step_flops
from train.task import of_kind
from train.tasks import task_for

EXPRESSIONS = 8
SCALES = ("avat3r-cpu", "avat3r-small", "avat3r")


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

    def eager_picture() -> None:
        with as_written_first(rasterizer=False):
            rasterize(model(views, codes[:1]).gaussians(0), camera, size)

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
        "eager_picture": eager_picture,
    }
    seconds = medians({name: waited(action) for name, action in actions.items()}, rounds)
    seconds["create_self_attention"] -= seconds["create_tokens"]
    seconds["drive_batch"] /= EXPRESSIONS
    flops = counted(config)["decode_gflop"] * 1e9
    return {
        **{f"{name}_ms": round(1e3 * value, 3) for name, value in seconds.items()},
        "gaussians": len(anchors.pixels),
        "whole_over_cached": round(seconds["whole_picture"] / seconds["drive_picture"], 3),
        "eager_over_cached": round(seconds["eager_picture"] / seconds["drive_picture"], 3),
        "drive_fps": round(1 / seconds["drive_picture"], 2),
        "drive_batch_fps": round(1 / seconds["drive_batch"], 2),
        "drive_network_share_of_peak": round(
            flops / seconds["drive_network"] / measured_peak(device, dtype), 3
        ),
    }


def network_of(recipe: str) -> Avat3rConfig:
    """The network of a recipe."""
    return of_kind(find_recipe(recipe).model, Avat3rConfig)


def step_counted(config: TrainConfig) -> dict[str, float]:
    """GFLOP and GiB of one example's step on one rank, a multiply-add counted as two."""
    need = measure_need(config)
    states = state_bytes(need.parameters, config.precision, config.zero_stage, 1, bucket=0)
    counted = {
        "parameters_million": need.parameters / 1e6,
        "network_gflop": step_flops(task_for(config)) / 1e9,
        "network_gflop_with_recomputation": step_flops(task_for(config), recompute=True) / 1e9,
        "activations_gib": need.activations / 2**30,
        "weights_gradients_optimiser_gib": sum(states.values()) / 2**30,
    }
    return {name: round(value, 3) for name, value in counted.items()}


def random_batch(config: TrainConfig, device: str) -> dict[str, Any]:
    """One training example."""
    network, n = of_kind(config.model, Avat3rConfig), config.data.views
    rows = config.data.expressions
    inputs, targets = random_views(network, 4, device), random_views(network, n, device)
    batch: dict[str, Any] = {
        f"input_{name}": value for name, value in vars(inputs).items() if value is not None
    }
    return batch | {
        "expression": torch.rand(rows, network.expression_dim, device=device),
        "target_images": targets.images.expand(rows, -1, -1, -1, -1),
        "target_K": targets.K.expand(rows, -1, -1, -1),
        "target_world_to_camera": targets.world_to_camera.expand(rows, -1, -1, -1),
        "progress": 0.0,
    }


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `scaled_dot_product_attention` computes, with the matrix of all pairs in memory."""
    return ((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5).softmax(-1) @ v


@contextmanager
def as_written_first(rasterizer: bool) -> Iterator[None]:
    """Attention spelled out, and where asked for the plain-torch rasterizer."""
    with mock.patch.object(F, "scaled_dot_product_attention", attention_by_hand):
        if not rasterizer:
            yield
            return
        with mock.patch("train.tasks.avat3r.rasterize", rasterize_reference):
            yield


def step_measured(config: TrainConfig, device: str, rounds: int, baseline: bool) -> dict[str, Any]:
    """Milliseconds of a step and of its parts, the share of the peak, and the ratio to the eager baseline.

    Args:
        config: the recipe; activations are recomputed where it says so.
        device: where.
        rounds: of which the median is taken.
        baseline: whether to measure the eager baseline, too.
    """
    narrow = torch.bfloat16 if config.precision == "bf16" else torch.float32

    def made(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, Any]]:
        torch.manual_seed(0)
        module = task_for(config).build().to(device, dtype)
        for head in module.get_submodule("model.heads").children():
            torch.nn.init.normal_(head.weight, std=0.02)  # type: ignore[arg-type]
        # bf16 is trained through a float32 copy of the weights, as DeepSpeed does it.
        copies = [p.detach().float().requires_grad_() for p in module.parameters()]
        return module, torch.optim.AdamW(copies, fused=True), random_batch(config, device)

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
        loss, _ = module(batch)
        loss.backward()
        copies = optimizer.param_groups[0]["params"]
        for wide, parameter in zip(copies, module.parameters(), strict=True):
            wide.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(module.parameters()), copies)
        if device == "cuda":
            torch.cuda.synchronize()

    own = made(narrow)
    network = own[0].get_submodule("model")

    def network_alone(network: Any = network) -> None:
        maps = network(views_from(own[2]), own[2]["expression"])
        maps.raw.sum().backward()
        own[0].zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    actions = {"step": lambda: step(*own), "network": network_alone}
    if device == "cuda":  # on a CPU the compiler takes minutes and gains little
        compiled = torch.compile(network)
        actions["network_compiled"] = lambda: network_alone(compiled)
    if baseline:
        plain = made(torch.float32)

        def eager() -> None:
            with as_written_first(rasterizer=False):
                step(*plain)

        actions["eager_step"] = eager
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = medians(actions, rounds)
    if baseline and device == "cpu":

        def all_plain() -> None:
            with as_written_first(rasterizer=True):
                step(*plain)

        seconds |= medians({"eager_step_plain_rasterizer": all_plain}, 1, warm_up=0)
    result: dict[str, Any] = {f"{name}_ms": round(1e3 * value, 2) for name, value in seconds.items()}
    flops, peak = step_flops(task_for(config)), measured_peak(device, narrow)
    result |= {"precision": config.precision, "peak_gflops": round(peak / 1e9, 1)}
    for name in (name for name in actions if name != "eager_step"):
        result[f"{name}_share_of_peak"] = round(flops / seconds[name] / peak, 3)
    for name in ("eager_step", "eager_step_plain_rasterizer"):
        if name in seconds:
            result[f"{name}_over_step"] = round(seconds[name] / seconds["step"], 2)
    if device == "cuda" and not baseline:
        result["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return result


def views_from(batch: dict[str, Any]) -> Views:
    """The input views of a batch."""
    names = ("images", "K", "world_to_camera", "positions", "confidence", "features")
    return Views(**{name: batch.get(f"input_{name}") for name in names})


def measurements(description: str) -> tuple[dict[str, Any], Path]:
    """Everything that this benchmark counts and measures, and where to write it, as the command line says."""
    parser = arguments(description)
    parser.add_argument("--rounds", type=int, default=15, help="repetitions of which the median is taken")
    parser.add_argument("--step-rounds", type=int, default=5, help="the same for training steps")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = "avat3r" if device == "cuda" else "avat3r-cpu"
    content: dict[str, Any] = {
        "what": "Avat3r, 4 views: arithmetic and memory of three scales; creation and driving of one; training steps",
        "counted": {name: counted(network_of(name)) for name in SCALES},
        "timed_recipe": recipe,
        "threads": torch.get_num_threads(),
    }
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        content[name] = measured(network_of(recipe), device, dtype, options.rounds)
        content[name]["peak_gflops"] = round(measured_peak(device, dtype) / 1e9, 1)
    steps: dict[str, Any] = {}
    for name in SCALES:
        config = find_recipe(name)
        config = replace(config, data=replace(config.data, micro_batch=1))
        steps[name] = {"counted": step_counted(config)}
        if device == "cuda" or name != "avat3r":
            rounds = options.step_rounds if device == "cuda" or name == "avat3r-cpu" else 2
            steps[name][device] = step_measured(config, device, rounds, baseline=name == "avat3r-cpu")
            print(name, steps[name], flush=True)
    content["training_step"] = steps
    return content, options.out


def main() -> None:
    """Counts, measures, writes."""
    content, out = measurements(__doc__ or "")
    write("avat3r", content, ("torch", "gsplat"), out)


if __name__ == "__main__":
    main()
