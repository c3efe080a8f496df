"""A protocol: everything that makes two numbers comparable, as data with an id.

The id is a hash of every field, the metrics' definitions and the data's hash among them. Two rows with one id
were measured on the same pictures in the same way; rows of two ids never share a table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.files import write_whole
from eval.hashing import canonical_json, short_hash
from eval.metrics import AKD_MTCNN, CSIM_FACENET, LPIPS, PSNR, PSNR_MASKED, SSIM, SSIM_MASKED, Definition

if TYPE_CHECKING:
    from shards import ShardSet

__all__ = [
    "ALL_METRICS",
    "Protocol",
    "choose_timesteps",
    "choose_views",
    "data_hash",
    "frontal_first",
    "head_directions",
    "read_protocol",
    "synthetic_heldout",
    "write_protocol",
]

ALL_METRICS = (PSNR, SSIM, PSNR_MASKED, SSIM_MASKED, LPIPS, AKD_MTCNN, CSIM_FACENET)

CROP_RULE = "the square that the shards were packed with"
MASK_RULE = "prediction and target over the background; no crop; mask >= 0.5 for the metrics in mask"
ROUNDING = "prediction clamped to [0, 1] and rounded to 8 bits; target as stored"
VIEW_RULE = (
    "k-farthest directions from the most frontal camera on, at the first target timestep, no input camera"
)
TIMESTEP_RULE = "timesteps of the input set left out, the rest at even stride"


@dataclass(frozen=True)
class Protocol:
    """How avatars are measured.

    Attributes:
        name: name of the protocol, for example "synthetic-heldout".
        split: split of the shard set.
        subjects: whom the split holds.
        data: hash of the split's pictures, cameras and codes.
        input_set: which of a subject's input sets makes the avatar.
        inputs: how many pictures an input set must have, 0 for any number.
        crop: how pictures were cut out of the captures, in words; the data's hash holds the cut itself.
        last: only the last so many timesteps may be targets, 0 for all.
        timesteps: number of target timesteps a subject, 0 for all.
        timestep_rule: how they are chosen, in words.
        views: number of target cameras a timestep, 0 for all.
        view_rule: how they are chosen, in words.
        cameras: ids of the target cameras where they are fixed; empty where `view_rule` chooses them.
        input_cameras: whether a camera of the input set may be a target too, as in a video of one camera.
        size: (height, width) in pixels at which everything is measured and timed.
        background: RGB behind prediction and target.
        mask_rule: what the mask does, in words.
        color_space: colour space of the measured pictures.
        rounding: how predictions become pictures, in words.
        seed: random seed set before every avatar's creation.
        metrics: what is measured, with definitions and the hashes of weights.
    """

    name: str
    split: str
    subjects: tuple[str, ...]
    data: str
    size: tuple[int, int]
    input_set: int = 0
    inputs: int = 4
    crop: str = CROP_RULE
    last: int = 0
    timesteps: int = 0
    timestep_rule: str = TIMESTEP_RULE
    views: int = 8
    view_rule: str = VIEW_RULE
    cameras: tuple[str, ...] = ()
    input_cameras: bool = False
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    mask_rule: str = MASK_RULE
    color_space: str = "sRGB"
    rounding: str = ROUNDING
    seed: int = 0
    metrics: tuple[Definition, ...] = ALL_METRICS

    def __post_init__(self) -> None:
        if not self.subjects:
            raise UserError(f"The protocol {self.name} has no subjects: the split {self.split!r} is empty.")
        keys = [metric.key for metric in self.metrics]
        if len(set(keys)) != len(keys) or not keys:
            raise UserError(f"The protocol {self.name} needs metrics with distinct keys; it has {keys}.")
        if min(self.timesteps, self.views, self.input_set, self.inputs, self.last) < 0:
            raise UserError(
                f"The protocol {self.name} has a negative number of timesteps, views, inputs or input set."
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain types for JSON, without the id."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["metrics"] = [metric.as_dict() for metric in self.metrics]
        return json.loads(canonical_json(values))

    @property
    def id(self) -> str:
        """12 hexadecimal digits that change with any field."""
        return short_hash(self.as_dict())


def synthetic_heldout(
    shards: ShardSet, *, views: int = 8, timesteps: int = 0, metrics: tuple[Definition, ...] = ALL_METRICS
) -> Protocol:
    """Held-out synthetic subjects, expressions that were no input and cameras that were no input.

    Args:
        shards: the held-out split.
        views: target cameras a timestep, 0 for all.
        timesteps: target timesteps a subject, 0 for all.
        metrics: what to measure.
    """
    return Protocol(
        name="synthetic-heldout",
        split=shards.split,
        subjects=tuple(shards.subjects),
        data=data_hash(shards),
        size=(shards.manifest.size, shards.manifest.size),
        inputs=0,
        views=views,
        timesteps=timesteps,
        metrics=metrics,
    )


def data_hash(shards: ShardSet) -> str:
    """12 hexadecimal digits over the bytes of every shard of a split, whatever the files are called."""
    subjects = set(shards.subjects)
    content = sorted(
        [shard.subject, shard.sha256] for shard in shards.manifest.shards if shard.subject in subjects
    )
    return short_hash(content)


def write_protocol(protocol: Protocol, path: Path) -> None:
    """Writes the protocol with its id as JSON."""
    write_whole(path, json.dumps({"id": protocol.id, **protocol.as_dict()}, indent=1) + "\n")


def read_protocol(path: Path) -> Protocol:
    """Reads a protocol file.

    Raises:
        UserError: no such file, no JSON, unknown fields, or a file edited after its id was written.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        written = values.pop("id")
        values["metrics"] = tuple(Definition.from_dict(metric) for metric in values["metrics"])
        for name in ("subjects", "size", "background", "cameras"):
            values[name] = tuple(values[name])
        protocol = Protocol(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a protocol file ({type(error).__name__}: {error}).") from error
    if protocol.id != written:
        raise UserError(
            f"{path} was edited after its id was written: it says {written}, its contents make "
            f"{protocol.id}. Put the new id into the file if the change is meant; two ids do not compare."
        )
    return protocol


def choose_timesteps(timesteps: Sequence[str], used: Sequence[str], count: int, last: int = 0) -> list[int]:
    """Indices of the target timesteps: all that were not input, or `count` of them at even stride.

    Args:
        timesteps: names of all timesteps, in order of time.
        used: names of the input's timesteps.
        count: how many, 0 for all.
        last: only the last so many timesteps may be chosen, 0 for all.

    Raises:
        UserError: nothing is left.
    """
    first = max(len(timesteps) - last, 0) if last else 0
    free = [index for index, name in enumerate(timesteps) if index >= first and name not in set(used)]
    if not free:
        raise UserError(
            "No target timestep is left: all of them were input. Pack captures with more timesteps."
        )
    if count == 0 or count >= len(free):
        return free
    return [free[(2 * i + 1) * len(free) // (2 * count)] for i in range(count)]


def choose_views(cameras: Cameras, used: Sequence[int], count: int) -> list[int]:
    """Indices of the target cameras, k-farthest on the directions in which they stand, in ascending order.

    Starts at the most frontal camera that was no input and adds the one whose nearest chosen direction is
    farthest, ties to the lower index.

    Args:
        cameras: V cameras in the head frame.
        used: indices of the input cameras.
        count: how many, 0 for all.

    Raises:
        UserError: nothing is left.
    """
    taken = set(used)
    free = [index for index in range(len(cameras)) if index not in taken]
    if not free:
        raise UserError("No target camera is left: all of them were input. Use captures with more cameras.")
    if count == 0 or count >= len(free):
        return free
    candidates = head_directions(cameras)[free]
    # Cosines are rounded so that the last bit of a product never decides between mirrored cameras.
    chosen = [frontal_first(cameras[free])[0]]
    nearest = (candidates @ candidates[chosen[0]]).round(decimals=9)
    while len(chosen) < count:
        nearest[chosen] = torch.inf
        best = int(torch.nonzero(nearest == nearest.min())[0])
        chosen.append(best)
        nearest = torch.maximum(nearest, (candidates @ candidates[best]).round(decimals=9))
    return sorted(free[index] for index in chosen)


def head_directions(cameras: Cameras) -> Tensor:
    """(V, 3) float64 unit directions from the head frame's origin to the cameras."""
    return torch.nn.functional.normalize(cameras.centers.double().cpu(), dim=-1)


def frontal_first(cameras: Cameras) -> list[int]:
    """Camera indices, the one most straight before the face first, ties to the lower index."""
    toward_face = head_directions(cameras)[:, 2].round(
        decimals=9
    )  # +z of the head frame points out of the face
    return torch.argsort(toward_face, descending=True, stable=True).tolist()
