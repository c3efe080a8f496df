"""Populations of synthetic people on Ray: one job a person, any number of machines that share the folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from avatars.errors import UserError
from cluster.pool import Event, Job, Report, run_jobs
from cluster.session import ray_session

__all__ = ["make_one", "synthesize_population"]


def synthesize_population(
    out: Path | str,
    *,
    subjects: int | Sequence[int] = 8,
    workers: int | None = None,
    on_event: Callable[[Event], None] | None = None,
    **settings: Any,
) -> list[Path]:
    """`shards.synth.synthesize` with several people at a time; the files are the same, byte for byte.

    May be called again at any time: what is complete is kept. A person whose worker was killed is made again by
    another.

    Args:
        out: folder that receives `s<number>` folders; on several machines on storage that all of them share.
        subjects: how many people, or the numbers of those to make.
        workers: people at a time, a core each; as many as there are cores, of the cluster where `RAY_ADDRESS` names
            one. One (and no cluster) works without Ray.
        on_event: told of what happens to the jobs, in this process.
        settings: as `synthesize` takes them.

    Raises:
        UserError: as `synthesize`, or some people could not be made.
    """
    from shards.synth import synthesize

    count = subjects if isinstance(subjects, int) else len(subjects)
    if workers is not None and not 1 <= workers <= 10_000:
        raise UserError(f"workers is {workers}; it must lie between 1 and 10000")

    def run(jobs: list[dict[str, Any]], advance: Callable[[int], None]) -> None:
        here = min(len(jobs), workers or _cores_here())
        with ray_session(here):
            _run(jobs, advance, min(len(jobs), workers or _cores()), on_event or (lambda event: None))

    alone = min(count, workers or _cores_here()) == 1 and "RAY_ADDRESS" not in os.environ
    return synthesize(out, subjects=subjects, run=None if alone else run, **settings)


def make_one(arguments: dict[str, Any], report: Report) -> None:
    """Makes one person, in an actor or anywhere else; reports "pictures" after each timestep."""
    from shards.synth.capture import make_capture

    if arguments["settings"]["quality"] == "path":
        import drjit

        drjit.set_thread_count(1)  # an actor has one core: several people's pictures are in flight, one each
    made = 0

    def advance(pictures: int) -> None:
        nonlocal made
        made += pictures
        report(pictures=made)

    make_capture(arguments, advance)


def _run(
    jobs: list[dict[str, Any]], advance: Callable[[int], None], slots: int, tell: Callable[[Event], None]
) -> None:
    named = {f"s{job['number']:04d}": job for job in jobs}
    made = dict.fromkeys(named, 0)

    def on_event(event: Event) -> None:
        tell(event)
        if event.kind == "failed" and event.report["error"].startswith("cannot write"):
            raise UserError(event.report["error"])  # nobody else could write either
        known = {"retried": 0, "done": named[event.name]["pictures"]}
        now = known.get(event.kind, event.report.get("pictures", made[event.name]))
        advance(now - made[event.name])
        made[event.name] = now

    outcomes = run_jobs(
        make_one, [Job(name, job) for name, job in named.items()], slots=slots, on_event=on_event
    )
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} people could not be made, the first is {failed[0].name}: {failed[0].error}. "
            "The others are complete; run the same command again."
        )


def _cores_here() -> int:
    """CPUs that this process may use; not every system can tell them from all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cores() -> int:
    """CPUs of the Ray that is connected."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))
