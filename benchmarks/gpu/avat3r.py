"""Avat3r at the paper's scale on a CUDA device: what benchmarks/avat3r.py measures there, beside what it should reach.

    python benchmarks/gpu/avat3r.py [--out FOLDER] [--rounds 15] [--step-rounds 5]

The goals are for a device of the H100's class: 60 pictures a second driven from 4 views of 512 px (the paper has 7.9),
45 % of the measured bf16 matrix rate in the network's part of a training step, and 0.2 s for an avatar without the
position prior.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from avat3r import measurements
from record import write


def main() -> None:
    """Measures, compares, writes."""
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device and PyTorch found none.")
    content, out = measurements(__doc__ or "")
    half, step = content["bfloat16"], content["training_step"]["avat3r"]["cuda"]
    create = sum(half[f"create_{part}_ms"] for part in ("tokens", "self_attention", "anchors"))
    content["goals"] = {
        "drive_fps": {"reached": half["drive_fps"], "goal": 60},
        "network_share_of_peak": {"reached": step["network_share_of_peak"], "goal": 0.45},
        "network_compiled_share_of_peak": {"reached": step["network_compiled_share_of_peak"], "goal": 0.45},
        "create_seconds": {"reached": round(create / 1e3, 4), "goal_below": 0.2},
    }
    for name, values in content["goals"].items():
        print(name, values)
    write("avat3r", content, ("torch", "gsplat"), out)


if __name__ == "__main__":
    main()
