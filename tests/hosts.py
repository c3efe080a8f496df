"""Several hosts on this machine: network namespaces on a bridge of their own, with a real sshd in each.

They share the file system, processes and memory, and differ in network; a host may also see another file or folder in
the place of one (`instead`), as each has its own mounts. Names and addresses are unique, so that two test runs do not
meet, and everything is taken away again by name and process id, however a test ends.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path

TOOLS = ("ip", "sshd", "ssh", "ssh-keygen", "nsenter")


def missing() -> str:
    """Why hosts cannot be had here; empty when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not installed (openssh-server, openssh-client, iproute2)"
    name = f"hsprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no network namespace can be made ({made.stderr.strip()})"
    ip("netns", "del", name)
    return ""


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


class Hosts(AbstractContextManager["Hosts"]):
    """`count` hosts; `addresses[i]` is reached by `reach` as root."""

    def __init__(self, count: int, folder: Path, instead: dict[int, dict[Path, Path]] | None = None) -> None:
        self.folder = folder
        self.count = count
        self.instead = instead or {}
        self.servers: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.net = self._bridge()
        self.addresses = [f"{self.net}.{i + 2}" for i in range(self.count)]
        try:
            self._keys()
            for index in range(self.count):
                self._host(index)
            for address in self.addresses:
                self._await(address)
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def reach(self) -> str:
        return f"ssh -F {self.folder / 'ssh_config'}"

    def _bridge(self) -> str:
        """A network that nobody has yet: making the bridge fails when its name is taken."""
        for _ in range(50):
            a, b = random.randint(64, 127), random.randint(1, 254)
            self.bridge = f"hs{a}-{b}"
            if f"10.{a}.{b}." in ip("-o", "addr"):
                continue
            try:
                ip("link", "add", self.bridge, "type", "bridge")
            except subprocess.CalledProcessError:
                continue
            ip("addr", "add", f"10.{a}.{b}.1/24", "dev", self.bridge)
            ip("link", "set", self.bridge, "up")
            return f"10.{a}.{b}"
        raise RuntimeError("no free network")

    def name(self, index: int) -> str:
        return f"{self.bridge}n{index}"

    def _keys(self) -> None:
        for key in ("user", "host"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)]
            subprocess.run(words, check=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        (self.folder / "ssh_config").write_text(
            f"Host {self.net}.*\n  User root\n  IdentityFile {self.folder / 'user'}\n  IdentitiesOnly yes\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )

        lines = ["127.0.0.1 localhost", f"{self.net}.1 launcher"]
        lines += [f"{address} node{index}" for index, address in enumerate(self.addresses)]
        (self.folder / "names").write_text("\n".join(lines) + "\n")

    def _host(self, index: int) -> None:
        name, outer, address = self.name(index), f"{self.bridge}v{index}", self.addresses[index]
        inner = f"net{index}"  # every host calls its interface otherwise
        ip("netns", "add", name)
        ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
        ip("link", "set", outer, "master", self.bridge, "up")
        ip("-n", name, "addr", "add", f"{address}/24", "dev", inner)
        ip("-n", name, "link", "set", inner, "up")
        ip("-n", name, "link", "set", "lo", "up")
        # Names of their own: without them every connection waits for a name server that is not there.
        instead = {Path("/etc/hosts"): self.folder / "names", **self.instead.get(index, {})}
        mounts = [f"mount --bind '{new}' '{old}'" for old, new in instead.items()]
        options = {
            "HostKey": self.folder / "host",
            "AuthorizedKeysFile": self.folder / "user.pub",
            "ListenAddress": address,
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "PermitRootLogin": "yes",
        }
        program = shutil.which("sshd", path="/usr/sbin:/usr/bin") or "sshd"
        server = ["exec", program, "-D", "-e", "-f", "/dev/null"]
        server += [f"-o '{key}={value}'" for key, value in options.items()]
        shell = " && ".join([*mounts, " ".join(server)])
        with (self.folder / f"sshd{index}.log").open("w") as log:
            words = ["ip", "netns", "exec", name, "sh", "-c", shell]
            self.servers.append(subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    def _await(self, address: str) -> None:
        while True:
            try:
                socket.create_connection((address, 22), timeout=5).close()
                return
            except OSError:
                if any(server.poll() is not None for server in self.servers):
                    raise
                time.sleep(0.05)

    def inside(self, index: int) -> list[str]:
        """What a command must be put behind to run on a host without ssh."""
        return ["nsenter", "-t", str(self.servers[index].pid), "-m", "-n", "--wd=" + str(Path.cwd())]

    def processes(self, index: int) -> list[int]:
        """Ids of everything that runs on a host, its sshd included."""
        return [int(pid) for pid in ip("netns", "pids", self.name(index)).split()]

    def ranks(self, index: int) -> list[int]:
        """Ids of a host's training processes."""
        return [pid for pid in self.processes(index) if b"launch.cli" in command_line(pid)]

    def left_over(self, index: int) -> list[bytes]:
        """Command lines of everything on a host but ssh servers."""
        lines = [command_line(pid) for pid in self.processes(index)]
        return [line for line in lines if line and b"sshd" not in line]

    def kill(self, index: int) -> None:
        """The host is gone: every process at once, as by a lost power supply."""
        for pid in self.processes(index):
            end(pid)

    def cut(self, index: int) -> None:
        """The host goes on, but no packet gets in or out."""
        ip("link", "set", f"{self.bridge}v{index}", "down")

    def __exit__(self, *stop: object) -> None:
        for index in range(self.count):
            try:
                while pids := self.processes(index):
                    for pid in pids:
                        end(pid)
                    time.sleep(0.05)
                ip("netns", "del", self.name(index))
            except subprocess.CalledProcessError:
                continue  # it was never made
        for server in self.servers:
            server.wait()
        ip("link", "del", self.bridge)


def end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
