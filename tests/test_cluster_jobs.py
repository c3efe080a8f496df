"""`ray job submit` of fits and evaluations to a Ray that the cluster file's own script started on the loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from finished_runs import write_network
from tiny_captures import write_tiny_capture

from avatars.head.cache import cache_folder
from avatars.method import load_avatar
from eval.metrics import PSNR
from eval.protocol import synthetic_heldout, write_protocol
from eval.rows import read_rows
from shards import open_shards

REPOSITORY = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent

TOKEN = "fedcba9876543210" * 4

pytestmark = pytest.mark.e2e


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def user(home: Path) -> dict[str, str]:
    """The environment of somebody with a token, who sees no other Ray."""
    token = home / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text(TOKEN)
    return {
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "HOME": str(home),
        "HEADSPLAT_CACHE": str(cache_folder()),
        "HEADSPLAT_RAY_IP": "127.0.0.1",
        "HEADSPLAT_RAY_PORT": str(free_port()),
        "RAY_TMPDIR": tempfile.mkdtemp(prefix="hsj", dir="/tmp"),
        "RAY_AUTH_MODE": "token",
        "RAY_USE_RANDOM_PORTS": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_memory_monitor_refresh_ms": "0",  # what else runs on the machine must not end a fit
    }


@pytest.fixture
def environment(tmp_path):
    environment = user(tmp_path / "home")
    yield environment
    shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


@dataclass
class Node:
    """A Ray that the cluster file's own script started."""

    environment: dict[str, str]
    address: str

    def submit(self, *words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        empty = Path(self.environment["HOME"]) / "empty"
        empty.mkdir(exist_ok=True)
        submit = [
            "ray",
            "job",
            "submit",
            "--address",
            self.address,
            "--working-dir",
            str(empty),
            "--",
            *words,
        ]
        for _ in range(60):
            done = subprocess.run(submit, env=environment or self.environment, capture_output=True, text=True)
            if "No available agent" not in done.stderr:  # Ray's agent comes up after Ray itself
                break
            time.sleep(2)
        return done


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    environment = user(tmp_path_factory.mktemp("node") / "home")
    port = free_port()
    words = [str(REPOSITORY / "cluster" / "node.sh"), "head", "--num-cpus=2", "--dashboard-host=127.0.0.1"]
    # The agent, which takes jobs, has a fixed port that another Ray on this machine may hold.
    words += [f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}"]
    started = subprocess.run(words, env=environment, capture_output=True, text=True)
    noted = Path(environment["HOME"]) / ".headsplat-ray" / "pid"
    try:
        assert started.returncode == 0, started.stderr
        yield Node(environment, f"http://127.0.0.1:{port}")
    finally:
        pid = int(noted.read_text())
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.1)
        shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


@pytest.mark.slow
def test_a_submitted_fit_is_made_by_the_cluster(node, tmp_path):
    capture = write_tiny_capture(tmp_path / "captures", "s00", timesteps=5, views=8)
    description = json.loads((capture / "capture.json").read_text())
    description["head"]["identity"] = [0.0] * 100
    (capture / "capture.json").write_text(json.dumps(description))
    fit = f"headsplat fit flashavatar --captures {capture} --views 3 --held-views 2 --steps 12".split()
    fit += ["--uv-resolution", "16", "--gpus", "0", "--out", str(tmp_path / "out")]
    submitted = node.submit(*fit)
    said = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0, said
    assert "succeeded" in said
    assert "s00: done" in said
    strangers = {name: value for name, value in node.environment.items() if name != "RAY_AUTH_MODE"}
    strangers["HOME"] = str(tmp_path)
    refused = node.submit("true", environment=strangers)
    assert refused.returncode != 0  # without the token nobody runs anything
    folder = tmp_path / "out" / "fits" / "flashavatar-views" / "s00"
    assert json.loads((folder / "result.json").read_text())["steps"] == 12
    assert load_avatar(folder).expression_length == 52


@pytest.mark.slow
def test_a_submitted_evaluation_is_made_by_the_cluster_and_seen_in_its_dashboard(node, tiny_shards, tmp_path):
    write_network(tmp_path / "runs" / "tiny" / "export", step=7)
    protocol = synthetic_heldout(open_shards(tiny_shards, "train"), views=1, timesteps=1, metrics=(PSNR,))
    write_protocol(protocol, tmp_path / "protocol.json")
    words = [
        "headsplat",
        "eval",
        "any",
        str(tmp_path / "runs" / "*"),
        "nearest-input",
        str(tmp_path / "gone"),
    ]
    words += ["--split", "train", "--protocol", str(tmp_path / "protocol.json"), "--data", str(tiny_shards)]
    submitted = node.submit(*words, "--out", str(tmp_path / "out"))
    said = submitted.stdout + submitted.stderr
    assert submitted.returncode != 0  # one checkpoint is gone
    assert f"1 evaluation failed, first any {tmp_path / 'gone'}" in said
    assert "[6/6, about 0 s left]" in said
    rows = read_rows(tmp_path / "out" / "results")
    assert {(row.method, row.subject, row.threads) for row in rows} == {
        (method, subject, 1) for method in ("avat3r", "nearest-input") for subject in ("s00", "s01", "s02")
    }
    asked = urllib.request.Request(
        f"{node.address}/api/v0/tasks?limit=1000", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(asked) as answer:
        tasks = json.load(answer)["data"]["result"]["result"]
    names = {task["name"] for task in tasks if task["state"] == "FINISHED"}
    assert f"avat3r tiny-step7, synthetic-heldout {protocol.id}, s02" in names
    (tmp_path / "gone").symlink_to(tmp_path / "runs" / "tiny")
    resumed = node.submit(*words, "--out", str(tmp_path / "out"))
    said = resumed.stdout + resumed.stderr
    assert resumed.returncode == 0, said
    assert "6 of 9 rows are there already" in said


def test_a_machine_without_a_token_or_with_a_ray_that_fails_is_a_sentence(environment, tmp_path):
    (tmp_path / "home" / ".ray" / "auth_token").unlink()
    node = str(REPOSITORY / "cluster" / "node.sh")
    done = subprocess.run([node, "head"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ray get-auth-token --generate" in done.stderr

    broken = environment | {"RAY_AUTH_TOKEN": "x", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\necho no network\nexit 1\n")
    ray.chmod(0o755)
    done = subprocess.run([node, "worker", "10.0.0.1:6379"], env=broken, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Ray did not start" in done.stderr
    assert "no network" in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "name a headsplat command"),
        (["--nodes", "two", "fit"], "--nodes takes a number"),
        (["doctor"], "no headsplat in the PATH"),
    ],
)
def test_a_submission_that_cannot_work_is_a_sentence(words, sentence, environment):
    environment = environment | {"PATH": "/usr/bin:/bin"}
    script = [sys.executable, str(REPOSITORY / "cluster" / "submit.py")]
    done = subprocess.run([*script, *words], env=environment, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert sentence in done.stderr


def test_a_submission_without_a_cluster_is_a_sentence(environment):
    script = [sys.executable, str(REPOSITORY / "cluster" / "submit.py"), "doctor"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "run `ray up` with the cluster file first" in done.stderr
