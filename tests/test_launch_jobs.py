"""Jobs for schedulers: what of them can be run here is run, the rest is read closely."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kubernetes_validate import validate

from train.checkpoint import latest

ROOT = Path(__file__).resolve().parent.parent
JOBS = ROOT / "launch" / "jobs"
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "script", [JOBS / "train.slurm", JOBS / "torchrun.sh", ROOT / ".ci" / "run"], ids=lambda p: p.name
)
def test_scripts_pass_shellcheck(script):
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert os.access(script, os.X_OK)


@pytest.fixture
def slurm(tmp_path):
    """Stand-ins for srun and scontrol, and the variables of an allocation of this one machine."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> {tmp_path}/srun.log\n'
        'while [ "${1#--}" != "$1" ]; do shift; done\n'  # the options
        'exec "$@"\n'
    )
    (tools / "scontrol").write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> {tmp_path}/scontrol.log\n'
        'if [ "$1 $2" = "show hostnames" ]; then echo localhost; fi\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "HEADSPLAT": str(BIN / "headsplat"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "2",
        "SLOTS": "1",
        "RECIPE": "avat3r-tiny",
        "OUT": str(tmp_path / "work"),
    }


@pytest.mark.slow
@pytest.mark.e2e
def test_a_preempted_slurm_job_writes_a_checkpoint_and_is_requeued(slurm, tiny_shards, tmp_path):
    run = tmp_path / "work" / "runs" / "avat3r-tiny"
    job = subprocess.Popen(
        ["bash", str(JOBS / "train.slurm")],
        env=os.environ | slurm | {"DATA": str(tiny_shards), "ARGS": "--steps 100000 --checkpoint.every 5"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while job.poll() is None and not (run / "checkpoints" / "LATEST").exists():
        time.sleep(0.1)
    assert job.poll() is None, job.communicate()[0]
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert "asking the ranks for a checkpoint" in output
    assert "was stopped" in output
    assert (tmp_path / "scontrol.log").read_text().splitlines() == ["show hostnames localhost", "requeue 7"]
    assert (tmp_path / "work" / "hostfile-7").read_text() == "localhost slots=1\n"
    used = (tmp_path / "srun.log").read_text()
    assert "--overlap --cpu-bind=none --cpus-per-task=2 --nodes=1 --ntasks=1 --nodelist=localhost" in used
    step = latest(run)[1].step
    assert f"wrote step-{step:08d}" in output


def test_a_slurm_job_that_fails_is_not_requeued(slurm, tmp_path):
    words = ["bash", str(JOBS / "train.slurm")]
    missing = subprocess.run(words, env=os.environ | slurm, cwd=ROOT, capture_output=True, text=True)
    assert missing.returncode != 0
    assert "DATA: is not set" in missing.stderr
    failed = subprocess.run(
        words, env=os.environ | slurm | {"DATA": "nowhere"}, cwd=ROOT, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "nowhere" in failed.stderr
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()


@pytest.mark.e2e
def test_torchrun_starts_two_ranks(tiny_shards, tmp_path):
    given = {"DATA": str(tiny_shards), "RUN": str(tmp_path / "run"), "RECIPE": "avat3r-tiny", "RANKS": "2"}
    given |= {
        "TORCHRUN": str(BIN / "torchrun"),
        "PORT": str(free()),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    words = [str(JOBS / "torchrun.sh"), "--steps", "2", "--data.views", "2"]
    ran = subprocess.run(words, env=os.environ | given, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert latest(tmp_path / "run")[1].world_size == 2


def free() -> int:
    from launch.preflight import free_port

    return free_port(None)


def test_the_kubernetes_manifest_fits_the_schema_and_itself():
    service, job = yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text())
    for document in (service, job):
        validate(document, "1.31", strict=True)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(values["NNODES"])
    # Pod 0 of an Indexed Job is called JOB-0, and its service makes that a name.
    assert values["HEAD"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    script = re.search(r"launch/jobs/\S+", container["args"][0])[0]
    assert (ROOT / script).is_file()
    used = set(re.findall(r"\$\{(\w+)", (ROOT / script).read_text()))
    assert set(values) <= used


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_dockerfile_is_what_the_repository_has():
    steps = instructions()
    assert [name for name, _ in steps if name == "FROM"] == ["FROM", "FROM"]
    for name, rest in steps:
        assert name in {"FROM", "COPY", "ENV", "RUN", "WORKDIR", "CMD"}
        if name == "FROM":
            assert re.fullmatch(r"\S+:\S*\d\S*( AS \w+)?", rest), f"{rest} has no version"
        if name == "COPY" and "--from" not in rest:
            assert all((ROOT / path).exists() for path in rest.split()[:-1])
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest]).returncode == 0
    rooms = next(rest for name, rest in steps if name == "RUN" and "make setup" in rest)
    assert {"avatars", "shards", "eval", "train", "cluster", "launch"} <= set(rooms.split())
    # What `make setup` reads must be copied before it runs.
    copied = next(rest for name, rest in steps if name == "COPY" and "pyproject.toml" in rest)
    assert {"Makefile", "constraints.txt", "README.md", "LICENSE"} <= set(copied.split())


def test_the_dockerfiles_packages_exist():
    if shutil.which("apt-cache") is None:
        pytest.skip("no apt here to ask")
    install = next(rest for name, rest in instructions() if name == "RUN" and "apt-get install" in rest)
    words = re.search(r"--no-install-recommends ([^&]*)", install)[1].split()
    known = subprocess.run(["apt-cache", "policy", *words], capture_output=True, text=True).stdout
    if "Candidate" not in known:
        pytest.skip("apt has no package lists here")
    assert {line.rstrip(":") for line in known.splitlines() if not line.startswith(" ")} == set(words)
