"""The list of shards beside the shards: who is in which, how many bytes with which hash, and how they were
packed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from avatars.errors import UserError
from avatars.inputs import Background
from shards.codecs import CODECS
from shards.stores import RemoteFolder, location

__all__ = [
    "INPUT_BACKGROUNDS",
    "SCHEMA",
    "SPLITS",
    "Manifest",
    "PackSettings",
    "PriorError",
    "PriorSettings",
    "ShardInfo",
    "write_json",
]

# All that came before are read: 1 had no feature maps and one number for the error of positions, 2 only JPEGs, cut to
# the head, and input sets of different timesteps.
SCHEMA = 3
SPLITS = ("train", "heldout")
NAME = "manifest.json"
INPUT_BACKGROUNDS = ("masked", "kept")


@dataclass(frozen=True)
class PackSettings:
    """How captures become shards. Everything that changes the bytes of a shard is in here.

    Attributes:
        size: side of the square pictures in pixels.
        crop: "head": the largest square around the projected head; "full": the smallest around the whole picture.
        background: "black": what the masks exclude was removed from targets.
        codec: of the pictures: "jpeg", "png", "webp" or "webp-lossless".
        quality: of "jpeg" and "webp", 1 to 100.
        subsampling: of the chroma of "jpeg": "444", "422" or "420".
        prior: position maps that packing made: "depth" or "none". `Manifest.priors` says what is there now.
        n_inputs: pictures in an input set.
        input_timesteps: the pictures of an input set are of "different" timesteps, or all of the "same".
        input_background: of input pictures, is what the masks exclude black ("masked") or there ("kept")? Targets
            have none. Shards from before there was a choice are "masked".
        input_sets: input sets at the head of each shard.
        k: input cameras are drawn among the k farthest.
        max_input_degrees: how far from straight before the face an input camera may stand.
        timesteps_per_shard: target timesteps in one shard.
        seed: of all draws.
    """

    size: int
    crop: str = "head"
    background: str = "black"
    codec: str = "jpeg"
    quality: int = 95
    subsampling: str = "444"
    prior: str = "depth"
    n_inputs: int = 4
    input_sets: int = 8
    k: int = 3
    max_input_degrees: float = 80.0
    timesteps_per_shard: int = 256
    seed: int = 0
    input_timesteps: Literal["different", "same"] = "different"
    input_background: Background = "masked"


@dataclass(frozen=True)
class PriorSettings:
    """Which priors the input sets come with, and how they are stored.

    Attributes:
        position: where position maps come from: "depth", "none", or a network and its weights' hash
            ("dust3r:1a2b3c4d").
        features: where feature maps come from: "none", or a network and its weights' hash
            ("sapiens-0.3b:1a2b3c4d").
        feature_dim: channels D of a feature map; 0 without features.
        storage: how feature maps are stored: "fp16", or "int8" with one scale a picture and channel.
        feature_grid: height and width of a feature map; (0, 0) without features.
    """

    position: str = "none"
    features: str = "none"
    feature_dim: int = 0
    storage: Literal["fp16", "int8"] = "fp16"
    feature_grid: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class PriorError:
    """What storing priors in few bits costs: differences of what is read back and what was computed.

    Attributes:
        position_max: largest difference of a coordinate in metres, where the confidence is above 1.
        position_rms: root of the mean square of the same.
        features_max: largest difference of a feature.
        features_rms: root of the mean square of the same.
    """

    position_max: float | None = None
    position_rms: float | None = None
    features_max: float | None = None
    features_rms: float | None = None


@dataclass(frozen=True)
class ShardInfo:
    """One shard.

    Attributes:
        path: file name beside the manifest.
        subject: the one person in it.
        bytes: size of the file.
        sha256: hash of the file.
        index: offset and size of the bytes of its index.
        views: number of views of each of its target timesteps.
        inputs: for each of its input sets, which of the shard's own target timesteps it is made of.
    """

    path: str
    subject: str
    bytes: int
    sha256: str
    index: tuple[int, int]
    views: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]

    @property
    def targets(self) -> int:
        """Number of target timesteps."""
        return len(self.views)

    @cached_property
    def excluded(self) -> tuple[int, ...]:
        """Targets that every input set of the shard contains, which no example can therefore have. Sorted."""
        if not self.inputs:
            return tuple(range(self.targets))
        return tuple(sorted(set(self.inputs[0]).intersection(*self.inputs[1:])))


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        folder: where it was read from, a path or a URL.
        expression_kind: what the codes mean.
        expression_length: their length E.
        expression_mean: E means over the timesteps of the training subjects, to standardise codes with.
        expression_std: E standard deviations over the same.
        head: name of the parametric head that tracked the captures, or None.
        settings: how the shards were packed.
        priors: which priors the input sets come with.
        prior_error: what storing those in few bits costs, None where there is no such prior.
        train: subjects to train on.
        heldout: subjects that training never sees.
        shards: the files.
    """

    folder: Path | str
    expression_kind: str
    expression_length: int
    expression_mean: tuple[float, ...]
    expression_std: tuple[float, ...]
    head: str | None
    settings: PackSettings
    priors: PriorSettings
    prior_error: PriorError
    train: tuple[str, ...]
    heldout: tuple[str, ...]
    shards: tuple[ShardInfo, ...]

    @property
    def size(self) -> int:
        """Side of the square pictures in pixels."""
        return self.settings.size

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any byte of the shards and with the split."""
        content = [[shard.path, shard.subject, shard.sha256] for shard in self.shards]
        identity = json.dumps([content, self.train, self.heldout]).encode()
        return hashlib.sha256(identity).hexdigest()[:16]

    def subjects(self, split: str) -> tuple[str, ...]:
        """The subjects of a split.

        Raises:
            UserError: there is no such split.
        """
        if split not in SPLITS:
            raise UserError(f"There is no split {split!r}; the splits are train and heldout.")
        return self.train if split == "train" else self.heldout

    def split(self, split: str) -> list[ShardInfo]:
        """The shards of a split, in the order of the manifest."""
        subjects = set(self.subjects(split))
        return [shard for shard in self.shards if shard.subject in subjects]

    def save(self) -> None:
        """Writes `manifest.json`, whole or not at all."""
        content: dict[str, Any] = {"schema": SCHEMA, **dataclasses.asdict(self)}
        del content["folder"]
        for shard in content["shards"]:
            if len(set(shard["views"])) == 1:  # the usual case in one pair of numbers: views, how often
                shard["views"] = {"each": shard["views"][0], "targets": len(shard["views"])}
        write_json(Path(self.folder) / NAME, content)

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Reads the manifest of a folder, or of a URL that fsspec knows, and looks at the size of every
        shard that it names.

        Raises:
            UserError: no folder, no manifest, one of a newer version or with fields missing, a shard that is
                not there or has another size. Hashes are compared by `shards.check`, which reads all bytes.
        """
        manifest = cls.read(folder)
        manifest._look()
        return manifest

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Reads the manifest of a folder without a look at the shards; otherwise like `load`."""
        folder = location(folder)
        if isinstance(folder, str):
            file = f"{folder}/{NAME}"
            text = RemoteFolder(folder).text(NAME)
        else:
            path = folder / NAME
            file = str(path)
            if not folder.is_dir():
                raise UserError(f"{folder} is not there. Give the folder that `headsplat shards pack` wrote.")
            text = path.read_text() if path.is_file() else None
        if text is None:
            raise UserError(
                f"{folder} holds no {NAME}, so it is no finished set of shards."
                f" Run `headsplat shards pack CAPTURES {folder}`; it goes on where it stopped."
            )
        try:
            content = json.loads(text)
            schema = content["schema"]
            if schema > SCHEMA:
                raise UserError(
                    f"{file} has schema {schema}, this version reads up to {SCHEMA}. Update headsplat or"
                    " pack again."
                )
            return cls._parse(folder, content)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{file} cannot be read ({type(error).__name__}: {error}). Run `headsplat shards pack` again."
            ) from None

    @classmethod
    def _parse(cls, folder: Path | str, content: dict[str, Any]) -> Manifest:
        shards = []
        for shard in content["shards"]:
            views = shard["views"]
            if isinstance(views, dict):
                views = [int(views["each"])] * int(views["targets"])
            if Path(shard["path"]).name != shard["path"] or shard["path"] in ("", ".", ".."):
                raise ValueError(f"a shard's path must be a plain file name, not {shard['path']!r}")
            offset, size = shard["index"]
            shards.append(
                ShardInfo(
                    path=shard["path"],
                    subject=str(shard["subject"]),
                    bytes=int(shard["bytes"]),
                    sha256=str(shard["sha256"]),
                    index=(int(offset), int(size)),
                    views=tuple(map(int, views)),
                    inputs=tuple(tuple(map(int, steps)) for steps in shard["inputs"]),
                )
            )
        if content["schema"] == 1:
            priors = PriorSettings(position=content["settings"]["prior"])
            error = PriorError(position_max=content["prior_error"])
        else:
            stored = content["priors"]
            priors = PriorSettings(**{**stored, "feature_grid": tuple(map(int, stored["feature_grid"]))})
            error = PriorError(**content["prior_error"])
        settings = PackSettings(**content["settings"])
        if settings.codec not in CODECS:
            raise ValueError(f"there is no codec {settings.codec!r}")
        if settings.input_background not in INPUT_BACKGROUNDS:
            raise ValueError(f"there is no input_background {settings.input_background!r}")
        return cls(
            folder=folder,
            expression_kind=str(content["expression_kind"]),
            expression_length=int(content["expression_length"]),
            expression_mean=tuple(map(float, content["expression_mean"])),
            expression_std=tuple(map(float, content["expression_std"])),
            head=content["head"],
            settings=settings,
            priors=priors,
            prior_error=error,
            train=tuple(content["train"]),
            heldout=tuple(content["heldout"]),
            shards=tuple(shards),
        )

    def _look(self) -> None:
        if isinstance(self.folder, str):
            sizes: dict[str, int | None] = RemoteFolder(self.folder).sizes()
        else:
            with os.scandir(self.folder) as entries:
                sizes = {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".tar")}
        for shard in self.shards:
            path = f"{self.folder}/{shard.path}"
            if shard.path not in sizes:
                raise UserError(
                    f"{path} is named by the manifest but is not there. Copy it again or pack again."
                )
            if sizes[shard.path] not in (shard.bytes, None):
                raise UserError(
                    f"{path} has {sizes[shard.path]} bytes where the manifest says {shard.bytes}: it was"
                    " cut short or"
                    " replaced. Copy it again or pack again."
                )


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that `path` is at any time the old file or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
