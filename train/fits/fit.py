"""Fitting an avatar to one person: a loop that fits on a screen and knows only a `Fit`.

A `Fit` is to one subject what a `Task` is to the trainer: it is built from the person's pictures, takes
steps, says what has to be saved to go on later, and gives the avatar at the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from avatars.errors import UserError
from avatars.inputs import InputSet
from avatars.method import Avatar
from train.fits.pictures import FitPictures

__all__ = ["Fit", "FitConfig", "FitProgress", "Fitted", "fit_key", "forget_checkpoint", "run_fit"]

CHECKPOINT = "checkpoint.pt"
SCHEMA = 1

FitProgress = Callable[[int, int, dict[str, float]], None]
"""Called after every step with the steps done, the steps in all, and the step's losses."""


@dataclass(frozen=True)
class Fitted:
    """A finished fit."""

    avatar: Avatar
    seconds: float
    """Wall time of building and stepping, what came before an interruption included."""
    resumed_from: int
    """Step of the checkpoint that it went on from, 0 for none."""
    notes: tuple[str, ...] = ()
    """What a reader of the result should know."""


class Fit(Protocol):
    """One person being fitted."""

    step: int
    """Steps taken."""
    notes: list[str]
    """What a reader of the result should know, such as a part of the loss that had to be left out."""

    def advance(self) -> dict[str, float]:
        """Takes one optimiser step and returns its losses; `loss` is the sum."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: parameters, optimiser, random state. Tensors and plain values only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        ...

    def avatar(self) -> Avatar:
        """The person as fitted so far."""
        ...


class FitConfig(Protocol):
    """A complete, named configuration of a fit: a frozen dataclass."""

    @property
    def method(self) -> str:
        """Name of the method, which is also the name of its folder of results."""
        ...

    @property
    def steps(self) -> int:
        """Optimiser steps of a whole fit."""
        ...

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints."""
        ...

    def build(self, inputs: InputSet | FitPictures, device: str = "cpu") -> Fit:
        """A fit at step 0.

        Raises:
            UserError: these pictures cannot be fitted by this method.
        """
        ...


def fit_key(config: FitConfig, inputs: Any = None) -> str:
    """A short hash that tells fits apart: same configuration, same inputs, same key.

    Args:
        config: the configuration, a dataclass.
        inputs: what identifies the pictures, JSON-able: hashes of shards, the subject, the input set.
    """
    if not is_dataclass(config) or isinstance(config, type):
        raise TypeError("a fit's configuration is a dataclass")
    text = json.dumps([SCHEMA, config.method, asdict(config), inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_fit(
    config: FitConfig,
    inputs: InputSet | FitPictures,
    folder: str | Path,
    *,
    key: str | None = None,
    device: str = "cpu",
    on_step: FitProgress | None = None,
) -> Fitted:
    """Fits one person, going on from the checkpoint in `folder` when it is of the same fit.

    A fit that goes on gives the same avatar, bit by bit on a CPU, as one that never stopped. The checkpoint
    stays until the caller has saved the avatar and calls `forget_checkpoint`.

    Args:
        config: what to fit and how.
        inputs: the person's pictures.
        folder: where the checkpoint is kept.
        key: identifies the fit; `fit_key(config)` when None. A checkpoint of another key is not used.
        device: where to compute.
        on_step: progress.

    Raises:
        UserError: the pictures cannot be fitted, or the loss is not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    key = key or fit_key(config)
    started = time.perf_counter()
    fit = config.build(inputs, device)
    spent, resumed_from = 0.0, 0
    saved = _read_checkpoint(folder / CHECKPOINT, key)
    if saved is not None:
        fit.load_state_dict(saved["fit"])
        spent, resumed_from = saved["seconds"], fit.step

    while fit.step < config.steps:
        losses = fit.advance()
        if not all(map(math.isfinite, losses.values())):
            raise UserError(
                f"The fit of {inputs.subject} got a loss that is not finite at step {fit.step}; its pictures "
                "or "
                "cameras are likely wrong, or a learning rate is too high."
            )
        if on_step is not None:
            on_step(fit.step, config.steps, losses)
        if fit.step % config.checkpoint_every == 0 or fit.step == config.steps:
            seconds = spent + time.perf_counter() - started
            _write_checkpoint(folder / CHECKPOINT, {"key": key, "seconds": seconds, "fit": fit.state_dict()})
    return Fitted(fit.avatar(), spent + time.perf_counter() - started, resumed_from, tuple(fit.notes))


def forget_checkpoint(folder: str | Path) -> None:
    """Removes the checkpoint once the result is written."""
    folder = Path(folder)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    for part in folder.glob("checkpoint.*.part"):  # of an attempt that was killed while it wrote
        part.unlink(missing_ok=True)


def _write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces the checkpoint in one move, so that a kill at any moment leaves the old one or the new one."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"The checkpoint {path} cannot be written ({error.strerror}); the older one is whole. Make room "
            "and run "
            "the same command again to go on."
        ) from error


def _read_checkpoint(path: Path, key: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(
            f"The checkpoint {path} cannot be read; delete it to fit again from the start."
        ) from error
    return state if state.get("key") == key else None
