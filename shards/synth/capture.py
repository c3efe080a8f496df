"""Writing synthetic captures: the layout that the shard packer reads, many people at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError
from avatars.head import ParametricHead
from shards.synth.dome import Rig, rig
from shards.synth.expressions import random_expression, smooth_sequence
from shards.synth.render import Picture, render
from shards.synth.subject import Subject, draw_subject, pose
from shards.synth.traced import TracedPerson

__all__ = ["DEPTH_UNIT", "SCHEMA", "synthesize", "write_capture"]

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
    workers: int | None = None,
    rig_name: str = "dome",
    motion: str = "random",
    quality: str = "fast",
    progress: bool | Callable[[int, int], None] = True,
) -> list[Path]:
    """Write synthetic captures, one folder a subject, and return the folders.

    A capture that is complete (it has its `capture.json`, written last) and was asked for with the same settings is
    kept; an incomplete one is made again. Pictures depend only on the seed, not on the number of workers.

    Args:
        out: folder that receives `s<number>` folders.
        subjects: how many people, or the numbers of those to make.
        timesteps: instants a person; the first is close to neutral.
        views: cameras (80 on the dome, up to 16 on the `nersemble` rig).
        size: height and width of the pictures in pixels.
        seed: population seed; person k of seed s is always the same.
        workers: processes; by default one a core, never more than subjects.
        rig_name: 'dome' or 'nersemble'.
        motion: 'random' expressions, or one 'smooth' sequence.
        quality: 'fast' (baked light, no noise), or 'path': Mitsuba traces 64 paths a pixel (some seconds a picture).
        progress: True draws a bar on a terminal; a function is called with (pictures done, pictures in all).

    Raises:
        UserError: a setting is out of range, the folder cannot be written, or it holds captures of other settings.
    """
    numbers = list(range(subjects)) if isinstance(subjects, int) else [int(number) for number in subjects]
    for name, value, low, high in (
        ("subjects", len(numbers), 1, 10**6), ("timesteps", timesteps, 1, 10**5), ("views", views, 1, 1000),
        ("size", size, 16, 2048), ("workers", 1 if workers is None else workers, 1, 1024), ("seed", seed, 0, 2**63),
    ):  # fmt: skip
        if not low <= value <= high:
            raise UserError(f"{name} is {value}; it must lie between {low} and {high}")
    if len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise UserError("subjects must be different numbers that are not negative")
    if motion not in MOTIONS:
        raise UserError(f"unknown motion {motion!r}; there are {', '.join(MOTIONS)}")
    if quality not in QUALITIES:
        raise UserError(f"unknown quality {quality!r}; there are {', '.join(QUALITIES)}")
    cameras = rig(rig_name, views, size)
    out = Path(out)
    settings = {
        "timesteps": timesteps, "views": views, "size": size, "seed": seed, "rig": rig_name, "motion": motion,
        "quality": quality, "generator": GENERATOR,
    }  # fmt: skip
    folders = [out / f"s{number:04d}" for number in numbers]
    wanted = [
        (number, folder)
        for number, folder in zip(numbers, folders, strict=True)
        if not _kept(folder, settings)
    ]
    total = len(numbers) * timesteps * views
    ready = (len(numbers) - len(wanted)) * timesteps * views
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _Bar(progress, total, ready) as advance:
            if wanted:
                _head()  # parsed and cached on disk once here, not in every worker
                _make(wanted, settings, cameras, workers, advance)
    except OSError as error:
        raise UserError(
            f"cannot write captures into {out}: {error.strerror}; what is complete stays"
        ) from error
    return folders


def _make(
    wanted: list[tuple[int, Path]],
    settings: dict,
    cameras: Rig,
    workers: int | None,
    advance: Callable[[int], None],
) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or cores, len(wanted))
    if count == 1:
        for number, folder in wanted:
            write_capture(number, folder, settings, cameras, advance)
        return
    _compile()  # the compiled kernels are cached on disk: the workers load them
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        ticks = manager.Queue()
        with ProcessPoolExecutor(count, mp_context=context, initializer=_single_thread) as pool:
            with _single_threaded_children():
                jobs = [
                    pool.submit(write_capture, number, folder, settings, cameras, ticks.put)
                    for number, folder in wanted
                ]
            pending = set(jobs)
            try:
                while pending or not ticks.empty():
                    while not ticks.empty():
                        advance(ticks.get())
                    for job in [job for job in pending if job.done()]:
                        job.result()
                        pending.discard(job)
                    wait(pending, timeout=0.2)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def write_capture(
    number: int, folder: Path, settings: dict, cameras: Rig, advance: Callable[[int], None]
) -> None:
    """Render one person into a folder; `advance` is called with the number of pictures after each timestep."""
    from PIL import Image

    head = _head()
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
        for K, world_to_camera, camera in zip(cameras.K, cameras.world_to_camera, cameras.ids, strict=True):
            picture = render(posed, K, world_to_camera @ head_to_world, settings["size"])
            if traced is not None:
                image = traced.render(K, world_to_camera @ head_to_world, settings["size"], samples=PATHS)
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


def _compile() -> None:
    """Run the compiled kernels once on next to nothing."""
    head = _head()
    subject = draw_subject(head, 0)
    cameras = rig("dome", 1, 16)
    render(
        pose(head, subject, np.zeros(52, np.float32), np.eye(4)), cameras.K[0], cameras.world_to_camera[0], 16
    )


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Processes started here get one BLAS thread each: they fill the cores, and idle BLAS threads spin.

    BLAS reads its number of threads when it is loaded, before any code of ours runs in a child, hence the environment.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _single_thread() -> None:
    import torch

    torch.set_num_threads(1)


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
