"""Fits of many people at once, one actor a slot, one folder of results a person."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from avatars.errors import UserError
from cluster.pool import Event, Job, Report, run_jobs
from cluster.session import ray_session

if TYPE_CHECKING:
    from rich.table import Table

    from train.fits import FitConfig

__all__ = ["FitResult", "Fits", "fit_subjects", "gpus_here", "read_result", "results_table", "slots_here"]

FORMAT = "headsplat-fit"
RESULT = "result.json"
OURS = {RESULT, "avatar.json", "avatar.safetensors"}
"""Files of a folder of results; besides them only `checkpoint*`, while a fit is unfinished."""


@dataclass(frozen=True)
class FitResult:
    """What became of one person."""

    method: str
    subject: str
    status: Literal["fitted", "kept", "failed"]
    """Fitted now, found finished from before, or failed."""
    folder: Path
    """Holds `avatar.json`, `avatar.safetensors` and `result.json`; `load_avatar(folder)` reads it."""
    result: dict[str, Any] = field(default_factory=dict)
    """The content of `result.json`: seconds, steps, device, losses, notes. Empty for a failure."""
    error: str | None = None
    """A sentence, for a failure."""
    attempts: int = 0
    """How often it was tried now."""


@dataclass(frozen=True)
class Fits:
    """What became of everybody."""

    results: list[FitResult]

    @property
    def failures(self) -> dict[str, str]:
        """Subject to reason, of those that could not be fitted."""
        return {result.subject: result.error for result in self.results if result.error is not None}


def fit_subjects(
    method: str | FitConfig,
    shards_folder: str | Path,
    out: str | Path,
    *,
    split: str = "heldout",
    subjects: Iterable[str] | None = None,
    input_set: int = 0,
    workers: int | None = None,
    cpus_per_actor: float = 1,
    gpus_per_actor: float | None = None,
    memory_per_actor: float | None = None,
    retries: int = 2,
    patience: float = 600,
    on_event: Callable[[Event], None] | None = None,
) -> Fits:
    """Fits one avatar a person and writes each to `out / <method> / <subject>`.

    May be called again at any time: what is finished with the same configuration and the same shards is kept,
    what was interrupted goes on from its checkpoint, what failed is tried anew. On several machines
    `shards_folder` and `out` must be on storage that all of them share.

    Args:
        method: a method ("flashavatar": its recipe for GPUs where actors have one, else the one for CPUs), a
            recipe
            in `train.fits.RECIPES`, or a configuration.
        shards_folder: packed shards.
        out: where results go.
        split: whose subjects: "train" or "heldout".
        subjects: only these.
        input_set: which of a subject's input sets to fit to.
        workers: actors at work at the same time; as many as the machine's CPUs (or GPUs) allow when None.
        cpus_per_actor: CPUs, and threads, of each.
        gpus_per_actor: GPUs of each, fractions allowed; 0 fits on the CPU. None is one where this machine has
            any, and 0 elsewhere.
        memory_per_actor: bytes that Ray reserves for each.
        retries: how often an attempt that ended in anything but a user's error is repeated.
        patience: seconds to wait for the cluster to give an actor.
        on_event: progress, called in this process: `Event.report` has "step", "steps" and "loss".

    Returns:
        One result a subject, in the order of the shards, failures included.

    Raises:
        UserError: no such recipe, shards, split or subject, or no room for an actor. What is wrong with one
            subject is in its result and stops nobody else.
    """
    from shards import open_shards
    from train.fits import fit_key

    if gpus_per_actor is None:
        gpus_per_actor = float(gpus_here() > 0)
    config = _configuration(method, gpus_per_actor > 0)
    shards = open_shards(shards_folder, split)
    chosen = _choose(shards.subjects, subjects, split)
    tell = on_event or (lambda event: None)

    found: dict[str, FitResult] = {}
    jobs = []
    for subject in chosen:
        folder = Path(out) / config.method / subject
        hashes = [shard.sha256 for shard in shards.manifest.split(split) if shard.subject == subject]
        key = fit_key(config, {"subject": subject, "input_set": input_set, "shards": hashes})
        try:
            kept = read_result(folder)
        except UserError as error:
            found[subject] = FitResult(config.method, subject, "failed", folder, error=str(error))
            tell(Event("failed", subject, {"error": str(error)}))
            continue
        if kept is not None and kept["config_hash"] == key:
            found[subject] = FitResult(config.method, subject, "kept", folder, kept)
            continue
        arguments = {
            "config": config,
            "shards": str(Path(shards_folder).resolve()),
            "split": split,
            "subject": subject,
            "input_set": input_set,
            "folder": str(folder.resolve()),
            "key": key,
            "gpu": gpus_per_actor > 0,
        }
        jobs.append(Job(subject, arguments))

    if jobs:
        here = min(len(jobs), workers or slots_here(cpus_per_actor, gpus_per_actor))
        with ray_session(here * cpus_per_actor, here * gpus_per_actor):
            slots = min(len(jobs), workers or slots_here(cpus_per_actor, gpus_per_actor))
            outcomes = run_jobs(
                fit_one,
                jobs,
                slots=slots,
                cpus=cpus_per_actor,
                gpus=gpus_per_actor,
                memory=memory_per_actor,
                retries=retries,
                patience=patience,
                on_event=on_event,
            )
        for outcome in outcomes:
            folder = Path(out) / config.method / outcome.name
            found[outcome.name] = FitResult(
                config.method,
                outcome.name,
                "fitted" if outcome.error is None else "failed",
                folder,
                outcome.value or {},
                outcome.error,
                outcome.attempts,
            )
    return Fits([found[subject] for subject in chosen])


def fit_one(arguments: dict[str, Any], report: Report) -> dict[str, Any]:
    """Fits one person, in an actor or anywhere else; the result file is written last and makes the fit
    finished.

    Args:
        arguments: as `fit_subjects` makes them.
        report: told "step", "steps" and "loss" after every step.

    Returns:
        The content of `result.json`.
    """
    import torch

    from eval.provenance import hardware
    from shards import open_shards
    from train.fits.fit import forget_checkpoint, run_fit

    config, folder = arguments["config"], Path(arguments["folder"])
    device = "cuda" if arguments["gpu"] and torch.cuda.is_available() else "cpu"
    if arguments["gpu"] and device == "cpu":
        raise UserError(
            "GPUs were asked for and PyTorch sees none in the actor; run `headsplat doctor` on its node."
        )
    subject = open_shards(arguments["shards"], arguments["split"]).read(arguments["subject"])
    number = arguments["input_set"]
    if number >= len(subject.input_sets):
        raise UserError(
            f"{arguments['subject']} has {len(subject.input_sets)} input sets and number {number} was asked "
            "for; "
            "numbers start at 0."
        )
    inputs = subject.input_sets[number]
    last: dict[str, float] = {}

    def on_step(step: int, steps: int, losses: dict[str, float]) -> None:
        last.update(losses)
        report(step=step, steps=steps, loss=losses["loss"])

    (folder / RESULT).unlink(missing_ok=True)  # of other settings: from here on it would be wrong
    fitted = run_fit(config, inputs, folder, key=arguments["key"], device=device, on_step=on_step)
    fitted.avatar.save(folder)
    result = {
        "format": FORMAT,
        "schema": 1,
        "method": config.method,
        "subject": arguments["subject"],
        "config_hash": arguments["key"],
        "seconds": round(fitted.seconds, 3),
        "steps": config.steps,
        "resumed_from": fitted.resumed_from,
        "losses": last,
        "hardware": hardware(),
        "notes": list(fitted.notes),
        "config": asdict(config),
        "inputs": inputs.provenance,
    }
    part = folder / f"{RESULT}.part"
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(folder / RESULT)
    forget_checkpoint(folder)
    return result


def read_result(folder: str | Path) -> dict[str, Any] | None:
    """The finished fit in a folder, or None where there is none yet.

    Raises:
        UserError: the folder holds files that no fit wrote, or a result that cannot be read.
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(
            f"{folder} is a file where a folder of results should be; move it or choose another OUT."
        )
    names = {path.name for path in folder.iterdir()}
    foreign = sorted(name for name in names - OURS if not name.startswith(("checkpoint", f"{RESULT}.")))
    if foreign and RESULT not in names:
        raise UserError(
            f"{folder} holds {foreign[0]} and no {RESULT}, so it is no folder of a fit; choose another OUT "
            "or move it."
        )
    if RESULT not in names:
        return None
    try:
        result = json.loads((folder / RESULT).read_text())
        ours = result["format"] == FORMAT and isinstance(result["config_hash"], str)
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{folder / RESULT} is not the result of a fit; choose another OUT or move it away.")
    return result if {"avatar.json", "avatar.safetensors"} <= names else None


def results_table(fits: Fits) -> Table:
    """What became of everybody, for the terminal."""
    from rich.table import Table

    table = Table(title="Fits")
    for heading in ("method", "subject", "status", "seconds", "attempts", "loss or reason"):
        table.add_column(heading, justify="right" if heading in ("seconds", "attempts") else "left")
    for result in fits.results:
        loss = result.result.get("losses", {}).get("loss")
        reason = result.error or ("" if loss is None else f"{loss:.5f}")
        seconds = result.result.get("seconds")
        table.add_row(
            result.method,
            result.subject,
            result.status,
            "" if seconds is None else f"{seconds:.1f}",
            str(result.attempts or ""),
            reason,
        )
    return table


def _configuration(method: str | FitConfig, gpu: bool) -> FitConfig:
    from train.fits import RECIPES

    if not isinstance(method, str):
        return method
    for name in (method, f"{method}-{'gpu' if gpu else 'cpu'}"):
        if name in RECIPES:
            return RECIPES[name]()
    methods = sorted({name.partition("-")[0] for name in RECIPES})
    raise UserError(
        f"There is no fit called {method!r}; there are the methods {', '.join(methods)} and the recipes "
        f"{', '.join(sorted(RECIPES))}."
    )


def _choose(there: Iterable[str], wanted: Iterable[str] | None, split: str) -> list[str]:
    there = list(there)
    if wanted is None:
        return there
    wanted = list(dict.fromkeys(wanted))
    for subject in wanted:
        if subject not in there:
            raise UserError(
                f"There is no subject {subject!r} in the split {split!r}; there are {', '.join(there)}."
            )
    return wanted


def slots_here(cpus: float, gpus: float) -> int:
    """How many actors this machine, or the cluster that a connected Ray shows, has room for."""
    import ray

    if ray.is_initialized():
        total = ray.cluster_resources()
        have_cpus, have_gpus = total.get("CPU", 1.0), total.get("GPU", 0.0)
    else:
        have_cpus, have_gpus = float(os.cpu_count() or 1), float(gpus_here())
    rooms = [have_cpus / cpus] if cpus else []
    if gpus:
        rooms.append(have_gpus / gpus)
    return max(1, int(min(rooms))) if rooms else 1


def gpus_here() -> int:
    """How many GPUs this machine has."""
    import torch

    return torch.cuda.device_count()
