"""The checks of many hosts, from what hosts tell; real hosts are in test_multihost.py."""

import json
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from pathlib import Path

import pytest

from avatars.errors import UserError
from launch import agent, hosts
from launch.hosts import Fleet, agent_command, deepspeed_environment, node_command, passed_on
from launch.preflight import CHECKS, Finding, Report, chosen_hosts, compare, inspect_hosts

GIB = 2**30
SOUND = {
    "address": "10.0.0.2",
    "interface": "eth0",
    "commit": "abc",
    "sources": "123",
    "versions": {"python": "3.11.7", "torch": "2.14.1", "cuda": "13.0"},
    "driver": "580.1",
    "devices": 8,
    "cores": 64,
    "run_free": 100 * GIB,
    "cache_free": 10 * GIB,
    "cache": "/root/.cache/torch_extensions",
    "locks": [],
    "data": {"manifest": "m1", "problem": ""},
    "run_shared": True,
    "run_writable": True,
    "tracking": "",
}
HERE = {key: SOUND[key] for key in ("commit", "sources", "versions", "data")}


def problems(**changes):
    """What is found when the second of two hosts differs in `changes`."""
    other = deepcopy(SOUND) | changes
    found = compare({"a": 8, "b": 8}, {"a": deepcopy(SOUND), "b": other}, HERE, need=GIB)
    bad = [finding for finding in found if finding.problem]
    assert all(finding.host == "b" for finding in bad)
    return {finding.check: finding.problem for finding in bad}


def test_sound_hosts_pass_every_check():
    assert problems() == {}


@pytest.mark.parametrize(
    ("changes", "check", "sentence"),
    [
        ({"commit": "def"}, "code", "at commit def, here it is abc; check out the same"),
        ({"sources": "456"}, "code", "other source files than here"),
        ({"versions": SOUND["versions"] | {"torch": "2.13.0"}}, "versions", "torch 2.13.0 (here 2.14.1)"),
        ({"versions": SOUND["versions"] | {"cuda": "12.6"}}, "versions", "cuda 12.6 (here 13.0)"),
        ({"driver": "570.2"}, "driver", "NVIDIA driver 570.2, but 580.1 on a"),
        ({"devices": 4}, "devices", "4 CUDA devices are visible and the hostfile says slots=8"),
        ({"devices": 0}, "devices", "do not mix"),
        ({"run_free": GIB // 2}, "disk", "checkpoints take 1.0 GiB"),
        ({"cache_free": 1}, "disk", "TORCH_EXTENSIONS_DIR"),
        ({"locks": ["/root/x/lock"]}, "locks", "/root/x/lock is left from a killed build"),
        ({"interface": None}, "network", "no network interface there carries an address of b"),
        ({"interface": "lo"}, "network", "write the address into the hostfile"),
        (
            {"data": {"manifest": "", "problem": "No such file"}},
            "data",
            "the data are not there (No such file)",
        ),
        ({"data": {"manifest": "m2", "problem": ""}}, "data", "the manifest is another one"),
        ({"data": {"manifest": "m1", "problem": "x.tar is not there in full"}}, "data", "x.tar"),
        ({"run_shared": False}, "run", "a disk that all hosts share"),
        ({"run_writable": False}, "run", "cannot write the run's folder"),
    ],
)
def test_each_difference_is_named_with_its_remedy(changes, check, sentence):
    found = problems(**changes)
    assert list(found) == [check]
    assert sentence in found[check]


def test_only_the_first_host_must_reach_the_tracking_store():
    told = {
        "a": SOUND | {"tracking": "http://x is not reached"},
        "b": SOUND | {"tracking": "http://x is not reached"},
    }
    found = [f for f in compare({"a": 8, "b": 8}, told, HERE, 0) if f.problem]
    assert [(f.host, f.check) for f in found] == [("a", "tracking")]


def test_hosts_without_devices_have_cores_for_their_ranks():
    none = SOUND | {"devices": 0, "driver": "none"}
    found = [f for f in compare({"a": 2, "b": 65}, {"a": none, "b": none}, HERE, 0) if f.problem]
    assert [(f.host, f.check) for f in found] == [("b", "devices")]


def test_the_first_hosts_of_a_longer_hostfile_are_used(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=8\nb slots=4\nc slots=8\n")
    assert chosen_hosts(2, hostfile) == {"a": 8, "b": 4}
    hostfile.write_text("-oProxyCommand=x slots=8\n")
    with pytest.raises(UserError, match="starts with a dash"):
        chosen_hosts(1, hostfile)


def test_a_report_shows_all_hosts_and_checks(capsys):
    findings = [Finding("a", check, "") for check in CHECKS] + [Finding("b", "reached", "it is down.")]
    report = Report(tuple(findings), ("1", ""), 0)
    from rich.console import Console

    Console(width=150).print(report.table())
    shown = capsys.readouterr().out
    assert all(check in shown for check in CHECKS)
    assert shown.count("ok") == len(CHECKS)
    assert report.to_json()["hosts"]["b"] == {"reached": "it is down."}
    assert report.to_json()["ok"] is False
    with pytest.raises(UserError, match=r"No rank was started.*\n  b: it is down"):
        report.require()


def test_an_unknown_host_and_this_one(tmp_path, tiny_shards):
    # A name that cannot be resolved, and this machine, whose agent needs no ssh.
    with Fleet({"localhost": 2, "no-such-host.invalid": 2}) as fleet:
        report = inspect_hosts(fleet, tiny_shards, tmp_path / "run", f"sqlite:///{tmp_path}/m.db", None, GIB)
    told = report.to_json()["hosts"]
    assert "reached" in told["no-such-host.invalid"]
    assert told["no-such-host.invalid"]["reached"]
    assert "means another machine on every host" in told["localhost"]["network"]
    assert told["localhost"]["data"] is None
    assert told["localhost"]["tracking"] is None
    assert not list((tmp_path / "run").iterdir())


def test_a_port_in_use_on_the_first_host(tmp_path, tiny_shards):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with Fleet({"localhost": 1}) as fleet:
            report = inspect_hosts(fleet, tiny_shards, tmp_path / "run", "", port, 0)
    assert f"port {port} of 127.0.0.1 cannot be used" in report.to_json()["hosts"]["localhost"]["rendezvous"]


SLEEPER = "import time, sys; print('up', flush=True); time.sleep(600)"


def order(tmp_path, code):
    words = [sys.executable, "-c", code]
    log = str(tmp_path / "logs" / "hosts.jsonl")
    return {
        "words": words,
        "environment": {"A": "1"},
        "folder": str(tmp_path),
        "log": log,
        "address": "127.0.0.1",
    }


def running(fleet):
    """Process ids of what the fleet's agents started."""
    import psutil

    return [child for agent in fleet.agents for child in psutil.Process(agent.process.pid).children()]


def test_a_run_that_works_and_one_that_fails(tmp_path, capfd):
    with Fleet({"localhost": 1}) as fleet:
        code = "import os; print(os.environ['A'], os.environ['GLOO_SOCKET_IFNAME'], os.getcwd())"
        assert fleet.run([order(tmp_path, code)]) == (0, "")
    assert f"1 lo {tmp_path}" in capfd.readouterr().out
    with Fleet({"localhost": 1}) as fleet:
        status, cause = fleet.run([order(tmp_path, "raise SystemExit(3)")])
    assert status == 3
    assert "A rank on host localhost ended with status 3" in cause


def test_one_failing_host_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "GRACE", 0.1)
    with Fleet({"localhost": 1, "127.0.0.1": 1}) as fleet:
        status, cause = fleet.run([order(tmp_path, "raise SystemExit(3)"), order(tmp_path, SLEEPER)])
        assert running(fleet) == []
    assert (status, "localhost" in cause) == (3, True)
    told = [json.loads(line) for line in (tmp_path / "logs" / "hosts.jsonl").read_text().splitlines()]
    assert any(cause in entry["ended"] for entry in told)


def test_an_agent_that_dies_is_a_lost_host_and_silence_is_too(tmp_path, monkeypatch):
    with Fleet({"localhost": 1, "127.0.0.1": 1}) as fleet:
        threading.Timer(1.0, fleet.agents[1].process.kill).start()
        ranks = [order(tmp_path, SLEEPER)] * 2
        status, cause = fleet.run(ranks)
        assert status == hosts.LOST
        assert "Host 127.0.0.1 was lost: its connection ended" in cause
    monkeypatch.setattr(hosts, "SILENCE", 3.0)
    with Fleet({"localhost": 1}) as fleet:
        threading.Timer(1.0, fleet.agents[0].process.send_signal, [signal.SIGSTOP]).start()
        started = time.monotonic()
        status, cause = fleet.run([order(tmp_path, SLEEPER)])
        fleet.agents[0].process.send_signal(signal.SIGCONT)
        assert time.monotonic() - started < 60
        assert "no sign of life" in cause


def test_a_launcher_that_is_killed_leaves_nothing(tmp_path):
    # The connection's end is all that an agent notices of it.
    started = tmp_path / "pid"
    code = f"import os, time, pathlib; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(600)"
    script = (
        "import sys; from launch.hosts import Fleet; from pathlib import Path\n"
        f"Fleet({{'localhost': 1}}).run([{order(tmp_path, code)!r}])"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script], cwd=Path(agent.__file__).parent.parent)
    while not started.exists() or not started.read_text():
        time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    import psutil

    while psutil.pid_exists(int(started.read_text())):
        time.sleep(0.1)


def test_ranks_are_asked_for_a_checkpoint_once(tmp_path, capfd):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *a: (print('checkpoint', flush=True), sys.exit(0)))\n"
        "print('up', flush=True); time.sleep(600)"
    )
    launcher = (
        f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {code!r}]).returncode)"
    )
    with Fleet({"localhost": 1}) as fleet:
        main_thread = threading.main_thread().ident
        threading.Timer(3.0, signal.pthread_kill, [main_thread, signal.SIGTERM]).start()
        status, cause = fleet.run([order(tmp_path, launcher)])
    assert (status, cause) == (0, "")
    assert "SIGTERM: asking the ranks for a checkpoint\n" in (out := capfd.readouterr().out)
    assert "checkpoint\n" in out.split("up\n")[1]


def test_commands_for_hosts(monkeypatch):
    over_ssh = agent_command("node7.invalid", "ssh -F cfg")
    assert over_ssh[:3] == ["ssh", "-F", "cfg"]
    assert over_ssh[-2] == "node7.invalid"
    assert "-m launch.agent" in over_ssh[-1]
    over_srun = agent_command("localhost", "srun --overlap")
    assert over_srun[:5] == ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--nodelist=localhost"]
    assert agent_command("localhost", "ssh")[0] == sys.executable
    words = node_command({"a": 2, "b": 1}, 1, "10.0.0.2", 29500, ["train", "avat3r"])
    assert "--node_rank=1" in words
    assert words[-2:] == ["train", "avat3r"]


def test_the_users_deepspeed_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert deepspeed_environment() == {}
    (tmp_path / ".deepspeed_env").write_text("NCCL_IB_HCA=mlx5\nWANDB_KEY=a=b\n")
    assert deepspeed_environment() == {"NCCL_IB_HCA": "mlx5", "WANDB_KEY": "a=b"}
    (tmp_path / ".deepspeed_env").write_text("NCCL_IB_HCA=mlx5\n\n# a comment\n")
    with pytest.raises(UserError, match="line 2"):
        deepspeed_environment()


def test_what_travels_to_other_hosts():
    given = {"MLFLOW_TRACKING_URI": "u", "NCCL_DEBUG": "INFO", "HF_HOME": "h", "SECRET": "s", "PATH": "p"}
    assert set(passed_on(given)) == {"MLFLOW_TRACKING_URI", "NCCL_DEBUG", "HF_HOME"}


def test_each_host_finds_its_own_interface():
    found = agent.network_environment("127.0.0.1", {})
    assert found == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    assert "NCCL_SOCKET_IFNAME" not in agent.network_environment("127.0.0.1", {"NCCL_SOCKET_IFNAME": "ib0"})
    assert agent.network_environment("192.0.2.1", {}) == {}


def test_a_tracking_server_that_is_away():
    assert agent.tracking_reached("http://127.0.0.1:9") != ""
    assert agent.tracking_reached("sqlite:////no/such/folder/m.db") != ""
