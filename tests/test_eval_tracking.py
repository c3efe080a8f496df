"""MLflow for real, on SQLite: training runs that end well and badly, evaluations that are logged once."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from test_eval_rows import ROW

from avatars.errors import UserError
from eval.rows import row_folder, write_row
from eval.runs import log_evaluation
from eval.tracking import TrainingRun, dashboard_command, flatten, mark_ended, open_store
from launch.preflight import free_port

PARAMS = {"recipe": "tiny", "model": {"width": 8, "heads": [1, 2]}, "lr": 1e-3}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One store for the module: making a schema takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    open_store(uri)
    return uri


def history(uri, run_id, key):
    return [(m.step, m.value) for m in open_store(uri).get_metric_history(run_id, key)]


def test_settings_become_flat_parameters():
    assert flatten(PARAMS) == {"recipe": "tiny", "model.width": "8", "model.heads": "[1, 2]", "lr": "0.001"}
    assert flatten({"a": None, "b": True, "c": {}}) == {"a": "null", "b": "true"}


def test_a_training_that_ends_is_finished_and_has_all_its_numbers(uri, tmp_path):
    (tmp_path / "note.txt").write_text("x")
    with TrainingRun(uri, "tiny", tmp_path / "good", PARAMS, tags={"note": "n"}) as run:
        for step in range(1, 2101):  # more than two batches
            run.log_metrics({"train/loss": 1 / step}, step)
        run.log_artifact(tmp_path / "note.txt", "notes")
    client = open_store(uri)
    stored = client.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "good"
    assert stored.data.params == flatten(PARAMS)
    assert stored.data.tags["headsplat.kind"] == "train"
    assert stored.data.tags["headsplat.note"] == "n"
    assert "headsplat.version.commit" in stored.data.tags
    assert history(uri, run.run_id, "train/loss") == [(step, 1 / step) for step in range(1, 2101)]
    assert [f.path for f in client.list_artifacts(run.run_id, "notes")] == ["notes/note.txt"]
    artifacts = client.get_experiment(stored.info.experiment_id).artifact_location
    assert artifacts.startswith(Path(uri.removeprefix("sqlite:///")).parent.as_uri())


class Preempted(Exception):
    pass


def train_and_die(uri, folder, steps, error):
    run = TrainingRun(uri, "tiny", folder, PARAMS, killed_by=(Preempted,))
    try:
        with run:
            for step in range(1, steps + 1):
                run.log_metrics({"train/loss": float(step)}, step)
            raise error
    except type(error):
        return run


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("the loss is nan"), "FAILED"),
        (Preempted("SIGTERM"), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_a_training_that_dies_says_how(uri, tmp_path, error, status):
    run = train_and_die(uri, tmp_path, 1, error)
    stored = open_store(uri).get_run(run.run_id)
    assert stored.info.status == status
    assert type(error).__name__ in stored.data.tags["headsplat.reason"]
    assert history(uri, run.run_id, "train/loss") == [(1, 1.0)]


def test_a_resumed_training_goes_on_without_doubles(uri, tmp_path):
    first = train_and_die(uri, tmp_path, 7, Preempted("SIGTERM"))
    longer = {**PARAMS, "lr": 2e-3}
    with TrainingRun(uri, "tiny", tmp_path, longer, resume=first.run_id) as second:
        assert open_store(uri).get_run(second.run_id).info.status == "RUNNING"
        for step in range(5, 11):  # the checkpoint was of step 4
            second.log_metrics({"train/loss": float(step)}, step)
    assert second.run_id == first.run_id
    assert history(uri, first.run_id, "train/loss") == [(step, float(step)) for step in range(1, 11)]
    stored = open_store(uri).get_run(first.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params["lr"] == "0.001"
    assert stored.data.tags["headsplat.changed.lr"] == "0.002"


def vanish(run):
    """Leaves a run as a killed process does."""
    run._leaving.set()
    run._thread.join()
    run._spool.close()


def test_a_training_that_vanished_is_killed_when_another_starts_in_its_folder(uri, tmp_path):
    vanished = TrainingRun(uri, "tiny", tmp_path, PARAMS).__enter__()
    vanish(vanished)
    assert json.loads((tmp_path / "mlflow.json").read_text())["run_id"] == vanished.run_id
    with TrainingRun(uri, "tiny", tmp_path, PARAMS) as fresh:
        fresh.log_metrics({"train/loss": 1.0}, 1)
    assert fresh.run_id != vanished.run_id
    assert open_store(uri).get_run(vanished.run_id).info.status == "KILLED"
    with TrainingRun(uri, "tiny", tmp_path, PARAMS, resume="0" * 32) as again:  # a run of another store
        pass
    assert again.run_id not in (fresh.run_id, vanished.run_id)
    assert open_store(uri).get_run(fresh.run_id).info.status == "FINISHED"


def serve(database, port):
    """A real tracking server; returns when it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--workers", "1"]
    artifacts = ["--artifacts-destination", str(Path(database.removeprefix("sqlite:///")).parent / "served")]
    server = subprocess.Popen(
        [*command, *artifacts, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return server
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the tracking server did not start")


def stop(server):
    os.killpg(server.pid, signal.SIGKILL)  # as an outage is: without a goodbye
    server.wait()


def wait_for(condition):
    while not condition():
        time.sleep(0.05)


@pytest.mark.slow
def test_a_server_that_is_stopped_and_started_misses_and_doubles_nothing(uri, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eval.tracking.FLUSH_SECONDS", 0.1)
    monkeypatch.setattr("eval.tracking.FIRST_WAIT", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    port = free_port(None)
    address = f"http://127.0.0.1:{port}"
    (tmp_path / "picture.png").write_bytes(b"picture")
    server = serve(uri, port)
    try:
        with TrainingRun(address, "away", tmp_path / "run", PARAMS) as run:
            run.log_metrics({"train/loss": 1.0}, 1)
            wait_for(lambda: not run._spool.unsent()[0])
            stop(server)
            run.log_metrics({"train/loss": 2.0}, 2)
            run.log_artifact(tmp_path / "picture.png", "pictures")
            wait_for(lambda: run._wait)
            run.log_metrics({"train/loss": 3.0}, 3)
            server = serve(uri, port)
            wait_for(lambda: not run._spool.unsent()[0])
            run._spool.sent(0)  # as if the process had died between the store's yes and its own note of it
            run.log_metrics({"train/loss": 4.0}, 4)
            stop(server)
        assert "the tracking store did not take the end of the run" in capsys.readouterr().err
        server = serve(uri, port)
        stored = open_store(address).get_run(run.run_id)
        assert stored.info.status == "RUNNING"
        with TrainingRun(address, "away", tmp_path / "run", PARAMS, resume=run.run_id) as again:
            again.log_metrics({"train/loss": 4.0}, 4)
            again.log_metrics({"train/loss": 5.0}, 5)
        assert again.run_id == run.run_id
        told = open_store(address).get_metric_history(run.run_id, "train/loss")
        assert [(m.step, m.value) for m in told] == [(step, float(step)) for step in range(1, 6)]
        assert open_store(address).get_run(run.run_id).info.status == "FINISHED"
        assert [f.path for f in open_store(address).list_artifacts(run.run_id, "pictures")]
    finally:
        stop(server)


def test_a_store_that_stays_away_neither_fails_the_training_nor_loses_its_numbers(
    uri, tmp_path, monkeypatch, capsys
):
    with TrainingRun(uri, "tiny", tmp_path, PARAMS) as run:
        run.log_metrics({"train/loss": 0.5}, 7)

        def away(*arguments, **options):
            raise ConnectionError("no route")

        monkeypatch.setattr(run._store(), "log_batch", away)
    assert "did not take the end of the run" in capsys.readouterr().err
    assert open_store(uri).get_run(run.run_id).info.status == "RUNNING"
    with TrainingRun(uri, "tiny", tmp_path, PARAMS, resume=run.run_id):
        pass
    assert history(uri, run.run_id, "train/loss") == [(7, 0.5)]


def test_a_run_whose_process_vanished_is_ended_by_whoever_waited_for_it(uri, tmp_path):
    run = TrainingRun(uri, "tiny", tmp_path, PARAMS).__enter__()
    vanish(run)
    mark_ended(uri, tmp_path, "FAILED", "the ranks ended with status 9")
    stored = open_store(uri).get_run(run.run_id)
    assert stored.info.status == "FAILED"
    assert stored.data.tags["headsplat.reason"] == "the ranks ended with status 9"
    mark_ended(uri, tmp_path, "KILLED", "again")
    assert open_store(uri).get_run(run.run_id).info.status == "FAILED"
    mark_ended(uri, tmp_path / "nowhere", "FAILED", "no run")


def results(tmp_path, rows):
    for row in rows:
        folder = row_folder(tmp_path, row.method, row.checkpoint, row.subject, row.protocol, row.protocol_id)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("sheet.png", "00-prediction.png", "00-error.png", "00-target.png"):
            (folder / name).write_bytes(b"picture")
        write_row(row, tmp_path)
    return tmp_path


def evaluation_runs(uri, row):
    client = open_store(uri)
    experiment = client.get_experiment_by_name(f"{row.protocol} {row.protocol_id}")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    return parents, children


def test_an_evaluation_is_a_parent_with_a_child_a_subject(uri, tmp_path):
    one = replace(ROW, protocol_id="layout")
    other = replace(one, subject="s02", values={"psnr": 20.5})
    parents = log_evaluation([one, other], results(tmp_path, [one, other]), uri)
    (parent,), children = evaluation_runs(uri, one)
    assert parents == [parent.info.run_id]
    assert parent.info.run_name == "avat3r step-100"
    assert parent.data.metrics["eval/psnr"] == 23.0
    assert "eval/ssim" not in parent.data.metrics  # one subject has none
    assert parent.data.metrics["eval/create_seconds"] == 1.5
    assert parent.data.params["method"] == "avat3r"
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    child = next(run for run in children if run.data.tags["headsplat.subject"] == "s01")
    assert child.data.metrics == {
        "eval/psnr": 25.5,
        "eval/ssim": 0.9,
        "eval/create_seconds": 1.5,
        "eval/drive_fps": 40.0,
    }
    assert child.data.tags["headsplat.missing.lpips"].startswith("not available")
    client = open_store(uri)
    assert {f.path for f in client.list_artifacts(child.info.run_id)} == {"pictures", "row.json", "sheet.png"}
    assert [f.path for f in client.list_artifacts(child.info.run_id, "pictures")] == [
        "pictures/00-error.png",
        "pictures/00-prediction.png",
    ]
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}


def test_logging_again_doubles_nothing_and_a_new_measurement_replaces_the_old(uri, tmp_path):
    one = replace(ROW, protocol_id="again")
    results(tmp_path, [one])
    first = log_evaluation([one], tmp_path, uri)
    assert log_evaluation([one], tmp_path, uri) == first
    (parent,), (child,) = evaluation_runs(uri, one)
    assert len(history(uri, parent.info.run_id, "eval/psnr")) == 1
    better = replace(one, values={"psnr": 30.0, "ssim": 0.95})
    added = replace(one, subject="s02", values={"psnr": 20.0, "ssim": 0.85})
    results(tmp_path, [better, added])
    assert log_evaluation([better, added], tmp_path, uri) == first
    (parent,), children = evaluation_runs(uri, one)
    assert len(children) == 2
    assert child.info.run_id not in {run.info.run_id for run in children}
    assert parent.data.metrics["eval/psnr"] == 25.0


def test_a_child_that_was_half_logged_is_logged_whole(uri, tmp_path, monkeypatch):
    row = replace(ROW, protocol_id="half")
    results(tmp_path, [row])
    from mlflow import MlflowClient

    with monkeypatch.context() as patch:

        def dies(*arguments, **options):
            raise KeyboardInterrupt

        patch.setattr(MlflowClient, "log_artifact", dies)
        with pytest.raises(KeyboardInterrupt):
            log_evaluation([row], tmp_path, uri)
    log_evaluation([row], tmp_path, uri)
    (parent,), (child,) = evaluation_runs(uri, row)
    assert parent.info.status == child.info.status == "FINISHED"
    assert open_store(uri).list_artifacts(child.info.run_id, "pictures")


def test_rows_of_two_protocols_are_not_logged_together(uri, tmp_path):
    with pytest.raises(UserError, match="2 protocols"):
        log_evaluation([ROW, replace(ROW, protocol_id="ffff")], tmp_path, uri)


@pytest.mark.parametrize("address", ["file:///tmp/mlruns", "/tmp/mlruns", "mlruns", "ftp://host/x", ""])
def test_an_address_that_is_no_store_is_refused(address):
    with pytest.raises(UserError, match="is not a tracking store"):
        open_store(address)


def test_a_server_that_is_away_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"The tracking server http://127\.0\.0\.1:9 does not answer"):
        open_store("http://127.0.0.1:9")


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database " * 100)
    with pytest.raises(UserError, match="cannot be opened"):
        open_store(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_store_of_another_version_is_refused(tmp_path):
    import sqlite3

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("create table alembic_version (version_num varchar(32))")
        database.execute("create table experiments (experiment_id integer)")
        database.execute("insert into alembic_version values ('fromthefuture')")
    database.close()
    with pytest.raises(UserError, match="cannot be opened"):
        open_store(f"sqlite:///{tmp_path}/mlflow.db")


def test_processes_that_open_a_new_store_at_once_all_succeed_and_are_quiet(tmp_path):
    code = f"from eval.tracking import open_store; open_store('sqlite:///{tmp_path}/new/mlflow.db')"
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _ in range(2)
    ]
    for process in running:
        said, _ = process.communicate()
        assert process.returncode == 0, said.decode()
        assert said == b""


@pytest.mark.e2e
def test_the_dashboard_command_serves_the_store(uri, tmp_path):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    row = replace(ROW, protocol_id="served")
    log_evaluation([row], results(tmp_path, [row]), uri)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            dashboard_command(uri, port), stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
        )
    try:
        name = f"{row.protocol} {row.protocol_id}"
        body = json.dumps({"max_results": 100}).encode()
        address = f"http://127.0.0.1:{port}"
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                request = urllib.request.Request(
                    f"{address}/api/2.0/mlflow/experiments/search", body, {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request) as answer:
                    found = json.load(answer)
                break
            except OSError:
                time.sleep(0.2)
        assert name in {experiment["name"] for experiment in found["experiments"]}
        with urllib.request.urlopen(address) as answer:
            assert b"<title>MLflow</title>" in answer.read()
    finally:
        import os
        import signal

        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    with pytest.raises(UserError, match="open it in a browser"):
        dashboard_command("http://host:5000")
