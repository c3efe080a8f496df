"""The actor pool and fits on it, on a real Ray that lives as long as this module."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_captures import write_tiny_captures

from avatars.errors import UserError
from avatars.flashavatar import FlashAvatarConfig
from avatars.method import load_avatar
from cluster.fit import FitResult, Fits, fit_one, fit_subjects, read_result, results_table
from cluster.pool import Job, run_jobs
from cluster.session import ray_session
from train.fits import FitSource
from train.fits.fit import CHECKPOINT
from train.fits.flashavatar import FlashAvatarFitConfig

pytestmark = pytest.mark.e2e

CONFIG = FlashAvatarFitConfig(
    model=FlashAvatarConfig(uv_resolution=16, sh_degree=0, mlp_width=8, mlp_layers=1),
    steps=6,
    checkpoint_every=2,
    look="pictures",
    background="random",
    lpips_weight=0.0,
)


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    """One Ray for the module; `fit_subjects` finds it and leaves it alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the actors run functions of this module
        with ray_session(2):
            yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three tiny people, two of them held out, with identity codes of the built-in head's length."""
    from shards import pack, read_capture

    folder = tmp_path_factory.mktemp("people")
    paths = write_tiny_captures(folder / "captures", 3, timesteps=5, views=6)
    for path in paths:
        description = json.loads((path / "capture.json").read_text())
        description["head"]["identity"] = [0.0] * 100
        (path / "capture.json").write_text(json.dumps(description))
    pack(
        [read_capture(path) for path in paths],
        folder / "shards",
        size=48,
        heldout=["s01", "s02"],
        input_sets=1,
    )
    return folder / "shards"


def square(arguments, report):
    report(done=1)
    return arguments["x"] ** 2


def complain(arguments, report):
    counter = Path(arguments["counter"])
    counter.write_text(str(int(counter.read_text() or 0) + 1) if counter.exists() else "1")
    if arguments["kind"] == "user":
        raise UserError("The picture is upside down; turn it.")
    raise ZeroDivisionError("no luck")


def wait_to_be_killed(arguments, report):
    """Waits on the first attempt, and says on the second that it was not the first."""
    marker = Path(arguments["marker"])
    if marker.exists():
        return "second attempt"
    marker.touch()
    while True:
        report(waiting=True)
        time.sleep(0.05)


def slow_fit(arguments, report):
    """The real fit, slow enough after its fourth step for a test to kill it there."""

    def slowly(**values):
        report(**values)
        if values["step"] == 5 and not (marker := Path(arguments["folder"]).parent / "killed").exists():
            marker.touch()
            time.sleep(600)

    return fit_one(arguments, slowly)


def test_outcomes_come_in_the_order_of_the_jobs():
    jobs = [Job(f"j{x}", {"x": x}) for x in range(5)]
    events = []
    outcomes = run_jobs(square, jobs, slots=2, on_event=events.append)
    assert [(o.name, o.value, o.error, o.attempts) for o in outcomes] == [
        (f"j{x}", x * x, None, 1) for x in range(5)
    ]
    assert sorted(e.name for e in events if e.kind == "done") == [job.name for job in jobs]


def test_a_users_error_is_not_tried_again_and_others_are_up_to_the_cap(tmp_path):
    jobs = [
        Job("user", {"kind": "user", "counter": str(tmp_path / "user")}),
        Job("bug", {"kind": "bug", "counter": str(tmp_path / "bug")}),
    ]
    user, bug = run_jobs(complain, jobs, slots=1, retries=1)
    assert (user.error, user.attempts) == ("The picture is upside down; turn it.", 1)
    assert bug.error is not None
    assert "ZeroDivisionError: no luck (complain" in bug.error
    assert bug.attempts == 2
    assert [(tmp_path / name).read_text() for name in ("user", "bug")] == ["1", "2"]


def test_a_killed_actor_is_replaced_and_its_job_tried_again(tmp_path):
    killed = []

    def kill(event):
        if event.kind == "progress" and event.report.get("waiting") and not killed:
            killed.append(event.report["pid"])
            os.kill(killed[0], signal.SIGKILL)

    job = Job("victim", {"marker": str(tmp_path / "marker")})
    (outcome,) = run_jobs(wait_to_be_killed, [job], slots=1, on_event=kill)
    assert killed
    assert (outcome.value, outcome.attempts) == ("second attempt", 2)


def test_an_actor_that_nobody_has_room_for_is_a_sentence():
    with pytest.raises(UserError, match="Ray gave no actor with 64 CPUs and 0 GPUs within 1 seconds"):
        run_jobs(square, [Job("big", {"x": 1})], slots=1, cpus=64, patience=1)


def test_actors_without_gpus_see_none_and_use_their_cpus():
    (outcome,) = run_jobs(describe_actor, [Job("one", {})], slots=1, cpus=2)
    assert outcome.value == ("", 2)


def hungry(arguments, report):
    if arguments["appetite"] == "torch":
        return torch.empty(2**46).sum().item()
    if arguments["appetite"] == "python":
        return len(bytearray(2**46))
    return "fed"


def test_an_actor_out_of_memory_is_a_sentence_and_others_go_on():
    jobs = [Job(appetite, {"appetite": appetite}) for appetite in ("torch", "python", "none")]
    starved, also, fed = run_jobs(hungry, jobs, slots=1, retries=0)
    assert starved.error == also.error == "it ran out of memory; give each actor more, or run fewer at a time"
    assert fed.value == "fed"


def fit_and_look(arguments, report):
    result = fit_one(arguments, report)
    return result | {"tracker": "mlflow" in sys.modules}


def test_an_actor_never_touches_the_tracker(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.fit.fit_one", fit_and_look)
    (result,) = fit_subjects(CONFIG, shards, tmp_path, subjects=["s01"]).results
    assert result.result["tracker"] is False


def test_captures_are_fitted_and_one_that_is_none_stops_nobody_else(shards, tmp_path):
    captures = tmp_path / "captures"
    (captures / "empty").mkdir(parents=True)
    (captures / "s01").symlink_to(shards.parent / "captures" / "s01")
    source = FitSource("views", views=3, held_views=2)
    none, fitted = fit_subjects(CONFIG, None, tmp_path / "out", captures=captures, source=source).results
    assert none.error is not None
    assert "empty is not a capture" in none.error
    assert (fitted.status, fitted.method) == ("fitted", "flashavatar-views")
    assert fitted.folder == tmp_path / "out" / "flashavatar-views" / "s01"
    assert fitted.result["held_out"]["pictures"] == 2
    assert fitted.result["held_out"]["psnr"] > 5
    assert load_avatar(fitted.folder).expression_length == 52
    again = fit_subjects(CONFIG, None, tmp_path / "out", captures=captures / "s01", source=source)
    assert [(r.subject, r.status) for r in again.results] == [("s01", "kept")]
    with pytest.raises(UserError, match="give a folder of shards"):
        fit_subjects(CONFIG, None, tmp_path)
    with pytest.raises(UserError, match="is not a folder; --captures"):
        fit_subjects(CONFIG, None, tmp_path, captures=tmp_path / "nothing")


def describe_actor(arguments, report):
    return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads()


def test_fits_are_made_kept_and_made_again_when_settings_change(shards, tmp_path):
    first = fit_subjects(CONFIG, shards, tmp_path, workers=2)
    assert first.failures == {}
    assert [(r.subject, r.status, r.attempts) for r in first.results] == [
        ("s01", "fitted", 1),
        ("s02", "fitted", 1),
    ]
    for result in first.results:
        assert result.folder == tmp_path / "flashavatar" / result.subject
        assert sorted(p.name for p in result.folder.iterdir()) == [
            "avatar.json",
            "avatar.safetensors",
            "result.json",
        ]
        assert json.loads((result.folder / "result.json").read_text()) == result.result
        assert result.result["seconds"] > 0
        assert result.result["steps"] == 6
        avatar = load_avatar(result.folder)
        assert avatar.gaussians(torch.zeros(52)).means.isfinite().all()

    events = []
    second = fit_subjects(CONFIG, shards, tmp_path, workers=2, on_event=events.append)
    assert [r.status for r in second.results] == ["kept", "kept"]
    assert events == []  # no actor was started
    assert second.results[0].result == first.results[0].result

    from dataclasses import replace

    third = fit_subjects(replace(CONFIG, steps=7), shards, tmp_path, subjects=["s02"])
    assert [(r.subject, r.status, r.result["steps"]) for r in third.results] == [("s02", "fitted", 7)]


def test_a_fit_whose_actor_is_killed_goes_on_from_its_checkpoint(shards, tmp_path, monkeypatch):
    whole = fit_subjects(CONFIG, shards, tmp_path / "whole", subjects=["s01"])
    monkeypatch.setattr("cluster.fit.fit_one", slow_fit)
    killed = []

    def kill(event):
        if event.kind == "progress" and event.report.get("step") == 5 and not killed:
            assert (tmp_path / "out" / "flashavatar" / "s01" / CHECKPOINT).exists()
            killed.append(event.report["pid"])
            os.kill(killed[0], signal.SIGKILL)

    (result,) = fit_subjects(CONFIG, shards, tmp_path / "out", subjects=["s01"], on_event=kill).results
    assert killed
    assert (result.status, result.attempts, result.result["resumed_from"]) == ("fitted", 2, 4)
    names = ("avatar.json", "avatar.safetensors")
    for name in names:
        assert (result.folder / name).read_bytes() == (whole.results[0].folder / name).read_bytes(), name


def test_what_is_wrong_with_one_person_stops_nobody_else(shards, tmp_path):
    foreign = tmp_path / "flashavatar" / "s01"
    foreign.mkdir(parents=True)
    (foreign / "holiday.jpg").touch()
    fits = fit_subjects(CONFIG, shards, tmp_path)
    assert [r.status for r in fits.results] == ["failed", "fitted"]
    assert "holds holiday.jpg and no result.json" in fits.failures["s01"]
    assert list(fits.failures) == ["s01"]
    assert [p.name for p in foreign.iterdir()] == ["holiday.jpg"]

    (far,) = fit_subjects(
        CONFIG, shards, tmp_path / "far", subjects=["s02"], source=FitSource(input_set=7)
    ).results
    assert far.error is not None
    assert "has 1 input sets and number 7 was asked for" in far.error
    assert far.attempts == 1  # trying again would not help


def test_a_wrong_name_is_a_sentence(shards, tmp_path):
    with pytest.raises(UserError, match=r"no fit called 'flashavtar'; there are the methods .*flashavatar"):
        fit_subjects("flashavtar", shards, tmp_path)
    with pytest.raises(UserError, match="no subject 's00' in the split 'heldout'; there are s01, s02"):
        fit_subjects(CONFIG, shards, tmp_path, subjects=["s00"])


def test_a_result_that_is_not_ours_is_a_sentence(tmp_path):
    assert read_result(tmp_path / "nothing") is None
    assert read_result(tmp_path) is None
    (tmp_path / "result.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="is not the result of a fit"):
        read_result(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file where a folder"):
        read_result(tmp_path / "file")


def test_the_table_has_everybody(tmp_path):
    done = FitResult(
        "flashavatar", "s01", "fitted", tmp_path, {"seconds": 1.25, "losses": {"loss": 0.5}}, None, 1
    )
    failed = FitResult("flashavatar", "s02", "failed", tmp_path, error="its process died", attempts=3)
    console = Console(width=120, file=io.StringIO())
    console.print(results_table(Fits([done, failed])))
    said = console.file.getvalue()
    for word in ("s01", "fitted", "1.2", "0.50000", "s02", "failed", "its process died", "3"):
        assert word in said


PRIVATE = """
import json, psutil, sys, ray
from cluster.session import ray_session
with ray_session(1):
    processes = psutil.Process().children(recursive=True)
    open_to_all = {c.laddr.ip for p in processes for c in p.net_connections("tcp") if c.status == "LISTEN"}
    folder = ray._private.worker._global_node.get_session_dir_path()
gone = [p.pid for p in psutil.wait_procs(processes, timeout=20)[1]]
print(json.dumps({"listens": sorted(open_to_all), "left": gone, "folder": folder, "count": len(processes)}))
"""


def test_a_private_ray_listens_on_this_machine_only_and_leaves_nothing(tmp_path):
    import subprocess

    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", PRIVATE], env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    said = json.loads(lines[-1])
    assert len(lines) == 1, done.stdout  # Ray is silent
    assert done.stderr == ""
    assert said["count"] > 2
    assert {ip.removeprefix("::ffff:") for ip in said["listens"]} == {"127.0.0.1"}
    assert said["left"] == []
    assert not Path(said["folder"]).exists()
    assert not (tmp_path / ".ray").exists()  # no token in the home directory


def test_the_folder_of_a_driver_that_was_killed_is_removed_by_the_next_one(monkeypatch, tmp_path):
    import tempfile

    from cluster import session

    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/tmp")
    left = Path(tempfile.mkdtemp(prefix=session.PREFIX, dir="/tmp"))
    with session._private_folder() as mine:
        assert not left.exists()
        with session._private_folder() as other:
            assert mine.exists()  # it is held, so it is nobody's to remove
            assert other != mine
    assert not mine.exists()


def test_a_ray_that_cannot_start_is_a_sentence(monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)

    def fail(**_):
        raise Exception("no memory\nand a page of advice")  # as Ray does when a node comes up too slowly

    monkeypatch.setattr(ray, "init", fail)
    with (
        pytest.raises(UserError, match="Ray could not be started on this machine: no memory"),
        ray_session(1),
    ):
        pass


def test_ray_address_that_does_not_answer_is_a_sentence(monkeypatch):
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)

    def refuse(**_):
        raise ConnectionError("Could not connect to 127.0.0.1:1\nand a page of advice")

    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(UserError, match=r"RAY_ADDRESS=127\.0\.0\.1:1 cannot be used: Could not"),
        ray_session(1),
    ):
        pass
