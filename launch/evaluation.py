"""Commands that measure and show: evaluation on held-out people, the comparison page and the dashboard."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from avatars.errors import UserError
from launch.data import shards_there
from launch.options import parse
from launch.workspace import Workspace

if TYPE_CHECKING:
    from avatars.inputs import InputSet
    from eval.rows import Row

__all__ = ["dashboard", "evaluate", "evaluate_fits", "evaluate_training", "report", "show_table"]

INITIAL = "avat3r-untrained"
NEAREST = "nearest-input"


def evaluate_training(run: Path, shards: Path, workspace: Workspace) -> list[Row]:
    """Measures a trained network, the same network before training, and the nearest input picture.

    Args:
        run: a run's folder with `export/` and `initial/`.
        shards: packed shards with held-out people.
        workspace: where rows and pictures go.
    """
    from avatars.avat3r import Avat3rMethod
    from eval.baselines import nearest_input

    rows = []
    for name, folder in (("avat3r", run / "export"), (INITIAL, run / "initial")):
        method = Avat3rMethod.load(folder)
        step = json.loads((folder / "model.json").read_text())["provenance"]["step"]
        rows += measure(name, method.create, f"{run.name}-step{step}", shards, workspace)
    return rows + measure(NEAREST, nearest_input, "none", shards, workspace)


def evaluate_fits(method: str, shards: Path, workspace: Workspace) -> list[Row]:
    """Measures the avatars that were fitted to held-out people, in the folder that `headsplat fit` wrote.

    Raises:
        UserError: nothing was fitted.
    """
    from avatars.method import load_avatar
    from eval.evaluate import Made
    from eval.hashing import short_hash

    folder = workspace.fits / method
    results = {r.parent.name: json.loads(r.read_text()) for r in sorted(folder.glob("*/result.json"))}
    if not results:
        raise UserError(f"{folder} holds no fitted avatars. Make them with `make fit METHOD={method}`.")

    def read(inputs: InputSet) -> Made:
        result = results[inputs.subject]
        return Made(load_avatar(folder / inputs.subject), result["seconds"], result.get("hardware"))

    configurations = {short_hash(result["config"]) for result in results.values()}
    if len(configurations) > 1:
        raise UserError(
            f"{folder} holds fits of {len(configurations)} configurations; run `make fit METHOD={method}`."
        )
    return measure(method, read, configurations.pop(), shards, workspace, subjects=sorted(results))


def measure(
    method: str,
    create: Callable[..., Any],
    checkpoint: str,
    shards: Path,
    workspace: Workspace,
    subjects: list[str] | None = None,
) -> list[Row]:
    """Rows of one method on the held-out people, told to MLflow as well."""
    from eval.evaluate import evaluate as evaluate_method
    from eval.protocol import synthetic_heldout
    from eval.tracking import log_evaluation
    from shards import open_shards

    heldout = open_shards(shards, "heldout")
    rows = evaluate_method(
        method,
        create,
        heldout,
        synthetic_heldout(heldout),
        checkpoint=checkpoint,
        out=workspace.results,
        subjects=subjects,
        progress=print,
    )
    log_evaluation(rows, workspace.results, workspace.tracking_uri)
    return rows


def show_table(rows: list[Row], workspace: Workspace) -> None:
    """The comparison on the terminal, and where to look next."""
    from eval.tables import by_protocol, table

    for rows_of_one in by_protocol(rows).values():
        print()
        print(table(rows_of_one))
    print(
        f"\nRows and pictures: {workspace.results}    Compare in the browser: make dashboard OUT={workspace.root}"
    )


@dataclass(frozen=True)
class EvalOptions:
    """Measures trained models and fitted avatars on held-out people."""

    method: Annotated[str, tyro.conf.Positional] = "avat3r"
    """avat3r, or a method that was fitted with `headsplat fit`."""
    run: str = "avat3r-cpu"
    """avat3r only: name of the run under OUT/runs."""
    data: Path | None = None
    """Folder of packed shards; the demo's by default."""
    out: Path = Path("work")
    """Folder of runs, fits and results."""


def evaluate(words: list[str]) -> None:
    """`headsplat eval METHOD`."""
    options = parse(EvalOptions, words, "eval")
    workspace = Workspace(options.out)
    shards = shards_there(options.data, workspace)
    if shards is None:
        raise UserError(
            f"{workspace.shards} holds no packed shards. Name a folder with --data (DATA= for make)."
        )
    if options.method == "avat3r":
        rows = evaluate_training(workspace.run(options.run), shards, workspace)
    else:
        rows = evaluate_fits(options.method, shards, workspace)
    show_table(rows, workspace)


@dataclass(frozen=True)
class OutOptions:
    """Names the folder that everything was made in."""

    out: Path = Path("work")
    """Folder of runs, fits and results."""


def report(words: list[str]) -> None:
    """`headsplat report`: a page that compares everything that was evaluated under one protocol."""
    from eval.report import write_report
    from eval.rows import read_rows

    workspace = Workspace(parse(OutOptions, words, "report").out)
    rows = read_rows(workspace.results)
    if not rows:
        raise UserError(
            f"{workspace.results} holds no result rows. Make some with `make train` or `make eval`."
        )
    page = write_report(rows, workspace.results, workspace.root / "report")
    show_table(rows, workspace)
    print(f"Page: {page}")


@dataclass(frozen=True)
class DashboardOptions:
    """Opens the MLflow dashboard on this machine."""

    out: Path = Path("work")
    """Folder of the tracking store."""
    port: int = 5000
    """Port on the loopback interface."""


def dashboard(words: list[str]) -> int:
    """`headsplat dashboard`: serves until it is interrupted."""
    from eval.tracking import dashboard_command
    from launch.preflight import free_port

    options = parse(DashboardOptions, words, "dashboard")
    command = dashboard_command(Workspace(options.out).tracking_uri, port=free_port(options.port))
    print(f"http://127.0.0.1:{options.port}  (Ctrl-C ends it)", flush=True)
    return subprocess.run(command).returncode
