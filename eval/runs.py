"""Evaluations in MLflow: a parent run a method and checkpoint, in it a child a subject; checkpoints in its registry.

One process writes, the driver of the evaluation. The rows on disk are the record: everything here can be said again at
any time, and what the store has already is not doubled.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from eval.hashing import short_hash
from eval.rows import ROW_FILE, Row, check_one_protocol, row_folder
from eval.tracking import TAG, experiment_for, open_store, quiet

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from eval.checkpoints import Checkpoint

__all__ = ["EvaluationLog", "log_evaluation"]

FLUSH_SECONDS = 5.0
FIRST_WAIT, LONGEST_WAIT = 10.0, 300.0
"""Seconds between two tries of a store that is away."""
Group = tuple[str, str, str, str]
"""Protocol, its id, method and checkpoint: what shares a parent run."""


class EvaluationLog:
    """Tells the store of rows while an evaluation goes on; used as a context manager by its one driver.

    A thread sends what `tell` was given. A store that goes away meanwhile holds nothing up: what it has missed is sent
    when it is back. What is still unsent at the end is said in `untold`; the rows are on disk, and the same evaluation,
    which keeps them, tells the store of them.

    Args:
        uri: the tracking store.
        results: folder of the rows.

    Attributes:
        untold: a sentence on what the store has not been told, empty when it has everything.

    Raises:
        UserError: on entering, when the store cannot be opened: before the work rather than after it.
    """

    def __init__(self, uri: str, results: Path) -> None:
        self.untold = ""
        self._uri, self._results = uri, results
        self._waiting: dict[Group, tuple[Checkpoint | None, dict[str, Row]]] = {}
        self._parents: dict[Group, str] = {}
        self._lock, self._leaving = threading.Lock(), threading.Event()
        self._wait = 0.0
        self._thread = threading.Thread(target=self._send, name="headsplat-evaluation-log", daemon=True)

    def __enter__(self) -> EvaluationLog:
        self._client = open_store(self._uri)
        self._thread.start()
        return self

    def tell(self, checkpoint: Checkpoint | None, row: Row) -> None:
        """Takes a row, and returns at once."""
        group = (row.protocol, row.protocol_id, row.method, row.checkpoint)
        with self._lock:
            self._waiting.setdefault(group, (checkpoint, {}))[1][row.subject] = row

    def flush(self) -> None:
        """Sends what waits. What the store raises goes through, and what it has not taken waits on."""
        while True:
            with self._lock:
                group, (checkpoint, rows) = next(iter(self._waiting.items()), (None, (None, {})))
                rows = dict(rows)
            if group is None:
                return
            with quiet():
                experiment = experiment_for(self._client, self._uri, f"{group[0]} {group[1]}")
                self._parents[group] = _log_run(
                    self._client, experiment, list(rows.values()), self._results, checkpoint
                )
            with self._lock:
                mine = self._waiting[group][1]
                for subject, row in rows.items():
                    if mine[subject] is row:
                        del mine[subject]
                if not mine:
                    del self._waiting[group]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join()
        try:
            self.flush()
            for parent in self._parents.values():
                self._client.set_terminated(parent, "FINISHED" if kind is None else "KILLED")
        except Exception as trouble:  # the rows are on disk: whatever it was, nothing is lost
            rows = sum(len(rows) for _, rows in self._waiting.values())
            self.untold = (
                f"The tracking store {self._uri} was not told of {rows} rows ({_first_line(trouble)}). The same "
                "command keeps the rows and tells it."
            )

    def _send(self) -> None:
        """The thread: sends now and then, and less and less often while the store is away."""
        while not self._leaving.wait(self._wait or FLUSH_SECONDS):
            try:
                self.flush()
                self._wait = 0.0
            except Exception as error:
                if not self._wait:
                    print(
                        f"headsplat: the tracking store {self._uri} does not take rows ({_first_line(error)}); the "
                        "evaluation goes on and they are sent later",
                        file=sys.stderr,
                    )
                self._wait = min(max(2 * self._wait, FIRST_WAIT), LONGEST_WAIT)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def log_evaluation(
    rows: Sequence[Row], results: Path, uri: str, checkpoints: Sequence[Checkpoint] = ()
) -> list[str]:
    """Logs result rows with their pictures; a row that is there already is not logged again.

    Args:
        rows: rows of one protocol.
        results: the folder that `evaluate` wrote them to.
        uri: the tracking store.
        checkpoints: what made them, for the model registry.

    Returns:
        The ids of the parent runs, one a method and checkpoint.

    Raises:
        UserError: rows of several protocols, or a store that cannot be opened.
    """
    rows = list(rows)
    check_one_protocol(rows)
    client = open_store(uri)
    known = {(checkpoint.method, checkpoint.name): checkpoint for checkpoint in checkpoints}
    parents = []
    with quiet():
        experiment = experiment_for(client, uri, f"{rows[0].protocol} {rows[0].protocol_id}")
        for made_by in dict.fromkeys((row.method, row.checkpoint) for row in rows):
            mine = [row for row in rows if (row.method, row.checkpoint) == made_by]
            parents.append(_log_run(client, experiment, mine, results, known.get(made_by)))
            client.set_terminated(parents[-1], "FINISHED")
    return parents


def _log_run(
    client: MlflowClient, experiment: str, rows: list[Row], results: Path, checkpoint: Checkpoint | None
) -> str:
    """The parent of one method and checkpoint, with a child a row and means over all children; it stays RUNNING."""
    from mlflow.entities import Param, RunTag

    first = rows[0]
    run_key = short_hash([first.method, first.checkpoint, first.protocol_id])
    tags = {
        "kind": "evaluation",
        "run": run_key,
        "method": first.method,
        "checkpoint": first.checkpoint,
        "protocol": first.protocol,
        "protocol_id": first.protocol_id,
        "hardware": first.hardware,
        **({"variant": first.variant} if first.variant else {}),
        **{f"version.{name}": version for name, version in first.versions.items()},
    }
    params = {"method": first.method, "checkpoint": first.checkpoint, "protocol": first.protocol}
    if checkpoint is not None:
        params["recipe"] = checkpoint.recipe
        tags |= {"recipe": checkpoint.recipe, "checkpoint_hash": checkpoint.hash}
        tags |= {} if checkpoint.folder is None else {"folder": str(checkpoint.folder)}
    found = _only_one(client, experiment, _find(client, experiment, {"kind": "evaluation", "run": run_key}))
    if found:
        parent = found[0].info.run_id
        client.update_run(parent, status="RUNNING")
    else:
        name = first.method if first.checkpoint in ("", "none") else f"{first.method} {first.checkpoint}"
        parent = _create(client, experiment, name, tags)
    known = found[0].data.params if found else {}
    client.log_batch(
        parent,
        params=[Param(key, value) for key, value in params.items() if key not in known],
        tags=[RunTag(f"{TAG}{key}", value) for key, value in tags.items()],
    )
    if checkpoint is not None and checkpoint.folder is not None:
        _register(client, parent, checkpoint)
    children = _find(client, experiment, {}, parent)
    for row in rows:
        _log_row(client, experiment, parent, row, results, children)
    _log_means(client, experiment, parent)
    return parent


def _only_one(client: MlflowClient, experiment: str, runs: list[Any]) -> list[Any]:
    """Of several parents the one with the most children; the others are deleted.

    A client that lost the answer to "create" asks again, and the store may have made both.
    """
    if len(runs) < 2:
        return runs
    children = {run.info.run_id: _find(client, experiment, {}, run.info.run_id) for run in runs}
    kept = max(runs, key=lambda run: len(children[run.info.run_id]))
    for run in runs:
        if run is not kept:
            for child in children[run.info.run_id]:
                client.delete_run(child.info.run_id)
            client.delete_run(run.info.run_id)
    return [kept]


def _log_row(
    client: MlflowClient, experiment: str, parent: str, row: Row, results: Path, children: Sequence[Any]
) -> None:
    from mlflow.entities import Metric, Param

    content = short_hash(row.as_dict())
    there = [run for run in children if run.data.tags.get(f"{TAG}row") == row.key]
    whole = [run for run in there if run.data.tags.get(f"{TAG}content") == content][:1]
    for old in there:
        if old not in whole:  # of another evaluation, or left half logged by a process or a store that died
            client.delete_run(old.info.run_id)
    if whole:
        return
    tags = {
        "kind": "subject",
        "row": row.key,
        "method": row.method,
        "checkpoint": row.checkpoint,
        "subject": row.subject,
        "protocol_id": row.protocol_id,
        "hardware": row.hardware,
        **{f"missing.{key}": reason for key, reason in row.missing.items()},
    }
    child = _create(client, experiment, f"{row.method} · {row.subject}", tags, parent)
    now = int(time.time() * 1000)
    values = {**row.values, "create_seconds": row.create_seconds, "drive_fps": row.drive_fps}
    client.log_batch(
        child,
        metrics=[Metric(f"eval/{key}", value, now, 0) for key, value in values.items()],
        params=[Param("subject", row.subject), Param("method", row.method)],
    )
    folder = row_folder(results, row.method, row.checkpoint, row.subject, row.protocol, row.protocol_id)
    for path in sorted(folder.glob("*")):
        if path.name in (ROW_FILE, "sheet.png"):
            client.log_artifact(child, str(path))
        elif re.fullmatch(r"\d+-(prediction|error)\.png", path.name):
            client.log_artifact(child, str(path), "pictures")
    client.set_terminated(child, "FINISHED")
    client.set_tag(child, f"{TAG}content", content)  # last: a child without it is logged again


def _log_means(client: MlflowClient, experiment: str, parent: str) -> None:
    """Means over the children into the parent; only what changed, so that its history has no doubles."""
    from mlflow.entities import Metric

    children: list[Any] = []
    for run in _find(client, experiment, {}, parent):
        if f"{TAG}content" in run.data.tags:
            children.append(run)
        else:  # its creation was asked for twice
            client.delete_run(run.info.run_id)
    known = client.get_run(parent).data.metrics
    now, changed = int(time.time() * 1000), []
    for key in sorted({key for run in children for key in run.data.metrics}):
        values = [run.data.metrics[key] for run in children if key in run.data.metrics]
        if len(values) == len(children):
            mean = math.fsum(values) / len(values)
            if known.get(key) != mean:
                changed.append(Metric(key, mean, now, len(children)))
    client.log_batch(parent, metrics=changed)
    client.set_tag(parent, f"{TAG}subjects", str(len(children)))


def _register(client: MlflowClient, parent: str, checkpoint: Checkpoint) -> None:
    """A registered model a recipe, in it a version a checkpoint's hash; the weights stay where they are.

    The version's artifacts, under its source, describe the checkpoint and say where its files lie.
    """
    assert checkpoint.folder is not None
    name = re.sub(r"[/:'\"]", "-", checkpoint.recipe)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    there = [
        version
        for version in client.search_model_versions(f"name = '{name}'")
        if version.tags.get(f"{TAG}checkpoint_hash") == checkpoint.hash
    ]
    for double in sorted(there, key=lambda version: int(version.version))[1:]:
        client.delete_model_version(name, double.version)
    if there:
        return
    described = {
        "method": checkpoint.method,
        "checkpoint": checkpoint.name,
        "recipe": checkpoint.recipe,
        "step": checkpoint.step,
        "folder": str(checkpoint.folder.resolve()),
        "hash": checkpoint.hash,
        "hashes": dict(checkpoint.hashes),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.json"
        file.write_text(json.dumps(described, indent=1) + "\n")
        client.log_artifact(parent, str(file), "checkpoint")
    if (description := checkpoint.folder / "model.json").is_file():
        client.log_artifact(parent, str(description), "checkpoint")
    tags = {key: str(described[key]) for key in ("method", "checkpoint", "recipe", "step", "folder")}
    client.create_model_version(
        name,
        f"runs:/{parent}/checkpoint",
        parent,
        tags={f"{TAG}{key}": value for key, value in {**tags, "checkpoint_hash": checkpoint.hash}.items()},
        description=f"{checkpoint.name}: the weights are in {checkpoint.folder.resolve()}",
    )


def _create(
    client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str], parent: str | None = None
) -> str:
    marked = {f"{TAG}{key}": value for key, value in tags.items()}
    if parent is not None:
        marked["mlflow.parentRunId"] = parent
    return str(client.create_run(experiment, tags=marked, run_name=name).info.run_id)


def _find(
    client: MlflowClient, experiment: str, tags: Mapping[str, str], parent: str | None = None
) -> list[Any]:
    """All active runs of an experiment that carry the tags, of one parent, the newest first."""
    asked = {f"{TAG}{key}": value for key, value in tags.items()}
    if parent is not None:
        asked["mlflow.parentRunId"] = parent
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in asked.items())
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], condition, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
