"""Starts real training commands for tests, and reads what they logged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.preflight import free_port
from launch.training import rank_environment

ROOT = Path(__file__).resolve().parent.parent


def start(
    shards: Path, run: Path, *overrides: str, ranks: int | None = 2, recipe: str = "avat3r-tiny"
) -> subprocess.Popen:
    """`headsplat train` in a process group of its own.

    Several ranks start under the real DeepSpeed launcher; None is one process without a launcher.
    """
    words = ["train", recipe, "--data", str(shards), "--run", str(run), *overrides]
    return start_module("launch.cli", words, ranks)


def start_several(orders: list[list[str]], file: Path, ranks: int | None = 2) -> subprocess.Popen:
    """Several trainings in one start of the ranks; an order is the command line after `headsplat train`."""
    file.write_text(json.dumps(orders))
    return start_module("tests.several", [str(file)], ranks)


def start_module(module: str, words: list[str], ranks: int | None) -> subprocess.Popen:
    """`python -m module` as one rank or several."""
    command = [sys.executable, "-m"]
    if ranks is not None:
        command = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "error"]
        command += ["--num_gpus", str(ranks), "--master_port", str(free_port(None))]
        command += ["--no_local_rank", "--module"]
    return subprocess.Popen(
        [*command, module, *words],
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


def wait_until(process: subprocess.Popen, done: Callable[[], bool]) -> None:
    """Returns when `done` says so, or when the process has ended."""
    while process.poll() is None and not done():
        time.sleep(0.05)


def kill_group_when(process: subprocess.Popen, file: Path) -> None:
    """kill -9 of the whole process group as soon as `file` is there."""
    while process.poll() is None and not file.exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
