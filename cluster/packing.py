"""Packing on Ray: shards of many captures at once, with the bytes that one process gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from avatars.errors import UserError
from cluster.pool import Event, Job, Report, run_jobs
from cluster.session import ray_session
from shards import Capture, Manifest, pack, read_capture
from shards.manifest import PackSettings
from shards.packing import Receipt, describe, pack_shard

__all__ = ["pack_folders"]


def pack_folders(
    folders: Sequence[Path],
    out: str | Path,
    *,
    heldout: int | Sequence[str],
    workers: int = 1,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Manifest:
    """Packs captures like `shards.pack`, on Ray when there is more than one worker.

    A job is one shard. A worker that dies, with its machine or without, is replaced and its shard packed
    anew; what a killed command has finished is kept by the next one. On several machines the captures and
    `out` must be on storage that all of them share.

    Args:
        folders: captures.
        out: folder for the shards.
        heldout: names of the subjects to hold out from training, or how many: the last by name.
        workers: shards packed at the same time, each by one process with one CPU. 1 packs in this process
            without Ray.
        progress: called with a line of text after each shard.
        settings: what else `shards.pack` takes.

    Returns:
        The manifest, as saved.

    Raises:
        UserError: what `shards.pack` refuses, or a shard that could not be packed.
    """
    if workers < 1:
        raise UserError(f"{workers} workers pack nothing. Give 1 or more.")
    captures = [read_capture(folder) for folder in folders]
    subjects = sorted(capture.subject for capture in captures)
    if isinstance(heldout, int):
        if not 0 <= heldout <= len(subjects):
            raise UserError(
                f"heldout is {heldout} of {len(subjects)} subjects; give a number from 0 to {len(subjects)}."
            )
        heldout = subjects[len(subjects) - heldout :]
    if workers == 1:
        return pack(captures, out, heldout=heldout, progress=progress, **settings)
    places = {
        id(capture): str(Path(folder).resolve()) for capture, folder in zip(captures, folders, strict=True)
    }

    def on_ray(asked: list[tuple[Capture, int]], out: Path, packing: PackSettings) -> list[Receipt]:
        common = {"out": str(out.resolve()), "settings": dataclasses.asdict(packing)}
        jobs = [
            Job(f"{c.subject}-{number:04d}", {**common, "capture": places[id(c)], "number": number})
            for c, number in asked
        ]
        done = 0

        def tell(event: Event) -> None:
            nonlocal done
            done += event.kind == "done"
            if progress is not None and event.kind in ("done", "failed", "retried"):
                why = f": {event.report['error']}" if "error" in event.report else ""
                progress(f"{done}/{len(jobs)} {event.name} {event.kind}{why}")

        with ray_session(min(workers, len(jobs))):
            outcomes = run_jobs(_pack_one, jobs, slots=workers, on_event=tell)
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if failed:
            raise UserError(
                f"{len(failed)} of {len(jobs)} shards could not be packed, {failed[0].name} because:"
                f" {failed[0].error} Run the same command again; finished shards are kept."
            )
        return [outcome.value for outcome in outcomes]

    return pack(captures, out, heldout=heldout, pack_shards=on_ray, **settings)


def _pack_one(arguments: dict[str, Any], report: Report) -> Receipt:
    """One shard, in an actor."""
    try:
        receipt = pack_shard(
            _capture(arguments["capture"]),
            arguments["number"],
            Path(arguments["out"]),
            PackSettings(**arguments["settings"]),
            threads=1,
        )
    except OSError as error:
        raise UserError(
            f"{arguments['out']} cannot be written ({error.strerror or error}). Make space or give another folder."
        ) from None
    report(packed=describe(receipt))
    return receipt


@lru_cache(maxsize=1)
def _capture(folder: str) -> Capture:
    """The capture that this actor works on; a subject's shards follow each other."""
    return read_capture(folder)
