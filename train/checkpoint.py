"""Checkpoints that are whole or not there: written beside, verified, renamed, and only then pointed to.

A run's folder: `checkpoints/step-00000120/` holds DeepSpeed's shards, one `state-rank<r>.pt` a rank with its random
generators, `ema.pt` where a mean is kept, and `meta.json` with the hash of every file; `checkpoints/LATEST` names the
newest whole one and changes last.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from avatars.errors import UserError
from avatars.files import write_whole
from train.config import CheckpointConfig
from train.endings import SharedFailure
from train.weights import Ema
from train.writing import BackgroundWriter, digest

__all__ = ["Checkpoints", "Meta", "damage", "latest", "load", "newest_first"]

SCHEMA = 2
FOLDER = "checkpoints"
POINTER = "LATEST"
UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
BEST = {"psnr": max, "ssim": max, "lpips": min}


@dataclass(frozen=True)
class Meta:
    """What a checkpoint is of, beside its tensors.

    Attributes:
        step: optimiser steps that were taken.
        examples: the plan's cursor: examples that all ranks together have consumed.
        world_size: number of ranks that wrote it.
        batch: examples of an optimiser step over all ranks.
        config: the resolved recipe.
        data: fingerprint of the shards' manifest.
        expression_kind: the kind of expression code in the shards.
        versions: of headsplat, its git commit, torch, deepspeed and the rest.
        tracking_run: MLflow's id of the run, or None.
        validation: the metrics of this step, where it was validated.
        files: bytes and sha256 by name of every file beside this one.
    """

    step: int
    examples: int
    world_size: int
    batch: int
    config: dict[str, Any]
    data: str
    expression_kind: str
    versions: dict[str, str]
    tracking_run: str | None
    validation: dict[str, float] = field(default_factory=dict)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    schema: int = SCHEMA


def newest_first(run: Path) -> Iterator[tuple[Path, Meta | str]]:
    """A run's finished checkpoints from the one that `LATEST` names backwards, each with its meta or what is wrong."""
    pointer = run / FOLDER / POINTER
    if not pointer.is_file():
        return
    last = pointer.read_text().strip()
    folders = {folder.name for folder in finished(run / FOLDER)} | {last}
    for name in sorted((name for name in folders if name <= last), reverse=True):
        folder = run / FOLDER / name
        try:
            values = json.loads((folder / "meta.json").read_text())
            if values.get("schema") != SCHEMA:
                yield folder, f"its meta.json has schema {values.get('schema')}; this version reads {SCHEMA}"
            else:
                yield folder, Meta(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            yield folder, f"its meta.json cannot be read ({error})"


def latest(run: Path) -> tuple[Path, Meta] | None:
    """The newest checkpoint of a run with a readable meta.json, or None where there is none; files are not hashed."""
    for folder, meta in newest_first(run):
        if isinstance(meta, Meta):
            return folder, meta
    return None


def damage(folder: Path, meta: Meta) -> str | None:
    """What is wrong with a checkpoint's files, or None when every one is there with its size and hash."""

    def look(entry: tuple[str, tuple[int, str]]) -> str | None:
        name, (size, expected) = entry
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        return None if digest(path) == expected else f"{name} has changed since it was written"

    with ThreadPoolExecutor(4) as pool:
        return next((wrong for wrong in pool.map(look, meta.files.items()) if wrong), None)


class Checkpoints:
    """Writes a run's checkpoints beside its steps and keeps those that the policy says.

    `begin` copies the state and returns; threads of all ranks write. Every step the ranks tell each other who is done
    (`busy`, `failed`); when all are, `settle` makes the checkpoint valid. All methods but these two are collective.
    """

    def __init__(self, engine: Any, ema: Ema | None, run: Path, policy: CheckpointConfig) -> None:
        self.engine, self.ema, self.run, self.policy = engine, ema, run, policy
        self.writer = BackgroundWriter()
        engine.checkpoint_engine = self.writer
        self._pending: Meta | None = None
        self._failure = ""

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written; the same on all ranks."""
        return self._pending is not None

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self.writer.busy

    def begin(self, meta: Meta) -> None:
        """Starts a checkpoint; one that is still being written is finished first.

        Raises:
            SharedFailure: no space, or the folder is not writable. The checkpoints before this one are untouched.
        """
        if self.pending:
            self.settle()
        rank = dist.get_rank()
        root = self.run / FOLDER
        partial = root / f"step-{meta.step:08d}.partial"
        self._require_space()
        self._together(lambda: _make_empty(root, partial) if rank == 0 else None, meta)
        mean = self.ema.whole() if self.ema else None
        self.engine.save_checkpoint(
            str(root), tag=partial.name, save_latest=False, client_state=dict(UNIVERSAL)
        )
        self.writer.save(_random_state(), str(partial / f"state-rank{rank}.pt"))
        if rank == 0 and mean is not None:
            self.writer.save(mean, str(partial / "ema.pt"))
        self._pending = meta

    def settle(self) -> Path:
        """Waits for what is being written and makes it the newest checkpoint.

        Raises:
            SharedFailure: a rank could not write. The checkpoints before this one are untouched.
        """
        meta = self._pending
        assert meta is not None, "no checkpoint was begun"
        self._pending = None
        root = self.run / FOLDER
        name = f"step-{meta.step:08d}"
        reports: list[Any] = [None] * dist.get_world_size()
        own: dict[str, tuple[int, str]] = {}

        def collect() -> None:
            own.update(self.writer.collect())

        self._together(collect, meta)
        dist.all_gather_object(reports, own)
        files = {file: told for report in reports for file, told in report.items()}
        if dist.get_rank() == 0:
            self._together(lambda: _publish(root, name, replace(meta, files=files)), meta)
            self.writer.later(lambda: prune(root, self.policy))
        else:
            self._together(lambda: None, meta)
        return root / name

    def close(self) -> None:
        """Ends the writing thread, after what it still has to do."""
        self.writer.close()

    def _together(self, work: Callable[[], None], meta: Meta) -> None:
        """Does a rank's part; when any rank's part fails, all ranks raise the same sentence."""
        failures: list[Any] = [None] * dist.get_world_size()
        try:
            work()
            own = ""
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch reports a full disk as a RuntimeError of its zip writer
            own = str(error)
        dist.all_gather_object(failures, own)
        failure = next((told for told in failures if told), "")
        if failure:
            partial = self.run / FOLDER / f"step-{meta.step:08d}.partial"
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            before = latest(self.run)
            rest = f"the one of step {before[1].step} is whole" if before else "there is none before it"
            raise SharedFailure(
                f"The checkpoint of step {meta.step} could not be written to {self.run / FOLDER} ({failure}); {rest}. "
                "Free space there and run the same command again."
            )

    def _require_space(self) -> None:
        """Refuses before anything is written."""
        # Weights, float32 weights and two moments; ZeRO spreads the last three over ranks of one disk. The mean adds 4.
        each = 20 if self.ema else 16
        need = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters()) * each + 2**20
        self.run.mkdir(parents=True, exist_ok=True)
        free = [shutil.disk_usage(self.run).free]
        dist.broadcast_object_list(free, src=0)
        if free[0] < need:
            before = latest(self.run)
            rest = (
                f"The checkpoint of step {before[1].step} is whole"
                if before
                else "There is no checkpoint yet"
            )
            raise SharedFailure(
                f"No space for a checkpoint in {self.run}: it takes up to {need / 2**20:.0f} MiB and "
                f"{free[0] / 2**20:.0f} MiB are free. {rest}; free space and run the same command again."
            )


def load(engine: Any, folder: Path, meta: Meta, ema: Ema | None) -> None:
    """Puts weights, optimiser, running mean and random generators back; every rank must call it.

    Args:
        engine: built with `load_universal` where the number of ranks has changed at ZeRO 1 and above.
        folder: the checkpoint, or its universal form beside it.
        meta: what the checkpoint is of.
        ema: the mean to fill in, which starts from the weights where the checkpoint has none.

    Raises:
        UserError: its files cannot be read.
    """
    states = folder.with_suffix("")  # a universal form has the suffix `.universal`
    try:
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if ema is not None and "ema.pt" in meta.files:
            ema.load(torch.load(states / "ema.pt", weights_only=True))
        elif ema is not None:
            ema.restart()
        state = torch.load(states / f"state-rank{dist.get_rank() % meta.world_size}.pt", weights_only=True)
    except (OSError, RuntimeError, AttributeError, EOFError, KeyError) as error:
        raise UserError(
            f"{folder} cannot be read ({error}). Name an older one in {folder.parent / POINTER}."
        ) from error
    _set_random_state(state)


def finished(root: Path) -> list[Path]:
    """Folders of checkpoints that were made valid, oldest first."""
    return sorted(folder for folder in root.glob("step-*") if folder.is_dir() and not folder.suffix)


def prune(root: Path, policy: CheckpointConfig) -> None:
    """Deletes all but the newest `keep`, every `keep_every` steps and the best by the validation's metric."""
    last = (root / POINTER).read_text().strip()
    everything = finished(root)
    # What is newer than the newest belongs to a past that a run went back on.
    folders = [folder for folder in everything if folder.name <= last]
    kept = set(folders[-policy.keep :])
    values: dict[Path, float] = {}
    for folder in folders:
        try:
            values_of = json.loads((folder / "meta.json").read_text())
        except (OSError, ValueError):
            continue
        if policy.keep_every and values_of["step"] % policy.keep_every == 0:
            kept.add(folder)
        if policy.best in values_of["validation"]:
            values[folder] = values_of["validation"][policy.best]
    if values:
        kept.add(BEST[policy.best](values, key=lambda folder: values[folder]))
    for folder in everything:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _make_empty(root: Path, partial: Path) -> None:
    for stale in [*root.glob("*.partial"), *root.glob("*.universal")]:
        shutil.rmtree(stale)
    partial.mkdir(parents=True)


def _publish(root: Path, name: str, meta: Meta) -> None:
    """Makes a written checkpoint valid: meta.json, then its name, then the pointer."""
    partial, final = root / f"{name}.partial", root / name
    write_whole(partial / "meta.json", json.dumps(asdict(meta), indent=1) + "\n")
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    write_whole(root / POINTER, name + "\n")


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
