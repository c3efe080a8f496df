"""How fast gsplat draws on a CUDA device, forward and backward, beside the CPU kernels in the same run.

    python benchmarks/gpu/rasterize.py [--out FOLDER] [--repeats 20]

The scenes are those of benchmarks/rasterize.py, projection included. The CUDA device is waited for before and after
each half of a step; its peak memory is that of one step. Needs a CUDA device and says so where there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from rasterize import FIELDS, SCENES, head, measure, processor  # noqa: E402

from avatars.cameras import Cameras  # noqa: E402
from avatars.gaussians import Gaussians  # noqa: E402
from avatars.rasterize import Rendering  # noqa: E402
from avatars.rasterize.cpu import rasterize_cpu  # noqa: E402
from avatars.rasterize.gsplat_backend import gsplat_problem, rasterize_gsplat  # noqa: E402


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long the device takes for what `work` starts, and its result."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def on_device(scene: tuple[Gaussians, Cameras, torch.Tensor], count: int, repeats: int) -> dict[str, float]:
    """Medians of gsplat for `count` cameras in one call, and without gradients, in milliseconds."""
    gaussians, cameras, weights = scene
    gaussians, cameras, weights = gaussians.to("cuda"), cameras[:count].to("cuda"), weights[:count].to("cuda")
    size, background = (weights.shape[-2], weights.shape[-1]), torch.ones(3, device="cuda")

    def draw(leaves: Gaussians) -> Rendering:
        return rasterize_gsplat(leaves, cameras, size, background)

    def step() -> tuple[float, float, float]:
        leaves = Gaussians(*(getattr(gaussians, name).clone().requires_grad_() for name in FIELDS))
        forward, rendering = seconds(lambda: draw(leaves))
        backward, _ = seconds(lambda: rendering.image.backward(weights))
        with torch.no_grad():
            alone, _ = seconds(lambda: draw(gaussians))
        return forward, backward, alone

    for _ in range(3):  # the allocator and the clocks settle
        step()
    torch.cuda.reset_peak_memory_stats()
    forward, backward, alone = zip(*(step() for _ in range(repeats)), strict=True)
    return {
        "forward_ms": round(1e3 * statistics.median(forward), 3),
        "backward_ms": round(1e3 * statistics.median(backward), 3),
        "both_ms": round(1e3 * statistics.median(map(sum, zip(forward, backward, strict=True))), 3),
        "forward_only_ms": round(1e3 * statistics.median(alone), 3),
        "peak_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20),
    }


def agreement(scene: tuple[Gaussians, Cameras, torch.Tensor]) -> dict[str, float]:
    """How far gsplat's picture is from the CPU's: largest difference, and the share of pixels above 1e-3."""
    gaussians, cameras, weights = scene
    size = (weights.shape[-2], weights.shape[-1])
    with torch.no_grad():
        there = rasterize_gsplat(gaussians.to("cuda"), cameras[:1].to("cuda"), size).image.cpu()
        here = rasterize_cpu(gaussians, cameras[:1], size).image
    difference = (there - here).abs().amax(1)
    return {
        "largest": difference.max().item(),
        "share_above_1e-3": (difference > 1e-3).double().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder for the result")
    parser.add_argument("--repeats", type=int, default=20, help="of every measurement")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    problem = gsplat_problem()
    if problem:
        sys.exit(f"gsplat cannot be measured here. {problem}")
    ready = time.perf_counter() - begin
    cores = os.cpu_count() or 1
    scenes = []
    for count, pixels in SCENES:
        scene = head(count, pixels)
        row: dict[str, Any] = {
            "gaussians": count,
            "pixels": pixels,
            "difference_from_the_cpu": agreement(scene),
        }
        for cameras in (1, 8):
            gsplat = on_device(scene, cameras, options.repeats)
            cpu = measure(rasterize_cpu, scene, cameras, cores, 5)
            row[f"cameras_{cameras}"] = {
                "gsplat": gsplat,
                "cpu": cpu,
                "cpu_over_gsplat": round(cpu["both_ms"] / gsplat["both_ms"], 1),
            }
        print(json.dumps(row), flush=True)
        scenes.append(row)
    device = torch.cuda.get_device_properties(0)
    content = {
        "what": "forward and backward of gsplat and of the CPU rasterizer with projection, medians in milliseconds",
        "scenes": scenes,
        "gsplat_ready_seconds": round(ready, 2),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "device": device.name,
        "device_memory_gib": round(device.total_memory / 2**30, 1),
        "compute_capability": f"{device.major}.{device.minor}",
        "processor": f"{processor()}, {cores} cores",
        "versions": {name: version(name) for name in ("torch", "gsplat")}
        | {"python": platform.python_version(), "cuda": torch.version.cuda},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = "-".join(device.name.lower().split())
    (options.out / f"rasterize-{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
