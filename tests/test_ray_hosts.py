"""The cluster file on two hosts with sshd: `ray up`, `ray submit` of an evaluation and of a fit that loses a host."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from finished_runs import write_network
from hosts import Hosts, missing
from tiny_captures import write_tiny_captures

from avatars.head.cache import cache_folder
from avatars.method import load_avatar
from cluster.evaluate import evaluate_all
from eval.checkpoints import find_checkpoint
from eval.metrics import PSNR
from eval.protocol import synthetic_heldout, write_protocol
from eval.rows import read_rows
from shards import open_shards

REPOSITORY = Path(__file__).parents[1]
PROGRAMS = REPOSITORY / ".venv" / "bin"
TOOLS_MISSING = next((f"{tool} is not installed" for tool in ("rsync",) if shutil.which(tool) is None), "")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.multihost,
    pytest.mark.skipif(bool(missing() or TOOLS_MISSING), reason=missing() or TOOLS_MISSING),
    pytest.mark.skipif(not (PROGRAMS / "ray").is_file(), reason=f"no environment in {PROGRAMS.parent}"),
]


def tracked_captures(folder):
    """Two tiny people whose identity codes have the built-in head's length."""
    for path in write_tiny_captures(folder, 2, timesteps=5, views=8):
        description = json.loads((path / "capture.json").read_text())
        description["head"]["identity"] = [0.0] * 100
        (path / "capture.json").write_text(json.dumps(description))
    return folder


def cluster_file(hosts: Hosts, folder: Path) -> Path:
    """The repository's cluster file for these hosts; the environment is this one instead of a new one."""
    described = yaml.safe_load((REPOSITORY / "cluster" / "ray-cluster.yaml").read_text())
    described["cluster_name"] = hosts.bridge
    described["provider"] |= {"head_ip": hosts.addresses[0], "worker_ips": hosts.addresses[1:]}
    described["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.folder / "user")}
    made = described["setup_commands"].index("make -C ~/headsplat setup")
    described["setup_commands"][made] = f"ln -sfn {PROGRAMS.parent} ~/headsplat/.venv"
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(described))
    return path


def homes(folder: Path, short: Path, count: int) -> list[Path]:
    """A home folder a host; hosts share all other files, and Ray's must not meet."""
    made = []
    for index in range(count):
        home = folder / f"home{index}"
        home.mkdir(parents=True)
        (home / ".bashrc").write_text(
            f"export RAY_TMPDIR={short / str(index)} HEADSPLAT_CACHE={folder / 'cache'} OMP_NUM_THREADS=1"
            " RAY_memory_monitor_refresh_ms=0\n"  # what else runs on the machine must not end a fit
        )
        (short / str(index)).mkdir()
        users = Path("/etc/passwd").read_text().splitlines()
        fields = [line.split(":") for line in users]
        changed = [[*f[:5], str(home), *f[6:]] if f[0] == "root" else f for f in fields]
        home.with_suffix(".passwd").write_text("".join(":".join(f) + "\n" for f in changed))
        made.append(home)
    shutil.copytree(cache_folder(), folder / "cache", copy_function=os.link)
    return made


@dataclass
class Cluster:
    """Two hosts with the repository's cluster file brought up on them."""

    hosts: Hosts
    home: list[Path]
    environment: dict[str, str]
    file: str

    def submit(self, *words: str) -> list[str]:
        """The words of a `ray submit` of a headsplat command, for `subprocess` in `REPOSITORY`."""
        script = str(REPOSITORY / "cluster" / "submit.py")
        return [str(PROGRAMS / "ray"), "submit", "--no-config-cache", self.file, script, "--", *words]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    short = Path(tempfile.mkdtemp(prefix="hsr", dir="/tmp"))
    home = homes(folder, short, 2)
    token = folder / "client" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("0123456789abcdef" * 4)
    kept = ("PATH", "LANG")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {
        "HOME": str(token.parents[1]),
        "RAY_TMPDIR": str(short),
        "RAY_AUTH_MODE": "token",
    }
    instead = {i: {Path("/etc/passwd"): home[i].with_suffix(".passwd")} for i in range(2)}
    try:
        with Hosts(2, folder / "hosts", instead) as hosts:
            file = str(cluster_file(hosts, folder))
            up = subprocess.run(
                [str(PROGRAMS / "ray"), "up", "--yes", "--no-config-cache", file],
                cwd=REPOSITORY,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert up.returncode == 0, up.stdout[-3000:] + up.stderr[-3000:]
            yield Cluster(hosts, home, environment, file)
    finally:
        shutil.rmtree(short, ignore_errors=True)


def test_an_evaluation_is_spread_over_two_hosts(cluster, tiny_shards, tmp_path):
    assert (cluster.home[0] / "headsplat" / "cluster" / "evaluate.py").is_file()  # the code came along
    write_network(tmp_path / "runs" / "tiny" / "export", step=7)
    protocol = synthetic_heldout(open_shards(tiny_shards, "train"), views=2, timesteps=1, metrics=(PSNR,))
    write_protocol(protocol, tmp_path / "protocol.json")
    words = [
        "--nodes",
        "2",
        "eval",
        "any",
        str(tmp_path / "runs" / "tiny"),
        "nearest-input",
        "--split",
        "train",
    ]
    words += ["--protocol", str(tmp_path / "protocol.json"), "--data", str(tiny_shards), "--workers", "2"]
    submitted = subprocess.run(
        cluster.submit(*words, "--out", str(tmp_path / "out"), "--cpus", "2"),
        cwd=REPOSITORY,
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    said = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0, said
    assert "[6/6, about 0 s left]" in said
    rows = read_rows(tmp_path / "out" / "results")
    here = evaluate_all(
        [find_checkpoint("any", tmp_path / "runs" / "tiny"), find_checkpoint("nearest-input")],
        [protocol],
        tiny_shards,
        tmp_path / "here",
        split="train",
        cpus=2,
    ).rows
    assert [(row.key, row.values, row.pictures, row.threads) for row in rows] == [
        (row.key, row.values, row.pictures, row.threads) for row in here
    ]


def test_a_fit_on_two_hosts_outlives_one_of_them(cluster, tmp_path):
    captures, out = tracked_captures(tmp_path / "captures"), tmp_path / "out"
    words = ["--nodes", "2", "fit", "flashavatar-cpu", "--pictures", "views", "--views", "4"]
    words += ["--held-views", "2", "--captures", str(captures), "--out", str(out), "--cpus", "2"]
    words += ["--workers", "2", "--gpus", "0", "--steps", "1200", "--uv-resolution", "32"]
    said, taken = [], False
    with subprocess.Popen(
        cluster.submit(*words),
        cwd=REPOSITORY,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as submitted:
        assert submitted.stdout is not None
        for line in submitted.stdout:
            said.append(line)
            under_way = {
                name
                for name, step in re.findall(r"(s0\d): step (\d+)/1200", "".join(said))
                if int(step) > 100
            }
            if not taken and under_way == {"s00", "s01"}:
                cluster.hosts.kill(1)
                taken = True
    text = "".join(said)
    assert submitted.returncode == 0, text
    assert taken, text
    assert re.search(r"s0\d: retried: its (node was lost|process died)", text), text
    results = [
        json.loads((out / "fits" / "flashavatar-views" / name / "result.json").read_text())
        for name in ("s00", "s01")
    ]
    assert sorted(result["resumed_from"] > 0 for result in results) == [False, True]
    for name in ("s00", "s01"):
        avatar = load_avatar(out / "fits" / "flashavatar-views" / name)
        assert avatar.expression_length == 52
