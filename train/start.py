"""What a training does before its first step. What one rank finds is told to the others, so that none waits in vain."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed as dist

from avatars.errors import UserError
from shards import Manifest
from train import checkpoint
from train.config import TrainConfig
from train.endings import SharedFailure
from train.task import Task

__all__ = [
    "Resumption",
    "agreed_checkpoint",
    "check_precision",
    "claimed",
    "find_checkpoint",
    "first_micro_batch",
    "join_ranks",
    "shared",
    "single_process_environment",
    "usable",
]


def join_ranks(config: TrainConfig) -> tuple[int, int]:
    """Makes this process a rank of the group that the environment describes.

    Returns:
        Rank and world size.
    """
    import deepspeed

    # DeepSpeed compiles an operator here with the ninja that PATH finds. Another version of ninja takes what the
    # environment's has built for outdated and builds it again, minutes long, each time they take turns.
    own = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, os.environ.get("PATH", os.defpath)])
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        timeout=timedelta(seconds=config.guard.first_step_seconds),
        verbose=False,
    )
    rank = dist.get_rank()
    dist.barrier()  # by now every rank of this machine has opened the others' shared memory
    release_shared_memory(rank)
    return rank, dist.get_world_size()


def release_shared_memory(rank: int) -> None:
    """Takes the name of DeepSpeed's shared buffer away, so that its 66 MiB a rank go when the ranks do.

    DeepSpeed makes the buffer where all ranks are on one machine, never removes it, and so each training would take
    memory until the machine is started again. What is open stays usable without a name.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)


@contextmanager
def shared() -> Iterator[None]:
    """Around what every rank looks at and finds the same, so that one voice tells it.

    Raises:
        SharedFailure: in place of a UserError.
    """
    try:
        yield
    except UserError as error:
        raise SharedFailure(str(error)) from error


def usable(data: Path, task: Task) -> Manifest:
    """The shards' manifest, when the task can be trained on them.

    Raises:
        SharedFailure: it cannot.
    """
    with shared():
        manifest = Manifest.load(data)
        task.check(manifest)
        return manifest


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on.

    Attributes:
        folder: the checkpoint that is loaded; its universal form where the number of ranks has changed.
        meta: what it is of.
        universal: whether it is the universal form.
        remarks: what is told about the choice.
    """

    folder: Path
    meta: checkpoint.Meta
    universal: bool
    remarks: tuple[str, ...]


def agreed_checkpoint(run: Path, config: TrainConfig, data: str) -> Resumption | None:
    """Rank 0 looks for the newest whole checkpoint and tells the others, as ranks may see a shared disk differently.

    Raises:
        SharedFailure: the run's checkpoint is of another model or of other data, or none of them is whole.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [find_checkpoint(run, config, data, dist.get_world_size())]
        except UserError as error:
            found = [SharedFailure(str(error))]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], SharedFailure):
        raise found[0]
    return found[0]


def find_checkpoint(run: Path, config: TrainConfig, data: str, world_size: int) -> Resumption | None:
    """The newest checkpoint whose files are all as they were written; every damaged one gets a remark.

    Raises:
        UserError: see `agreed_checkpoint`.
    """
    remarks: list[str] = []
    for folder, meta in checkpoint.newest_first(run):
        wrong = meta if isinstance(meta, str) else checkpoint.damage(folder, meta)
        if isinstance(meta, str) or wrong:
            remarks.append(f"{folder} is damaged: {wrong}; taking the one before it")
            continue
        if not config.same_model_as(meta.config):
            raise UserError(
                f"{run} holds a checkpoint of another model (recipe {meta.config.get('recipe')}); choose another RUN=."
            )
        if meta.config.get("zero_stage") != config.zero_stage or meta.config["precision"] != config.precision:
            raise UserError(
                f"{folder} was written at --zero-stage {meta.config.get('zero_stage')} in {meta.config['precision']} "
                f"and the recipe has {config.zero_stage} in {config.precision}; "
                "go on as it was, or choose another RUN=."
            )
        if meta.data != data:
            raise UserError(
                f"{run} was trained on other shards than the ones given; choose another RUN= or the same DATA=."
            )
        moved = meta.world_size != world_size and config.zero_stage > 0
        if moved:
            folder = to_universal(folder)
        if meta.world_size != world_size:
            remarks.append(f"{meta.world_size} ranks wrote {folder.stem} and {world_size} go on")
        return Resumption(folder, meta, moved, tuple(remarks))
    if remarks:
        raise UserError(
            f"No checkpoint in {run / checkpoint.FOLDER} is whole: {remarks[0].partition(';')[0]}. "
            "Put it back from a copy, or choose another RUN=."
        )
    return None


def to_universal(folder: Path) -> Path:
    """A checkpoint in DeepSpeed's universal format, which any number of ranks reads, beside it.

    Raises:
        UserError: DeepSpeed cannot convert it.
    """
    from deepspeed.checkpoint import ds_to_universal

    out = folder.with_suffix(".universal")
    shutil.rmtree(out, ignore_errors=True)
    options = SimpleNamespace(
        input_folder=str(folder),
        output_folder=str(out),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    try:
        with redirect_stdout(io.StringIO()):
            ds_to_universal.main(options)
    except Exception as error:  # it raises whatever it meets
        raise UserError(
            f"{folder} cannot be converted for another number of ranks ({type(error).__name__}: {error}); start as "
            "many ranks as wrote it."
        ) from error
    (folder.parent / "latest_universal").unlink(missing_ok=True)
    return out


def first_micro_batch(meta: checkpoint.Meta | None, at_once: int) -> int:
    """The plan's cursor in micro-batches of all ranks together.

    Args:
        meta: of the checkpoint, None at the start.
        at_once: examples that all ranks compute at once.

    Raises:
        SharedFailure: the examples that were consumed are no whole number of these.
    """
    examples = meta.examples if meta else 0
    if examples % at_once:
        raise SharedFailure(
            f"The checkpoint has consumed {examples} examples, which is no multiple of the {at_once} that the ranks "
            "now compute at once; take a --data.micro-batch and a number of ranks that divide it."
        )
    return examples // at_once


def check_precision(config: TrainConfig) -> None:
    """Refuses arithmetic that the device lacks.

    Raises:
        UserError: bf16 on a GPU without it.
    """
    if config.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError(
            f"{torch.cuda.get_device_name()} has no bf16, which --precision asks for; take --precision fp32."
        )


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
    # DeepSpeed builds an operator with the first `ninja` on the path; another than the launcher's builds it anew.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
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
