"""Commands that measure and show: evaluation on held-out people, the comparison page and the dashboard."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
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
    folder = workspace.fits / method
    create, name = _fitted_maker(method, folder)
    subjects = sorted(path.parent.name for path in folder.glob("*/result.json"))
    return measure(method, create, name, shards, workspace, subjects=subjects)


def measure(
    method: str,
    create: Callable[..., Any],
    checkpoint: str,
    shards: Path,
    workspace: Workspace,
    subjects: list[str] | None = None,
) -> list[Row]:
    """Rows of one method on the held-out people under `synthetic-heldout`, told to MLflow as well."""
    from eval.evaluate import evaluate as evaluate_method
    from eval.protocols import named_protocol
    from eval.tracking import log_evaluation
    from shards import open_shards

    heldout = open_shards(shards, "heldout")
    rows = evaluate_method(
        method,
        create,
        heldout,
        named_protocol("synthetic-heldout", heldout),
        checkpoint=checkpoint,
        out=workspace.results,
        subjects=subjects,
        progress=print,
    )
    log_evaluation(rows, workspace.results, workspace.tracking_uri)
    return rows


def evaluate_checkpoint(options: EvalOptions, shards: Path, workspace: Workspace) -> list[Row]:
    """Rows of a checkpoint under any protocol, measured by one process or several.

    Raises:
        UserError: the checkpoint is not whole, the protocol does not fit the shards, or a subject failed.
    """
    from eval.protocol import write_protocol
    from eval.protocols import find_protocol
    from eval.rows import protocol_folder
    from eval.tracking import log_evaluation
    from shards import open_shards

    heldout = open_shards(shards, options.split)
    protocol = find_protocol(options.protocol, heldout)
    _, name = load_maker(options.method, options.checkpoint, options.device)
    subjects = list(protocol.subjects)
    file = protocol_folder(workspace.results, protocol.name, protocol.id) / "protocol.json"
    write_protocol(protocol, file)
    workers = max(1, min(options.workers, len(subjects)))
    print(
        f"{options.method} {name}: {protocol.name} {protocol.id}, {len(subjects)} people, {workers} at a time"
    )
    arguments = [
        (options, str(file), str(shards), str(workspace.root), subjects[i::workers]) for i in range(workers)
    ]
    if workers == 1:
        rows = evaluate_part(arguments[0])
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            rows = [row for part in pool.map(evaluate_part, arguments) for row in part]
    rows.sort(key=lambda row: subjects.index(row.subject))
    log_evaluation(rows, workspace.results, workspace.tracking_uri)
    return rows


def evaluate_part(arguments: tuple[EvalOptions, str, str, str, list[str]]) -> list[Row]:
    """One process's share of an evaluation: options, protocol file, shards, workspace and its subjects."""
    import torch

    from eval.evaluate import evaluate as evaluate_method
    from eval.protocol import read_protocol
    from shards import open_shards

    options, protocol, shards, root, subjects = arguments
    if options.workers > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.workers))
    create, name = load_maker(options.method, options.checkpoint, options.device)
    return evaluate_method(
        options.method,
        create,
        open_shards(shards, options.split),
        read_protocol(Path(protocol)),
        checkpoint=name,
        out=Workspace(Path(root)).results,
        subjects=subjects,
        device=options.device,
        batch=options.batch,
        progress=print,
    )


def load_maker(method: str, checkpoint: Path | None, device: str = "cpu") -> tuple[Callable[..., Any], str]:
    """What makes a method's avatars out of a checkpoint, and the checkpoint's name in rows.

    Args:
        method: "avat3r", "nearest-input", or a method that is fitted to one person.
        checkpoint: an exported model, a run's folder that holds one, or a folder of fitted avatars.
        device: where the avatars are made.

    Raises:
        UserError: no checkpoint, or one that lacks its recipe or its weights.
    """
    if method == NEAREST:
        from eval.baselines import nearest_input

        return nearest_input, "none"
    if checkpoint is None:
        raise UserError(
            f"Name a checkpoint of {method}: `headsplat eval {method} CHECKPOINT --protocol NAME`."
        )
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint} is no folder. Name an exported model, a run or a folder of fitted avatars."
        )
    if method != "avat3r":
        return _fitted_maker(method, checkpoint)
    from avatars.avat3r import Avat3rMethod

    folder = checkpoint if (checkpoint / "model.json").is_file() else checkpoint / "export"
    if not (folder / "model.json").is_file():
        raise UserError(
            f"{checkpoint} holds no model.json, the recipe of its weights. Name the export folder of a finished "
            "training; `make train` writes it at the end."
        )
    try:
        made = Avat3rMethod.load(folder)
        provenance = json.loads((folder / "model.json").read_text())["provenance"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not a whole model ({type(error).__name__}: {error}). Export it again."
        ) from error
    made.model.to(device)
    run = folder.parent.name if folder.name in ("export", "initial") else folder.name
    return made.create, f"{run}-step{provenance['step']}" if "step" in provenance else run


def _fitted_maker(method: str, folder: Path) -> tuple[Callable[..., Any], str]:
    from avatars.method import load_avatar
    from eval.evaluate import Made
    from eval.hashing import short_hash

    files = sorted(folder.glob("*/result.json"))
    if not files:
        raise UserError(f"{folder} holds no fitted avatars. Make them with `make fit METHOD={method}`.")
    results: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            results[file.parent.name] = json.loads(file.read_text())
            _ = results[file.parent.name]["config"], results[file.parent.name]["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} lacks the recipe or the seconds of its fit ({type(error).__name__}: {error}). Fit again with "
                f"`make fit METHOD={method}`."
            ) from error
    configurations = {short_hash(result["config"]) for result in results.values()}
    if len(configurations) > 1:
        raise UserError(
            f"{folder} holds fits of {len(configurations)} configurations; run `make fit METHOD={method}`."
        )

    def read(inputs: InputSet) -> Made:
        if inputs.subject not in results:
            raise UserError(
                f"{folder} holds no avatar of {inputs.subject}. Fit everybody with `make fit METHOD={method}`."
            )
        result = results[inputs.subject]
        return Made(load_avatar(folder / inputs.subject), result["seconds"], result.get("hardware"))

    return read, configurations.pop()


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
    """avat3r, nearest-input, or a method that was fitted with `headsplat fit`."""
    checkpoint: Annotated[Path | None, tyro.conf.Positional] = None
    """An exported model, a run's folder or a folder of fitted avatars; without it, what OUT holds of METHOD."""
    protocol: str = "synthetic-heldout"
    """Name of a protocol, or a JSON file: ava256-fewshot, nersemble-fewshot, nersemble-benchmark, flashavatar-video,
    synthetic-heldout. Needs CHECKPOINT."""
    split: str = "heldout"
    """Split of the shards."""
    device: str = "cpu"
    """Where avatars are made and measured: cpu or cuda."""
    batch: int = 0
    """Pictures measured at once, 0 for all of a timestep; changes no number."""
    workers: int = 1
    """Processes, each with its share of the people; changes no number but the timings."""
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
    if options.checkpoint is not None or options.method == NEAREST:
        rows = evaluate_checkpoint(options, shards, workspace)
    elif options.protocol != "synthetic-heldout":
        raise UserError(
            f"--protocol needs a checkpoint: `headsplat eval {options.method} CHECKPOINT --protocol …`."
        )
    elif options.method == "avat3r":
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
    from eval.tracking import dashboard_command, dashboard_pages
    from launch.preflight import free_port

    options = parse(DashboardOptions, words, "dashboard")
    uri = Workspace(options.out).tracking_uri
    command = dashboard_command(uri, port=free_port(options.port))
    address = f"http://127.0.0.1:{options.port}"
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    for protocol, page in dashboard_pages(uri, address).items():
        print(f"Compare under {protocol}: {page}", flush=True)
    return subprocess.run(command).returncode
