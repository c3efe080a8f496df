"""How much arithmetic a training step is, and how fast this machine could do it at best."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from train.task import Task

__all__ = ["measured_peak", "step_flops"]

MATRIX = {
    "cpu": 1024,
    "cuda": 8192,
}  # sides: large enough for full speed, small enough for a fraction of a second
REPETITIONS = 5


def step_flops(task: Task, *, recompute: bool = False) -> float:
    """Floating point operations of one training example, forward and backward, a multiply-add counted as two.

    Counted by torch's `FlopCounterMode` on the meta device, so that the paper's scale takes no memory. Matrix
    products, convolutions and attention are counted. The rasterizer, the picture losses and pointwise work are not:
    they are no matrix products, and how much the rasterizer does depends on the picture.

    Args:
        task: the model and its loss.
        recompute: count what activation checkpointing computes a second time, too. Without it this is the numerator
            of the usual model-FLOPs utilisation.
    """
    with FlopCounterMode(display=False) as counter:
        task.dry_pass(recompute=recompute).backward()
    return float(counter.get_total_flops())


@cache
def measured_peak(device: str, dtype: torch.dtype) -> float:
    """Floating point operations a second of large matrix products, the best of a few, measured once a process.

    Args:
        device: "cpu" (with the threads that this process uses) or "cuda".
        dtype: of the factors.
    """
    side = MATRIX[torch.device(device).type]
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(REPETITIONS + 1):  # the first one warms up
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / best


def synchronize(device: str) -> None:
    """Waits until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
