"""Checkpoint files written beside the training: copied at once, written, read back and compared by a thread.

DeepSpeed's own decoupled engine needs its asynchronous I/O kernels, which are built against libaio and a pinned-memory
pool; this one needs nothing, works for every ZeRO stage, and costs the step one copy in memory.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch

__all__ = ["BackgroundWriter", "digest", "snapshot"]

CHUNK = 2**22


class BackgroundWriter:
    """Takes the place of a DeepSpeed engine's `checkpoint_engine`: `save` returns when its values are copied."""

    name = "headsplat"

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="headsplat-writer")
        self._jobs: dict[str, Future[tuple[int, str]]] = {}

    def save(self, state_dict: Any, path: str) -> None:
        """Copies the values to memory of the host and has them written."""
        self._jobs[path] = self._pool.submit(write_verified, snapshot(state_dict, {}), Path(path))

    @property
    def busy(self) -> bool:
        """Whether anything is still to be written."""
        return not all(job.done() for job in self._jobs.values())

    def later(self, work: Callable[[], None]) -> None:
        """Does something when all that was asked before is done."""
        self._pool.submit(work)

    def collect(self) -> dict[str, tuple[int, str]]:
        """Waits for the files of this checkpoint.

        Returns:
            Bytes and sha256 by file name.

        Raises:
            OSError, RuntimeError: one could not be written, or reads back otherwise.
        """
        jobs, self._jobs = self._jobs, {}
        return {Path(path).name: job.result() for path, job in jobs.items()}

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown()

    def load(self, path: str, map_location: Any = None) -> Any:
        """What `save` wrote. The files are the run's own: DeepSpeed's states hold more than tensors."""
        return torch.load(path, map_location=map_location, weights_only=False)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """As DeepSpeed's."""
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def create(self, info: Any) -> None:
        """As DeepSpeed's; there is nothing to prepare."""

    def commit(self, info: Any) -> bool:
        """As DeepSpeed's; `Checkpoints` finishes a checkpoint when all ranks have written theirs."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether a rank writes what all have alike."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Whether DeepSpeed itself should wait for a process of its own."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """Tensors are copied one by one."""
        return False

    def cleanup(self) -> None:
        """As DeepSpeed's."""


def snapshot(value: Any, seen: dict[int, torch.Tensor]) -> Any:
    """A copy that later steps do not touch: tensors on the host, containers new, the rest copied.

    Args:
        value: nested dicts, lists, tuples and tensors.
        seen: copies made so far, by the tensors' ids, so that a tensor that is there twice is copied once.
    """
    if isinstance(value, torch.Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.detach().to("cpu", copy=True).contiguous()
        return seen[id(value)]
    if isinstance(value, dict):
        made = value.__class__()
        for key, item in value.items():
            made[key] = snapshot(item, seen)
        return made
    if type(value) in (list, tuple):
        return type(value)(snapshot(item, seen) for item in value)
    return copy.deepcopy(value)


class Hashed:
    """A file that keeps the hash of what goes in."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Writes and hashes."""
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """To the operating system."""
        self.file.flush()


def write_verified(state: Any, path: Path) -> tuple[int, str]:
    """Writes a state, forces it to the disk, reads it back and compares.

    Returns:
        Bytes and sha256.

    Raises:
        OSError, RuntimeError: it could not be written, or what is on the disk is not what was written.
    """
    out = Hashed(path)
    with out.file:
        torch.save(state, cast(IO[bytes], out))
        out.flush()
        os.fsync(out.file.fileno())
        if hasattr(os, "posix_fadvise"):  # read back from the disk, as far as the system lets one ask for it
            os.posix_fadvise(out.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    meant = out.hash.hexdigest()
    if digest(path) != meant:
        raise OSError(f"{path} reads back otherwise than it was written")
    return path.stat().st_size, meant


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
