"""Evaluation in bulk on a real Ray: the numbers of one process, what is kept, what fails and what goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finished_runs import write_fits, write_network

from avatars.errors import UserError
from cluster.evaluate import evaluate_all, evaluate_one
from cluster.session import ray_session
from eval.checkpoints import find_checkpoint
from eval.failures import read_failures
from eval.metrics import AKD_MTCNN, LPIPS, PSNR, SSIM
from eval.protocol import synthetic_heldout, write_protocol
from eval.rows import read_rows
from launch.cli import main
from shards import open_shards

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    """One Ray for the module; evaluations find it and leave it alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the actors run functions of this module
        with ray_session(2):
            yield


@pytest.fixture(scope="module")
def checkpoints(tiny_shards, tmp_path_factory):
    """Two trained networks and fits of three people, as trainings and fits leave them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_network(folder / "runs" / "first" / "export", seed=0, step=100)
    write_network(folder / "runs" / "second" / "export", seed=1, step=200)
    write_fits(folder / "fits" / "flashavatar", tiny_shards, "train")
    return folder


@pytest.fixture(scope="module")
def people(tiny_shards):
    return open_shards(tiny_shards, "train")


@pytest.fixture(scope="module")
def protocol(people):
    return synthetic_heldout(people, views=2, timesteps=1, metrics=(PSNR, SSIM))


def found(checkpoints):
    names = ("runs/first", "runs/second", "fits/flashavatar")
    return [find_checkpoint("any", checkpoints / name) for name in names] + [find_checkpoint("nearest-input")]


def run(checkpoints, protocols, shards, results, **options):
    return evaluate_all(checkpoints, protocols, shards, results, split="train", cpus=1, **options)


def numbers(rows):
    return [(r.key, r.values, r.missing, r.counts, r.pictures, r.threads, r.checkpoint_hash) for r in rows]


def test_two_actors_give_the_numbers_of_one_process(checkpoints, protocol, tiny_shards, tmp_path):
    protocols = [protocol, replace(protocol, views=1)]
    lines = []
    alone = run(found(checkpoints), protocols, tiny_shards, tmp_path / "1", workers=1)
    bulk = run(found(checkpoints), protocols, tiny_shards, tmp_path / "2", workers=2, say=lines.append)
    assert alone.failures == bulk.failures == []
    assert len(bulk.rows) == 4 * 2 * 3
    assert numbers(alone.rows) == numbers(bulk.rows)
    assert {row.at_a_time for row in alone.rows} == {1}
    assert {row.at_a_time for row in bulk.rows} == {2}
    assert {row.method for row in bulk.rows} == {"avat3r", "flashavatar", "nearest-input"}
    assert {row.checkpoint for row in bulk.rows if row.method == "avat3r"} == {
        "first-step100",
        "second-step200",
    }
    pictures = [
        sorted((path.relative_to(tmp_path / n), path.read_bytes()) for path in (tmp_path / n).rglob("*.png"))
        for n in ("1", "2")
    ]
    assert pictures[0] == pictures[1]
    assert len(lines) == 24
    assert lines[-1].startswith("[24/24, about 0 s left] ")
    assert sum(", s01: psnr " in line for line in lines) == 8


def test_what_is_there_is_kept_until_something_changes(checkpoints, protocol, tiny_shards, tmp_path):
    first = run(found(checkpoints)[:1], [protocol], tiny_shards, tmp_path)
    told, lines = [], []
    again = run(
        found(checkpoints)[:1],
        [protocol],
        tiny_shards,
        tmp_path,
        say=lines.append,
        on_row=lambda checkpoint, row: told.append(row),
    )
    assert (again.kept, again.rows, told) == (3, first.rows, first.rows)  # the tracker hears of them anyway
    assert lines == ["3 of 3 rows are there already; --again measures them anew"]
    (cut,) = tmp_path.rglob("s01/row.json")
    cut.write_text(cut.read_text()[:200])
    assert run(found(checkpoints)[:1], [protocol], tiny_shards, tmp_path).kept == 2
    assert len(read_rows(tmp_path)) == 3  # it is whole again
    assert run(found(checkpoints)[:1], [protocol], tiny_shards, tmp_path, again=True).kept == 0
    changed = replace(found(checkpoints)[0], hashes=(("", "another"),))
    assert run([changed], [replace(protocol, views=1)], tiny_shards, tmp_path, subjects=["s00"]).failures
    assert run(found(checkpoints)[:1], [replace(protocol, seed=1)], tiny_shards, tmp_path).kept == 0


def test_a_metric_whose_weights_have_come_is_measured(protocol, tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    monkeypatch.delenv("HEADSPLAT_WEIGHTS", raising=False)
    both = replace(protocol, metrics=(PSNR, LPIPS, AKD_MTCNN))
    baseline = [find_checkpoint("nearest-input")]
    missing = run(baseline, [both], tiny_shards, tmp_path / "out")
    assert all(set(row.missing) >= {"lpips"} for row in missing.rows)
    assert run(baseline, [both], tiny_shards, tmp_path / "out").kept == 3  # nothing has come
    rows = {path: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("row.json")}
    for path, row in rows.items():  # as on a machine that lacked facenet-pytorch
        weights = {key: value for key, value in row["weights"].items() if key != AKD_MTCNN.key}
        path.write_text(
            json.dumps(row | {"weights": weights, "missing": row["missing"] | {AKD_MTCNN.key: "no"}})
        )
    assert run(baseline, [both], tiny_shards, tmp_path / "out").kept == 0


def troubled(arguments, report):
    """The real job, but for two people: the process of one dies, the memory of the other ends."""
    if arguments["subject"] == "s00":
        os.kill(os.getpid(), signal.SIGKILL)
    if arguments["subject"] == "s01":
        torch.empty(2**46).sum()
    return evaluate_one(arguments, report)


def test_a_killed_actor_and_one_out_of_memory_are_failures_that_say_so(
    checkpoints, protocol, tiny_shards, tmp_path, monkeypatch
):
    monkeypatch.setattr("cluster.evaluate.evaluate_one", troubled)
    network = found(checkpoints)[:1]
    bulk = run(network, [protocol], tiny_shards, tmp_path, workers=2, retries=0)
    assert [row.subject for row in bulk.rows] == ["s02"]
    reasons = {failure.subject: failure.reason for failure in bulk.failures}
    assert reasons["s00"].startswith("its process died: it was killed")
    assert reasons["s01"].startswith("it ran out of memory")
    assert read_failures(tmp_path) == bulk.failures
    assert bulk.failures[0].checkpoint == "first-step100"
    assert bulk.failures[0].protocol == f"synthetic-heldout {protocol.id}"
    monkeypatch.undo()
    mended = run(network, [protocol], tiny_shards, tmp_path)
    assert (mended.kept, mended.failures, len(mended.rows)) == (1, [], 3)
    assert read_failures(tmp_path) == []


def kill_once(arguments, report):
    """The real job, whose process dies the first time that it measures s01."""
    marker = Path(arguments["results"]) / "killed"
    if arguments["subject"] == "s01" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate_one(arguments, report)


def test_a_row_whose_actor_was_killed_is_measured_by_another(
    checkpoints, protocol, tiny_shards, tmp_path, monkeypatch
):
    monkeypatch.setattr("cluster.evaluate.evaluate_one", kill_once)
    lines = []
    bulk = run(found(checkpoints)[:1], [protocol], tiny_shards, tmp_path, workers=2, say=lines.append)
    assert [row.subject for row in bulk.rows] == ["s00", "s01", "s02"]
    assert sum(", s01: tried again, for its process died" in line for line in lines) == 1
    assert (tmp_path / "killed").exists()


def test_checkpoints_that_do_not_fit_together_are_refused(checkpoints, protocol, tiny_shards, tmp_path):
    first = found(checkpoints)[0]
    twin = replace(first, folder=checkpoints, hashes=(("", "x"),))
    with pytest.raises(UserError, match="Two checkpoints are called avat3r first-step100"):
        run([first, twin], [protocol], tiny_shards, tmp_path)
    with pytest.raises(UserError, match="does not know the subjects nobody"):
        run([first], [protocol], tiny_shards, tmp_path, subjects=["nobody"])
    with pytest.raises(UserError, match="no checkpoint to evaluate"):
        run([], [protocol], tiny_shards, tmp_path)


def test_the_command_takes_patterns_and_goes_on_without_a_checkpoint_that_is_gone(
    checkpoints, protocol, tiny_shards, tmp_path, capsys
):
    write_protocol(protocol, tmp_path / "a.json")
    write_protocol(replace(protocol, views=1), tmp_path / "b.json")
    gone = tmp_path / "gone"
    words = ["eval", "any", f"{checkpoints}/runs/*", str(gone), "nearest-input", "--split", "train"]
    words += ["--protocol", str(tmp_path / "a.json"), "--protocol", str(tmp_path / "b.json")]
    words += ["--data", str(tiny_shards), "--out", str(tmp_path / "out"), "--workers", "2"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert f"1 evaluation failed, first any {gone} on everybody: {gone} is no folder." in said.err
    assert "[18/18, " in said.out
    assert "| avat3r second-step200" in said.out
    assert "Failures" in said.out
    (failure,) = read_failures(tmp_path / "out" / "results")
    assert (failure.checkpoint, failure.subject) == (str(gone), "everybody")
    shutil.copytree(checkpoints / "fits" / "flashavatar", gone)
    assert main(words) == 0
    assert "18 of 24 rows are there already" in capsys.readouterr().out
    assert read_failures(tmp_path / "out" / "results") == []
