"""FlashAvatar on a CUDA device: a whole fit of many views, driven frames a second, and how close the fit comes.

    python benchmarks/gpu/fits.py [--out FOLDER] [--frames 500] [--size 512]

A synthetic person's 40 views of several expressions at 512 x 512 are fitted by `flashavatar-gpu-many`, whole,
and measured on held-out views and expressions. Then avatars of 64, 128 and 256 squared are driven, network, head and
rasterizer included, 50 warm-up and 500 timed frames, no picture copied off the device. Needs a CUDA device and says so
where there is none.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fits
from record import arguments, write

from shards import read_capture
from shards.synth import synthesize
from train.fits import RECIPES, FitSource
from train.fits.heldout import measure_held_out
from train.fits.pictures import from_capture

GOAL_FRAMES, GOAL_SECONDS = 1000, 120
"""A second at 128 squared and 512 x 512, and for a whole fit, on an H100-class device; the paper has 300 on a 3090."""


def measured(folder: Path, size: int, frames: int) -> dict[str, Any]:
    """All of it; the fit's time does not include reading pictures."""
    capture = synthesize(folder, subjects=[fits.PEOPLE[0]], timesteps=8, views=60, size=size, progress=False)[
        0
    ]
    source = FitSource("views", views=fits.VIEWS, held_views=fits.HELD_VIEWS, held_timesteps=0.25, size=size)
    pictures, held = from_capture(read_capture(capture), source)
    assert held is not None
    config: Any = RECIPES["flashavatar-gpu-many"]()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    fit = config.build(pictures, "cuda")
    while fit.step < config.steps:
        fit.advance()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {
        "what": f"FlashAvatar at {size} px: one whole fit to {len(pictures)} pictures, and driving",
        "goals": {"fit_seconds": GOAL_SECONDS, "frames_per_second": GOAL_FRAMES},
        "fit_seconds": round(seconds, 1),
        "fits_an_hour": round(3600 / seconds, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "notes": fit.notes,
        "held_out": measure_held_out(fit.avatar(), held, "cuda")[0],
        "driving": {
            f"uv{uv}_{size}px": fits.driving(
                fits.at_density(config, uv).build(pictures, "cuda").avatar(), pictures, 1.0, size, frames
            )
            for uv in fits.DENSITIES
        },
    }


def main() -> int:
    """Measures and writes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--frames", type=int, default=500, help="driven frames that are timed")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu/fits.py needs a CUDA device, and PyTorch sees none here.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), options.size, options.frames)
    write("fits-gpu", found, ("torch", "gsplat"), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
