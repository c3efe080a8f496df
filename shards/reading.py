"""Shards read back: whole subjects for evaluation and fits, and the pieces that training batches are made
of.
"""

from __future__ import annotations

import io
import json
import math
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.inputs import InputSet
from shards.codecs import decode_picture, extension
from shards.manifest import Manifest, ShardInfo
from shards.pictures import decode_mask
from shards.stores import RemoteFolder, ShardCache, StreamReader
from shards.tarfiles import Data, Scratch, ShardReader

__all__ = ["ShardSet", "SubjectShards", "Target", "open_shards"]


Reader = ShardReader | StreamReader

_threads = threading.local()


def open_reader(manifest: Manifest, shard: ShardInfo, cache: ShardCache | None) -> Reader:
    """A reader of one shard: of the file where it is local or cached, of the stream where it is remote."""
    if isinstance(manifest.folder, Path):
        return ShardReader(manifest.folder / shard.path, shard.index)
    remote = RemoteFolder(manifest.folder)
    if cache is None:
        return StreamReader(remote, shard.path)
    return ShardReader(cache.path(remote, shard.path, shard.sha256), shard.index)


def open_shards(folder: str | Path, split: str, cache: ShardCache | None = None) -> ShardSet:
    """Opens one split of a folder of shards.

    Args:
        folder: where `pack` wrote, or a URL of a copy of it.
        split: "train" or "heldout".
        cache: where copies of remote shards are kept; without one they are streamed.

    Raises:
        UserError: no valid set of shards, or no such split.
    """
    return ShardSet(Manifest.load(folder), split, cache)


class ShardSet:
    """One split of a folder of shards, by subject."""

    def __init__(self, manifest: Manifest, split: str, cache: ShardCache | None = None) -> None:
        self._cache = cache
        self.manifest = manifest
        self.split = split
        self.subjects = list(manifest.subjects(split))

    def read(self, subject: str) -> SubjectShards:
        """Everything about one subject. Pictures of targets are decoded when asked for.

        Raises:
            UserError: no such subject in this split, or a shard that cannot be read.
        """
        if subject not in self.subjects:
            raise UserError(
                f"{subject} is not among the {self.split} subjects of {self.manifest.folder}:"
                f" {', '.join(self.subjects) or 'none'}."
            )
        shards = [shard for shard in self.manifest.shards if shard.subject == subject]
        return SubjectShards(self.manifest, shards, self._cache)


class SubjectShards:
    """One subject's input sets and target timesteps.

    Attributes:
        subject: name of the person.
        input_sets: all input sets; one is decoded when it is taken out.
        targets: all target timesteps in the order of time.
    """

    def __init__(
        self, manifest: Manifest, shards: Sequence[ShardInfo], cache: ShardCache | None = None
    ) -> None:
        self.subject = shards[0].subject
        readers = [open_reader(manifest, shard, cache) for shard in shards]
        self.input_sets = InputSets(readers, manifest)
        self.targets: list[Target] = sorted(
            (
                Target(reader, key, manifest.size, manifest.settings.codec)
                for reader in readers
                for key in reader.keys
                if key.startswith("target-")
            ),
            key=lambda target: target.timestep,
        )


class InputSets(Sequence[InputSet]):
    """The input sets of a subject, each decoded when it is taken out."""

    def __init__(self, readers: Sequence[Reader], manifest: Manifest) -> None:
        self._manifest = manifest
        self._places = [
            (reader, key) for reader in readers for key in reader.keys if key.startswith("inputs-")
        ]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> InputSet: ...

    @overload
    def __getitem__(self, index: slice) -> list[InputSet]: ...

    def __getitem__(self, index: int | slice) -> InputSet | list[InputSet]:
        if isinstance(index, slice):
            return [read_input_set(reader, key, self._manifest) for reader, key in self._places[index]]
        return read_input_set(*self._places[index], self._manifest)


class Target:
    """One timestep with all its views.

    Attributes:
        id: subject and timestep, unique in a set of shards.
        timestep: name of the timestep in the capture.
        expression: (E,) code.
        cameras: V cameras in the head frame.
        camera_ids: V names.
    """

    def __init__(self, reader: Reader, key: str, size: int, codec: str) -> None:
        self._reader, self._key, self._size, self._codec = reader, key, size, codec
        described = read_description(reader, key)
        self.timestep = str(described["timestep"])
        self.id = f"{described['subject']}/{self.timestep}"
        self.expression = torch.tensor(described["expression"], dtype=torch.float32)
        self.camera_ids = [str(camera["camera"]) for camera in described["cameras"]]
        self.cameras = cameras_of(described["cameras"])

    def images(self, views: Sequence[int]) -> Tensor:
        """Pictures (v, 3, H, W) float on black of the given views."""
        return torch.from_numpy(float_pictures(*self._decode(views)))

    def masks(self, views: Sequence[int]) -> Tensor:
        """Coverage (v, 1, H, W) in [0, 1] of the given views."""
        return torch.from_numpy(float_masks(self._decode(views, pictures=False)[1]))

    def _decode(
        self, views: Sequence[int], pictures: bool = True
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        views = [range(len(self.camera_ids))[v] for v in views]
        images = np.empty((len(views), self._size, self._size, 3), np.uint8)
        masks = np.empty((len(views), self._size, self._size), np.uint8)
        names = [f"{v:03d}" for v in views]
        decode_views(self._reader, self._key, names, images if pictures else None, masks, self._codec)
        return images, masks


def read_input_set(reader: Reader, key: str, manifest: Manifest) -> InputSet:
    """Decodes one input set of a shard."""
    described, size, priors = read_description(reader, key), manifest.size, manifest.priors
    pictures = described["pictures"]
    names = [f"{i:02d}" for i in range(len(pictures))]
    images = np.empty((len(names), size, size, 3), np.uint8)
    masks = np.empty((len(names), size, size), np.uint8)
    decode_views(reader, key, names, images, masks, manifest.settings.codec)
    maps: dict[str, Tensor | None] = {"positions": None, "confidence": None, "features": None}
    if priors.position != "none":
        positions = np.empty((len(names), 3, size, size), np.float32)
        confidence = np.empty((len(names), 1, size, size), np.float32)
        fill_positions(reader, key, names, positions, confidence)
        maps |= {"positions": torch.from_numpy(positions), "confidence": torch.from_numpy(confidence)}
    if priors.features != "none":
        features = np.empty((len(names), priors.feature_dim, *priors.feature_grid), np.float32)
        fill_features(reader, key, names, features, priors.storage)
        maps["features"] = torch.from_numpy(features)
    identity, kept = described["identity"], manifest.settings.input_background == "kept"
    return InputSet(
        images=torch.from_numpy(float_pictures(images, None if kept else masks)),
        masks=torch.from_numpy(float_masks(masks)),
        cameras=cameras_of(pictures),
        **maps,
        expressions=torch.tensor([picture["expression"] for picture in pictures], dtype=torch.float32),
        expression_kind=described["expression_kind"],
        subject=described["subject"],
        head=described["head"],
        identity=None if identity is None else torch.tensor(identity, dtype=torch.float32),
        provenance={
            "id": f"{described['subject']}/{reader.path.stem}/{key}",
            "capture": described["capture"],
            "layout": described["layout"],
            "shard": reader.path.name,
            "prior": priors.position,
            "features": priors.features,
            "timesteps": [picture["timestep"] for picture in pictures],
            "camera_ids": [picture["camera"] for picture in pictures],
        },
        background=manifest.settings.input_background,
    )


def read_description(reader: Reader, key: str) -> dict[str, Any]:
    """The JSON of one sample."""
    try:
        described: dict[str, Any] = json.loads(bytes(reader.read(key, ["json"])["json"]))
        return described
    except ValueError as error:
        raise UserError(
            f"{reader.path}: {key}.json cannot be read ({error}). Copy the shard again."
        ) from None


def decode_views(
    reader: Reader,
    key: str,
    names: Sequence[str],
    images: NDArray[np.uint8] | None,
    masks: NDArray[np.uint8],
    codec: str,
) -> None:
    """Decodes pictures and masks of one sample into `images` (v, H, W, 3), unless None, and `masks` (v, H,
    W).
    """
    wanted = [f"{name}.mask.png" for name in names]
    if images is not None:
        wanted += [f"{name}.{extension(codec)}" for name in names]
    found = reader.read(key, wanted, _scratch())
    for i, name in enumerate(names):
        where = f"{reader.path}: {key}.{name}"
        decode_mask(found[f"{name}.mask.png"], masks[i], f"{where}.mask.png")
        if images is not None:
            member = f"{name}.{extension(codec)}"
            decode_picture(found[member], images[i], f"{reader.path}: {key}.{member}", codec)


def _scratch() -> Scratch:
    """This thread's memory for members that are decoded before the next read."""
    scratch: Scratch | None = getattr(_threads, "scratch", None)
    if scratch is None:
        scratch = _threads.scratch = Scratch()
    return scratch


def fill_positions(
    reader: Reader,
    key: str,
    names: Sequence[str],
    positions: NDArray[np.floating],
    confidence: NDArray[np.floating],
) -> None:
    """Reads an input set's maps into `positions` (N, 3, H, W) and `confidence` (N, 1, H, W)."""
    found = reader.read(
        key, [f"{name}.{kind}.npy" for name in names for kind in ("position", "confidence")], _scratch()
    )
    for kind, out in (("position", positions), ("confidence", confidence)):
        for i, name in enumerate(names):
            member = f"{name}.{kind}.npy"
            out[i] = _array(found[member], "float16", out.shape[1:], f"{reader.path}: {key}.{member}")


def fill_features(
    reader: Reader,
    key: str,
    names: Sequence[str],
    features: NDArray[Any],
    storage: str,
    scales: NDArray[np.float16] | None = None,
) -> None:
    """Reads an input set's feature maps into `features` (N, D, h, w).

    Args:
        reader: of the shard.
        key: of the input set.
        names: of its pictures.
        features: where to; of the stored type when `scales` is given for "int8".
        storage: "fp16" or "int8".
        scales: (N, D, 1, 1) where to put the scales of "int8" instead of multiplying with them.
    """
    kinds = ("features", "features-scale") if storage == "int8" else ("features",)
    found = reader.read(key, [f"{name}.{kind}.npy" for name in names for kind in kinds], _scratch())
    for i, name in enumerate(names):
        where = f"{reader.path}: {key}.{name}"
        kind = "int8" if storage == "int8" else "float16"
        stored = _array(found[f"{name}.features.npy"], kind, features.shape[1:], f"{where}.features.npy")
        if storage != "int8":
            features[i] = stored
            continue
        shape = (features.shape[1], 1, 1)
        scale = _array(found[f"{name}.features-scale.npy"], "float16", shape, f"{where}.features-scale.npy")
        if scales is None:
            np.multiply(stored, scale.astype(np.float32), out=features[i])
        else:
            features[i], scales[i] = stored, scale


def _array(data: Data, kind: str, shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """The array in a member; a view of its bytes where the header is the one that numpy writes."""
    header = _npy_header(kind, shape)
    if bytes(data[: len(header)]) == header and len(data) == len(header) + np.dtype(
        kind
    ).itemsize * math.prod(shape):
        return np.frombuffer(data, kind, offset=len(header)).reshape(shape)
    return _other_npy(data, kind, shape, where)


@cache
def _npy_header(kind: str, shape: tuple[int, ...]) -> bytes:
    """What an array file of this kind and shape begins with, as numpy writes it: comparing is faster than
    parsing.
    """
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(shape, kind))
    return buffer.getvalue()[: -np.dtype(kind).itemsize * math.prod(shape)]


def _other_npy(data: Data, kind: str, shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """An array file whose header numpy has to parse."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{where} cannot be read ({error}). Pack the shards again.") from None
    if array.shape != shape or array.dtype != kind:
        raise UserError(
            f"{where} is {array.dtype} {array.shape} where {kind} {shape} is declared. Pack the shards again."
        )
    return np.asarray(array)


def cameras_of(described: Sequence[dict[str, Any]]) -> Cameras:
    """Cameras from their descriptions in a sample's JSON."""
    return Cameras(
        torch.tensor([camera["K"] for camera in described], dtype=torch.float32),
        torch.tensor([camera["world_to_camera"] for camera in described], dtype=torch.float32),
    )


def float_pictures(
    images: NDArray[np.uint8], masks: NDArray[np.uint8] | None, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Pictures (v, H, W, 3) as (v, 3, H, W) float in [0, 1]; what a codec smeared over the mask's edge is
    removed. Without masks all of a picture stays.
    """
    channels = images.transpose(0, 3, 1, 2)
    if masks is None:
        return np.multiply(channels, np.float32(1 / 255), out=out, order="C")
    scale = np.where(masks > 0, np.float32(1 / 255), np.float32(0))
    return np.multiply(channels, scale[:, None], out=out, order="C")


def float_masks(masks: NDArray[np.uint8], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Masks (v, H, W) as (v, 1, H, W) float in [0, 1]."""
    return np.multiply(masks[:, None], np.float32(1 / 255), out=out)
