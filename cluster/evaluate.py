"""Evaluation in bulk: many checkpoints × subjects × protocols, a Ray job each, with the numbers of one process."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avatars.errors import UserError
from cluster.fit import slots_here
from cluster.pool import Event, Job, Report, out_of_memory, run_jobs
from cluster.session import ray_session
from eval.checkpoints import Checkpoint, load_maker
from eval.failures import Failure, note_failures
from eval.protocol import Protocol, write_protocol
from eval.rows import PROTOCOL_FILE, ROW_FILE, Row, protocol_folder, read_row, row_folder

if TYPE_CHECKING:
    from eval.meter import Meter
    from eval.metrics import Definition
    from shards import ShardSet

__all__ = ["Evaluated", "evaluate_all", "evaluate_one"]


@dataclass(frozen=True)
class Evaluated:
    """What became of an evaluation.

    Attributes:
        rows: in the order of protocols, checkpoints and the protocol's subjects; those that were there already too.
        failures: what has no row, and why.
        kept: how many rows were there already.
        untold: a sentence on what a tracking store was not told, from who tells it.
    """

    rows: list[Row]
    failures: list[Failure]
    kept: int
    untold: str = ""


@dataclass(frozen=True)
class _Part:
    """One subject of one checkpoint under one protocol."""

    checkpoint: Checkpoint
    protocol: Protocol = field(repr=False)
    subject: str

    @property
    def name(self) -> str:
        """Unique; what terminals and Ray's dashboard call it."""
        made_by = " ".join(part for part in (self.checkpoint.method, self.checkpoint.name) if part != "none")
        return f"{made_by}, {self.protocol.name} {self.protocol.id}, {self.subject}"

    def folder(self, results: Path) -> Path:
        """Where its row is, or will be."""
        made_by = self.checkpoint.method, self.checkpoint.name
        return row_folder(results, *made_by, self.subject, self.protocol.name, self.protocol.id)


def evaluate_all(
    checkpoints: Sequence[Checkpoint],
    protocols: Sequence[Protocol],
    shards: str | Path,
    results: Path,
    *,
    split: str = "heldout",
    subjects: Iterable[str] | None = None,
    again: bool = False,
    workers: int | None = 1,
    cpus: float | None = None,
    gpus: float | None = None,
    memory: float | None = None,
    retries: int = 2,
    patience: float = 600,
    device: str = "cpu",
    batch: int = 0,
    say: Callable[[str], None] | None = None,
    on_row: Callable[[Checkpoint, Row], None] | None = None,
) -> Evaluated:
    """Measures every checkpoint on every subject of every protocol; a row a job.

    May be called again at any time: a row that is there with the same protocol id, which holds the data's hash, and
    the same checkpoint's hash is kept, unless weights of one of its missing metrics have come since. What fails is
    noted beside the rows and stops nothing else. On several machines shards, checkpoints and results must be on
    storage that all of them share. With equal threads the numbers are bit for bit those of one process; timings are
    those of a machine that works on other jobs too.

    Args:
        checkpoints: what to measure.
        protocols: of the same split of the same shards.
        shards: the packed shards.
        results: folder of rows, pictures and failures.
        split: of the shards.
        subjects: a part of the protocols' subjects; all by default.
        again: measures anew what is there.
        workers: rows measured at the same time. 1 measures in this process, without Ray; None asks for as many as
            there is room for.
        cpus: CPUs and threads of each, 1 by default; in this process PyTorch's threads where it is None.
        gpus: GPUs of each, fractions allowed; by default 1 where the device is a GPU.
        memory: bytes that Ray sets aside for each.
        retries: how often a job is tried again whose process or machine was lost.
        patience: seconds to wait for the cluster to give an actor.
        device: where avatars are made and measured.
        batch: pictures measured at once, 0 for all of a timestep.
        say: told a line when a row is done, retried or failed.
        on_row: called in this process with every row as soon as it is there.

    Raises:
        UserError: no checkpoint, no such subject, or no room for an actor.
    """
    if not checkpoints:
        raise UserError("There is no checkpoint to evaluate.")
    tell = say or (lambda line: None)
    take = on_row or (lambda checkpoint, row: None)
    for protocol in protocols:
        write_protocol(protocol, protocol_folder(results, protocol.name, protocol.id) / PROTOCOL_FILE)
    parts = list(_parts(checkpoints, protocols, subjects))
    rows: dict[str, Row] = {}
    waiting: list[_Part] = []
    for part in parts:
        row = None if again else _standing(part, results)
        if row is None:
            waiting.append(part)
        else:
            rows[part.name] = row
            take(part.checkpoint, row)
    kept = len(rows)
    if kept:
        tell(f"{kept} of {len(parts)} rows are there already; --again measures them anew")

    by_name = {part.name: part for part in waiting}
    jobs = [
        Job(
            part.name,
            {
                "checkpoint": part.checkpoint,
                "protocol": part.protocol,
                "subject": part.subject,
                "shards": str(shards) if "://" in str(shards) else str(Path(shards).resolve()),
                "split": split,
                "results": str(results.resolve()),
                "device": device,
                "batch": batch,
            },
        )
        for part in waiting
    ]
    errors: dict[str, str] = {}
    started, done = time.monotonic(), 0

    def on_event(event: Event) -> None:
        nonlocal done
        if event.kind == "retried":
            tell(f"{event.name}: tried again, for {event.report['error']}")
        if event.kind not in ("done", "failed"):
            return
        done += 1
        left = (time.monotonic() - started) / done * (len(jobs) - done)
        head = f"[{done}/{len(jobs)}, about {_duration(left)} left] {event.name}"
        if event.kind == "failed":
            errors[event.name] = event.report["error"]
            tell(f"{head}: failed: {event.report['error']}")
            return
        from eval.evaluate import told

        rows[event.name] = event.value
        tell(f"{head}: {told(event.value)}")
        take(by_name[event.name].checkpoint, event.value)

    if jobs and workers == 1:
        _in_this_process(jobs, cpus, on_event)
    elif jobs:
        cpus = 1 if cpus is None else cpus
        gpus = float(device != "cpu") if gpus is None else gpus
        room = min(len(jobs), workers or slots_here(cpus, gpus))
        with ray_session(room * cpus, room * gpus):
            slots = min(len(jobs), workers or slots_here(cpus, gpus))
            for job in jobs:
                job.arguments["at_a_time"] = slots
            run_jobs(
                evaluate_one,
                jobs,
                slots=slots,
                cpus=cpus,
                gpus=gpus,
                memory=memory,
                retries=retries,
                patience=patience,
                on_event=on_event,
            )
    _note(parts, errors, results)
    failures = [_failure(part, errors[part.name]) for part in parts if part.name in errors]
    return Evaluated([rows[part.name] for part in parts if part.name in rows], failures, kept)


def evaluate_one(arguments: dict[str, Any], report: Report) -> Row:
    """One row, in an actor or anywhere else. What it loads is kept for the next job of the same process.

    Args:
        arguments: as `evaluate_all` makes them.
        report: told "stage".
    """
    from eval.evaluate import check_data, evaluate_subject

    checkpoint, protocol, subject = arguments["checkpoint"], arguments["protocol"], arguments["subject"]
    report(stage="loading")
    shards = _shards(arguments["shards"], arguments["split"])
    check_data(shards, protocol)
    create = _maker(checkpoint, arguments["device"])
    meter = _meter(protocol.metrics, arguments["device"])
    report(stage="measuring")
    return evaluate_subject(
        checkpoint.method,
        create,
        shards,
        subject,
        protocol,
        meter,
        checkpoint=checkpoint.name,
        out=Path(arguments["results"]),
        checkpoint_hash=checkpoint.hash_for(subject),
        device=arguments["device"],
        at_a_time=arguments.get("at_a_time", 1),
        batch=arguments["batch"],
    )


@lru_cache(maxsize=1)
def _shards(folder: str, split: str) -> ShardSet:
    from shards import open_shards

    return open_shards(folder, split)


@lru_cache(maxsize=1)  # one network in memory: jobs come ordered by checkpoint
def _maker(checkpoint: Checkpoint, device: str) -> Callable[..., Any]:
    return load_maker(checkpoint, device)


@lru_cache(maxsize=2)
def _meter(metrics: tuple[Definition, ...], device: str) -> Meter:
    from eval.meter import Meter

    return Meter(metrics, device)


def _forget() -> None:
    """Lets go of what jobs in this process have loaded."""
    for kept in (_shards, _maker, _meter):
        kept.cache_clear()


def _parts(
    checkpoints: Sequence[Checkpoint], protocols: Sequence[Protocol], subjects: Iterable[str] | None
) -> Iterator[_Part]:
    """In an order in which neighbours share what has to be loaded."""
    chosen = None if subjects is None else list(dict.fromkeys(subjects))
    for protocol in protocols:
        unknown = sorted(set(chosen or ()) - set(protocol.subjects))
        if unknown:
            raise UserError(
                f"The protocol {protocol.name} {protocol.id} does not know the subjects {', '.join(unknown)}."
            )
    if len({(c.method, c.name) for c in checkpoints}) < len(checkpoints):
        names = [f"{c.method} {c.name}" for c in checkpoints]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"Two checkpoints are called {twice}, so their rows would replace each other. Rename one's folder."
        )
    for checkpoint in checkpoints:
        for protocol in protocols:
            for subject in chosen or protocol.subjects:
                yield _Part(checkpoint, protocol, subject)


def _standing(part: _Part, results: Path) -> Row | None:
    """The row that is there, when nothing that it depends on has changed."""
    folder = part.folder(results)
    if not (folder / "sheet.png").is_file():
        return None
    try:
        row = read_row(folder / ROW_FILE)
    except UserError:
        return None  # cut short, or of an older version: it is replaced
    wanted = part.checkpoint.hash_for(part.subject)
    same = wanted != "" and (row.checkpoint_hash, row.protocol_id) == (wanted, part.protocol.id)
    return row if same and not _measurable_now(part.protocol, row) else None


def _measurable_now(protocol: Protocol, row: Row) -> bool:
    """Whether weights have come for a metric that this row lacks."""
    lacking = {key for key in row.missing if key not in row.weights}
    networks = tuple(m for m in protocol.metrics if m.network is not None and m.key in lacking)
    return bool(networks) and len(_meter(networks, "cpu").missing) < len(networks)


def _in_this_process(jobs: Sequence[Job], cpus: float | None, on_event: Callable[[Event], None]) -> None:
    """The jobs one after the other, without Ray; what is no user's error and no lack of memory is a bug and raised."""
    import torch

    threads = torch.get_num_threads()
    if cpus is not None:
        torch.set_num_threads(max(1, int(cpus)))
    try:
        for job in jobs:
            try:
                value = evaluate_one(job.arguments, lambda **_: None)
            except UserError as error:
                on_event(Event("failed", job.name, {"error": str(error)}))
            except Exception as error:
                if not out_of_memory(error):
                    raise
                on_event(Event("failed", job.name, {"error": "it ran out of memory"}))
            else:
                on_event(Event("done", job.name, value=value))
    finally:
        torch.set_num_threads(threads)
        _forget()


def _failure(part: _Part, reason: str) -> Failure:
    protocol = f"{part.protocol.name} {part.protocol.id}"
    return Failure(part.checkpoint.method, part.subject, reason, part.checkpoint.name, protocol)


def _note(parts: Sequence[_Part], errors: dict[str, str], results: Path) -> None:
    """Failures beside the rows; one that was there and went well now is taken out."""
    outcomes: dict[tuple[str, str, str], dict[str, str | None]] = defaultdict(dict)
    for part in parts:
        told = _failure(part, errors.get(part.name, ""))
        outcomes[told.method, told.checkpoint, told.protocol][told.subject] = told.reason or None
    for (method, checkpoint, protocol), by_subject in outcomes.items():
        note_failures(results, method, by_subject, checkpoint=checkpoint, protocol=protocol)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
