"""Trainings over several hosts that differ in network: started, refused, killed, cut off, resumed on what is left."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import hosts
import pytest

from eval.tracking import open_store
from launch.agent import ROOMS
from train.checkpoint import latest

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "avat3r-tiny"
MINUTE = 60.0

pytestmark = [
    pytest.mark.multihost,
    pytest.mark.e2e,
    pytest.mark.skipif(bool(hosts.missing()), reason=f"several hosts cannot be had here: {hosts.missing()}"),
]

LACKS_DATA, OTHER_COMMIT, LOGIN = 8, 9, 10  # numbers of hosts; 0 to 7 are sound, 10 is the one we type on


def repository(folder: Path, message: str) -> Path:
    """A .git whose only commit is of that message."""
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(folder)]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", message], check=True)
    return folder / ".git"


@pytest.fixture(scope="module")
def net(tiny_shards, tmp_path_factory):
    """Eleven hosts; two of them see something else where the data and the repository are.

    All of them see the code as it is now, whatever somebody edits while the tests run.
    """
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "empty").mkdir()
    frozen = {ROOT / ".git": repository(folder / "same", "Same")}
    for room in ROOMS:
        frozen[ROOT / room] = shutil.copytree(ROOT / room, folder / room)
    instead = {index: dict(frozen) for index in range(11)}
    instead[LACKS_DATA][tiny_shards] = folder / "empty"
    instead[OTHER_COMMIT][ROOT / ".git"] = repository(folder / "other", "Another")
    with hosts.Hosts(11, folder / "net", instead) as net:
        yield net


def start(net, shards: Path, out: Path, slots: dict[str, int], overrides: str) -> subprocess.Popen:
    """What `make train NODES= HOSTFILE=` runs, on a host that trains nothing, as on a login node."""
    hostfile = out / "hostfile"
    out.mkdir(exist_ok=True)
    hostfile.write_text("".join(f"{address} slots={n}\n" for address, n in slots.items()))
    words = [
        *net.inside(LOGIN),
        sys.executable,
        "-m",
        "launch.cli",
        "launch",
        RECIPE,
        "--nodes",
        str(len(slots)),
    ]
    words += ["--hostfile", str(hostfile), "--data", str(shards), "--out", str(out), "--reach", net.reach]
    return subprocess.Popen(
        [*words, f"--args={overrides}"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_preflight_names_every_host_and_remedy(net, tiny_shards, tmp_path):
    sound, no_data, other = (net.addresses[i] for i in (0, LACKS_DATA, OTHER_COMMIT))
    dead = f"{net.net}.250"
    process = start(net, tiny_shards, tmp_path / "w", dict.fromkeys((sound, no_data, other, dead), 1), "")
    output, _ = process.communicate()
    assert process.returncode == 1, output
    table = {line.split()[0]: line for line in output.splitlines() if line.strip().startswith(net.net)}
    assert "FAILED" not in table[sound]
    assert all("FAILED" in table[address] for address in (no_data, other, dead))
    problems = output[output.index("No rank was started") :]
    assert f"{no_data}: the data are not there" in problems
    assert f"{other}: its headsplat is at commit" in problems
    assert f"{dead}: it is not reached" in problems
    assert f"{sound}: " not in problems
    assert "Traceback" not in output
    assert not (tmp_path / "w" / "runs" / RECIPE / "logs").exists()
    assert all(not net.ranks(i) for i in (0, LACKS_DATA, OTHER_COMMIT))


def test_eight_hosts_take_three_steps(net, tiny_shards, tmp_path):
    out = tmp_path / "w"
    eight = dict.fromkeys(net.addresses[:8], 1)
    process = start(net, tiny_shards, out, eight, "--steps 3 --data.views 2")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    logs = out / "runs" / RECIPE / "logs"
    for rank in range(8):
        steps = [
            json.loads(line).get("step") for line in (logs / f"rank{rank}.jsonl").read_text().splitlines()
        ]
        assert {1, 2, 3} <= set(steps), f"rank {rank}"
    assert latest(out / "runs" / RECIPE)[1].world_size == 8
    assert "avat3r-untrained" in output  # it ends by evaluating
    assert all(not net.left_over(i) for i in range(8))


@dataclass
class Ended:
    """How a training ended."""

    out: Path
    output: str
    status: int
    seconds: float
    step: int
    tracked: str

    @property
    def run(self) -> Path:
        return self.out / "runs" / RECIPE


def lose(net, shards: Path, out: Path, pair: tuple[int, int], harm) -> Ended:
    """Trains on two hosts and harms the second of them after the next checkpoint."""
    run = out / "runs" / RECIPE
    before = latest(run)
    slots = {net.addresses[i]: 1 for i in pair}
    process = start(net, shards, out, slots, "--steps 100000 --checkpoint.every 5 --data.views 2")
    while process.poll() is None and ((newest := latest(run)) is None or newest == before):
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()[0]
    assert all(len(net.ranks(i)) > 0 for i in pair)
    harm(pair[1])
    harmed = time.monotonic()
    output, _ = process.communicate()
    while any(net.left_over(i) for i in pair) and time.monotonic() - harmed < MINUTE:
        time.sleep(0.2)
    seconds = time.monotonic() - harmed
    note = json.loads((run / "mlflow.json").read_text())
    tracked = open_store(note["uri"]).get_run(note["run_id"]).info.status
    return Ended(out, output, process.returncode, seconds, latest(run)[1].step, tracked)


@pytest.fixture(scope="module")
def killed(net, tiny_shards, tmp_path_factory):
    return lose(net, tiny_shards, tmp_path_factory.mktemp("lost") / "w", (0, 1), net.kill)


@pytest.fixture(scope="module")
def cut(killed, net, tiny_shards):
    return lose(net, tiny_shards, killed.out, (0, 2), net.cut)


@pytest.mark.parametrize(("how", "host"), [("killed", 1), ("cut", 2)])
def test_a_lost_host_ends_the_run_everywhere(how, host, net, request):
    ended = request.getfixturevalue(how)
    assert ended.status == 1, ended.output
    assert f"Host {net.addresses[host]} was lost" in ended.output
    assert "goes on from the last checkpoint" in ended.output
    assert net.left_over(0) == net.left_over(host) == []
    assert ended.seconds < MINUTE
    assert ended.tracked == "FAILED"


def test_the_far_side_of_a_cut_writes_down_why(cut, net):
    told = [json.loads(line) for line in (cut.run / "logs" / "hosts.jsonl").read_text().splitlines()]
    reasons = {entry["host"]: entry["ended"] for entry in told}
    assert "the network is cut" in reasons[net.addresses[2]]


def test_training_goes_on_with_the_hosts_that_are_left(cut, net, tiny_shards):
    assert f"resuming {cut.run} at step" in cut.output  # after the first loss, with another host
    slots = {net.addresses[0]: 1}  # half as many ranks as before
    process = start(net, tiny_shards, cut.out, slots, f"--steps {cut.step + 2} --data.views 2")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert f"resuming {cut.run} at step {cut.step}" in output
    assert latest(cut.run)[1].step == cut.step + 2
    assert latest(cut.run)[1].world_size == 1
