"""What the foundation priors cost: DUSt3R, its alignment, Sapiens and the precompute, with seeded weights.

    python benchmarks/priors.py [--out FOLDER] [--memory GIB] [--whole]

Networks have their published sizes and numbers out of a hat; each is measured in a process of its own, once, for its
peak memory. Sapiens above 0.3b is timed by four of its layers, all of which are alike, and scaled to its depth;
`--whole` runs all layers. What would need more than `--memory` is left out, and said so.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import arguments, write
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from avatars.priors import DUSt3R, align, pair_maps
from avatars.priors.checkpoints import DUSt3RConfig
from avatars.priors.dust3r import Linear
from avatars.priors.features import SAPIENS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

GIB = 2**30
SLICE = 4
"""Layers of the larger Sapiens that are timed."""
SHEET = {"pair_512_tflop": 2.57, "set_shared_tflop": 16.3, "set_unshared_tflop": 30.8}
"""Counted from the published code; ours has its 1 x 1 convolutions before the interpolations that follow them."""


def fill(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """Mild seeded numbers for a network that was built on the meta device."""
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 1 / math.sqrt(math.prod(parameter.shape[1:])) if parameter.ndim > 1 else 0.02
        parameter.data.normal_(0, scale, generator=generator)
        if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
            parameter.data.add_(1)
    return model.eval().requires_grad_(False)


def dust3r(precision: str, device: str) -> DUSt3R:
    """The published 512_dpt network with seeded weights."""
    with torch.device("meta"):
        model = DUSt3R(DUSt3RConfig())
        for layer in model.modules():
            if precision == "bf16" and isinstance(layer, Linear):
                layer.to(torch.bfloat16)
    filled = fill(model, device)
    assert isinstance(filled, DUSt3R)
    return filled


def sapiens(size: str, precision: str, device: str, layers: int | None = None) -> torch.nn.Module:
    """A published size of Sapiens v1, or its first layers, with seeded weights."""
    from timm.models.vision_transformer import VisionTransformer

    width, depth, heads = SAPIENS[size]
    with torch.device("meta"):
        model = VisionTransformer(
            img_size=1024, patch_size=16, embed_dim=width, depth=layers or depth, num_heads=heads, num_classes=0,
            global_pool="",
        ).to(torch.bfloat16 if precision == "bf16" else torch.float32)  # fmt: skip
    return fill(model, device)


def counted() -> dict[str, float]:
    """TFLOP of a pair and of a set of four, a multiply-add counted as two."""
    with torch.device("meta"):
        model, images = DUSt3R(DUSt3RConfig()), torch.empty(4, 3, 512, 512)
        with FlopCounterMode(display=False) as pair:
            model(images[:1], images[1:2])
        with FlopCounterMode(display=False) as shared:
            pair_maps(model, images, batch=4)
    found = {
        "pair_512_tflop": pair.get_total_flops() / 1e12,
        "set_shared_tflop": shared.get_total_flops() / 1e12,
        "set_unshared_tflop": 12 * pair.get_total_flops() / 1e12,
    }
    with torch.device("meta"):
        for size in SAPIENS:
            with FlopCounterMode(display=False) as counter:
                sapiens_meta(size).forward_features(torch.empty(1, 3, 1024, 1024))
            found[f"sapiens_{size}_tflop"] = counter.get_total_flops() / 1e12
    return {name: round(value, 3) for name, value in found.items()}


def sapiens_meta(size: str) -> Any:
    """The network without numbers."""
    from timm.models.vision_transformer import VisionTransformer

    width, depth, heads = SAPIENS[size]
    return VisionTransformer(
        img_size=1024, embed_dim=width, depth=depth, num_heads=heads, num_classes=0, global_pool=""
    )


def timed(action: Any) -> tuple[float, Any]:
    """Wall seconds and result."""
    start = time.perf_counter()
    with torch.no_grad():
        result = action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak() -> float:
    """The process's largest resident memory in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def measure_dust3r(precision: str) -> dict[str, float]:
    """A pair at 512 x 512 on this machine's processor, by part."""
    base, model, images = peak(), dust3r(precision, "cpu"), torch.rand(2, 3, 512, 512)
    cpu = time.process_time()
    encode, both = timed(lambda: model.encode(images))
    decode, _ = timed(lambda: model.decode(both[:1], both[1:]))
    return {
        "seconds": encode + decode,
        "cpu_seconds": time.process_time() - cpu,
        "encode_2_seconds": encode,
        "decode_seconds": decode,
        "peak_gib": peak() - base,
    }


def measure_sapiens(size: str, precision: str, whole: bool) -> dict[str, float]:
    """A picture at 1024 x 1024 on this machine's processor."""
    depth = SAPIENS[size][1]
    layers = depth if whole or size == "0.3b" else SLICE
    base, model = peak(), sapiens(size, precision, "cpu", layers)
    image = torch.rand(1, 3, 1024, 1024, dtype=next(model.parameters()).dtype)
    cpu = time.process_time()
    seconds, _ = timed(lambda: model.forward_features(image))  # type: ignore[operator]
    cpu = time.process_time() - cpu
    weights = sum(parameter.nbytes for parameter in sapiens_meta(size).parameters())
    weights = weights / 2 if precision == "bf16" else weights
    here = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "seconds": seconds * depth / layers,
        "cpu_seconds": cpu * depth / layers,
        "layers_timed": layers,
        "peak_gib": peak() - base + (weights - here) / GIB,
    }


def alignment_scene(size: int, device: str) -> tuple[Any, Any, Tensor, Tensor]:
    """Pairs with one percent of noise of a head before four cameras, as the tests have them."""
    from test_priors_alignment import head, ring, seen_in_pairs

    cameras = ring(size)
    points, masks = head(cameras, size)
    maps = seen_in_pairs(cameras, points, masks, noise=0.01, bend=0.02)
    moved = type(maps)(maps.pairs, maps.points.to(device), maps.confidence.to(device))
    return moved, cameras.to(device), points.to(device), masks.to(device)


def measure_alignment(device: str = "cpu") -> dict[str, Any]:
    """A set of four at 512 x 512: ours, and the published 300 steps of Adam by the time of a few."""
    from test_priors_alignment import adam, error_mm

    maps, cameras, points, masks = alignment_scene(512, device)
    align(maps, cameras)
    cpu = time.process_time()
    seconds, aligned = timed(lambda: align(maps, cameras))
    found: dict[str, Any] = {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        **{f"{part}_seconds": value for part, value in aligned.seconds.items()},
        "gauss_newton_steps": aligned.steps,
        "start_loss": aligned.start_loss,
        "loss": aligned.loss,
        "median_error_mm": error_mm(aligned, points, masks),
    }
    if device == "cpu":
        few = 3
        for threads in (1, 2):
            torch.set_num_threads(threads)
            start, cpu = time.perf_counter(), time.process_time()
            adam(maps, cameras, aligned.depth, iterations=few)
            found[f"adam_300_steps_{threads}_threads_seconds"] = (time.perf_counter() - start) / few * 300
            found[f"adam_300_steps_{threads}_threads_cpu_seconds"] = (time.process_time() - cpu) / few * 300
    return found


def measure_precompute() -> dict[str, Any]:
    """Pictures an hour through `headsplat priors`, DINOv2-small of its published size, for 1 and 2 workers."""
    from test_priors_features import dinov2_weights
    from tiny_captures import pack_tiny

    from avatars.priors.registry import find_network
    from cluster.priors import PriorRequest, precompute_priors

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = pack_tiny(folder, subjects=4, timesteps=6, views=8, size=64, input_sets=2)
        file = Path(folder) / "dinov2_vits14_pretrain.pth"
        torch.save(dinov2_weights(False), file)
        request = PriorRequest(features=find_network("dinov2-small", file))
        for workers in (1, 2):
            start = time.perf_counter()
            done = precompute_priors(
                shards,
                Path(folder) / f"out-{workers}",
                request,
                store=Path(folder) / f"store-{workers}",
                workers=workers,
            )
            seconds = time.perf_counter() - start
            found[f"workers_{workers}"] = {
                "pictures": done.pictures,
                "seconds_with_ray": seconds,
                "network_seconds_per_picture": done.seconds / done.pictures,
                "pictures_per_hour": 3600 * done.pictures / seconds,
                "pictures_per_hour_networks_alone": 3600 * workers * done.pictures / done.seconds,
            }
    return found


def needed_gib(case: str) -> float:
    """Memory that a case will take, roughly: weights, and activations of one picture."""
    kind, _, rest = case.partition(":")
    if kind == "dust3r":
        return 2.3 + 2.5
    if kind == "sapiens":
        size, precision = rest.split(":")
        parameters = {"0.3b": 0.31, "0.6b": 0.64, "1b": 1.14, "2b": 2.13}[size]
        return parameters * (2 if precision == "bf16" else 4) + 1.5
    return 2


def measure(case: str, whole: bool) -> dict[str, Any]:
    """One case, in this process."""
    kind, _, rest = case.partition(":")
    if kind == "dust3r":
        return dict(measure_dust3r(rest))
    if kind == "sapiens":
        size, precision = rest.split(":")
        return dict(measure_sapiens(size, precision, whole))
    return {"alignment": measure_alignment, "precompute": measure_precompute, "counted": counted}[kind]()


def rounded(value: Any) -> Any:
    """Four significant digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Every case in its own process, then the file."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--memory", type=float, default=8, help="GiB that one process may take")
    parser.add_argument("--whole", action="store_true", help="time all layers of every Sapiens")
    parser.add_argument("--case", help="measure this one and print it")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.whole)))
        return
    cases = ["counted", "alignment", "precompute", "dust3r:bf16", "dust3r:fp32"]
    cases += [f"sapiens:{size}:{precision}" for size in SAPIENS for precision in ("bf16", "fp32")]
    found: dict[str, Any] = {
        "what": "DUSt3R, Sapiens, alignment and precompute",
        "counted_by_the_sheet": SHEET,
    }
    for case in cases:
        if options.whole and needed_gib(case) > options.memory:
            found[case] = f"left out: it needs more than {options.memory:g} GiB"
            continue
        words = [sys.executable, __file__, "--case", case, *(["--whole"] if options.whole else [])]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        found[case] = (
            rounded(json.loads(done.stdout.splitlines()[-1]))
            if done.returncode == 0
            else f"failed: {done.stderr[-300:]}"
        )
        print(case, json.dumps(found[case]), flush=True)
    write("priors", found, ("torch", "timm"), options.out)


if __name__ == "__main__":
    main()
