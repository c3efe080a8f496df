"""A Ray for the length of a `with` block: the cluster's where there is one, a private one otherwise."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from avatars.errors import UserError

__all__ = ["ray_session"]

PREFIX = "headsplat-ray-"
OBJECT_STORE_BYTES = 100 * 2**20
"""Jobs and results are small dictionaries; Ray's default would take a third of the memory."""


@contextmanager
def ray_session(cpus: float, gpus: float = 0) -> Iterator[None]:
    """Connects to the cluster that `RAY_ADDRESS` names, or starts Ray on this machine only.

    A Ray that was already initialised is used and left alone. A private one listens on the loopback
    interface, asks for a token that exists only in this process and its children, keeps its files in a folder
    of its own, and is gone with that folder when the block ends, whatever ends it. Ray's own log lines stay
    off the terminal.

    Args:
        cpus: CPUs that a private Ray offers to actors.
        gpus: GPUs that a private Ray offers.

    Raises:
        UserError: `RAY_ADDRESS` names a cluster that does not answer or refuses the token, or Ray cannot start.
    """
    # Actors that ask for no GPU get CUDA_VISIBLE_DEVICES from us; this keeps Ray from warning about its own
    # default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    with _without_reports_on_workers(), ExitStack() as stack:
        if address := os.environ.get("RAY_ADDRESS"):
            stack.callback(ray.shutdown)
            _connect(address)
        else:
            folder = stack.enter_context(_private_folder())
            stack.callback(ray.shutdown)
            _start_private(cpus, gpus, folder)
        yield


def _connect(address: str) -> None:
    import ray

    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(
            f"The Ray cluster at RAY_ADDRESS={address} cannot be used: {str(error).splitlines()[0]} "
            "Check the address, and RAY_AUTH_MODE and RAY_AUTH_TOKEN where the cluster asks for a token."
        ) from error


def _start_private(cpus: float, gpus: float, folder: Path) -> None:
    import ray
    from ray._private import ray_constants

    # Ray turns token authentication on by itself; without a token here it writes one into the home directory.
    os.environ.setdefault("RAY_AUTH_TOKEN", _token())
    # Fixed default ports would make two runs on one machine collide.
    os.environ.setdefault("RAY_USE_RANDOM_PORTS", "1")
    # Ray replaces a loopback address by the machine's public one, except where it believes that it cannot
    # form clusters. There is no public setting for "this machine only" on Linux.
    cluster, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        ray.init(
            address="local",
            num_cpus=max(1, math.ceil(cpus)),
            num_gpus=math.ceil(gpus),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
        )
    except Exception as error:  # on a busy machine Ray gives up with a bare Exception
        raise UserError(
            f"Ray could not be started on this machine: {str(error).splitlines()[0]} Look for a lack of memory, of "
            "processor time, of processes or of space in the temporary folder."
        ) from error
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = cluster


@contextmanager
def _without_reports_on_workers() -> Iterator[None]:
    """Ray prints a paragraph for every worker that dies, whatever `log_to_driver` says; ours are in the results."""
    from ray._private import worker

    printing = worker.print_to_stdstream
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = printing


@lru_cache(maxsize=1)
def _token() -> str:
    """One token a process: Ray caches it, so that a second session must use the first one's."""
    return secrets.token_hex(32)


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder for Ray's files, gone at the end; also removes what drivers that were killed left."""
    # Ray's sockets lie 70 characters deeper, and the kernel takes at most 107 for a socket's path.
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > 16:
        parent = Path("/tmp")
    for left in parent.glob(f"{PREFIX}*"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder; the lock falls with its process, however that ends. OSError: another one holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
