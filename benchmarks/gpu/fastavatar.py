"""FastAvatar on a CUDA device: one picture to Gaussians by part, beside a FlashAvatar fit on the same device.

    python benchmarks/gpu/fastavatar.py [--out FOLDER] [--rounds 100]

What benchmarks/fastavatar.py measures, with networks, head and Gaussians on the device, which is waited for after every
part. dlib's network stays on the CPU. Needs a CUDA device and says so where there is none.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastavatar import speed
from record import arguments, write


def main() -> None:
    """Measures, writes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=100, help="repetitions that are timed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu/fastavatar.py needs a CUDA device and PyTorch found none.")
    with tempfile.TemporaryDirectory() as folder:
        content = speed(Path(folder), options.rounds, "cuda")
    write("fastavatar", content, ("torch", "timm", "gsplat"), options.out)


if __name__ == "__main__":
    main()
