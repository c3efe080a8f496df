"""pyiqa's PSNR + SSIM on the pictures of benchmarks/metrics.py, run by it in pyiqa's own environment.

    python benchmarks/peers/metrics_peer.py IN.npz OUT.json ROUNDS

The environment: see metrics-requirements.txt beside this file.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pyiqa
import torch

given = np.load(sys.argv[1])
prediction, target = (torch.from_numpy(given[name]) for name in ("prediction", "target"))
torch.set_num_threads(int(given["threads"]))
psnr, ssim = pyiqa.create_metric("psnr", device="cpu"), pyiqa.create_metric("ssimc", device="cpu")
seconds = []
for _ in range(int(sys.argv[3])):
    started = time.perf_counter()
    with torch.no_grad():
        values = {"psnr": psnr(prediction, target), "ssim": ssim(prediction, target)}
    seconds.append(time.perf_counter() - started)
result = {"seconds": statistics.median(seconds), "version": pyiqa.__version__}
result |= {name: value.flatten().tolist() for name, value in values.items()}
Path(sys.argv[2]).write_text(json.dumps(result))
