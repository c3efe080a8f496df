"""Result rows: one JSON file per method, checkpoint, subject and protocol, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from avatars.errors import UserError
from eval.hashing import short_hash

__all__ = [
    "TURNTABLE",
    "Row",
    "check_one_protocol",
    "mean_values",
    "protocol_folder",
    "protocol_people",
    "read_row",
    "read_rows",
    "row_folder",
    "write_row",
]

SCHEMA = 1
ROW_FILE = "row.json"
PROTOCOL_FILE = "protocol.json"
TURNTABLE = "turntable.webp"
"""The moving picture beside a row."""


@dataclass(frozen=True)
class Row:
    """What one avatar scored under one protocol.

    Attributes:
        method: name of the method, for example "avat3r".
        checkpoint: name of the checkpoint or fit that made the avatar, for example "step-001000".
        subject: name of the person.
        protocol: name of the protocol.
        protocol_id: its id; rows of different ids are never compared.
        values: metric key to its mean over the pictures, always finite.
        missing: metric key to the sentence that says why there is no number.
        counts: pictures, timesteps, views; "<metric>_left_out" where a metric could not judge some pictures.
        create_seconds: wall time from the input set to the avatar.
        drive_fps: pictures a second at the protocol's size, from an expression to the finished picture.
        pictures: per picture: timestep, camera and the values.
        weights: metric key to {weight file: sha256} of the networks that judged.
        hardware: what the timings were taken on.
        versions: the program's commit, and the packages that the numbers depend on.
        threads: processor threads that torch used.
        create_hardware: machine of `create_seconds` where another process made the avatar.
        variant: what sets these numbers apart from the protocol's others, in a few words; empty for most. An avatar
            with an attribute of this name gives it ("guided: its inputs include tracked views of the person"). Tables
            show such rows in a part of their own and never rank them with the others.
        checkpoint_hash: hash of the files that made the avatar, empty where nobody told it.
        at_a_time: how many rows were measured at the same time, which timings suffer from.
    """

    method: str
    checkpoint: str
    subject: str
    protocol: str
    protocol_id: str
    values: dict[str, float]
    missing: dict[str, str]
    counts: dict[str, int]
    create_seconds: float
    drive_fps: float
    pictures: list[dict[str, Any]] = field(repr=False)
    weights: dict[str, dict[str, str]] = field(repr=False)
    hardware: str = field(repr=False)
    versions: dict[str, str] = field(repr=False)
    threads: int
    create_hardware: str | None = field(default=None, repr=False)
    variant: str = ""
    checkpoint_hash: str = field(default="", repr=False)
    at_a_time: int = 1

    @property
    def key(self) -> str:
        """Short hash of method, checkpoint, subject and protocol id: the row's identity."""
        return short_hash([self.method, self.checkpoint, self.subject, self.protocol_id])

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON, with the schema's number."""
        return {"schema": SCHEMA, **asdict(self)}


def row_folder(
    out: Path, method: str, checkpoint: str, subject: str, protocol: str, protocol_id: str
) -> Path:
    """Where a row and its pictures live under `out`: `<protocol>-<id>/<method>@<checkpoint>/<subject>`."""
    run = f"{_file_name(method)}@{_file_name(checkpoint)}"
    return protocol_folder(out, protocol, protocol_id) / run / _file_name(subject)


def protocol_folder(out: Path, protocol: str, protocol_id: str) -> Path:
    """Where everything of one protocol lives under `out`."""
    return out / f"{_file_name(protocol)}-{protocol_id}"


def protocol_people(out: Path, row: Row) -> int:
    """How many subjects the protocol of a row under `out` has; 0 where its file is gone."""
    path = protocol_folder(out, row.protocol, row.protocol_id) / PROTOCOL_FILE
    try:
        return len(json.loads(path.read_text(encoding="utf-8"))["subjects"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def write_row(row: Row, out: Path) -> Path:
    """Writes `row.json` into the row's folder under `out`; a reader sees the old row or the new one, whole.

    Raises:
        UserError: a value is not finite, or the file cannot be written.
    """
    for key, value in {
        **row.values,
        "create_seconds": row.create_seconds,
        "drive_fps": row.drive_fps,
    }.items():
        if not math.isfinite(value):
            raise UserError(
                f"The result of {row.method} {row.checkpoint} on {row.subject} has {key} = {value}; "
                "a row holds finite numbers, and a metric without one belongs in `missing` with its reason."
            )
    folder = row_folder(out, row.method, row.checkpoint, row.subject, row.protocol, row.protocol_id)
    path = folder / ROW_FILE
    temporary = folder / f".{ROW_FILE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(row.as_dict(), file, indent=1, sort_keys=True, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error.strerror}). Free space or choose another folder."
        ) from error
    return path


def read_row(path: Path) -> Row:
    """Reads one row.

    Raises:
        UserError: the file is cut short, of another schema, or lacks a field.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a whole result row ({error}). Delete it and evaluate again."
        ) from error
    schema = values.pop("schema", None) if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema!r}; this version reads {SCHEMA}. Evaluate again.")
    try:
        return Row(**values)
    except TypeError as error:
        raise UserError(
            f"{path} does not have the fields of a result row ({error}). Evaluate again."
        ) from error


def read_rows(out: Path) -> list[Row]:
    """All rows below a folder, ordered by protocol, method, checkpoint and subject.

    Raises:
        UserError: no folder, no row in it, or a row that cannot be read.
    """
    if not out.is_dir():
        raise UserError(f"{out} is not a folder of results. Run `headsplat eval` first.")
    rows = [read_row(path) for path in sorted(out.rglob(ROW_FILE))]
    if not rows:
        raise UserError(f"{out} holds no result rows. Run `headsplat eval` first.")
    return sorted(
        rows, key=lambda row: (row.protocol, row.protocol_id, row.method, row.checkpoint, row.subject)
    )


def check_one_protocol(rows: list[Row]) -> str:
    """The protocol id that all rows share.

    Raises:
        UserError: no rows, or rows of several protocols.
    """
    found = sorted({f"{row.protocol} {row.protocol_id}" for row in rows})
    if not found:
        raise UserError("There are no result rows to compare. Run `headsplat eval` first.")
    if len(found) > 1:
        raise UserError(
            f"These rows were measured under {len(found)} protocols ({', '.join(found)}); their numbers do "
            "not compare. Make one table a protocol."
        )
    for key in {key for row in rows for key in row.weights}:
        networks = {short_hash(row.weights[key]) for row in rows if key in row.weights}
        if len(networks) > 1:
            raise UserError(
                f"These rows were judged by {len(networks)} different networks for {key}; their numbers do "
                "not compare. Evaluate them again with one set of weights."
            )
    return rows[0].protocol_id


def mean_values(rows: list[Row], key: str) -> float | None:
    """Mean of a metric over subjects, or None where one has no number: a mean over fewer would flatter."""
    values = [row.values[key] for row in rows if key in row.values]
    return sum(values) / len(values) if values and len(values) == len(rows) else None


def _file_name(text: str) -> str:
    """`text` as a file name; where characters had to go, a hash keeps two names apart."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:80]
    return safe if safe == text else f"{safe or 'name'}-{short_hash(text, 6)}"
