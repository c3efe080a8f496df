"""The whole story in one command: captures, shards, training, fits, evaluation and a comparison."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from launch.data import DEMO, DemoCaptures
from launch.options import parse
from launch.training import LaunchOptions, run_training
from launch.workspace import Workspace

__all__ = ["demo"]


@dataclass(frozen=True)
class DemoOptions:
    """Captures to compared avatars, on every real component."""

    recipe: Annotated[str, tyro.conf.Positional] = "avat3r-cpu"
    """Recipe of the training."""
    data: Path | None = None
    """Folder of packed shards; demo captures are made and packed when it is not given."""
    out: Path = Path("work")
    """Folder for everything that is made."""
    port: int | None = None
    """Port of the ranks' rendezvous; any free one by default."""
    args: str = ""
    """Overrides of the recipe, as one string."""
    demo: DemoCaptures = DEMO
    """What to make when no data are given."""


def demo(words: list[str]) -> None:
    """`headsplat demo`: what `make demo` runs."""
    from eval.report import write_report
    from launch.evaluation import evaluate_fits, evaluate_training, show_table
    from launch.fitting import FitOptions, run_fits

    options = parse(DemoOptions, words, "demo")
    started = time.perf_counter()
    workspace = Workspace(options.out)
    shards, run = run_training(
        LaunchOptions(
            recipe=options.recipe,
            data=options.data,
            out=options.out,
            port=options.port,
            args=options.args,
            demo=options.demo,
        )
    )
    rows = evaluate_training(run, shards, workspace)
    run_fits(FitOptions(method="flashavatar", data=shards, out=options.out), shards, workspace)
    rows += evaluate_fits("flashavatar", shards, workspace)
    page = write_report(rows, workspace.results, workspace.root / "report")
    show_table(rows, workspace)
    minutes, seconds = divmod(int(time.perf_counter() - started), 60)
    print(f"Page with pictures: {page}    Took {minutes} min {seconds} s.")
