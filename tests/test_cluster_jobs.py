"""`ray job submit` of a fit to a Ray that the cluster file's own script started, on this machine's loopback."""

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
from pathlib import Path

import pytest
from tiny_captures import write_tiny_capture

from avatars.head.cache import cache_folder
from avatars.method import load_avatar

REPOSITORY = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent

pytestmark = pytest.mark.e2e


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def environment(tmp_path):
    """Of a user with a token, who sees no other Ray."""
    short = tempfile.mkdtemp(prefix="hsj", dir="/tmp")
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("fedcba9876543210" * 4)
    yield {
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "HEADSPLAT_CACHE": str(cache_folder()),
        "HEADSPLAT_RAY_IP": "127.0.0.1",
        "HEADSPLAT_RAY_PORT": str(free_port()),
        "RAY_TMPDIR": short,
        "RAY_AUTH_MODE": "token",
        "RAY_USE_RANDOM_PORTS": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_memory_monitor_refresh_ms": "0",  # what else runs on the machine must not end a fit
    }
    shutil.rmtree(short, ignore_errors=True)


def test_a_submitted_fit_is_made_by_the_cluster(environment, tmp_path):
    capture = write_tiny_capture(tmp_path / "captures", "s00", timesteps=5, views=8)
    description = json.loads((capture / "capture.json").read_text())
    description["head"]["identity"] = [0.0] * 100
    (capture / "capture.json").write_text(json.dumps(description))
    (tmp_path / "empty").mkdir()
    port = free_port()
    node = [str(REPOSITORY / "cluster" / "node.sh"), "head", "--num-cpus=2", "--dashboard-host=127.0.0.1"]
    started = subprocess.run(
        [*node, f"--dashboard-port={port}"], env=environment, capture_output=True, text=True
    )
    noted = tmp_path / "home" / ".headsplat-ray" / "pid"
    try:
        assert started.returncode == 0, started.stderr
        fit = f"headsplat fit flashavatar --captures {capture} --views 3 --held-views 2 --steps 12".split()
        fit += ["--uv-resolution", "16", "--gpus", "0", "--out", str(tmp_path / "out")]
        submit = ["ray", "job", "submit", "--address", f"http://127.0.0.1:{port}"]
        words = [*submit, "--working-dir", str(tmp_path / "empty"), "--", *fit]
        for _ in range(60):
            submitted = subprocess.run(words, env=environment, capture_output=True, text=True)
            if "No available agent" not in submitted.stderr:  # Ray's agent comes up after Ray itself
                break
            time.sleep(2)
        said = submitted.stdout + submitted.stderr
        assert submitted.returncode == 0, said
        assert "succeeded" in said
        assert "s00: done" in said
        strangers = {name: value for name, value in environment.items() if name != "RAY_AUTH_MODE"}
        strangers["HOME"] = str(tmp_path / "empty")
        refused = subprocess.run([*submit, "--", "true"], env=strangers, capture_output=True, text=True)
        assert refused.returncode != 0  # without the token nobody runs anything
    finally:
        pid = int(noted.read_text())
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.1)
    folder = tmp_path / "out" / "fits" / "flashavatar-views" / "s00"
    assert json.loads((folder / "result.json").read_text())["steps"] == 12
    assert load_avatar(folder).expression_length == 52


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
