"""One host's end of a training on many hosts: answers the preflight's questions, then starts and ends the ranks there.

`python -m launch.agent` is started on every host, over ssh or srun, by `launch.hosts`, and lives as long as that
connection. Both sides send one JSON object a line, marked so that what a login shell prints is not taken for it.
It uses the standard library and psutil alone: it must start in a moment, and be small beside the ranks.

When the connection ends, or nothing was heard for `SILENCE` seconds (a cut network tells nothing), it ends the ranks of
its host. That holds on the far side of a cut too, where no launcher can reach.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import queue
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

__all__ = ["MARK", "SILENCE", "interface_of", "main", "network_environment", "probe", "stale_locks"]

MARK = "\x1eheadsplat "
SILENCE = 30.0  # seconds without a word from the other side after which it counts as lost
GRACE = 8.0  # seconds that ranks have to end by themselves, so that they can say why, before they are killed
ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("avatars", "shards", "eval", "train", "cluster", "launch")


def main() -> int:
    """Serves one connection until it ends."""
    words: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=read_lines, args=(words,), daemon=True).start()
    host = Host()
    host.say("hello", os.getpid())
    heard = time.monotonic()
    while True:
        try:
            line = words.get(timeout=1.0)
        except queue.Empty:
            if time.monotonic() - heard > SILENCE:
                host.end(f"nothing was heard from the launcher for {SILENCE:.0f} s: the network is cut")
                return 1
            continue
        heard = time.monotonic()
        if line is None:
            host.end("the connection to the launcher ended")
            return 0
        host.obey(json.loads(line))


def read_lines(into: queue.Queue[str | None]) -> None:
    """Standard input line by line, and None at its end."""
    for line in sys.stdin:
        into.put(line)
    into.put(None)


class Host:
    """What the launcher can ask of a host."""

    def __init__(self) -> None:
        self.ranks: subprocess.Popen[str] | None = None
        self.log: Path | None = None
        self.name = socket.gethostname()
        self._speaking = threading.Lock()
        self._listening: socket.socket | None = None

    def say(self, what: str, value: Any) -> None:
        """One message to the launcher. A launcher that is gone is noticed where its words are awaited."""
        with self._speaking:
            try:
                sys.stdout.write(MARK + json.dumps({what: value}) + "\n")
                sys.stdout.flush()
            except (OSError, ValueError):
                return

    def obey(self, order: dict[str, Any]) -> None:
        """Does what one message asks for; what takes time is done beside the loop that listens."""
        match order.pop("do"):
            case "beat":
                self.say("beat", None)
            case "probe":
                self.name = order["name"]
                threading.Thread(target=self._probe, kwargs=order, daemon=True).start()
            case "listen":
                self.say("listen", self.listen(order["address"], order["port"]))
            case "connect":
                threading.Thread(target=lambda: self.say("connect", connect(**order)), daemon=True).start()
            case "run":
                self.run(**order)
            case "preempt":
                self.preempt()
            case "stop":
                threading.Thread(target=self.end, args=(order["reason"],), daemon=True).start()

    def _probe(self, **order: Any) -> None:
        try:
            self.say("probe", probe(**order))
        except Exception as error:  # whatever it is, the launcher waits for an answer and shows it
            self.say("probe", {"error": f"{type(error).__name__}: {error}"})

    def listen(self, address: str, port: int) -> int | str:
        """Holds a port for the ranks' rendezvous open until the ranks start; a sentence when it cannot be had."""
        self._listening = socket.socket()
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._listening.bind((address, port))
            self._listening.listen(1024)
        except OSError as error:
            return f"port {port} of {address} cannot be used ({error.strerror})"
        return int(self._listening.getsockname()[1])

    def run(self, words: list[str], environment: dict[str, str], folder: str, log: str, address: str) -> None:
        """Starts this host's ranks; their words and their end are told as they come."""
        if self._listening is not None:
            self._listening.close()
        self.log = Path(log)
        everything = {**os.environ, **environment}
        everything = network_environment(address, everything) | everything
        everything["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        self.ranks = subprocess.Popen(
            words,
            env=everything,
            cwd=folder if Path(folder).is_dir() else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        threading.Thread(target=self._follow, args=(self.ranks,), daemon=True).start()

    def _follow(self, ranks: subprocess.Popen[str]) -> None:
        assert ranks.stdout is not None
        for line in ranks.stdout:
            self.say("out", line.rstrip("\n"))
        self.say("ended", ranks.wait())

    def preempt(self) -> None:
        """SIGTERM to every rank, which writes a checkpoint. DeepSpeed's node launcher would kill them 30 s later."""
        if self.ranks is not None and self.ranks.poll() is None:
            for rank in psutil.Process(self.ranks.pid).children():
                rank.terminate()

    def end(self, reason: str) -> None:
        """Ends every process of this host's ranks and writes down why, on this host's own log."""
        ranks = self.ranks
        if ranks is None:
            return
        try:
            ranks.wait(GRACE)
        except subprocess.TimeoutExpired:
            kill_tree(ranks.pid)
            ranks.wait()
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as log:
                log.write(json.dumps({"host": self.name, "ended": reason, "time": time.time()}) + "\n")


def kill_tree(pid: int) -> None:
    """SIGKILL to a process, everything it started, and what is left of their session."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        processes = []
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def connect(address: str, port: int) -> str:
    """Empty when this host can open a TCP connection to the rendezvous, otherwise why not."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""


def interface_of(address: str) -> str | None:
    """The network interface that carries an IPv4 or IPv6 address here, None when none does."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in addresses):
            return name
    return None


def network_environment(address: str, environment: dict[str, str]) -> dict[str, str]:
    """Which interface gloo and NCCL use on this host, unless the user has said so.

    Names differ between hosts (eth0 here, ens3 there), so each host finds its own from its own address.

    Args:
        address: this host's address in the network that the ranks share.
        environment: what is set already.
    """
    interface = interface_of(address)
    if interface is None:
        return {}
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: interface for name in names if name not in environment}


def probe(name: str, data: str, token: str, tracking: str, want_tracking: bool) -> dict[str, Any]:
    """Everything that the preflight compares, as plain values.

    Args:
        name: the host's name in the hostfile.
        data: folder of packed shards.
        token: a file that the launcher has just written into the run's folder.
        tracking: MLflow's tracking URI.
        want_tracking: whether this host's ranks will write to it.
    """
    address = own_address(name)
    return {
        "address": address,
        "interface": interface_of(address) if address else None,
        **code(),
        "versions": package_versions(),
        "driver": nvidia_driver(),
        "devices": visible_devices(),
        "cores": len(os.sched_getaffinity(0)),
        "run_free": free_bytes(Path(token).parent),
        "cache_free": free_bytes(extensions_folder()),
        "cache": str(extensions_folder()),
        "locks": [str(path) for path in stale_locks(extensions_folder())],
        "data": data_seen(Path(data)),
        "run_shared": Path(token).is_file(),
        "run_writable": os.access(Path(token).parent, os.W_OK),
        "tracking": tracking_reached(tracking) if want_tracking else "",
    }


def own_address(name: str) -> str | None:
    """This host's address as the launcher reaches it: ssh tells it, otherwise the host's name resolves to it."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if len(connection) == 4:
        return connection[2]
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return None
    mine = [address for address in found if interface_of(address)]
    return next((address for address in mine if not address.startswith("127.")), mine[0] if mine else None)


def code() -> dict[str, str]:
    """The commit of the checkout, and a hash of all source files, which sees changes that no commit has."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    words = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(words, capture_output=True, text=True)
        commit = found.stdout.strip() if found.returncode == 0 else "no git"
    except OSError:
        commit = "no git"
    return {"commit": commit, "sources": digest.hexdigest()[:12]}


def package_versions() -> dict[str, str]:
    """Versions that ranks must share, read without importing the packages."""
    found = {"python": platform.python_version()}
    for package in ("torch", "deepspeed", "numpy", "gsplat"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        described = runpy.run_path(str(Path(torch.origin).with_name("version.py")))
        found["cuda"] = str(described.get("cuda"))
    return found


def nvidia_driver() -> str:
    """Version of the NVIDIA driver, "none" without one."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "none"
    return next((word for word in first.split() if word[0].isdigit() and "." in word), "unknown")


def visible_devices() -> int:
    """CUDA devices that torch sees, asked in a process of its own, whose memory is given back."""
    if not Path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi") is None:
        return 0
    words = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    found = subprocess.run(words, capture_output=True, text=True)
    return int(found.stdout) if found.returncode == 0 else 0


def free_bytes(folder: Path) -> int:
    """Bytes free where a folder is or will be."""
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def extensions_folder() -> Path:
    """Where torch compiles extensions at first use, DeepSpeed's and gsplat's among them."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path.home() / ".cache" / "torch_extensions"


def stale_locks(folder: Path) -> list[Path]:
    """Lock files of killed builds, for which every later import would wait for ever.

    Newer torch (2.14) locks builds through the operating system, as our own kernels' build does: the lock falls with
    the process and the file that is left means nothing. Older torch takes the file's being there for the lock: one
    that no process here holds open and that is older than a minute is left over.
    """
    if not folder.is_dir() or not torch_locks_by_file():
        return []
    held = set(open_files())
    old = time.time() - 60
    return sorted(
        path for path in folder.rglob("lock") if str(path) not in held and path.stat().st_mtime < old
    )


def torch_locks_by_file() -> bool:
    """Whether the installed torch's extension builder waits for a lock file to disappear."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    builder = Path(torch.origin).parent / "utils" / "cpp_extension.py"
    return builder.is_file() and "FileBaton(" in builder.read_text()


def open_files() -> Iterator[str]:
    """Paths that processes of this host have open, as far as this user may know."""
    for process in psutil.process_iter():
        try:
            yield from (entry.path for entry in process.open_files())
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue


def data_seen(folder: Path) -> dict[str, Any]:
    """Hash of the manifest, and the first shard that is not there in its size; all empty when all is well."""
    try:
        text = (folder / "manifest.json").read_bytes()
    except OSError as error:
        return {"manifest": "", "problem": str(error.strerror)}
    problem = ""
    for shard in json.loads(text).get("shards", []):
        path = folder / shard["path"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            problem = f"{shard['path']} is not there in full"
            break
    return {"manifest": hashlib.sha256(text).hexdigest()[:16], "problem": problem}


def tracking_reached(uri: str) -> str:
    """Empty when the tracking store can be written from here, otherwise why not."""
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    if not uri.startswith(("http://", "https://")):
        return ""
    try:
        urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=10).close()
    except urllib.error.HTTPError as error:
        # A server that refuses the path is a server that was reached.
        return "" if error.code in (401, 403, 404) else f"{uri} answers {error.code}"
    except (OSError, ValueError) as error:
        return f"{uri} is not reached ({getattr(error, 'reason', error)})"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
