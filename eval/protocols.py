"""The protocols that this suite knows by name, as data, and the submission of the NeRSemble benchmark.

A `Standard` says everything but the data; `named_protocol` binds it to the shards of a split, and the resulting
`Protocol` has an id that also holds whom the split contains and the bytes of their shards. Where a paper leaves
something open (Avat3r names neither its twelve people nor its views), the choice here is ours and written down.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from avatars.errors import UserError
from eval.metrics import (
    AKD_MESH,
    AKD_MTCNN,
    AKD_PIPNET,
    CSIM_ARCFACE,
    CSIM_DLIB,
    CSIM_FACENET,
    LPIPS,
    LPIPS_VGG,
    PSNR,
    PSNR_MASKED,
    SSIM,
    SSIM_MASKED,
    Definition,
    Pictures,
)
from eval.protocol import ALL_METRICS, TIMESTEP_RULE, VIEW_RULE, Protocol, data_hash, read_protocol

if TYPE_CHECKING:
    from shards import ShardSet

__all__ = [
    "STANDARDS",
    "SUBMISSIONS",
    "Standard",
    "Submission",
    "Video",
    "find_protocol",
    "named_protocol",
    "write_submission",
]

FEW_SHOT_METRICS = (
    *(PSNR, SSIM, PSNR_MASKED, SSIM_MASKED, LPIPS),
    *(AKD_PIPNET, AKD_MESH, CSIM_ARCFACE, CSIM_DLIB),
)
"""Avat3r's five, and of AKD and CSIM also those that need no file."""


@dataclass(frozen=True)
class Standard:
    """A protocol without its data; fields that `Protocol` has too mean the same.

    Attributes:
        text: where it comes from, and what of it is our choice.
        people: the only people that it may be measured on, by the numbers in their names; empty for any.
    """

    name: str
    text: str
    size: tuple[int, int] | None = None
    inputs: int = 4
    timesteps: int = 0
    timestep_rule: str = TIMESTEP_RULE
    last: int = 0
    views: int = 0
    view_rule: str = VIEW_RULE
    cameras: tuple[str, ...] = ()
    input_cameras: bool = False
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    metrics: tuple[Definition, ...] = ALL_METRICS
    people: tuple[str, ...] = ()


NERSEMBLE_HOLD_OUT = ("222200040", "220700191", "222200043", "221501007")
"""Cameras 3, 6, 11 and 15 of the sixteen, which few-shot papers on NeRSemble evaluate."""
BENCHMARK_TRAIN_CAMERA = "222200037"
BENCHMARK_CAMERAS = (BENCHMARK_TRAIN_CAMERA, "222200046", "220700191", "222200039")
BENCHMARK_PEOPLE = ("393", "404", "461", "477", "486")
BENCHMARK_SEQUENCES = ("FREE", "EMO-1-shout+laugh", "SEN-09", "SEN-10")

STANDARDS = {
    standard.name: standard
    for standard in (
        Standard(
            "synthetic-heldout",
            "Held-out synthetic people, expressions and cameras that were no input; ours.",
            inputs=0,
            views=8,
        ),
        Standard(
            "ava256-fewshot",
            "Avat3r's few-shot table: Ava-256 at 512 × 512 from 4 pictures of 4 timesteps. The paper names neither its "
            "12 people nor how many pictures it measures: here the split's people, 10 timesteps and 8 cameras.",
            size=(512, 512),
            timesteps=10,
            views=8,
            metrics=FEW_SHOT_METRICS,
        ),
        Standard(
            "nersemble-fewshot",
            "NeRSemble at 512 × 512 from 4 pictures: cameras 222200040, 220700191, 222200043 and 221501007, which must "
            "be no input, at 10 timesteps. The number of timesteps is ours.",
            size=(512, 512),
            timesteps=10,
            cameras=NERSEMBLE_HOLD_OUT,
            view_rule="the four evaluation cameras of the sixteen",
            metrics=FEW_SHOT_METRICS,
        ),
        Standard(
            "nersemble-benchmark",
            "The mono FLAME avatar task of the NeRSemble benchmark, measured here on what is public of it: its five "
            "people at 512 × 512 through the training camera. The hidden sequences are measured by the benchmark, "
            "from the zip that `write_submission` makes.",
            size=(512, 512),
            last=500,
            timestep_rule="the last 500 timesteps without those of the input set",
            cameras=(BENCHMARK_TRAIN_CAMERA,),
            view_rule="the training camera",
            input_cameras=True,
            metrics=(PSNR, SSIM, LPIPS, AKD_PIPNET, CSIM_ARCFACE),
            people=BENCHMARK_PEOPLE,
        ),
        Standard(
            "flashavatar-video",
            "FlashAvatar's split: the last 500 frames of a monocular video at 512 × 512, LPIPS over VGG.",
            size=(512, 512),
            inputs=0,
            last=500,
            timestep_rule="the last 500 timesteps without those of the input set",
            input_cameras=True,
            view_rule="every camera, the input's too",
            metrics=(PSNR, SSIM, LPIPS, LPIPS_VGG, AKD_MTCNN, CSIM_FACENET),
        ),
    )
}
"""All protocols with a name."""


def find_protocol(name: str, shards: ShardSet) -> Protocol:
    """A protocol by name, bound to shards, or the one in a JSON file.

    Raises:
        UserError: no such protocol, shards that it cannot be measured on, or a file edited after its id was written.
    """
    if name in STANDARDS:
        return named_protocol(name, shards)
    if name.endswith(".json") or Path(name).is_file():
        return read_protocol(Path(name))
    raise UserError(
        f"There is no protocol {name!r}: name one of {', '.join(STANDARDS)}, or a JSON file (every folder of results "
        "holds its protocol.json)."
    )


def named_protocol(name: str, shards: ShardSet) -> Protocol:
    """The named protocol of a split.

    Raises:
        UserError: other people than the protocol's, pictures of another size, or an empty split.
    """
    standard = STANDARDS[name]
    size = (shards.manifest.size, shards.manifest.size)
    if standard.size is not None and size != standard.size:
        raise UserError(
            f"{name} measures at {standard.size[0]} × {standard.size[1]}; these shards hold pictures of {size[0]} × "
            f"{size[1]}. Pack with --size {standard.size[0]}."
        )
    numbers = {subject: "".join(filter(str.isdigit, subject)).lstrip("0") for subject in shards.subjects}
    if standard.people and set(numbers.values()) != set(standard.people):
        raise UserError(
            f"{name} is measured on {', '.join(standard.people)}; the split {shards.split!r} holds "
            f"{', '.join(shards.subjects) or 'nobody'}. Pack with these people held out."
        )
    return Protocol(
        name=name,
        split=shards.split,
        subjects=tuple(shards.subjects),
        data=data_hash(shards),
        size=size,
        inputs=standard.inputs,
        timesteps=standard.timesteps,
        timestep_rule=standard.timestep_rule,
        last=standard.last,
        views=standard.views,
        view_rule=standard.view_rule,
        cameras=standard.cameras,
        input_cameras=standard.input_cameras,
        background=standard.background,
        metrics=standard.metrics,
    )


@dataclass(frozen=True)
class Submission:
    """What a task of the NeRSemble benchmark asks for.

    Attributes:
        size: (height, width) of every frame.
        fps: frames a second of the videos.
        videos: (participant, sequence) pairs, each with all cameras.
        cameras: serials.
    """

    size: tuple[int, int]
    fps: Fraction
    videos: tuple[tuple[str, str], ...]
    cameras: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        """Names inside the zip, in order."""
        return [_file(p, s, camera) for p, s in self.videos for camera in self.cameras]


SUBMISSIONS = {
    "mono-flame-avatar": Submission(
        (512, 512),
        Fraction(243, 10),
        tuple((person, sequence) for person in BENCHMARK_PEOPLE for sequence in BENCHMARK_SEQUENCES),
        BENCHMARK_CAMERAS,
    ),
    "nvs": Submission(
        (1604, 1100),
        Fraction(73),
        (
            ("388", "GLASSES"),
            ("422", "EXP-2-eyes"),
            ("443", "FREE"),
            ("445", "EXP-6-tongue-1"),
            ("475", "HAIR"),
        ),
        ("222200046", "222200037", "222200039"),
    ),
}
"""The benchmark's tasks whose submissions are videos."""
CRF = "14"


@dataclass(frozen=True)
class Video:
    """One video of a submission: `frames` gives pictures of any number of frames at a time, in order."""

    participant: str
    sequence: str
    camera: str
    frames: Iterable[Pictures]


def write_submission(path: Path, task: str, videos: Iterable[Video]) -> list[str]:
    """Writes the zip that the benchmark takes: `388/GLASSES/cam_222200046.mp4` and so on, H.264 at CRF 14.

    Args:
        path: the zip; it is there whole or not at all.
        task: key of `SUBMISSIONS`.
        videos: every video once, in any order; frames are written as they come.

    Returns:
        The names inside the zip.

    Raises:
        UserError: an unknown task, a video that the task does not ask for, one that is missing, there twice or without
            frames, frames of another size, or no PyAV.
    """
    if task not in SUBMISSIONS:
        raise UserError(f"The benchmark has no video task {task!r}: name one of {', '.join(SUBMISSIONS)}.")
    wanted = SUBMISSIONS[task]
    expected = wanted.files
    written: list[str] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w") as archive:
            for video in videos:
                name = _file(video.participant, video.sequence, video.camera)
                if name not in expected:
                    raise UserError(f"The task {task} asks for no video {name}.")
                if name in written:
                    raise UserError(f"The video {name} was given twice.")
                archive.writestr(name, _mp4(name, video.frames, wanted))
                written.append(name)
        missing = [name for name in expected if name not in written]
        if missing:
            raise UserError(
                f"The submission lacks {len(missing)} of {len(expected)} videos, {missing[0]} first."
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return written


def _file(participant: str, sequence: str, camera: str) -> str:
    return f"{participant:0>3}/{sequence}/cam_{camera}.mp4"


def _mp4(name: str, batches: Iterable[Pictures], wanted: Submission) -> bytes:
    try:
        import av
    except ImportError as error:
        raise UserError(f"Videos are written with PyAV, which cannot be imported: {error}.") from error
    height, width = wanted.size
    buffer, count = io.BytesIO(), 0
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=wanted.fps, options={"crf": CRF})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for batch in batches:
            if tuple(batch.tensor.shape[-2:]) != wanted.size:
                raise UserError(
                    f"A frame of {name} is {tuple(batch.tensor.shape[-2:])} pixels; the task asks for {wanted.size}."
                )
            for picture in _bytes(batch.tensor):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                count += 1
        container.mux(stream.encode(None))
    if count == 0:
        raise UserError(f"The video {name} has no frames.")
    return buffer.getvalue()


def _bytes(pictures: Tensor) -> Sequence:
    return list((pictures * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy())
