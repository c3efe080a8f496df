"""Starts real training commands for tests, and reads what they logged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch.preflight import free_port
from launch.training import rank_environment

ROOT = Path(__file__).resolve().parent.parent


def start(shards: Path, run: Path, *overrides: str, ranks: int | None = 2) -> subprocess.Popen:
    """`headsplat train avat3r-tiny` in a process group of its own.

    Several ranks start under the real DeepSpeed launcher; None is one process without a launcher.
    """
    words = [sys.executable, "-m"]
    if ranks is not None:
        words = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "error"]
        words += ["--num_gpus", str(ranks), "--master_port", str(free_port(None))]
        words += ["--no_local_rank", "--module"]
    words += ["launch.cli", "train", "avat3r-tiny", "--data", str(shards), "--run", str(run), *overrides]
    return subprocess.Popen(
        words,
        env=rank_environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and everything that was printed."""
    output, _ = process.communicate()
    return process.returncode, output


def kill_group_when(process: subprocess.Popen, file: Path) -> None:
    """kill -9 of the whole process group as soon as `file` is there."""
    while process.poll() is None and not file.exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
