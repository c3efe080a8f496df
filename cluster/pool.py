"""A pool of Ray actors that maps a function over jobs and survives what happens to actors and nodes.

The function knows nothing of Ray: it takes a job's arguments and a callable that reports progress. It must be
safe to run again from the start, or from wherever it left something on disk, because a job whose actor died
is retried.
"""

from __future__ import annotations

import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from avatars.errors import UserError

__all__ = ["Event", "Job", "JobFunction", "Outcome", "Report", "out_of_memory", "run_jobs"]

Report = Callable[..., None]
"""Called by a job with keyword arguments (plain values) that replace its last report."""
JobFunction = Callable[[dict[str, Any], Report], Any]

POLL_SECONDS = 0.5
"""Between two looks at progress."""


@dataclass(frozen=True)
class Job:
    """One thing to do."""

    name: str
    """Unique among the jobs; a subject, for fits."""
    arguments: dict[str, Any]
    """What the function gets."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job: either a value or an error."""

    name: str
    value: Any = None
    error: str | None = None
    """A sentence, None on success."""
    attempts: int = 1
    seconds: float = 0.0
    """Wall time of the last attempt."""


@dataclass(frozen=True)
class Event:
    """Something to show while the pool runs."""

    kind: Literal["started", "progress", "retried", "done", "failed"]
    name: str
    report: dict[str, Any] = field(default_factory=dict)
    """The job's last report; with "retried" and "failed", the `error`. A report carries the actor's `pid`."""
    value: Any = None
    """With "done", what the function returned."""


class HeadsplatActor:
    """Runs in a process of its own; two threads, so that progress can be asked for during a job. Ray shows its name."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.report: dict[str, Any] = {}

    def ready(self) -> int:
        """Answers once the process is up."""
        return os.getpid()

    def run(self, function: JobFunction, job: Job) -> tuple[str, Any]:
        """("value", result), ("user", sentence) or ("error", sentence); prints to the log that Ray keeps."""
        print(f"{job.name}: begins", flush=True)
        started = time.perf_counter()
        kind, answer = self._run(function, job.arguments)
        ending = "done" if kind == "value" else answer
        print(f"{job.name}: {ending} ({time.perf_counter() - started:.1f} s)", flush=True)
        return kind, answer

    def _run(self, function: JobFunction, arguments: dict[str, Any]) -> tuple[str, Any]:
        import torch

        torch.set_num_threads(self.threads)
        self.report = {"pid": os.getpid()}

        def report(**values: Any) -> None:
            self.report = {"pid": os.getpid(), **values}

        try:
            return "value", function(arguments, report)
        except UserError as error:
            return "user", str(error)
        except Exception as error:
            if out_of_memory(error):
                return "error", "it ran out of memory; give each actor more, or run fewer at a time"
            where = traceback.extract_tb(error.__traceback__)[-1]
            return "error", f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"

    def progress(self) -> dict[str, Any]:
        """The job's last report."""
        return self.report


@dataclass
class _Slot:
    """An actor as the driver sees it: starting (no job), or at work."""

    actor: Any
    waits_for: Any  # the reference that ends the present state
    job: Job | None = None
    since: float = 0.0
    asked: Any = None  # outstanding question for progress


def run_jobs(
    function: JobFunction,
    jobs: Sequence[Job],
    *,
    slots: int,
    cpus: float = 1,
    gpus: float = 0,
    memory: float | None = None,
    retries: int = 2,
    patience: float = 600,
    on_event: Callable[[Event], None] | None = None,
) -> list[Outcome]:
    """Runs every job on one of `slots` actors; call it inside `ray_session`.

    A job that raises `UserError` has failed: trying again would not mend it. Any other error, and the death
    of an actor (killed, out of memory, its node gone), puts the job back at the end of the queue, at most
    `retries` times.

    Args:
        function: a function of a module that the actors can import.
        jobs: what to run; the names are unique.
        slots: actors at work at the same time.
        cpus: CPUs of an actor, which are also its threads.
        gpus: GPUs of an actor; fractions share one. With 0 the actor sees no GPU.
        memory: bytes that Ray sets aside for an actor, None for no reservation.
        retries: how often a job is tried again.
        patience: seconds that the cluster may take to give the first actor, or a new one when none is left.
        on_event: told of everything that happens, in this thread.

    Returns:
        One outcome a job, in the order of `jobs`.

    Raises:
        UserError: the cluster gives no actor of this size in time.
    """
    import ray

    tell = on_event or (lambda event: None)
    outcomes: dict[str, Outcome] = {}
    attempts = dict.fromkeys((job.name for job in jobs), 0)
    if len(attempts) != len(jobs):
        raise ValueError("two jobs have the same name")
    queue = deque(jobs)
    pool: list[_Slot] = []
    last_sign = time.monotonic()

    def start() -> _Slot:
        environment = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
        options: dict[str, Any] = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_concurrency": 2,
            "max_restarts": 0,  # we start a fresh actor ourselves and know which job it had
            "runtime_env": {"env_vars": environment} if environment else None,
        }
        if memory is not None:
            options["memory"] = memory
        actor = ray.remote(HeadsplatActor).options(**options).remote(max(1, int(cpus)))
        return _Slot(actor, actor.ready.remote())

    def retire(slot: _Slot) -> None:
        """Ends an actor, dead or alive; one that is only forgotten may keep its CPUs."""
        pool.remove(slot)
        ray.kill(slot.actor)

    def give(slot: _Slot) -> None:
        """The next job for a free actor, or its end."""
        if not queue:
            retire(slot)
            return
        slot.job = queue.popleft()
        attempts[slot.job.name] += 1
        # Under this name Ray's dashboard lists it, with its state, its time and its log.
        slot.waits_for = slot.actor.run.options(name=slot.job.name).remote(function, slot.job)
        slot.since = time.monotonic()
        slot.asked = None
        tell(Event("started", slot.job.name))

    def settle(
        job: Job, seconds: float, value: Any = None, error: str | None = None, final: bool = True
    ) -> None:
        tries = attempts[job.name]
        if error is not None and not final and tries <= retries:
            queue.append(job)
            tell(Event("retried", job.name, {"error": error}))
            return
        outcomes[job.name] = Outcome(job.name, value, error, tries, seconds)
        if error is None:
            tell(Event("done", job.name, value=value))
        else:
            tell(Event("failed", job.name, {"error": error}))

    try:
        while len(outcomes) < len(jobs):
            while len(pool) < min(slots, len(queue) + sum(slot.job is not None for slot in pool)):
                pool.append(start())
            ready, _ = ray.wait([slot.waits_for for slot in pool], num_returns=1, timeout=POLL_SECONDS)
            for slot in [slot for slot in pool if slot.waits_for in ready]:
                job, slot.job = slot.job, None
                seconds = time.monotonic() - slot.since
                last_sign = time.monotonic()
                try:
                    answer = ray.get(slot.waits_for)
                except ray.exceptions.RayError as error:
                    retire(slot)
                    if job is not None:
                        settle(job, seconds, error=_sentence(error), final=False)
                    continue
                if job is None:
                    give(slot)
                    continue
                kind, value = answer
                if kind == "value":
                    settle(job, seconds, value=value)
                else:
                    settle(job, seconds, error=value, final=kind == "user")
                if kind == "error":  # the process may be in any state: a fresh one for the next job
                    retire(slot)
                else:
                    give(slot)
            working = [slot for slot in pool if slot.job is not None]
            _ask_progress(working, tell)
            if working:
                last_sign = time.monotonic()
            elif pool and time.monotonic() - last_sign > patience:
                raise UserError(
                    f"Ray gave no actor with {cpus:g} CPUs and {gpus:g} GPUs within {patience:.0f} seconds; "
                    "the cluster "
                    f"has {_resources(ray.cluster_resources())}. Ask for less, or wait until nodes have "
                    "joined."
                )
    finally:
        for slot in pool:
            ray.kill(slot.actor)
    return [outcomes[job.name] for job in jobs]


def _ask_progress(working: list[_Slot], tell: Callable[[Event], None]) -> None:
    """Collects answers that are there and asks again; never waits."""
    import ray

    for slot in working:
        if slot.asked is None:
            slot.asked = slot.actor.progress.remote()
            continue
        answered, _ = ray.wait([slot.asked], timeout=0)
        if not answered:
            continue
        try:
            report = ray.get(slot.asked)
        except ray.exceptions.RayError:
            continue  # the job's own reference tells what happened to the actor
        slot.asked = None
        if report and slot.job is not None:
            tell(Event("progress", slot.job.name, report))


def out_of_memory(error: Exception) -> bool:
    """Python, a GPU, and PyTorch on a CPU each have their own way to say it."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _sentence(error: Exception) -> str:
    """What happened to an actor, without Ray's pages of advice."""
    import ray

    text = str(error).lower()  # its advice names memory and nodes whatever has happened
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in text:
        return "its process was stopped because the machine ran out of memory"
    if isinstance(error, ray.exceptions.NodeDiedError) or "its node has died" in text:
        return "its node was lost"
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process died: it was killed, as the kernel does when memory ends, or it crashed"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _resources(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
