"""Writing synthetic captures: the layout that the shard packer reads, one job a person."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError
from avatars.head import ParametricHead
from shards.synth.dome import Rig, rig
from shards.synth.expressions import random_expression, smooth_sequence
from shards.synth.render import Picture, render
from shards.synth.subject import Subject, draw_subject, pose
from shards.synth.traced import TracedPerson

__all__ = ["DEPTH_UNIT", "SCHEMA", "Runner", "make_capture", "synthesize", "write_capture"]

Runner = Callable[[list[dict[str, Any]], Callable[[int], None]], None]
"""Runs `make_capture` on every job and tells the second argument how many pictures there are more."""

SCHEMA = 1
GENERATOR = (
    2  # counts up when people, light or cameras of a seed change: captures of two generators do not mix
)
LAYOUT = "headsplat-synthetic"
DEPTH_UNIT = 6.25e-5  # metres a step of the 16-bit depth pictures: 4 m at most
MOTIONS = ("random", "smooth")
QUALITIES = ("fast", "path")
PATHS = 64  # a pixel, in the path-traced quality


def synthesize(
    out: Path | str,
    *,
    subjects: int | Sequence[int] = 8,
    timesteps: int = 5,
    views: int = 80,
    size: int = 128,
    seed: int = 0,
    rig_name: str = "dome",
    motion: str = "random",
    quality: str = "fast",
    tracking: Sequence[str] = (),
    progress: bool | Callable[[int, int], None] = True,
    run: Runner | None = None,
) -> list[Path]:
    """Write synthetic captures, one folder a subject, and return the folders.

    A capture that is complete (it has its `capture.json`, written last) and was asked for with the same settings is
    kept; an incomplete one is made again. Pictures depend only on the seed, not on who draws them.

    Args:
        out: folder that receives `s<number>` folders.
        subjects: how many people, or the numbers of those to make.
        timesteps: instants a person; the first is close to neutral.
        views: cameras (80 on the dome, up to 16 on the `nersemble` rig).
        size: height and width of the pictures in pixels.
        seed: population seed; person k of seed s is always the same.
        rig_name: 'dome' or 'nersemble'.
        motion: 'random' expressions, or one 'smooth' sequence.
        quality: 'fast' (baked light, no noise), or 'path': Mitsuba traces 64 paths a pixel (some seconds a picture).
        tracking: layouts of `shards.synth.tracking` to write each capture in as well, into `<out>-<layout>`.
        progress: True draws a bar on a terminal; a function is called with (pictures done, pictures in all).
        run: what runs the jobs; None does one after another in this process (`cluster.synth` has another way).

    Raises:
        UserError: a setting is out of range, the folder cannot be written, or it holds captures of other settings.
    """
    from shards.synth.tracking import LAYOUTS

    numbers = list(range(subjects)) if isinstance(subjects, int) else [int(number) for number in subjects]
    for name, value, low, high in (
        ("subjects", len(numbers), 1, 10**6), ("timesteps", timesteps, 1, 10**5), ("views", views, 1, 1000),
        ("size", size, 16, 2048), ("seed", seed, 0, 2**63),
    ):  # fmt: skip
        if not low <= value <= high:
            raise UserError(f"{name} is {value}; it must lie between {low} and {high}")
    if len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise UserError("subjects must be different numbers that are not negative")
    if motion not in MOTIONS:
        raise UserError(f"unknown motion {motion!r}; there are {', '.join(MOTIONS)}")
    if quality not in QUALITIES:
        raise UserError(f"unknown quality {quality!r}; there are {', '.join(QUALITIES)}")
    for layout in tracking:
        if layout not in LAYOUTS:
            raise UserError(f"unknown tracking layout {layout!r}; there are {', '.join(LAYOUTS)}")
    rig(rig_name, views, size)
    out = Path(out)
    settings = {
        "timesteps": timesteps, "views": views, "size": size, "seed": seed, "rig": rig_name, "motion": motion,
        "quality": quality, "generator": GENERATOR,
    }  # fmt: skip
    folders = [out / f"s{number:04d}" for number in numbers]
    kept = [_kept(folder, settings) for folder in folders]
    each = timesteps * views
    jobs = [
        {"number": number, "folder": str(folder.absolute()), "settings": settings, "tracking": list(tracking),
         "pictures": 0 if there else each}
        for number, folder, there in zip(numbers, folders, kept, strict=True)
        if tracking or not there
    ]  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write captures into {out}: {error.strerror}") from error
    with _Bar(progress, len(numbers) * each, sum(kept) * each) as advance:
        if jobs:
            _head()  # parsed and cached on disk once, here
            (run or _one_by_one)(jobs, advance)
    return folders


def make_capture(job: dict[str, Any], advance: Callable[[int], None]) -> None:
    """One job of `synthesize`: render the person where that is not done, and write the tracking files.

    Args:
        job: as `synthesize` makes them; plain values.
        advance: called with the number of new pictures.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(job["folder"])
    try:
        if not _kept(folder, job["settings"]):
            write_capture(job["number"], folder, job["settings"], advance)
    except OSError as error:
        raise UserError(
            f"cannot write captures into {folder.parent}: {error.strerror or error}; what is complete stays, free "
            "space and run the same command again"
        ) from error
    if job["tracking"]:
        from shards.synth.tracking import export_tracking

        for layout in job["tracking"]:
            export_tracking(folder, layout, folder.parent.with_name(f"{folder.parent.name}-{layout}"))


def _one_by_one(jobs: list[dict[str, Any]], advance: Callable[[int], None]) -> None:
    for job in jobs:
        make_capture(job, advance)


def write_capture(number: int, folder: Path, settings: dict, advance: Callable[[int], None]) -> None:
    """Render one person into a folder; `advance` is called with the number of pictures after each timestep."""
    from PIL import Image

    head, cameras = _head(), rig(settings["rig"], settings["views"], settings["size"])
    person = subject_seed(settings["seed"], number)
    subject = draw_subject(head, person)
    rng = np.random.default_rng([person, 42])
    expressions = _expressions(rng, settings["timesteps"], settings["motion"])
    motions = [_head_pose(rng) for _ in range(settings["timesteps"])]
    if folder.exists():
        shutil.rmtree(folder)
    timesteps = []
    for t, (expression, head_to_world) in enumerate(zip(expressions, motions, strict=True)):
        name = f"{t:05d}"
        for kind in ("image", "mask", "depth"):
            (folder / kind / name).mkdir(parents=True)
        posed = pose(head, subject, expression, head_to_world)
        traced = TracedPerson(posed, subject.light, head_to_world) if settings["quality"] == "path" else None
        # One traced picture at a time keeps all of a process's threads busy; more in flight were no faster.
        noise = np.random.SeedSequence([person, t]).generate_state(len(cameras.ids)).tolist()
        for K, world_to_camera, camera, seed in zip(
            cameras.K, cameras.world_to_camera, cameras.ids, noise, strict=True
        ):
            picture = render(posed, K, world_to_camera @ head_to_world, settings["size"])
            if traced is not None:
                image = traced.render(
                    K, world_to_camera @ head_to_world, settings["size"], samples=PATHS, seed=seed
                )
                picture = replace(picture, image=image)
            for kind, pixels in _encode(picture).items():
                Image.fromarray(pixels).save(folder / kind / name / f"{camera}.png", compress_level=1)
        timesteps.append(
            {"id": name, "expression": expression.tolist(), "head_to_world": head_to_world.tolist()}
        )
        advance(len(cameras.ids))
    _write_index(folder, number, subject, head, settings, cameras, timesteps)


def _encode(picture: Picture) -> dict[str, NDArray]:
    depth = np.round(picture.depth / DEPTH_UNIT).astype(np.uint16)
    return {"image": picture.image, "mask": picture.mask, "depth": depth}


def _write_index(
    folder: Path,
    number: int,
    subject: Subject,
    head: ParametricHead,
    settings: dict,
    cameras: Rig,
    timesteps: list[dict],
) -> None:
    index = {
        "schema": SCHEMA,
        "layout": LAYOUT,
        "subject": folder.name,
        "seed": settings["seed"],
        "size": [settings["size"], settings["size"]],
        "expression_kind": head.expression_kind,
        "expression_names": list(head.expression_names),
        "head": {"model": head.name, "identity": subject.identity.tolist()},
        "depth_unit": DEPTH_UNIT,
        "cameras": [
            {"id": camera, "K": K.tolist(), "world_to_camera": pose_.tolist()}
            for camera, K, pose_ in zip(cameras.ids, cameras.K, cameras.world_to_camera, strict=True)
        ],
        "timesteps": timesteps,
        "settings": settings,
        "appearance": {
            "hair": subject.style.name if subject.style else "bald",
            "masculinity": round(subject.masculinity, 3),
            "age": round(subject.age, 3),
            "tone": round(subject.look.tone, 3),
        },
    }
    part = folder / "capture.json.part"
    part.write_text(json.dumps(index))
    part.replace(folder / "capture.json")


def _kept(folder: Path, settings: dict) -> bool:
    """Whether a folder holds a complete capture of these settings."""
    path = folder / "capture.json"
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text()).get("settings")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete the folder and run again") from error
    if found != settings:
        raise UserError(
            f"{path} was made with other settings ({found}); choose another folder or delete this one"
        )
    return True


def subject_seed(seed: int, number: int) -> int:
    """The seed of person `number` in population `seed`."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _expressions(rng: np.random.Generator, count: int, motion: str) -> NDArray[np.float32]:
    if motion == "smooth":
        return smooth_sequence(rng, count)
    first = np.zeros(52, np.float32)
    return np.stack([first, *(random_expression(rng) for _ in range(count - 1))])


def _head_pose(rng: np.random.Generator) -> NDArray[np.float64]:
    """A small turn (5° deviation in yaw, 4° in pitch, 2.5° in roll) and shift (4 mm) of the head in the studio."""
    from scipy.spatial.transform import Rotation

    pose_ = np.eye(4)
    angles = np.clip(rng.normal(0, [5.0, 4.0, 2.5]), -12, 12)
    pose_[:3, :3] = Rotation.from_euler("yxz", angles, degrees=True).as_matrix()
    pose_[:3, 3] = rng.normal(0, 0.004, 3)
    return pose_


@lru_cache(maxsize=1)
def _head() -> ParametricHead:
    """The built-in head, one a process."""
    return ParametricHead.load()


class _Bar:
    """Progress as a bar on a terminal, as calls of a function, or not at all."""

    def __init__(self, progress: bool | Callable[[int, int], None], total: int, done: int) -> None:
        self.report, self.total, self.done = progress, total, done

    def __enter__(self) -> Callable[[int], None]:
        if self.report is True:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("synthetic captures"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.done)
        return self.advance

    def advance(self, pictures: int) -> None:
        self.done += pictures
        if self.report is True:
            self.bar.update(self.task, completed=self.done)
        elif callable(self.report):
            self.report(self.done, self.total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.report is True:
            self.bar.stop()
