"""Evaluations in MLflow: the registry, a store that goes away in mid-run, and one that asks twice."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from finished_runs import write_network
from test_eval_rows import ROW
from test_eval_tracking import evaluation_runs, results, serve, stop, uri, wait_for  # noqa: F401

from avatars.errors import UserError
from eval.checkpoints import find_checkpoint
from eval.runs import EvaluationLog, log_evaluation
from eval.tracking import open_store
from launch.preflight import free_port


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return find_checkpoint("any", write_network(tmp_path_factory.mktemp("run") / "export", step=100))


def made_by(checkpoint, row, **changes):
    return replace(row, method=checkpoint.method, checkpoint=checkpoint.name, **changes)


def versions(client, name="avat3r-tiny"):
    found = client.search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version))


def test_a_checkpoint_is_registered_once_with_what_it_is(uri, checkpoint, tmp_path):  # noqa: F811
    rows = [made_by(checkpoint, ROW, protocol_id=name) for name in ("registry-1", "registry-2")]
    client = open_store(uri)
    for row in rows:
        for _ in range(2):
            log_evaluation([row], results(tmp_path, [row]), uri, [checkpoint])
    (version,) = versions(client)
    tags = version.tags
    assert tags["headsplat.checkpoint_hash"] == checkpoint.hash
    assert (tags["headsplat.step"], tags["headsplat.recipe"]) == ("100", "avat3r-tiny")
    assert tags["headsplat.folder"] == str(checkpoint.folder)
    (parent,), _ = evaluation_runs(uri, rows[0])
    assert version.run_id == parent.info.run_id
    assert {file.path for file in client.list_artifacts(version.run_id, "checkpoint")} == {
        "checkpoint/checkpoint.json",
        "checkpoint/model.json",
    }
    assert parent.data.tags["headsplat.recipe"] == "avat3r-tiny"
    assert parent.data.tags["headsplat.checkpoint_hash"] == checkpoint.hash
    assert parent.data.tags["headsplat.hardware"] == "a machine"
    assert parent.data.params["recipe"] == "avat3r-tiny"
    trained_on = replace(checkpoint, hashes=(("", "0123"),), name="longer", step=200)
    row = made_by(trained_on, ROW, protocol_id="registry-1")
    log_evaluation([row], results(tmp_path, [row]), uri, [trained_on])
    assert [version.tags["headsplat.step"] for version in versions(client)] == ["100", "200"]
    baseline = find_checkpoint("nearest-input")
    row = made_by(baseline, ROW, protocol_id="registry-1")
    log_evaluation([row], results(tmp_path, [row]), uri, [baseline])
    assert [model.name for model in client.search_registered_models()] == ["avat3r-tiny"]


def test_what_a_store_made_twice_is_cleared(uri, checkpoint, tmp_path):  # noqa: F811
    """A client that loses the answer to "create" asks again, and the store has made both."""
    row = made_by(checkpoint, ROW, protocol_id="twice")
    results(tmp_path, [row])
    log_evaluation([row], tmp_path, uri, [checkpoint])
    client = open_store(uri)
    (parent,), (child,) = evaluation_runs(uri, row)
    for run in (parent, child):
        bare = {key: value for key, value in run.data.tags.items() if key != "headsplat.content"}
        client.create_run(run.info.experiment_id, tags=bare)
    assert tuple(map(len, evaluation_runs(uri, row))) == (2, 2)
    log_evaluation([row], tmp_path, uri, [checkpoint])
    (parent,), (child,) = evaluation_runs(uri, row)
    assert "headsplat.content" in child.data.tags
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.metrics["eval/psnr"] == 25.5


@pytest.mark.slow
@pytest.mark.e2e
def test_a_server_stopped_and_started_in_mid_run_misses_and_doubles_nothing(
    uri,  # noqa: F811
    checkpoint,
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.setattr("eval.runs.FLUSH_SECONDS", 0.1)
    monkeypatch.setattr("eval.runs.FIRST_WAIT", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    one = made_by(checkpoint, ROW, protocol_id="outage")
    rows = [replace(one, subject=f"s{n:02d}", values={"psnr": float(20 + n)}) for n in range(6)]
    results(tmp_path, rows)
    port = free_port(None)
    address = f"http://127.0.0.1:{port}"
    server = serve(uri, port)
    try:
        with EvaluationLog(address, tmp_path) as log:
            for row in rows[:2]:
                log.tell(checkpoint, row)
            wait_for(lambda: not log._waiting)
            killed = threading.Event()
            create = log._client.create_run

            def in_the_middle(*arguments, **options):
                """The server makes a child and dies before anything is in it."""
                made = create(*arguments, **options)
                if not killed.is_set():
                    stop(server)
                    killed.set()
                return made

            log._client.create_run = in_the_middle
            for row in rows[2:4]:
                log.tell(checkpoint, row)
            wait_for(lambda: log._wait)
            log.tell(checkpoint, rows[4])
            server = serve(uri, port)
            wait_for(lambda: not log._waiting)
            stop(server)
            log.tell(checkpoint, rows[5])
        assert "was not told of 1 rows" in log.untold
        assert "The same command keeps the rows and tells it." in log.untold
        assert "does not take rows" in capsys.readouterr().err
        server = serve(uri, port)
        with EvaluationLog(address, tmp_path) as again:
            for row in rows:
                again.tell(checkpoint, row)
        assert again.untold == ""
    finally:
        stop(server)
    (parent,), children = evaluation_runs(uri, one)
    assert sorted(run.data.tags["headsplat.subject"] for run in children) == [row.subject for row in rows]
    assert {run.data.metrics["eval/psnr"] for run in children} == {20.0 + n for n in range(6)}
    assert parent.data.metrics["eval/psnr"] == 22.5
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert len(versions(open_store(uri))) == len(
        {version.tags["headsplat.checkpoint_hash"] for version in versions(open_store(uri))}
    )


def test_a_store_that_cannot_be_opened_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="does not answer"), EvaluationLog("http://127.0.0.1:9", tmp_path):
        raise AssertionError("the work began")


def interrupted(log, row):
    with log:
        log.tell(None, row)
        raise KeyboardInterrupt


def test_an_evaluation_that_is_interrupted_is_killed(uri, tmp_path):  # noqa: F811
    row = replace(ROW, protocol_id="interrupted")
    with pytest.raises(KeyboardInterrupt):
        interrupted(EvaluationLog(uri, results(tmp_path, [row])), row)
    (parent,), (child,) = evaluation_runs(uri, row)
    assert (parent.info.status, child.info.status) == ("KILLED", "FINISHED")
