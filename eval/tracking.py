"""MLflow: the tracking store, its dashboard, and training runs in it.

The store is SQLite by default; anything else that MLflow speaks comes by its address. One process writes:
rank 0 of a training, or the driver of an evaluation (`eval.runs`). Layout: an experiment a recipe for training; for
evaluation an experiment a protocol.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from avatars.errors import UserError
from avatars.files import write_whole
from eval.hashing import short_hash
from eval.provenance import hardware, versions

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "TrainingRun",
    "dashboard_command",
    "dashboard_pages",
    "experiment_for",
    "flatten",
    "mark_ended",
    "open_store",
    "quiet",
]

TAG = "headsplat."
FLUSH_SECONDS = 5.0
FIRST_WAIT, LONGEST_WAIT = 30.0, 300.0  # seconds between two tries of a store that is away
METRICS_A_BATCH = 1000  # MLflow's own limits for one request
PARAMS_A_BATCH = 100
PARAM_LENGTH = 500
RUN_FILE = "mlflow.json"
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")


def open_store(uri: str) -> MlflowClient:
    """A quiet client of a tracking store whose schema is there.

    MLflow makes the schema at first use, and processes that do so at once break it (all of eight did); a
    lock beside an SQLite file lets one do it while the others wait.

    Args:
        uri: address such as `sqlite:////data/mlflow.db` or `http://host:5000`.

    Raises:
        UserError: an address that MLflow does not serve, a store of another version, or one that cannot be
            reached.
    """
    if uri.split(":", 1)[0].split("+", 1)[0] not in SCHEMES:
        raise UserError(
            f"{uri!r} is not a tracking store. Give MLFLOW_TRACKING_URI as sqlite:////path/mlflow.db or "
            "http://host:port; MLflow no longer writes to plain folders."
        )
    mlflow = _import_quietly()
    database = _sqlite_file(uri)
    try:
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        with _locked(database), quiet():
            client = mlflow.MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # MLflow, SQLAlchemy and HTTP raise their own kinds
        if "Max retries exceeded" in str(error):
            raise UserError(
                f"The tracking server {uri} does not answer. Start it, or unset MLFLOW_TRACKING_URI to use a file."
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The tracking store {uri} cannot be opened: {first[:300]} Check the address, or move the file "
            "away to start a new store."
        ) from error
    return client


def dashboard_command(uri: str, port: int = 5000, host: str = "127.0.0.1") -> list[str]:
    """The command that serves MLflow's dashboard of a store, as words for `subprocess`.

    Raises:
        UserError: the store is a server already.
    """
    if uri.startswith(("http://", "https://")):
        raise UserError(f"The tracking store {uri} is a server: open it in a browser.")
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    return [*command, "--host", host, "--port", str(port), "--workers", "1"]


def dashboard_pages(uri: str, address: str) -> dict[str, str]:
    """Where the dashboard lists the runs of each protocol, the newest first.

    MLflow opens an experiment on a page for language models unless the address says otherwise.

    Args:
        uri: the tracking store.
        address: of the dashboard, for example `http://127.0.0.1:5000`.

    Returns:
        The protocol's name and id to the page's address.
    """
    client = open_store(uri)
    with quiet():
        found = client.search_experiments(order_by=["last_update_time DESC"])
        evaluations = {
            experiment.name: str(experiment.experiment_id)
            for experiment in found
            if client.search_runs(
                [experiment.experiment_id], f"tags.`{TAG}kind` = 'evaluation'", max_results=1
            )
        }
    return {
        name: f"{address.rstrip('/')}/#/experiments/{number}/runs?workflowType=machine_learning"
        for name, number in evaluations.items()
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow's flat parameters: `{"model": {"width": 8}}` is `{"model.width": "8"}`."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, str):
            flat[name] = value
        else:
            flat[name] = json.dumps(value, default=str)
    return flat


class Spool:
    """What a run tells, one JSON line after the other on disk, and how far the store has taken it.

    The file stays: it is the run's own record, and says after a restart what has been told already. Lines carry the
    time at which they were told, so that a line that is sent twice is one entry in the store.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"mlflow-{run_id}.jsonl"
        self._mark = folder / f"mlflow-{run_id}.sent"
        self.fresh = not self.path.exists()
        self._file = self.path.open("ab")
        self._sent = int(self._mark.read_text()) if self._mark.is_file() else 0

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines; they are on the disk's way when this returns."""
        self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._file.flush()

    def unsent(self, most: int = METRICS_A_BATCH) -> tuple[list[dict[str, Any]], int]:
        """The next lines to send, and where they end in the file."""
        with self.path.open("rb") as file:
            file.seek(self._sent)
            # A process that died in the middle of a line left a half: it is no line.
            raw = [line for line, _ in zip(file, range(most), strict=False) if line.endswith(b"\n")]
        return [json.loads(line) for line in raw], self._sent + sum(map(len, raw))

    def sent(self, end: int) -> None:
        """Remembers that the store has everything before `end`."""
        self._sent = end
        write_whole(self._mark, str(end))

    def last_steps(self) -> dict[str, int]:
        """The last step of every metric that was told."""
        steps: dict[str, int] = {}
        for line in self.path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                told = json.loads(line)
                if "key" in told:
                    steps[told["key"]] = max(told["step"], steps.get(told["key"], -1))
        return steps

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TrainingRun:
    """One training in the tracking store, for rank 0; used as a context manager.

    Leaving it normally marks the run FINISHED; an exception of `killed_by`, an interrupt or an exit marks
    it KILLED; any other exception marks it FAILED, with the reason in the tag `headsplat.reason`. A process
    that vanishes leaves it RUNNING until `mark_ended`, or until the next one with the same folder resumes it or
    puts KILLED. Everything is written to a spool in the run's folder and sent from there by a thread: a store that
    is slow or away does not hold the training up, and what it has missed is sent when it is back, in this process
    or in the next one of the same run.

    Args:
        uri: the tracking store.
        experiment: name of the experiment, for example the recipe's.
        folder: the run's folder; its name is the run's name, and `mlflow.json` in it remembers the run's id.
        params: the resolved recipe, nested.
        resume: id of the run to go on with, from a checkpoint; None starts a new one. A run that is gone
            from the store is started anew.
        killed_by: exceptions that mean preemption.
        tags: further tags.

    Attributes:
        run_id: MLflow's id, once entered.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        folder: Path,
        params: Mapping[str, Any],
        *,
        resume: str | None = None,
        killed_by: tuple[type[BaseException], ...] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.run_id = ""
        self._uri, self._experiment, self._folder, self._params = uri, experiment, folder, params
        self._resume, self._killed_by, self._tags = resume, killed_by, dict(tags or {})
        self._client: MlflowClient | None = None
        self._spool: Spool | None = None
        self._last_step: dict[str, int] = {}
        self._wait = 0.0  # seconds between tries, 0 while the store answers
        self._sending = threading.Lock()
        self._leaving = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._send, name="headsplat-tracking", daemon=True)

    def __enter__(self) -> TrainingRun:
        remembered = self._remembered()
        try:
            client = self._client = open_store(self._uri)
        except UserError:
            if self._resume is None or self._resume != remembered:
                raise
            self.run_id = self._resume  # the store knows the run and is away: it hears of it later
            self._away()
        else:
            experiment = experiment_for(client, self._uri, self._experiment)
            if self._resume is not None and _exists(client, self._resume):
                self.run_id = self._resume
                client.update_run(self.run_id, status="RUNNING")
            else:
                if remembered is not None and _exists(client, remembered) and _running(client, remembered):
                    client.set_terminated(remembered, "KILLED")
                self.run_id = client.create_run(experiment, run_name=self._folder.name).info.run_id
            self._describe(client)
        write_whole(self._folder / RUN_FILE, json.dumps({"uri": self._uri, "run_id": self.run_id}) + "\n")
        self._spool = Spool(self._folder, self.run_id)
        self._last_step = self._spool.last_steps()
        self._thread.start()
        return self

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of one step. What a resumed run has told already is left out: nothing is doubled."""
        now = int(time.time() * 1000)
        lines = []
        for key, value in metrics.items():
            if key not in self._last_step:
                self._last_step[key] = self._step_told(key)
            if step > self._last_step[key]:
                lines.append({"key": key, "value": float(value), "timestamp": now, "step": step})
                self._last_step[key] = step
        self._spooled().append(lines)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copies a file to the run, under `folder` among its artifacts; it must stay until it is sent."""
        self._spooled().append([{"artifact": str(path.resolve()), "folder": folder}])

    def flush(self) -> None:
        """Sends what waits."""
        from mlflow.entities import Metric

        spool = self._spooled()
        with self._sending:
            client = self._store()
            while True:
                lines, end = spool.unsent()
                if not lines:
                    return
                metrics = [
                    Metric(line["key"], line["value"], line["timestamp"], line["step"])
                    for line in lines
                    if "key" in line
                ]
                with quiet():
                    if metrics:
                        client.log_batch(self.run_id, metrics=metrics)
                    for line in lines:
                        if "artifact" in line and Path(line["artifact"]).is_file():
                            client.log_artifact(self.run_id, line["artifact"], line["folder"])
                spool.sent(end)

    def end(self, status: str, reason: str = "") -> None:
        """The run's last status, from whatever thread; what comes after it changes nothing."""
        if self._ended:
            return
        self._ended = True
        try:
            self.flush()
            if reason:
                self._store().set_tag(self.run_id, f"{TAG}reason", reason[:1000])
            self._store().set_terminated(self.run_id, status)
        except Exception as trouble:
            # The training's own outcome matters more than the tracker's; what was not sent stays on disk.
            print(
                f"headsplat: the tracking store did not take the end of the run ({trouble}); the same command sends "
                f"what waits in {self._spooled().path}",
                file=sys.stderr,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "FINISHED"
        if kind is not None:
            stopped = (*self._killed_by, KeyboardInterrupt, SystemExit)
            status = "KILLED" if issubclass(kind, stopped) else "FAILED"
        self._leaving.set()
        self._thread.join()
        self.end(status, f"{kind.__name__}: {error}" if kind is not None else "")
        self._spooled().close()

    def _send(self) -> None:
        """The thread: sends now and then, and less and less often while the store is away."""
        while not self._leaving.wait(self._wait or FLUSH_SECONDS):
            try:
                self.flush()
                self._wait = 0.0
            except Exception as error:
                self._away(error)

    def _away(self, error: Exception | None = None) -> None:
        first = not self._wait
        self._wait = min(max(2 * self._wait, FIRST_WAIT), LONGEST_WAIT)
        if first:
            print(
                f"headsplat: the tracking store {self._uri} does not answer"
                f"{f' ({type(error).__name__})' if error else ''}; training goes on and the numbers are sent later",
                file=sys.stderr,
            )

    def _store(self) -> MlflowClient:
        if self._client is None:
            if not self.run_id:
                raise RuntimeError("TrainingRun is a context manager: enter it before logging")
            client = open_store(self._uri)
            client.update_run(self.run_id, status="RUNNING")
            self._describe(client)
            self._client = client
        return self._client

    def _spooled(self) -> Spool:
        if self._spool is None:
            raise RuntimeError("TrainingRun is a context manager: enter it before logging")
        return self._spool

    def _step_told(self, key: str) -> int:
        """Last step of a metric that the spool does not know; -1 for a new run."""
        if self.run_id != self._resume or self._client is None or not self._spooled().fresh:
            return -1
        with quiet():
            history = self._client.get_metric_history(self.run_id, key)
        return max((metric.step for metric in history), default=-1)

    def _remembered(self) -> str | None:
        try:
            note = json.loads((self._folder / RUN_FILE).read_text())
            return str(note["run_id"]) if note["uri"] == self._uri else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _describe(self, client: MlflowClient) -> None:
        from mlflow.entities import Param, RunTag

        known = client.get_run(self.run_id).data.params
        new, changed = [], []
        for key, value in flatten(self._params).items():
            value = value[:PARAM_LENGTH]
            if key not in known:
                new.append(Param(key, value))
            elif known[key] != value:  # MLflow's parameters cannot change; a resumed run may
                changed.append(RunTag(f"{TAG}changed.{key}", value))
        found = {"kind": "train", "hardware": hardware(), "folder": str(self._folder), **self._tags}
        found |= {f"version.{name}": version for name, version in versions().items()}
        tags = changed + [RunTag(f"{TAG}{key}", value) for key, value in found.items()]
        for start in range(0, max(len(new), len(tags)), PARAMS_A_BATCH):
            part = slice(start, start + PARAMS_A_BATCH)
            client.log_batch(self.run_id, params=new[part], tags=tags[part])


def mark_ended(uri: str, folder: Path, status: str, reason: str) -> None:
    """Ends a run whose process could not do so itself; one that has ended stays as it is.

    Args:
        uri: the tracking store.
        folder: the run's folder.
        status: "FAILED" or "KILLED".
        reason: goes to the tag `headsplat.reason`.
    """
    try:
        note = json.loads((folder / RUN_FILE).read_text())
        client = open_store(uri)
        if note["uri"] == uri and _exists(client, note["run_id"]) and _running(client, note["run_id"]):
            client.set_tag(note["run_id"], f"{TAG}reason", reason[:1000])
            client.set_terminated(note["run_id"], status)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return  # no run, or a store that is away: the next start of the run puts it right


def _exists(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException:
        return False


def _running(client: MlflowClient, run_id: str) -> bool:
    return bool(client.get_run(run_id).info.status == "RUNNING")


def experiment_for(client: MlflowClient, uri: str, name: str) -> str:
    """Id of the experiment of this name, made if need be; beside SQLite its artifacts lie beside it."""
    from mlflow.exceptions import MlflowException

    database = _sqlite_file(uri)
    location = None if database is None else (database.parent / "mlartifacts" / short_hash(name)).as_uri()
    for _ in range(2):
        found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "active":
            return str(found.experiment_id)
        if found is not None:
            raise UserError(
                f"The experiment {name!r} was deleted in the tracking store {uri}. Restore it in the "
                "dashboard, or remove it for good with `mlflow gc`."
            )
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another process made it between the two calls
            continue
    raise UserError(f"The tracking store {uri} neither has nor makes the experiment {name!r}.")


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///")).resolve()


@contextmanager
def _locked(database: Path | None) -> Iterator[None]:
    if database is None:
        yield
        return
    with database.with_name(f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _import_quietly() -> Any:
    """mlflow, without telemetry, and without its and alembic's chatter about schemas."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # A server that is away is tried for about 15 s rather than for minutes; numbers wait meanwhile.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies, at import
        import mlflow
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps MLflow's deprecation warnings about its own code from whoever runs with warnings as errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=ResourceWarning)
        yield
