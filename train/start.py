"""What a training does before its first step. What one rank finds is told to the others, so that none waits in vain."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from avatars.errors import UserError
from shards import Manifest
from train import checkpoint
from train.config import TrainConfig
from train.endings import SharedFailure
from train.task import Task

__all__ = ["agreed_checkpoint", "claimed", "join_ranks", "single_process_environment", "usable"]


def join_ranks(config: TrainConfig) -> tuple[int, int]:
    """Makes this process a rank of the group that the environment describes.

    Returns:
        Rank and world size.
    """
    import deepspeed

    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        timeout=timedelta(seconds=config.guard.first_step_seconds),
        verbose=False,
    )
    return dist.get_rank(), dist.get_world_size()


def usable(data: Path, task: Task) -> Manifest:
    """The shards' manifest, when the task can be trained on them.

    Raises:
        SharedFailure: it cannot. Every rank looks and finds the same.
    """
    try:
        manifest = Manifest.load(data)
        task.check(manifest)
        return manifest
    except UserError as error:
        raise SharedFailure(str(error)) from error


def agreed_checkpoint(run: Path, config: TrainConfig, data: str) -> tuple[Path, checkpoint.Meta] | None:
    """Rank 0 looks for a checkpoint and tells the others, as ranks may see a shared disk differently.

    Raises:
        UserError: the run's checkpoint is of another model or of other data.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [checkpoint.latest(run)]
        except UserError as error:
            found = [SharedFailure(str(error))]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], SharedFailure):
        raise found[0]
    newest = found[0]
    if newest is None:
        return None
    meta = newest[1]
    if not config.same_model_as(meta.config):
        raise SharedFailure(
            f"{run} holds a checkpoint of another model (recipe {meta.config.get('recipe')}); choose another RUN=."
        )
    if meta.data != data:
        raise SharedFailure(
            f"{run} was trained on other shards than the ones given; choose another RUN= or the same DATA=."
        )
    return newest


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Keeps a second training out of the same folder; the lock goes with the process, however it dies.

    Raises:
        UserError: another run holds it. Every rank raises.
    """
    busy = [False]
    handle = None
    if dist.get_rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        handle = (run / "lock").open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = [True]
    dist.broadcast_object_list(busy, src=0)
    if busy[0]:
        raise SharedFailure(f"Another training is running in {run}; wait for it, or choose another RUN=.")
    try:
        yield
    finally:
        if handle is not None:
            handle.close()


def single_process_environment() -> None:
    """Lets `headsplat train` run without a launcher, as a world of one."""
    import socket

    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
