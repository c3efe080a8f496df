"""Checkpoints that are whole or not there: written beside, renamed, and only then pointed to.

A run's folder: `checkpoints/step-00000120/` holds DeepSpeed's shards, one `state-rank<r>.pt` a rank with its random
generators, and `meta.json`; `checkpoints/LATEST` names the newest whole one and changes last.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from avatars.errors import UserError
from avatars.files import write_whole
from train.endings import SharedFailure

__all__ = ["Meta", "latest", "load", "save"]

SCHEMA = 1
FOLDER = "checkpoints"
POINTER = "LATEST"


@dataclass(frozen=True)
class Meta:
    """What a checkpoint is of, beside its tensors.

    Attributes:
        step: optimiser steps that were taken.
        micro_batches: the plan's cursor: micro-batches that every rank has consumed.
        world_size: number of ranks that wrote it.
        config: the resolved recipe.
        data: fingerprint of the shards' manifest.
        versions: of headsplat, its commit, torch and deepspeed.
        tracking_run: MLflow's id of the run, or None.
    """

    step: int
    micro_batches: int
    world_size: int
    config: dict[str, Any]
    data: str
    versions: dict[str, str]
    tracking_run: str | None
    schema: int = SCHEMA


def latest(run: Path) -> tuple[Path, Meta] | None:
    """The newest whole checkpoint of a run, or None when there is none.

    Raises:
        UserError: the pointer names a checkpoint that is not there or cannot be read.
    """
    pointer = run / FOLDER / POINTER
    if not pointer.is_file():
        return None
    folder = run / FOLDER / pointer.read_text().strip()
    try:
        values = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{pointer} names {folder.name}, whose meta.json cannot be read ({error}). "
            f"Write the name of another folder beside it into {pointer}, or choose a new RUN."
        ) from error
    if values.get("schema") != SCHEMA:
        raise UserError(
            f"{folder / 'meta.json'} has schema {values.get('schema')}; this version reads {SCHEMA}."
        )
    return folder, Meta(**values)


def save(engine: Any, run: Path, meta: Meta, keep: int) -> Path:
    """Writes a checkpoint; every rank must call it.

    Args:
        engine: the DeepSpeed engine.
        run: the run's folder.
        meta: what it is of.
        keep: how many of the newest stay.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the disk is full or not writable. The checkpoint before this one is untouched.
    """
    rank = dist.get_rank()
    root = run / FOLDER
    name = f"step-{meta.step:08d}"
    partial = root / f"{name}.partial"
    _require_space(engine, run)
    try:
        if rank == 0:
            for stale in root.glob("*.partial"):
                shutil.rmtree(stale)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(root), tag=partial.name, save_latest=False)
        torch.save(_random_state(), partial / f"state-rank{rank}.pt")
        dist.barrier()
        if rank == 0:
            write_whole(partial / "meta.json", json.dumps(asdict(meta), indent=1) + "\n")
            final = root / name
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            write_whole(root / POINTER, name + "\n")
            _prune(root, keep)
        dist.barrier()
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its zip writer.
        shutil.rmtree(partial, ignore_errors=True)
        before = latest(run)
        rest = f"the one of step {before[1].step} is whole" if before else "there is none before it"
        raise UserError(
            f"The checkpoint of step {meta.step} could not be written to {root} ({error}); {rest}. "
            "Free space there and run the same command again."
        ) from error
    return root / name


def load(engine: Any, folder: Path, meta: Meta) -> None:
    """Puts weights, optimiser and random generators back; every rank must call it.

    Raises:
        UserError: another number of ranks wrote it, or its files cannot be read.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if meta.world_size != world_size:
        raise SharedFailure(
            f"{folder} was written by {meta.world_size} ranks and {world_size} are running; "
            f"start {meta.world_size} ranks, or train in a new RUN."
        )
    try:
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
        state = torch.load(folder / f"state-rank{rank}.pt", weights_only=True)
    except (OSError, RuntimeError, AttributeError, EOFError) as error:
        raise UserError(
            f"{folder} cannot be read ({error}). Name an older one in {folder.parent / POINTER}."
        ) from error
    _set_random_state(state)


def _require_space(engine: Any, run: Path) -> None:
    """Refuses before anything is written: ranks that met a full disk apart would wait for each other."""
    # Weights, float32 master weights and two moments at most; ZeRO shards the last three between ranks of one disk.
    need = sum(p.numel() for p in engine.module.parameters()) * 16 + 2**20
    run.mkdir(parents=True, exist_ok=True)
    free = [shutil.disk_usage(run).free]
    dist.broadcast_object_list(free, src=0)
    if free[0] < need:
        before = latest(run)
        rest = f"The checkpoint of step {before[1].step} is whole" if before else "There is no checkpoint yet"
        raise SharedFailure(
            f"No space for a checkpoint in {run}: it takes up to {need / 2**20:.0f} MiB and {free[0] / 2**20:.0f} MiB "
            f"are free. {rest}; free space and run the same command again."
        )


def _prune(root: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints."""
    folders = sorted(f for f in root.glob("step-*") if f.is_dir() and not f.name.endswith(".partial"))
    for folder in folders[:-keep]:
        shutil.rmtree(folder)


def _random_state() -> dict[str, Any]:
    """All generators of this rank, as tensors and plain numbers that load without unpickling code."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - libraries still draw from it
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": list(_flatten(random.getstate())),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _flatten(state: tuple[Any, ...]) -> tuple[Any, ...]:
    version, internal, gauss = state
    return version, list(internal), gauss


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
