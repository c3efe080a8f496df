"""What keeps a training from going wrong in silence.

Judging the numbers of a step: a loss that is not finite stops the run or leaves the examples out, a loss that jumps is
recorded. Watching the ranks (`Watch`): a rank that dies, a host that falls silent, data that do not come and a
collective that hangs each end the run on every rank with a sentence that names the cause.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import selectors
import signal
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from avatars.errors import UserError
from train.config import GuardConfig
from train.endings import Preempted, RunOver, SharedFailure

__all__ = ["STOP_FILE", "GradientGate", "LossSpikes", "StopSignal", "Watch", "require_finite"]

STOP_FILE = "stop"  # in a run's folder: asks the run to stop after the step under way, like SIGTERM
DATA = "waiting for data"
BEAT = 1.0  # seconds between two words of a rank
GRACE = 5.0  # seconds that a rank has to end by itself once the run is over
COLLECTIVE_ERRORS = (
    "gloo",
    "NCCL",
    "Connection",
    "c10d",
)  # in the message: what a peer's end does to a collective
SPIKE_HISTORY = 100
SPIKE_LEAST = 20

RECOVERY = (
    "The last checkpoint is whole: lower --optimizer.lr or look at these examples with `headsplat shards check`, "
    "then run the same command again."
)


class StopSignal:
    """Whether somebody asked the run to stop: SIGTERM, SIGINT, or the file `stop` in the run's folder.

    Args:
        run: the run's folder.
        looks: whether this rank looks for the file; one is enough, and hundreds would ask the shared disk every step.
    """

    def __init__(self, run: Path, *, looks: bool = True) -> None:
        self._signalled = False
        self._looks = looks
        self._file = run / STOP_FILE
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGINT, self._remember)

    @property
    def asked(self) -> bool:
        """Read once a step; looking for the file costs microseconds."""
        return self._signalled or (self._looks and self._file.exists())

    def obeyed(self) -> None:
        """Takes the file away, so that the next start is not stopped by it."""
        self._file.unlink(missing_ok=True)

    def _remember(self, signum: int, frame: Any) -> None:
        self._signalled = True


def require_finite(what: str, value: float, own: float, ids: list[str], step: int) -> None:
    """Ends the run on every rank when a number of the step is not finite on any rank, naming the examples.

    Args:
        what: "loss" or "gradient".
        value: mean over the ranks, which carries a NaN to everybody.
        own: this rank's.
        ids: this rank's examples.
        step: number of the step, from 0.

    Raises:
        SharedFailure: on all ranks alike.
    """
    if math.isfinite(value):
        return
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (own, ids))
    culprits = [name for number, names in reports if not math.isfinite(number) for name in names]
    raise SharedFailure(
        f"The {what} is {value} at step {step + 1}, from the examples {', '.join(culprits)}. {RECOVERY}"
    )


class GradientGate:
    """Zeroes this rank's gradients while it is shut: how examples with a NaN loss are left out of a step.

    The backward pass still runs, so that every rank takes part in every collective, also under ZeRO 2 and 3.
    """

    def __init__(self, module: nn.Module) -> None:
        self.shut = False
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._pass)

    def _pass(self, gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gradient) if self.shut else gradient


class LossSpikes:
    """Tells when a loss is far above what it has been lately."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._recent: deque[float] = deque(maxlen=SPIKE_HISTORY)

    def look(self, loss: float) -> float | None:
        """Adds a step's mean loss.

        Returns:
            The median of the steps before when the loss is more than `factor` times it, else None.
        """
        usual = statistics.median(self._recent) if len(self._recent) >= SPIKE_LEAST else math.inf
        self._recent.append(loss)
        return usual if self.factor > 0 and loss > self.factor * usual else None


@dataclass
class Word:
    """What a rank last said of itself."""

    host: str
    phase: str
    since: float
    limit: float
    heard: float = field(default_factory=time.monotonic)


def overdue(words: dict[int, Word], now: float, silence: float) -> str | None:
    """The sentence that ends a run, from what every rank last said, or None while all is well.

    Args:
        words: by rank.
        now: monotonic clock.
        silence: seconds without a word after which a rank counts as gone.
    """
    for rank, word in sorted(words.items()):
        quiet = now - word.heard
        if quiet > silence:
            return (
                f"Rank {rank} on {word.host} has not been heard of for {quiet:.0f} s: the host is down, the network "
                "is cut or the process is stopped."
            )
    late = {rank for rank, word in words.items() if now - word.since > word.limit}
    if not late:
        return None
    starved = [rank for rank in late if words[rank].phase == DATA]
    if starved:
        rank = min(starved)
        return (
            f"Rank {rank} on {words[rank].host} has waited {now - words[rank].since:.0f} s for data: look at the disk "
            "or store that holds them, or raise --guard.data-seconds."
        )
    told = "; ".join(
        f"rank {rank} on {word.host} is in '{word.phase}' since {now - word.since:.0f} s"
        for rank, word in sorted(words.items())
    )
    return (
        f"The step hangs: {told}. A collective waits for a rank that does not come; see --guard.step-seconds."
    )


class Hub:
    """Rank 0's ear: hears every rank, and tells all of them when the run is over and why.

    A connection that closes without a goodbye is a process that died; one that falls silent is a host or a network
    that is gone. Runs in a thread of its own, on the network interface of the ranks' rendezvous.
    """

    def __init__(self, address: str, key: str, world_size: int, silence: float) -> None:
        self._server = socket.create_server((address, 0), backlog=world_size)
        self.port: int = self._server.getsockname()[1]
        self._key, self._silence = key, silence
        self._words: dict[int, Word] = {}
        self._pending: dict[socket.socket, bytes] = {}
        self._ranks: dict[socket.socket, int] = {}
        self._verdict: str | None = None
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="headsplat-hub", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; ranks that still listen are told goodbye."""
        self._closing = True
        self._thread.join(2 * BEAT)

    def _serve(self) -> None:
        told = 0.0
        while not self._closing:
            for event, _ in self._selector.select(BEAT / 2):
                ear = event.fileobj
                if ear is self._server:
                    self._welcome()
                elif isinstance(ear, socket.socket):
                    self._hear(ear)
            now = time.monotonic()
            self._verdict = self._verdict or overdue(self._words, now, self._silence)
            if now - told >= BEAT or self._verdict:
                told = now
                self._tell({"over": self._verdict})
        self._tell({"bye": True})
        for connection in [self._server, *self._pending]:
            connection.close()

    def _welcome(self) -> None:
        connection, _ = self._server.accept()
        connection.settimeout(BEAT)
        self._pending[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> None:
        try:
            heard = connection.recv(65536)
        except OSError:
            heard = b""
        if not heard:
            self._drop(connection)
            return
        *lines, self._pending[connection] = (self._pending[connection] + heard).split(b"\n")
        for line in lines:
            try:
                self._understand(connection, json.loads(line))
            except (ValueError, KeyError, TypeError):  # no rank of this run talks like that
                self._drop(connection)
                return

    def _understand(self, connection: socket.socket, said: dict[str, Any]) -> None:
        if said["key"] != self._key:
            raise ValueError
        rank = int(said["rank"])
        self._ranks[connection] = rank
        if said.get("bye"):
            self._words.pop(rank, None)
            del self._ranks[connection]
            return
        now = time.monotonic()
        self._words[rank] = Word(said["host"], said["phase"], now - said["age"], said["limit"])
        if said.get("failed"):
            self._verdict = self._verdict or str(said["failed"])

    def _drop(self, connection: socket.socket) -> None:
        rank = self._ranks.pop(connection, None)
        if rank is not None and (word := self._words.pop(rank, None)) is not None:
            self._verdict = self._verdict or (
                f"Rank {rank} on {word.host} died: its process is gone without a word. Look for the "
                "out-of-memory killer there (`dmesg`)."
            )
        self._selector.unregister(connection)
        del self._pending[connection]
        connection.close()

    def _tell(self, values: dict[str, Any]) -> None:
        line = json.dumps(values).encode() + b"\n"
        for connection in list(self._ranks):
            try:
                connection.sendall(line)
            except OSError:
                self._drop(connection)


class Watch:
    """One rank's watchdog: a thread that says every second what the rank does, and ends it when the run is over.

    Args:
        config: how long things may take.
        tell: called once, from the thread, with the reason when the run ends; it must not wait for other ranks.
    """

    def __init__(self, config: GuardConfig, tell: Callable[[str], None]) -> None:
        self._config, self._tell = config, tell
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._phase, self._since, self._limit = "setting up", time.monotonic(), config.first_step_seconds
        self._warm = False
        self._failed: str | None = None
        self._verdict: str | None = None
        self._known = threading.Event()
        self._leaving = threading.Event()
        self._hub: Hub | None = None
        self._key, self._address = self._meet()
        # Introduced before anything else happens: the hub cannot miss whom it knows.
        try:
            self._line = socket.create_connection(self._address, timeout=config.silence_seconds)
        except OSError as error:
            raise UserError(
                f"Rank 0's port {self._address[1]} at {self._address[0]} cannot be reached from "
                f"{socket.gethostname()} ({error}); open the ports between the hosts of a training."
            ) from error
        self._line.settimeout(BEAT / 4)
        self._say()
        self._thread = threading.Thread(target=self._run, name="headsplat-watch", daemon=True)
        self._thread.start()

    def _meet(self) -> tuple[str, tuple[str, int]]:
        """Starts the hub on rank 0 and tells the others where it is."""
        place: list[Any] = [None]
        if self.rank == 0:
            key = secrets.token_hex(16)
            master = os.environ.get("MASTER_ADDR", "127.0.0.1")
            own = master if master in ("127.0.0.1", "localhost") else ""
            self._hub = Hub(own, key, self.world_size, self._config.silence_seconds)
            place = [(key, (master, self._hub.port))]
        dist.broadcast_object_list(place, src=0)
        return place[0]

    def enter(self, phase: str, limit: float) -> None:
        """Says what this rank begins to do and how many seconds it may take."""
        if not self._warm:
            limit = max(limit, self._config.first_step_seconds)
        self._phase, self._since, self._limit = phase, time.monotonic(), limit

    def warm(self) -> None:
        """Told after the first step: from now on nothing is built or compiled any more, and hangs are shorter."""
        if self._warm:
            return
        self._warm = True
        from datetime import timedelta

        # Ours comes first and names the cause; the process group's own is the net below.
        dist.set_timeout(timedelta(seconds=2 * self._config.step_seconds))

    @contextmanager
    def over(self) -> Iterator[None]:
        """Around the training: tells the others why this rank fails, and finds out why another one did.

        Raises:
            RunOver: the reason that the whole run ends, in place of what it caused here ("connection closed by
                peer"). What is no user's to mend stays as it is on the rank where it happened.
        """
        try:
            yield
        except (SharedFailure, Preempted):
            raise
        except Exception as error:
            from_elsewhere = any(word in str(error) for word in COLLECTIVE_ERRORS)
            if from_elsewhere and self._known.wait(self._config.silence_seconds + 5 * BEAT):
                raise RunOver(self._verdict) from error
            self._failed = str(error) or type(error).__name__
            if self._known.wait(3 * BEAT) and isinstance(error, UserError):
                raise RunOver(self._verdict) from error
            raise
        finally:
            self._leaving.set()
            self._thread.join(3 * BEAT)
            if self._hub is not None:
                self._hub.close()

    def _run(self) -> None:
        heard = time.monotonic()
        rest = b""
        with self._line:
            while not self._leaving.is_set():
                try:
                    self._say()
                    *lines, rest = (rest + self._listen()).split(b"\n")
                except OSError as error:
                    self._end(f"Rank 0 at {self._address[0]} died: its connection is gone ({error}).")
                    return
                for said in map(json.loads, lines):
                    heard = time.monotonic()
                    if said.get("over"):
                        self._end(said["over"])
                        return
                    if said.get("bye"):
                        return
                if time.monotonic() - heard > self._config.silence_seconds:
                    self._end(
                        f"Rank 0 at {self._address[0]} has not been heard of for {time.monotonic() - heard:.0f} s "
                        f"on {socket.gethostname()}: its host is down or the network is cut."
                    )
                    return
                self._leaving.wait(BEAT / 2)
            with suppress(OSError):
                self._say(bye=True)

    def _say(self, bye: bool = False) -> None:
        words = {
            "key": self._key,
            "rank": self.rank,
            "host": socket.gethostname(),
            "phase": self._phase,
            "age": time.monotonic() - self._since,
            "limit": self._limit,
            "failed": self._failed,
            "bye": bye,
        }
        try:
            self._line.sendall(json.dumps(words).encode() + b"\n")
        except TimeoutError:
            return  # the network is full or cut; silence tells

    def _listen(self) -> bytes:
        try:
            heard = self._line.recv(65536)
        except TimeoutError:
            return b""
        if not heard:
            raise ConnectionError("closed")
        return heard

    def _end(self, reason: str) -> None:
        """The run is over. The main thread may be stuck in a collective, so it gets a moment and no more."""
        if self._leaving.is_set():
            return
        self._verdict = reason
        self._known.set()
        if self._leaving.wait(GRACE):
            return
        try:
            self._tell(reason)
        finally:
            os._exit(1)
