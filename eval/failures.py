"""Subjects that a method failed on: a line each beside the rows, so that a table cannot hide them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from avatars.errors import UserError
from avatars.files import write_whole

__all__ = ["Failure", "note_failures", "read_failures"]

NAME = "failures.json"


@dataclass(frozen=True)
class Failure:
    """One avatar that was not made or not measured.

    Attributes:
        method: name of the method.
        subject: name of the person.
        reason: a sentence.
        checkpoint: name of the checkpoint that was to be measured; empty for a fit that made none.
        protocol: name and id of the protocol; empty for a fit.
    """

    method: str
    subject: str
    reason: str
    checkpoint: str = ""
    protocol: str = ""


def note_failures(
    results: Path,
    method: str,
    outcomes: Mapping[str, str | None],
    *,
    checkpoint: str = "",
    protocol: str = "",
) -> None:
    """Takes down what became of some of a method's subjects; what is known of others stays.

    Args:
        results: folder of results.
        method: name of the method.
        outcomes: subject to reason, None for one that went well.
        checkpoint: what was measured, for failures of an evaluation.
        protocol: under which protocol.
    """
    what = (method, checkpoint, protocol)
    kept = [
        f
        for f in read_failures(results)
        if (f.method, f.checkpoint, f.protocol) != what or f.subject not in outcomes
    ]
    new = [
        Failure(method, subject, reason, checkpoint, protocol)
        for subject, reason in sorted(outcomes.items())
        if reason
    ]
    if kept or new:
        write_whole(results / NAME, json.dumps([asdict(f) for f in kept + new], indent=1) + "\n")
    else:
        (results / NAME).unlink(missing_ok=True)


def read_failures(results: Path) -> list[Failure]:
    """All failures that are known under a folder of results.

    Raises:
        UserError: the file is damaged.
    """
    path = results / NAME
    if not path.is_file():
        return []
    try:
        return [Failure(**failure) for failure in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Delete it and run the fits and evaluations again."
        ) from error
