"""What every benchmark does alike: a result file with commit, hardware and versions beside the numbers."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.provenance import git_commit, hardware

__all__ = ["arguments", "machine", "medians", "write"]

RESULTS = Path(__file__).resolve().parent.parent / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the option that every benchmark has: where the result goes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result file")
    return parser


def machine() -> str:
    """The part of a result file's name that says where it was measured: the CUDA device, or processor and cores."""
    import torch

    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return f"{platform.machine()}-{os.cpu_count()}cores"


def medians(actions: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Median wall seconds of each action; they take turns, so that other load on the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warm_up + rounds):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def write(name: str, content: dict[str, Any], packages: Sequence[str], out: Path = RESULTS) -> Path:
    """Writes `<name>-<machine>.json` and prints where it is.

    Args:
        name: what was measured, in a word.
        content: the numbers; units in their names.
        packages: whose versions matter to them.
        out: folder.
    """
    described = {
        **content,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "hardware": hardware(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{machine()}.json"
    path.write_text(json.dumps(described, indent=1) + "\n")
    print(path)
    return path
