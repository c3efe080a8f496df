"""What the foundation priors cost on a CUDA device: a 4-view set through DUSt3R and its alignment, and Sapiens.

    python benchmarks/gpu/priors.py [--out FOLDER] [--rounds 5]

Published sizes with seeded weights; medians after a warm-up, with the device waited for. The set is 12 ordered pairs
at 512 x 512 with every picture encoded once, and the alignment of pairs with one percent of noise (what seeded weights
say about pictures cannot be aligned). Needs a CUDA device and says so where there is none.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from priors import alignment_scene, dust3r, rounded, sapiens
from record import arguments, medians, write

from avatars.priors import align, pair_maps
from avatars.priors.features import SAPIENS

GOAL_SECONDS = 1.5
"""Of a set on an H100-class device; the paper's whole creation takes 12.3."""


@torch.no_grad()
def measured(action: Any, rounds: int) -> dict[str, float]:
    """Median seconds, and the device's peak memory."""

    def waited() -> None:
        action()
        torch.cuda.synchronize()

    torch.cuda.reset_peak_memory_stats()
    seconds = medians({"seconds": waited}, rounds)["seconds"]
    return {"seconds": seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def main() -> int:
    """Measures and writes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of which the median is taken")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu/priors.py needs a CUDA device, and PyTorch sees none here.", file=sys.stderr)
        return 1
    found: dict[str, Any] = {
        "what": "DUSt3R set of 4, alignment and Sapiens on a CUDA device",
        "goal_seconds": 1.5,
    }
    images = torch.rand(4, 3, 512, 512, device="cuda")
    maps, cameras, _, _ = alignment_scene(512, "cuda")
    found["alignment"] = measured(lambda: align(maps, cameras), options.rounds)
    found["alignment"]["parts"] = align(maps, cameras).seconds
    for precision in ("bf16", "fp32"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "bf16"
        model = dust3r(precision, "cuda")
        for batch in (1, 4, 12):
            found[f"dust3r_{precision}_batch_{batch}"] = measured(
                lambda model=model, batch=batch: pair_maps(model, images, batch), options.rounds
            )
        best = min(found[f"dust3r_{precision}_batch_{batch}"]["seconds"] for batch in (1, 4, 12))
        found[f"set_{precision}_seconds"] = best + found["alignment"]["seconds"]
        found[f"set_{precision}_below_goal"] = found[f"set_{precision}_seconds"] < GOAL_SECONDS
        del model
        for size in SAPIENS:
            network = sapiens(size, precision, "cuda")
            kind = next(network.parameters()).dtype
            for batch in (1, 8):
                pictures = torch.rand(batch, 3, 1024, 1024, device="cuda", dtype=kind)
                case = measured(
                    lambda network=network, pictures=pictures: network.forward_features(pictures),
                    options.rounds,
                )
                case["pictures_per_second"] = batch / case["seconds"]
                found[f"sapiens_{size}_{precision}_batch_{batch}"] = case
            del network
            torch.cuda.empty_cache()
    write("priors", rounded(found), ("torch", "timm"), options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
