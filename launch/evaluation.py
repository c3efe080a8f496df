"""Commands that measure and show: evaluation on held-out people, the comparison page and the dashboard."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from avatars.errors import UserError
from launch.data import shards_there
from launch.options import parse
from launch.workspace import Workspace

if TYPE_CHECKING:
    from cluster.evaluate import Evaluated
    from eval.checkpoints import Checkpoint
    from eval.failures import Failure
    from eval.protocol import Protocol
    from eval.rows import Row

__all__ = ["dashboard", "evaluate", "evaluate_fits", "evaluate_training", "report", "show_table"]

SYNTHETIC = "synthetic-heldout"
EVERYBODY = "everybody"
"""In place of a subject, in the failure of a checkpoint that could not even be found."""


def evaluate_training(run: Path, shards: Path, workspace: Workspace) -> list[Row]:
    """Measures a trained network, the same network before training, and the nearest input picture.

    Args:
        run: a run's folder with `export/` and `initial/`.
        shards: packed shards with held-out people.
        workspace: where rows and pictures go.

    Raises:
        UserError: a subject could not be measured, or the tracking store does not answer.
    """
    return _whole(measure(_of_training(run), shards, workspace))


def evaluate_fits(method: str, shards: Path, workspace: Workspace) -> list[Row]:
    """Measures the avatars that were fitted to held-out people, in the folder that `headsplat fit` wrote.

    Raises:
        UserError: nothing was fitted, or what `evaluate_training` raises.
    """
    from eval.checkpoints import find_checkpoint

    fits = find_checkpoint(method, workspace.fits / method)
    return _whole(measure([fits], shards, workspace, subjects=tuple(subject for subject, _ in fits.hashes)))


def _of_training(run: Path) -> list[Checkpoint]:
    """A training's network, the same before its first step, and the baseline to beat."""
    from eval.checkpoints import ANY, NEAREST, find_checkpoint

    trained = find_checkpoint(ANY, run / "export")
    untrained = find_checkpoint(f"{trained.method}-untrained", run / "initial")
    return [trained, untrained, find_checkpoint(NEAREST)]


def measure(
    checkpoints: list[Checkpoint],
    shards: Path,
    workspace: Workspace,
    *,
    options: EvalOptions | None = None,
    subjects: tuple[str, ...] | None = None,
) -> Evaluated:
    """Rows of checkpoints under the options' protocols, told to MLflow as they come.

    Raises:
        UserError: a protocol that does not fit the shards, or a tracking store that cannot be opened.
    """
    from cluster.evaluate import evaluate_all
    from eval.runs import EvaluationLog

    options = options or EvalOptions()
    protocols = _protocols(options, shards)
    workers = _workers(options.workers)
    names = ", ".join(f"{protocol.name} {protocol.id}" for protocol in protocols)
    print(f"{_count(len(checkpoints), 'checkpoint')} under {names}", flush=True)
    with EvaluationLog(workspace.tracking_uri, workspace.results) as log:
        evaluated = evaluate_all(
            checkpoints,
            protocols,
            shards,
            workspace.results,
            split=options.split,
            subjects=subjects or options.subjects or None,
            again=options.again,
            workers=workers,
            cpus=options.cpus,
            gpus=options.gpus,
            memory=None if options.memory is None else options.memory * 2**30,
            retries=options.retries,
            device=options.device,
            batch=options.batch,
            say=lambda line: print(line, flush=True),
            on_row=log.tell,
        )
    return replace(evaluated, untold=log.untold)


def _whole(evaluated: Evaluated) -> list[Row]:
    """The rows, when nothing is missing.

    Raises:
        UserError: something failed, or the tracking store was not told of everything.
    """
    if evaluated.failures:
        first = evaluated.failures[0]
        raise UserError(
            f"{_count(len(evaluated.failures), 'evaluation')} failed, first {first.method} {first.checkpoint} on "
            f"{first.subject}: {first.reason}"
        )
    if evaluated.untold:
        raise UserError(evaluated.untold)
    return evaluated.rows


def _protocols(options: EvalOptions, shards: Path) -> list[Protocol]:
    """The protocols that were asked for, bound to the shards' split."""
    from eval.protocols import find_protocol
    from shards import open_shards

    people = open_shards(shards, options.split)
    return [find_protocol(name, people) for name in dict.fromkeys(options.protocol or (SYNTHETIC,))]


def _workers(asked: int | None) -> int | None:
    """How many rows at a time: without a word this process alone, or as many as a cluster has room for."""
    if asked is not None and asked < 1:
        raise UserError(f"--workers is {asked}; give 1 or more.")
    return 1 if asked is None and not os.environ.get("RAY_ADDRESS") else asked


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def found_checkpoints(
    options: EvalOptions, workspace: Workspace
) -> tuple[list[Checkpoint], dict[str, str | None]]:
    """What the words on the command line name.

    Returns:
        The checkpoints, and of every place that was named the sentence that says why it holds none, or None.

    Raises:
        UserError: nothing was named, and the workspace holds nothing of the method.
    """
    from eval.checkpoints import ANY, BASELINES, find_checkpoint

    if not options.checkpoints:
        if options.method in BASELINES:
            return [find_checkpoint(options.method)], {}
        fits = workspace.fits / options.method
        if not options.run and fits.is_dir():
            return [find_checkpoint(options.method, fits)], {}
        run = workspace.run(options.run or f"{options.method}-cpu")
        if not (run / "export").is_dir():
            raise UserError(
                f"{workspace.root} holds neither fits of {options.method} nor a finished training {run.name}. Name a "
                f"checkpoint, `headsplat eval {options.method} CHECKPOINT`, or a run with --run."
            )
        return _of_training(run), {}
    found: dict[tuple[str, str], Checkpoint] = {}
    places: dict[str, str | None] = {}
    for place in (place for word in options.checkpoints for place in _places(word)):
        try:
            if options.method == ANY and place in BASELINES:
                checkpoint = find_checkpoint(place)
            else:
                checkpoint = find_checkpoint(options.method, Path(place))
        except UserError as error:
            places[place] = str(error)
            continue
        twin = found.setdefault((checkpoint.method, checkpoint.name), checkpoint)
        same = twin.hashes == checkpoint.hashes
        places[place] = (
            None if same else f"{twin.folder} is called {twin.method} {twin.name} too; rename one of them."
        )
    return list(found.values()), places


def _places(word: str) -> list[str]:
    """A word, or what it stands for when it is a pattern that no shell has expanded."""
    if Path(word).exists() or not any(sign in word for sign in "*?["):
        return [word]
    start = Path(Path(word).anchor)
    return sorted(map(str, start.glob(str(Path(word).relative_to(start))))) or [word]


def show_table(rows: list[Row], workspace: Workspace) -> None:
    """The comparison on the terminal, and where to look next."""
    from eval.rows import protocol_people
    from eval.tables import NothingComparesError, by_protocol, table

    groups = by_protocol(rows)
    for name, mine in groups.items():
        print(f"\n{name}" if len(groups) > 1 else "")
        try:
            print(table(mine, people=protocol_people(workspace.results, mine[0])))
        except NothingComparesError as reason:
            print(reason)
    print(
        f"\nRows and pictures: {workspace.results}    Compare in the browser: make dashboard OUT={workspace.root}"
    )


@dataclass(frozen=True)
class EvalOptions:
    """Measures trained models and fitted avatars on held-out people, in this process or on Ray."""

    method: Annotated[str, tyro.conf.Positional] = "avat3r"
    """A trained or fitted method, nearest-input, or "any": checkpoints of several methods, each under its own name."""
    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Exported models, folders of runs, folders of fitted avatars, or patterns of these; without any, what OUT holds of
    METHOD. With "any" also nearest-input."""
    protocol: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Name of a protocol, or a JSON file: ava256-fewshot, nersemble-fewshot, nersemble-benchmark, flashavatar-video,
    synthetic-heldout (by default). Give it several times for several protocols."""
    subjects: tuple[str, ...] = ()
    """Only these people; tables then lack the others."""
    split: str = "heldout"
    """Split of the shards."""
    again: bool = False
    """Measures anew what has a row of the same checkpoint, protocol and data already."""
    device: str = "cpu"
    """Where avatars are made and measured: cpu or cuda."""
    batch: int = 0
    """Pictures measured at once, 0 for all of a timestep; changes no number."""
    workers: int | None = None
    """People measured at a time, each by a Ray actor: on the cluster that RAY_ADDRESS names, by default as many as it
    has room for, or on this machine. 1, the default without a cluster, works without Ray."""
    cpus: float | None = None
    """CPUs, and threads, of each; 1 on Ray by default, all of this machine's without it."""
    gpus: float | None = None
    """GPUs of each, fractions allowed; 1 by default where the device is cuda."""
    memory: float | None = None
    """GiB that Ray sets aside for each."""
    retries: int = 2
    """How often a person is tried again whose process or machine was lost."""
    run: str = ""
    """Name of a training under OUT/runs to measure; METHOD-cpu by default."""
    data: Path | None = None
    """Folder of packed shards; the demo's by default."""
    out: Path = Path("work")
    """Folder of runs, fits and results."""


def evaluate(words: list[str]) -> None:
    """`headsplat eval METHOD [CHECKPOINT …]`."""
    from eval.failures import Failure, note_failures

    options = parse(EvalOptions, words, "eval")
    workspace = Workspace(options.out)
    shards = shards_there(options.data, workspace)
    if shards is None:
        raise UserError(
            f"{workspace.shards} holds no packed shards. Name a folder with --data (DATA= for make)."
        )
    checkpoints, places = found_checkpoints(options, workspace)
    for place, reason in places.items():
        note_failures(workspace.results, options.method, {EVERYBODY: reason}, checkpoint=place)
    lost = [Failure(options.method, EVERYBODY, reason, place) for place, reason in places.items() if reason]
    if not checkpoints:
        raise UserError(" ".join(failure.reason for failure in lost))
    evaluated = measure(checkpoints, shards, workspace, options=options)
    failures = lost + evaluated.failures
    if evaluated.rows:
        show_table(evaluated.rows, workspace)
    if failures:
        show_failures(failures)
    _whole(replace(evaluated, failures=failures))


def show_failures(failures: list[Failure]) -> None:
    """What has no row and why, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Failures")
    for heading in ("method", "checkpoint", "subject", "reason"):
        table.add_column(heading, overflow="fold")
    for failure in failures:
        table.add_row(failure.method, failure.checkpoint, failure.subject, failure.reason)
    Console().print(table)


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
