"""`headsplat fit`: one avatar a held-out person, fitted by Ray actors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from avatars.errors import UserError
from launch.data import DEMO, DemoCaptures, demo_shards, shards_there
from launch.options import parse
from launch.workspace import Workspace

if TYPE_CHECKING:
    from cluster.pool import Event

__all__ = ["FitOptions", "fit", "run_fits"]


@dataclass(frozen=True)
class FitOptions:
    """Fits a per-subject method to held-out people on Ray, then evaluates the avatars."""

    method: Annotated[str, tyro.conf.Positional] = "flashavatar"
    """Name of the method."""
    data: Path | None = None
    """Folder of packed shards; the demo's by default, made when they are not there."""
    out: Path = Path("work")
    """Folder of fits and results."""
    size: int = 128
    """Side of the pictures in pixels, where demo captures are made."""
    demo: DemoCaptures = DEMO
    """What to make when no data are given."""


def fit(words: list[str]) -> int:
    """`headsplat fit METHOD`."""
    from launch.evaluation import evaluate_fits, show_table

    options = parse(FitOptions, words, "fit")
    workspace = Workspace(options.out)
    shards = shards_there(options.data, workspace) or demo_shards(workspace, options.size, options.demo)
    run_fits(options, shards, workspace)
    show_table(evaluate_fits(options.method, shards, workspace), workspace)
    return 0


def run_fits(options: FitOptions, shards: Path, workspace: Workspace) -> None:
    """Fits every held-out person that has no result yet.

    Raises:
        UserError: the method is unknown, or a person could not be fitted.
    """
    from rich.console import Console

    from cluster.fit import fit_subjects, results_table

    print(f"Fitting {options.method} to held-out people, one Ray actor each", flush=True)
    fits = fit_subjects(options.method, shards, workspace.fits, on_event=Progress())
    Console().print(results_table(fits))
    if fits.failures:
        names = ", ".join(sorted(fits.failures))
        raise UserError(f"{options.method} could not be fitted to {names}; the reasons are above.")


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
