"""Fits of many people at once, one actor a slot, one folder of results a person."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from avatars.errors import UserError
from cluster.pool import Event, Job, Report, run_jobs
from cluster.session import ray_session

if TYPE_CHECKING:
    from rich.table import Table

    from train.fits import FitConfig, FitPictures, FitSource

__all__ = [
    "FitResult",
    "Fits",
    "configuration",
    "fit_subjects",
    "fits_name",
    "gpus_here",
    "network_identity",
    "read_result",
    "results_table",
    "slots_here",
]

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
    shards_folder: str | Path | None,
    out: str | Path,
    *,
    source: FitSource | None = None,
    captures: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    split: str = "heldout",
    subjects: Iterable[str] | None = None,
    workers: int | None = None,
    cpus_per_actor: float = 1,
    gpus_per_actor: float | None = None,
    memory_per_actor: float | None = None,
    retries: int = 2,
    patience: float = 600,
    on_event: Callable[[Event], None] | None = None,
) -> Fits:
    """Fits one avatar a person and writes each to `out / fits_name(method, source) / <subject>`.

    May be called again at any time: what is finished with the same configuration and the same shards is kept,
    what was interrupted goes on from its checkpoint, what failed is tried anew. On several machines
    `shards_folder` and `out` must be on storage that all of them share.

    Args:
        method: a method, a recipe in `train.fits.RECIPES`, or a configuration. A method M stands for the recipe
            M-gpu where actors have a GPU and M-cpu elsewhere, or M-gpu-many and M-cpu-many for views and videos where
            the method has those.
        shards_folder: packed shards; None when `captures` is given.
        out: where results go.
        source: what of a person is fitted to, its first input set when None.
        captures: a capture, or a folder of captures, of any layout that `shards.read_capture` knows.
        overrides: fields of the recipe, or of its `model`, to change: {"steps": 1000, "head": "makehuman"}. A
            recipe with a field `network` starts from a trained network, and a fit knows it by its content.
        split: whose subjects: "train" or "heldout"; of captures all are fitted.
        subjects: only these.
        workers: actors at work at the same time; as many as the machine's CPUs (or GPUs) allow when None.
        cpus_per_actor: CPUs, and threads, of each.
        gpus_per_actor: GPUs of each, fractions allowed; 0 fits on the CPU. None is one where this machine has
            any, and 0 elsewhere.
        memory_per_actor: bytes that Ray reserves for each.
        retries: how often an attempt that ended in anything but a user's error is repeated.
        patience: seconds to wait for the cluster to give an actor.
        on_event: progress, called in this process: `Event.report` has "step", "steps" and "loss".

    Returns:
        One result a subject, in the order of the shards or of the captures' names, failures included.

    Raises:
        UserError: no such recipe, shards, captures, split or subject, or no room for an actor. What is wrong with one
            subject is in its result and stops nobody else.
    """
    from train.fits import FitSource, fit_key

    source = source or FitSource()
    if gpus_per_actor is None:
        gpus_per_actor = float(gpus_here() > 0)
    config = configuration(method, gpus_per_actor > 0, source, overrides or {})
    people = _captures(captures) if captures is not None else _packed(shards_folder, split)
    chosen = _choose(people, subjects, str(captures) if captures is not None else f"the split {split!r}")
    tell = on_event or (lambda event: None)
    name = fits_name(config.method, source)
    network = network_identity(config)

    found: dict[str, FitResult] = {}
    jobs = []
    for subject in chosen:
        folder = Path(out) / name / subject
        asked = {"subject": subject, "source": asdict(source), **people[subject]["identity"], **network}
        key = fit_key(config, asked)
        try:
            kept = read_result(folder)
        except UserError as error:
            found[subject] = FitResult(name, subject, "failed", folder, error=str(error))
            tell(Event("failed", subject, {"error": str(error)}))
            continue
        if kept is not None and kept["config_hash"] == key:
            found[subject] = FitResult(name, subject, "kept", folder, kept)
            continue
        arguments = {
            "config": config,
            "source": source,
            "place": people[subject]["place"],
            "method": name,
            "subject": subject,
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
            folder = Path(out) / name / outcome.name
            found[outcome.name] = FitResult(
                name,
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
    from train.fits.fit import forget_checkpoint, run_fit
    from train.fits.heldout import measure_held_out

    config, folder = arguments["config"], Path(arguments["folder"])
    device = "cuda" if arguments["gpu"] and torch.cuda.is_available() else "cpu"
    if arguments["gpu"] and device == "cpu":
        raise UserError(
            "GPUs were asked for and PyTorch sees none in the actor; run `headsplat doctor` on its node."
        )
    inputs, held = _pictures(arguments["place"], arguments["subject"], arguments["source"])
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
        "method": arguments["method"],
        "subject": arguments["subject"],
        "config_hash": arguments["key"],
        "seconds": round(fitted.seconds, 3),
        "steps": config.steps,
        "resumed_from": fitted.resumed_from,
        "losses": last,
        "held_out": None if held is None else measure_held_out(fitted.avatar, held, device)[0],
        "hardware": hardware(),
        "notes": list(fitted.notes),
        "config": asdict(config),
        "source": asdict(arguments["source"]),
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
    numbers = ("seconds", "attempts", "held-out PSNR")
    for heading in ("method", "subject", "status", *numbers, "loss or reason"):
        table.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    for result in fits.results:
        loss = result.result.get("losses", {}).get("loss")
        reason = result.error or ("" if loss is None else f"{loss:.5f}")
        seconds = result.result.get("seconds")
        quality = (result.result.get("held_out") or {}).get("psnr")
        table.add_row(
            result.method,
            result.subject,
            result.status,
            "" if seconds is None else f"{seconds:.1f}",
            str(result.attempts or ""),
            "" if quality is None else f"{quality:.2f}",
            reason,
        )
    return table


def fits_name(method: str, source: FitSource) -> str:
    """What fits of a method from a source are called, in folders and tables: "flashavatar", "flashavatar-video",
    and "flashavatar-1-input" of only the first picture of an input set.
    """
    if source.pictures != "inputs":
        return f"{method}-{source.pictures}"
    return f"{method}-{source.inputs}-input{'s' * (source.inputs > 1)}" if source.inputs else method


def _packed(folder: str | Path | None, split: str) -> dict[str, dict[str, Any]]:
    """Where each subject of shards is, and what tells its content from another."""
    from shards import open_shards

    if folder is None:
        raise UserError("A fit needs pictures: give a folder of shards (--data) or of captures (--captures).")
    shards = open_shards(folder, split)
    people: dict[str, dict[str, Any]] = {}
    for subject in shards.subjects:
        hashes = [shard.sha256 for shard in shards.manifest.split(split) if shard.subject == subject]
        place = {"shards": str(Path(folder).resolve()), "split": split}
        people[subject] = {"place": place, "identity": {"shards": hashes}}
    return people


def _captures(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The capture in a folder, or each folder in it, by name. Captures are opened by those who fit them."""
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --captures is a capture, or a folder of captures.")
    found = [folder]
    if not _is_capture(folder):
        found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise UserError(f"{folder} holds no captures; --captures is a capture, or a folder of captures.")
    return {
        path.name: {"place": {"capture": str(path)}, "identity": {"capture": _fingerprint(path)}}
        for path in found
    }


def _is_capture(folder: Path) -> bool:
    """Whether a folder looks like one capture, whole or not, and not like a folder of captures."""
    signs = ("capture.json", "imgs", "decoder", "transforms.json", "transforms_train.json")
    return folder.parent.name == "sequences" or any((folder / sign).exists() for sign in signs)


def _fingerprint(folder: Path) -> str:
    """Changes with the names and sizes of a capture's files and of its tracker's."""
    from shards.readers.metrical import checkpoint_folder

    tracked = checkpoint_folder(folder)
    files = [(path, folder) for path in folder.rglob("*")]
    if tracked is not None and folder not in tracked.parents:
        files += [(path, tracked) for path in tracked.glob("*.frame")]
    digest = hashlib.sha256()
    for name, size in sorted(
        (str(path.relative_to(top)), path.stat().st_size) for path, top in files if path.is_file()
    ):
        digest.update(f"{name} {size}\n".encode())
    return digest.hexdigest()[:16]


def _pictures(place: dict[str, str], subject: str, source: FitSource) -> tuple[Any, FitPictures | None]:
    """What a fit is made from, and what is kept to measure it on where the source decides that."""
    from shards import open_shards, read_capture
    from train.fits.pictures import from_capture, from_shards

    if "capture" in place:
        return from_capture(read_capture(place["capture"]), source)
    return from_shards(open_shards(place["shards"], place["split"]).read(subject), source), None


def configuration(
    method: str | FitConfig, gpu: bool, source: FitSource, overrides: Mapping[str, Any]
) -> FitConfig:
    """The configuration that `fit_subjects` fits with.

    Args:
        method: as `fit_subjects` takes it.
        gpu: whether fits have a GPU.
        source: what of a person is fitted to.
        overrides: fields of the recipe, or of its `model`, to change.

    Raises:
        UserError: there is no such recipe, or it has no such field.
    """
    config: Any = _recipe(method, gpu, source) if isinstance(method, str) else method
    shape: Any = getattr(config, "model", None)
    own, model = {}, {}
    for name, value in overrides.items():
        if name in _field_names(config):
            own[name] = value
        elif name in _field_names(shape):
            model[name] = value
        else:
            raise UserError(f"A fit of {config.method} has no setting {name!r}; leave it out.")
    if model:
        own["model"] = replace(shape, **model)
    return replace(config, **own) if own else config


def _field_names(config: Any) -> set[str]:
    return {field.name for field in fields(config)} if is_dataclass(config) else set()


def _recipe(method: str, gpu: bool, source: FitSource) -> FitConfig:
    """The recipe of a name, or a method's for this hardware and, where it tells them apart, for many pictures."""
    from train.fits import RECIPES

    here = f"{method}-{'gpu' if gpu else 'cpu'}"
    many = [] if source.pictures == "inputs" else [f"{here}-many"]
    for name in (method, *many, here):
        if name in RECIPES:
            return RECIPES[name]()
    own = sorted(name for name, recipe in RECIPES.items() if recipe().method == method)
    if own:
        raise UserError(
            f"{method} has no recipe for {'GPUs' if gpu else 'CPUs'}; name one of its own: {', '.join(own)}."
        )
    methods = sorted({recipe().method for recipe in RECIPES.values()})
    raise UserError(f"There is no fit called {method!r}; there are the methods {', '.join(methods)}.")


def network_identity(config: Any) -> dict[str, str]:
    """What tells a trained network that fits start from apart from another: its content. Nothing without one."""
    folder = getattr(config, "network", "")
    if not folder:
        return {}
    if not Path(folder).is_dir():
        raise UserError(
            f"{folder} is not a folder; --network is what a training of {config.method} exported."
        )
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {"network": digest.hexdigest()[:16]}


def _choose(there: Iterable[str], wanted: Iterable[str] | None, where: str) -> list[str]:
    there = list(there)
    if wanted is None:
        return there
    wanted = list(dict.fromkeys(wanted))
    for subject in wanted:
        if subject not in there:
            raise UserError(f"There is no subject {subject!r} in {where}; there are {', '.join(there)}.")
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
