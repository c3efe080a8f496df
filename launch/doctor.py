"""`headsplat doctor`: what works on this machine, what does not, and what to do about it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from launch.options import parse
from launch.workspace import Workspace

__all__ = ["doctor", "findings"]


def doctor(words: list[str]) -> None:
    """Prints one line a finding: what, whether it works, and why."""
    from dataclasses import make_dataclass

    parse(make_dataclass("DoctorOptions", []), words, "doctor")
    rows = list(findings())
    width = max(len(name) for name, _, _ in rows)
    for name, works, detail in rows:
        print(f"{'ok' if works else '--'}  {name:<{width}}  {detail}")


def findings() -> Iterator[tuple[str, bool, str]]:
    """(what, whether it works here, detail or remedy)."""
    import torch

    from eval.provenance import versions

    found = versions()
    yield "versions", True, ", ".join(f"{name} {number}" for name, number in found.items())
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield "device", True, f"CUDA: {names}"
    else:
        yield "device", True, f"no CUDA device; {cores} processor cores (recipe avat3r-cpu)"
    yield from rasterizers()
    compiler = shutil.which("c++") or shutil.which("g++")
    yield "compiler", compiler is not None, compiler or "install a C++ compiler: g++ or clang++"
    yield (
        "launcher",
        True,
        "deepspeed, one process a " + ("GPU" if torch.cuda.is_available() else "rank over gloo"),
    )
    yield "tracking", True, Workspace(Path("work")).tracking_uri
    yield from weights()


def rasterizers() -> Iterator[tuple[str, bool, str]]:
    """Which rasterizer draws on each kind of device, and why."""
    import torch

    from avatars.rasterize import backend_report

    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        report = backend_report(device)
        yield f"rasterizer on {device}", report.backend != "reference", f"{report.backend}: {report.reason}"


def weights() -> Iterator[tuple[str, bool, str]]:
    """Weights of metric networks: where they were found, or why their metrics are not available."""
    from eval.networks import available_weights

    yield from available_weights()
