"""Many hosts at once: an agent on each, over ssh or srun, and one training that all of them run or none.

DeepSpeed's own launcher for many hosts (pdsh) leaves ranks behind when a connection ends, and ends them with
`pkill -f` on its own name, which takes every other training of the user on those hosts along. Here each host has
an agent (`launch.agent`) that ends its ranks by their process ids when it is told to, when its connection ends, and
when it hears nothing any more. On each host the agent starts DeepSpeed's node launcher, exactly as DeepSpeed does.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from avatars.errors import UserError
from launch.agent import MARK, ROOT, SILENCE, interface_of

__all__ = ["Fleet", "deepspeed_environment", "node_command", "passed_on"]

BEAT = 2.0  # seconds between signs of life
ANSWER = 120.0  # seconds that a host has to answer the preflight's questions; a loaded one is slow
ENDING = 30.0  # seconds that hosts have to end their ranks once the run is over

# Variables that ranks on other hosts need and that nothing else brings there.
PASSED_ON = (
    *("MLFLOW_", "PYTHON", "NCCL_", "GLOO_", "UCX_", "TORCH_", "TRITON_", "OMP_", "HF_", "HEADSPLAT_", "DS_"),
    *("AWS_", "FSSPEC_", "CUDA_HOME", "XDG_CACHE_HOME"),
)


class Agent:
    """The connection to one host's agent."""

    def __init__(self, name: str, words: Sequence[str], inbox: queue.Queue[tuple[int, str, Any]], index: int):
        self.name = name
        self.index = index
        self.heard = time.monotonic()
        self.lost: str | None = None
        self._inbox = inbox
        self._noise: deque[str] = deque(maxlen=5)
        # A session of its own, so that Ctrl-C reaches the launcher, which tells the agents, and not ssh.
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._errors = threading.Thread(target=self._read_errors, daemon=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._errors.start()
        self._reader.start()

    def tell(self, what: str, **values: Any) -> None:
        """Sends an order; a connection that is gone is noticed by its reader."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **values}) + "\n")
            self.process.stdin.flush()
        except (OSError, ValueError):
            return

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.startswith(MARK):
                self._noise.append(line.strip())
                continue
            self.heard = time.monotonic()
            ((what, value),) = json.loads(line.removeprefix(MARK)).items()
            self._inbox.put((self.index, what, value))
        status = self.process.wait()
        self._errors.join(1.0)
        said = "; ".join(line for line in self._noise if line) or f"exit status {status}"
        self._inbox.put((self.index, "gone", said))

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._noise.append(line.strip())

    def close(self) -> None:
        """Ends the connection, which makes the agent end what it started."""
        assert self.process.stdin is not None
        with suppress(OSError):  # the other side may be gone already
            self.process.stdin.close()
        try:
            self.process.wait(2.0 if self.lost is None else 0.1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(2.0)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


class Fleet(AbstractContextManager["Fleet"]):
    """Agents on all hosts of a training.

    Args:
        hosts: names and slots, in the order of the ranks.
        reach: the command that runs a command on a host: `ssh`, with options, or `srun`, with options.
    """

    def __init__(self, hosts: dict[str, int], reach: str = "ssh") -> None:
        self.hosts = hosts
        self.inbox: queue.Queue[tuple[int, str, Any]] = queue.Queue()
        self.agents = [
            Agent(name, agent_command(name, reach), self.inbox, index) for index, name in enumerate(hosts)
        ]

    def __exit__(self, *stop: object) -> None:
        closing = [threading.Thread(target=agent.close) for agent in self.agents]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()

    def ask(self, what: str, orders: dict[int, dict[str, Any]], seconds: float = ANSWER) -> dict[int, Any]:
        """One question to several hosts at once.

        Args:
            what: the question.
            orders: its values by the host's number.
            seconds: how long to wait for the last answer.

        Returns:
            Answers by the host's number; a host that does not answer is missing here and `lost` says why.
        """
        waiting = {index for index in orders if self.agents[index].lost is None}
        for index in waiting:
            self.agents[index].tell(what, **orders[index])
        answers: dict[int, Any] = {}
        until = time.monotonic() + seconds
        beaten = time.monotonic()
        while waiting and time.monotonic() < until:
            try:
                index, kind, value = self.inbox.get(timeout=BEAT)
            except queue.Empty:
                kind, index = "", -1
            if kind == what:
                answers[index] = value
                waiting.discard(index)
            elif kind == "gone":
                self.agents[index].lost = value
                waiting.discard(index)
            if time.monotonic() - beaten > BEAT:
                self._beat()
                beaten = time.monotonic()
        for index in waiting:
            self.agents[index].lost = f"no answer in {seconds:.0f} s"
        return answers

    def _beat(self) -> None:
        for agent in self.agents:
            if agent.lost is None:
                agent.tell("beat")

    def run(self, orders: Sequence[dict[str, Any]]) -> tuple[int, str]:
        """Runs the ranks of all hosts until they have ended.

        SIGTERM and the first Ctrl-C ask the ranks for a checkpoint; a second Ctrl-C ends them at once.

        Args:
            orders: `words`, `environment`, `folder`, `log` and `address` for each host.

        Returns:
            0 and "", or a status and the reason why the run has ended.
        """
        ended: dict[int, int] = {}
        status, cause = 0, ""
        asked: deque[int] = deque()
        before = {
            number: signal.signal(number, lambda number, frame: asked.append(number))
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        for agent, order in zip(self.agents, orders, strict=True):
            agent.heard = time.monotonic()
            agent.tell("run", **order)
        beaten, stopped, preempting = 0.0, 0.0, False
        try:
            while self._running(ended):
                now = time.monotonic()
                if now - beaten > BEAT:
                    self._beat()
                    beaten = now
                why = self._next(ended) or self._silent(now)
                if asked and not preempting:
                    preempting = True
                    number = asked.popleft()
                    print(f"{signal.Signals(number).name}: asking the ranks for a checkpoint", flush=True)
                    for agent in self.agents:
                        agent.tell("preempt")
                elif asked:
                    why = why or (130, "Interrupted twice; the last checkpoint is whole.")
                if why is not None and (not cause or self.agents_lost(why)):
                    # A lost host explains what the ranks of the others saw a moment before.
                    status, cause = why
                    if not stopped:
                        stopped = now
                        for agent in self.agents:
                            agent.tell("stop", reason=cause)
                if stopped and now - stopped > SILENCE + ENDING:
                    break
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return status, cause

    @staticmethod
    def agents_lost(why: tuple[int, str]) -> bool:
        """Whether a reason is that a host was lost."""
        return why[0] == LOST

    def _running(self, ended: dict[int, int]) -> bool:
        return any(agent.lost is None and agent.index not in ended for agent in self.agents)

    def _next(self, ended: dict[int, int]) -> tuple[int, str] | None:
        """Takes one message; a reason to end the run, if it is one."""
        try:
            index, kind, value = self.inbox.get(timeout=0.5)
        except queue.Empty:
            return None
        agent = self.agents[index]
        if kind == "out":
            print(value, flush=True)
        elif kind == "ended":
            ended[index] = value
            if value != 0:
                return abs(
                    value
                ), f"A rank on host {agent.name} ended with status {value}; what it said is above."
        elif kind == "gone" and agent.lost is None:
            agent.lost = value
            if index not in ended:
                return LOST, f"Host {agent.name} was lost: its connection ended ({value})."
        return None

    def _silent(self, now: float) -> tuple[int, str] | None:
        """The first host that has not given a sign of life for too long."""
        for agent in self.agents:
            if agent.lost is None and now - agent.heard > SILENCE:
                agent.lost = f"no sign of life for {SILENCE:.0f} s"
                return LOST, f"Host {agent.name} was lost: {agent.lost}; it is down or its network is cut."
        return None


LOST = 113  # the status of a run that lost a host


def agent_command(name: str, reach: str) -> list[str]:
    """What starts the agent on a host: directly where the host is this machine, otherwise through ssh or srun."""
    here = [sys.executable, "-u", "-m", "launch.agent"]
    words = shlex.split(reach)
    if Path(words[0]).name == "srun":
        return [*words, "--nodes=1", "--ntasks=1", f"--nodelist={name}", *here]
    if is_here(name):
        return here
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
    return [*words, *options, name, f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(here)}"]


def is_here(name: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    if name in ("localhost", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        return interface_of(socket.gethostbyname(name)) is not None
    except OSError:
        return False  # an alias that only ssh's configuration knows


def node_command(
    hosts: dict[str, int], index: int, address: str, port: int, training: Iterable[str]
) -> list[str]:
    """DeepSpeed's node launcher for one host, as DeepSpeed's runner would start it there.

    Args:
        hosts: names and slots, in the order of the ranks.
        index: which of them.
        address: the first host's address.
        port: of the rendezvous there.
        training: the words after `python -m launch.cli`.
    """
    world = {name: list(range(slots)) for name, slots in hosts.items()}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    words = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={encoded}"]
    words += [f"--node_rank={index}", f"--master_addr={address}", f"--master_port={port}"]
    return [*words, "--module", "--no_local_rank", "--log_level=error", "launch.cli", *training]


def passed_on(environment: dict[str, str]) -> dict[str, str]:
    """The variables of this shell that the ranks of other hosts get as well."""
    return {name: value for name, value in environment.items() if name.startswith(PASSED_ON)}


def deepspeed_environment() -> dict[str, str]:
    """The user's own `.deepspeed_env`, at home or here, as DeepSpeed finds it; DS_ENV_FILE gives another name.

    Raises:
        UserError: a line is not `NAME=value`, on which DeepSpeed would fail without naming it.
    """
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    found: dict[str, str] = {}
    for path in (Path.home() / name, Path(name)):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            key, equals, value = line.partition("=")
            if not equals or not key.strip().isidentifier():
                raise UserError(
                    f"{path}, line {number}: {line!r} is not of the form NAME=value; DeepSpeed needs that."
                )
            found[key.strip()] = value.strip()
    return found
