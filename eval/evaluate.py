"""Measures avatars of held-out subjects under one protocol: the same code for every method and baseline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, runtime_checkable
from typing import Protocol as Interface

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.inputs import InputSet
from avatars.method import Avatar, render
from avatars.rasterize import Rendering
from eval.meter import Meter, Score
from eval.metrics import Pictures
from eval.movies import write_turntable
from eval.protocol import (
    Protocol,
    choose_timesteps,
    choose_views,
    data_hash,
    frontal_first,
    write_protocol,
)
from eval.provenance import hardware, versions
from eval.rows import PROTOCOL_FILE, TURNTABLE, Row, protocol_folder, row_folder, write_row
from eval.sheets import SheetColumn, contact_sheet, error_map, save_picture

if TYPE_CHECKING:
    from shards import ShardSet
    from shards.reading import Target

__all__ = [
    "Driven",
    "Made",
    "Measured",
    "check_data",
    "evaluate",
    "evaluate_subject",
    "measure_subject",
    "seconds_a_picture",
    "told",
]

PICTURES_KEPT = 4
WARM_UP = 2
FEWEST_TIMED = 5
MOST_TIMED = 30
TIMED_SECONDS = 1.0


@runtime_checkable
class Driven(Interface):
    """An avatar that makes its pictures itself instead of giving Gaussians to rasterize."""

    expression_kind: str

    def render(self, expression: Tensor, cameras: Cameras, size: tuple[int, int]) -> Rendering:
        """Pictures of one expression (E,) over black, from C cameras."""
        ...


@dataclass(frozen=True)
class Made:
    """An avatar that was made earlier, with what its making took there.

    Attributes:
        avatar: the avatar.
        seconds: wall time from the input set to the avatar.
        hardware: machine that made it, None for this one.
    """

    avatar: Avatar | Driven
    seconds: float
    hardware: str | None = None


@dataclass(frozen=True)
class Measured:
    """What one avatar scored on one subject's targets.

    Attributes:
        made: the avatar and the seconds that it took.
        inputs: what it was made from.
        score: means over the pictures.
        pictures: per picture: timestep, camera and the values.
        columns: the kept pictures, by rank; the first is the most frontal.
        timesteps: number of target timesteps.
        views: number of target cameras.
        expression: (E,) of the first target, for timing.
        frontal: the most frontal camera of the first target, for timing.
    """

    made: Made
    inputs: InputSet
    score: Score
    pictures: list[dict[str, Any]]
    columns: dict[int, SheetColumn]
    timesteps: int
    views: int
    expression: Tensor
    frontal: Cameras


def evaluate(
    method: str,
    create: Callable[[InputSet], Avatar | Driven | Made],
    shards: ShardSet,
    protocol: Protocol,
    *,
    checkpoint: str,
    out: Path,
    subjects: Sequence[str] | None = None,
    device: str = "cpu",
    batch: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """One row a subject: makes the avatar, renders every target, measures, times, keeps a few pictures.

    Under `out` each subject gets `<protocol>-<id>/<method>@<checkpoint>/<subject>/` with `sheet.png`, the
    kept pictures and `row.json`, which is written last; `protocol.json` lies at the top.

    Args:
        method: the method's name in rows and tables.
        create: makes the avatar of an input set; the random seed is the protocol's each time. Where the
            avatar was made earlier by another process, it returns `Made` with the seconds that this took.
        shards: the protocol's split.
        protocol: how to measure.
        checkpoint: name of the checkpoint or fit.
        out: folder of results.
        subjects: a part of the protocol's subjects, all by default.
        device: where avatars are made and rendered and networks judge.
        batch: pictures that are rendered and measured at once, 0 for all views of a timestep. Changes memory
            and time, never a number.
        progress: called with a short sentence as each subject starts and ends.

    Raises:
        UserError: the shards are not the protocol's, a subject lacks what the protocol asks for, or a method
            rendered pictures of another size or values that are not finite.
    """
    check_data(shards, protocol)
    chosen = list(protocol.subjects if subjects is None else subjects)
    unknown = sorted(set(chosen) - set(protocol.subjects))
    if unknown:
        raise UserError(
            f"The protocol {protocol.name} {protocol.id} does not know the subjects {', '.join(unknown)}."
        )
    meter = Meter(protocol.metrics, device)
    write_protocol(protocol, protocol_folder(out, protocol.name, protocol.id) / PROTOCOL_FILE)
    rows = []
    for number, subject in enumerate(chosen, start=1):
        if progress is not None:
            progress(f"{method} {checkpoint}: subject {subject} ({number} of {len(chosen)})")
        row = evaluate_subject(
            method,
            create,
            shards,
            subject,
            protocol,
            meter,
            checkpoint=checkpoint,
            out=out,
            device=device,
            batch=batch,
        )
        rows.append(row)
        if progress is not None:
            progress(f"{method} {checkpoint}: {subject}: {told(row)}")
    return rows


def evaluate_subject(
    method: str,
    create: Callable[[InputSet], Avatar | Driven | Made],
    shards: ShardSet,
    subject: str,
    protocol: Protocol,
    meter: Meter,
    *,
    checkpoint: str,
    out: Path,
    checkpoint_hash: str = "",
    at_a_time: int = 1,
    device: str = "cpu",
    batch: int = 0,
) -> Row:
    """One subject's row with its pictures, written under `out`; the row is last and makes it finished.

    Takes what `evaluate` takes, of one subject, and the protocol's meter, whose networks are loaded. `checkpoint_hash`
    is over the files that make this subject's avatar; `at_a_time` says how many rows are measured meanwhile. Raises
    what `evaluate` raises.
    """
    measured = measure_subject(method, create, shards, subject, protocol, meter, device, batch)
    row = replace(
        _row(measured, method, checkpoint, subject, protocol, meter),
        checkpoint_hash=checkpoint_hash,
        at_a_time=at_a_time,
    )
    folder = row_folder(out, method, checkpoint, subject, protocol.name, protocol.id)
    _save_pictures(folder, row, measured.inputs, measured.columns)
    if not isinstance(measured.made.avatar, Driven):
        write_turntable(measured.made.avatar, measured.expression, folder / TURNTABLE)
    write_row(row, out)
    return row


def told(row: Row) -> str:
    """A row's numbers on one line: "psnr 25.31, ssim 0.912"."""
    return ", ".join(f"{key} {value:.4g}" for key, value in row.values.items()) or "no number"


def seconds_a_picture(
    avatar: Avatar | Driven, expression: Tensor, camera: Cameras, size: tuple[int, int]
) -> float:
    """Median wall time from an expression to one finished picture, after warming up.

    Args:
        avatar: what is driven.
        expression: (E,).
        camera: one camera.
        size: (height, width).
    """
    times: list[float] = []
    for run in range(WARM_UP + MOST_TIMED):
        start = time.perf_counter()
        picture = _render(avatar, expression, camera, size)
        _wait_for(picture)
        if run >= WARM_UP:
            times.append(time.perf_counter() - start)
            if len(times) >= FEWEST_TIMED and sum(times) >= TIMED_SECONDS:
                break
    return statistics.median(times)


def check_data(shards: ShardSet, protocol: Protocol) -> None:
    """Holds the shards to the protocol.

    Raises:
        UserError: they are another split, or hold other bytes.
    """
    found = data_hash(shards)
    if shards.split != protocol.split or found != protocol.data:
        raise UserError(
            f"These shards (split {shards.split!r}, data {found}) are not what the protocol "
            f"{protocol.name} {protocol.id} measures (split {protocol.split!r}, data {protocol.data}). "
            "Make a protocol for them."
        )


def measure_subject(
    method: str,
    create: Callable[[InputSet], Avatar | Driven | Made],
    shards: ShardSet,
    subject: str,
    protocol: Protocol,
    meter: Meter,
    device: str = "cpu",
    batch: int = 0,
) -> Measured:
    """Makes one subject's avatar, renders every target and measures it; the arguments are those of `evaluate`.

    Raises:
        UserError: as `evaluate`.
    """
    data = shards.read(subject)
    if protocol.input_set >= len(data.input_sets):
        raise UserError(
            f"{subject} has {len(data.input_sets)} input sets; the protocol {protocol.name} asks for number "
            f"{protocol.input_set}. Pack more input sets."
        )
    inputs = data.input_sets[protocol.input_set].to(device)
    if protocol.inputs and len(inputs.images) != protocol.inputs:
        raise UserError(
            f"The input sets of {subject} have {len(inputs.images)} pictures; the protocol {protocol.name} makes "
            f"avatars from {protocol.inputs}. Pack with --input-views {protocol.inputs}, or use another protocol."
        )
    made = _create(create, inputs, protocol.seed, device)
    avatar = made.avatar
    if avatar.expression_kind != inputs.expression_kind:
        raise UserError(
            f"{method} is driven by {avatar.expression_kind} codes and {subject} has "
            f"{inputs.expression_kind}. Evaluate it on captures of its own kind."
        )

    used = inputs.provenance
    timesteps = choose_timesteps(
        [target.timestep for target in data.targets], used["timesteps"], protocol.timesteps, protocol.last
    )
    first = data.targets[timesteps[0]]
    chosen = _choose_cameras(first, used["camera_ids"], protocol, subject)
    camera_ids = [first.camera_ids[view] for view in chosen]

    kept = _pictures_to_keep(len(timesteps), frontal_first(first.cameras[chosen]))
    measured: list[dict[str, float | None]] = []
    pictures: list[dict[str, Any]] = []
    columns: dict[int, SheetColumn] = {}  # by rank among the kept pictures
    for position, timestep in enumerate(timesteps):
        target = data.targets[timestep]
        views = [target.camera_ids.index(name) for name in camera_ids if name in target.camera_ids]
        for some in _batches(views, batch):
            truth, prediction, values = _measure_views(
                avatar, target, some, protocol, meter, f"{method} for {target.id}", device
            )
            measured += values
            for index, view in enumerate(some):
                camera = target.camera_ids[view]
                entry: dict[str, Any] = {"timestep": target.timestep, "camera": camera, **values[index]}
                place = (position, camera_ids.index(camera))
                if place in kept:
                    rank = kept.index(place)
                    entry["file"] = f"{rank:02d}"
                    label = f"t {target.timestep} · {camera}"
                    psnr = values[index].get("psnr")
                    columns[rank] = SheetColumn(truth.tensor[index], prediction.tensor[index], label, psnr)
                pictures.append(entry)
    frontal = first.cameras[frontal_first(first.cameras)[0]].to(device=device)
    return Measured(
        made=made,
        inputs=inputs,
        score=meter.score(measured),
        pictures=pictures,
        columns=columns,
        timesteps=len(timesteps),
        views=len(chosen),
        expression=first.expression.to(device),
        frontal=frontal,
    )


def _choose_cameras(target: Target, used: Sequence[str], protocol: Protocol, subject: str) -> list[int]:
    """Indices of the target cameras.

    Raises:
        UserError: a fixed camera is not there or was an input, or none is left.
    """
    taken = set() if protocol.input_cameras else set(used)
    for name in protocol.cameras:
        if name not in target.camera_ids or name in taken:
            state = "was an input of" if name in taken else "is not among the cameras of"
            raise UserError(
                f"The protocol {protocol.name} measures camera {name}, which {state} {subject}. Pack other input "
                "sets, or all cameras."
            )
    if protocol.cameras:
        return sorted(target.camera_ids.index(name) for name in protocol.cameras)
    indices = [index for index, name in enumerate(target.camera_ids) if name in taken]
    return choose_views(target.cameras, indices, protocol.views)


def _batches(views: list[int], batch: int) -> list[list[int]]:
    size = batch if batch > 0 else len(views)
    return [views[start : start + size] for start in range(0, len(views), size)]


def _measure_views(
    avatar: Avatar | Driven,
    target: Target,
    views: list[int],
    protocol: Protocol,
    meter: Meter,
    name: str,
    device: str,
) -> tuple[Pictures, Pictures, list[dict[str, float | None]]]:
    """Targets, predictions and values of some views of one timestep."""
    background = torch.tensor(protocol.background)
    masks = target.masks(views)
    truth = Pictures(_over(target.images(views), masks, background), f"target {target.id}")
    if tuple(truth.tensor.shape[-2:]) != tuple(protocol.size):
        raise UserError(
            f"The target {target.id} is {tuple(truth.tensor.shape[-2:])} pixels; the protocol "
            f"{protocol.name} measures at {tuple(protocol.size)}."
        )
    cameras = target.cameras[views].to(device=device)
    rendering = _render(avatar, target.expression.to(device), cameras, protocol.size, background)
    prediction = Pictures.rendered(rendering.image.cpu(), f"prediction of {name}")
    return truth, prediction, meter.measure(prediction, truth, masks)


def _row(
    measured: Measured,
    method: str,
    checkpoint: str,
    subject: str,
    protocol: Protocol,
    meter: Meter,
) -> Row:
    """The row of a measured subject; takes the driving rate on the way."""
    seconds = seconds_a_picture(measured.made.avatar, measured.expression, measured.frontal, protocol.size)
    return Row(
        method=method,
        checkpoint=checkpoint,
        subject=subject,
        protocol=protocol.name,
        protocol_id=protocol.id,
        values=measured.score.values,
        missing=measured.score.missing,
        counts={
            "pictures": len(measured.pictures),
            "timesteps": measured.timesteps,
            "views": measured.views,
            **{f"{key}_left_out": count for key, count in measured.score.left_out.items()},
        },
        create_seconds=measured.made.seconds,
        drive_fps=1 / seconds,
        pictures=measured.pictures,
        weights=meter.weights,
        hardware=hardware(),
        versions=versions(),
        threads=torch.get_num_threads(),
        create_hardware=measured.made.hardware,
        variant=getattr(measured.made.avatar, "variant", ""),
    )


def _create(
    create: Callable[[InputSet], Avatar | Driven | Made], inputs: InputSet, seed: int, device: str
) -> Made:
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        start = time.perf_counter()
        avatar = create(inputs)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return avatar if isinstance(avatar, Made) else Made(avatar, seconds)


@torch.no_grad()
def _render(
    avatar: Avatar | Driven,
    expression: Tensor,
    cameras: Cameras,
    size: tuple[int, int],
    background: Tensor | None = None,
) -> Rendering:
    """An avatar's own pictures where it makes them, else its Gaussians rasterized, over `background`."""
    if not isinstance(avatar, Driven):
        if background is not None:
            background = background.to(expression.device)
        return render(avatar, expression, cameras, size, background)
    rendering = avatar.render(expression, cameras, size)
    if background is None or not bool(background.any()):
        return rendering
    behind = (1 - rendering.alpha) * background.to(rendering.image)[:, None, None]
    return replace(rendering, image=rendering.image + behind)


def _wait_for(rendering: Rendering) -> None:
    if rendering.image.is_cuda:
        torch.cuda.synchronize(rendering.image.device)


def _over(images: Tensor, masks: Tensor, background: Tensor) -> Tensor:
    """Pictures with black behind them, (v, 3, H, W), over another colour."""
    return (
        (images + (1 - masks) * background[:, None, None]).clamp(0, 1) if bool(background.any()) else images
    )


def _pictures_to_keep(timesteps: int, frontal: list[int]) -> list[tuple[int, int]]:
    """(timestep, view) positions for the sheets: timesteps at even stride, the most frontal views in turn.

    The first is the most frontal of all.

    The rule knows nothing of the method, so the sheets of all methods show the same pictures.

    Args:
        timesteps: number of target timesteps.
        frontal: positions of the target views, the most frontal first.
    """
    count = min(PICTURES_KEPT, timesteps * len(frontal))
    if timesteps < count:
        return [(i % timesteps, frontal[i // timesteps]) for i in range(count)]
    return [(i * timesteps // count, frontal[i % len(frontal)]) for i in range(count)]


def _save_pictures(folder: Path, row: Row, inputs: InputSet, columns: dict[int, SheetColumn]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(inputs.images):
        save_picture(image, folder / f"input-{index:02d}.png")
    for index, column in columns.items():
        save_picture(column.target, folder / f"{index:02d}-target.png")
        save_picture(column.prediction, folder / f"{index:02d}-prediction.png")
        error_map(column.prediction, column.target).save(folder / f"{index:02d}-error.png")
    used = inputs.provenance
    labels = [f"t {t} · {c}" for t, c in zip(used["timesteps"], used["camera_ids"], strict=True)]
    title = " · ".join(part for part in (row.method, row.checkpoint, row.subject) if part != "none")
    note = f"{row.protocol} {row.protocol_id}"
    shown = [columns[rank] for rank in sorted(columns)]
    contact_sheet(list(inputs.images), labels, shown, title=title, note=note).save(folder / "sheet.png")
