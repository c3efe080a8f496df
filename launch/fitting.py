"""`headsplat fit`: one avatar a held-out person, fitted by Ray actors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from avatars.errors import UserError
from launch.data import DEMO, DemoCaptures, shards_for
from launch.options import parse
from launch.workspace import Workspace

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
    size: int = 96
    """Side of the pictures in pixels, where demo captures are made."""
    demo: DemoCaptures = DEMO
    """What to make when no data are given."""


def fit(words: list[str]) -> int:
    """`headsplat fit METHOD`."""
    from launch.evaluation import evaluate_fits, show_table

    options = parse(FitOptions, words, "fit")
    workspace = Workspace(options.out)
    shards = shards_for(options.data, workspace, options.size, options.demo)
    run_fits(options, shards, workspace)
    show_table(evaluate_fits(options.method, shards, workspace), workspace)
    return 0


def run_fits(options: FitOptions, shards: Path, workspace: Workspace) -> None:
    """Fits every held-out person that has no result yet.

    Raises:
        UserError: the method is unknown, or a person could not be fitted.
    """
    from cluster.fit import fit_subjects

    outcome = fit_subjects(options.method, shards, workspace.fits)
    if outcome.failures:
        names = ", ".join(sorted(outcome.failures))
        raise UserError(f"{options.method} could not be fitted to {names}; the reasons are above.")
