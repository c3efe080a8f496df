"""Which program, on which machine, made a number."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["git_commit", "hardware", "versions"]

PACKAGES = (
    "headsplat",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "deepspeed",
    "gsplat",
    "webdataset",
    "ray",
    "mlflow",
    "lpips",
    "facenet-pytorch",
)


@cache
def git_commit() -> str:
    """The commit that is running, with "+changes" when the tree differs from it; "unknown" outside git."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def versions() -> dict[str, str]:
    """Versions of headsplat's own code and of the packages that numbers depend on."""
    found = {"commit": git_commit(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def hardware() -> str:
    """One line: the accelerators, or the processor with its usable cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"
