"""`headsplat fit`: one avatar a held-out person, fitted by Ray actors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from avatars.errors import UserError
from launch.data import DEMO, DemoCaptures, demo_shards, shards_there
from launch.options import parse
from launch.workspace import Workspace

if TYPE_CHECKING:
    from cluster.pool import Event
    from train.fits import FitSource

__all__ = ["FitOptions", "fit", "run_fits"]


@dataclass(frozen=True)
class FitOptions:
    """Fits a per-subject method to held-out people on Ray, then evaluates the avatars."""

    method: Annotated[str, tyro.conf.Positional] = "flashavatar"
    """Name of the method, or of one of its recipes (flashavatar-paper)."""
    pictures: Literal["inputs", "views", "video"] | None = None
    """What a person is fitted to: an input set as Avat3r gets it, many cameras at several expressions, or one camera's
    video. By default the input set of shards; of captures the views, or the video where there is one camera."""
    data: Path | None = None
    """Folder of packed shards; the demo's by default, made when they are not there."""
    captures: Path | None = None
    """A capture, or a folder of captures, to fit to instead of shards: metrical-tracker's and VHAP's layouts, Ava-256,
    NeRSemble, synthetic ones. A part of each is held out and measured."""
    out: Path = Path("work")
    """Folder of fits and results."""
    subjects: tuple[str, ...] = ()
    """Only these people."""
    input_set: int = 0
    """Number of the input set in the shards."""
    inputs: int = 0
    """Only the first so many pictures of the input set; 0 for all."""
    network: Path | None = None
    """Folder that a training exported, for methods whose fits start from a trained network."""
    views: int = 40
    """Cameras to fit to with "views"; 0 for all that are not held out."""
    held_views: int = 8
    """Cameras of a capture that are kept to measure on; shards follow the evaluation's protocol."""
    held_timesteps: float = 0.2
    """Share of a capture's timesteps, the last ones, that is kept to measure on."""
    picture_size: int = 512
    """Largest side in pixels of a capture's pictures."""
    head: str | None = None
    """Parametric head to fit on; the recipe's by default."""
    steps: int | None = None
    """Optimiser steps; the recipe's by default."""
    uv_resolution: int | None = None
    """Side of the UV map, of whose pixels each covered one is a Gaussian (64, 128, 256); the recipe's by default."""
    workers: int | None = None
    """Fits at a time; as many as there is room for by default, in the cluster that RAY_ADDRESS names or here."""
    cpus: float = 1
    """CPUs, and threads, of each fit."""
    gpus: float | None = None
    """GPUs of each fit, fractions allowed; by default one where this machine has any. 0 fits on CPUs."""
    memory: float | None = None
    """GiB that Ray sets aside for each fit."""
    retries: int = 2
    """How often a fit whose process or machine was lost is tried again."""
    size: int = 128
    """Side of the pictures in pixels, where demo captures are made."""
    demo: DemoCaptures = DEMO
    """What to make when no data are given."""


def fit(words: list[str]) -> int:
    """`headsplat fit METHOD`."""
    from launch.evaluation import evaluate_fits, show_table

    options = parse(FitOptions, words, "fit")
    workspace = Workspace(options.out)
    if options.captures is not None:
        name = run_fits(options, None, workspace)
        print(f"Avatars: {workspace.fits / name}    Look at one: headsplat view {workspace.fits / name}/NAME")
        return 0
    shards = shards_there(options.data, workspace) or demo_shards(workspace, options.size, options.demo)
    name = run_fits(options, shards, workspace)
    show_table(evaluate_fits(name, shards, workspace), workspace)
    return 0


def run_fits(options: FitOptions, shards: Path | None, workspace: Workspace) -> str:
    """Fits every held-out person of the shards, or every capture, that has no result yet.

    Returns:
        What the fits are called: the name of their folder.

    Raises:
        UserError: the method is unknown, or a person could not be fitted.
    """
    from rich.console import Console

    from cluster.fit import fit_subjects, results_table
    from eval.failures import note_failures

    print(
        f"Fitting {options.method} to {'captures' if shards is None else 'held-out people'}, one Ray actor each",
        flush=True,
    )
    fits = fit_subjects(
        options.method,
        shards,
        workspace.fits,
        source=_source(options),
        captures=options.captures,
        overrides={
            name: value
            for name in ("head", "steps", "uv_resolution")
            if (value := getattr(options, name)) is not None
        }
        | ({} if options.network is None else {"network": str(options.network.resolve())}),
        subjects=options.subjects or None,
        workers=options.workers,
        cpus_per_actor=options.cpus,
        gpus_per_actor=options.gpus,
        memory_per_actor=None if options.memory is None else options.memory * 2**30,
        retries=options.retries,
        on_event=Progress(),
    )
    Console().print(results_table(fits))
    outcomes = {result.subject: result.error for result in fits.results}
    note_failures(workspace.results, fits.results[0].method, outcomes)
    if fits.failures:
        names = ", ".join(sorted(fits.failures))
        raise UserError(f"{options.method} could not be fitted to {names}; the reasons are above.")
    return fits.results[0].method


def _source(options: FitOptions) -> FitSource:
    from train.fits import FitSource

    pictures = options.pictures
    if pictures is None:
        pictures = "inputs" if options.captures is None else _kind_of(options.captures)
    return FitSource(
        pictures,
        options.input_set,
        options.views,
        options.held_views,
        options.held_timesteps,
        options.picture_size,
        options.inputs,
    )


def _kind_of(captures: Path) -> Literal["views", "video"]:
    """A video for captures of metrical-tracker's layout, which have one camera."""
    folders = [captures, *captures.iterdir()] if captures.is_dir() else []
    return "video" if any((folder / "imgs").is_dir() for folder in folders) else "views"


class Progress:
    """Tells how far each fit is, a line for every tenth part of it."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        step, steps = event.report.get("step"), event.report.get("steps")
        if event.kind != "progress":
            reason = f": {event.report['error']}" if "error" in event.report else ""
            print(f"  {event.name}: {event.kind}{reason}", flush=True)
        if event.kind != "progress" or step is None or not steps:
            return
        tenth = 10 * step // steps
        if tenth > self._told.get(event.name, 0):
            self._told[event.name] = tenth
            print(f"  {event.name}: step {step}/{steps}  loss {event.report['loss']:.4f}", flush=True)
