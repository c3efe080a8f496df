"""Is a folder of shards what its manifest says, and is that fit to train and evaluate on?

`check` believes nothing: it walks through the raw tar headers itself, so a hostile file is described and not
unpacked.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from avatars.errors import UserError
from shards.capture import check_matrices
from shards.codecs import decode_picture, extension
from shards.manifest import SPLITS, Manifest, ShardInfo
from shards.pictures import decode_mask
from shards.stores import location

__all__ = ["Finding", "check"]

MEMBER = re.compile(r"(inputs-\d{3}|target-\d{5}|index)\.([a-z0-9.-]+)")
LARGEST_MEMBER = 1 << 30
MANY = 20  # findings of one kind in one shard that are told one by one


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or odd.

    Attributes:
        severity: "error": training or evaluating on it is wrong or impossible; "warning": look at it.
        where: the file, and the member in it.
        what: a sentence.
    """

    severity: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.what}"


@dataclass
class _Seen:
    """What is compared between shards."""

    captures: defaultdict[str, set[str]] = field(
        default_factory=lambda: defaultdict(set)
    )  # capture -> splits
    pictures: dict[bytes, tuple[str, str]] = field(default_factory=dict)  # hash -> split, where
    timesteps: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


def check(
    folder: str | Path,
    *,
    pictures: bool = True,
    threads: int = 2,
    progress: Callable[[str], None] | None = None,
) -> list[Finding]:
    """Looks for everything that can be wrong with a folder of shards.

    Manifest, split and leakage of people between its parts; files, sizes and hashes; tar structure; for each
    sample the members it needs, its subject, codes, cameras, and whether the head is before the camera and
    in the picture; with `pictures`, that every picture and prior can be decoded and no mask is empty.

    Args:
        folder: what `pack` wrote.
        pictures: whether to decode all pictures, by far the longest part.
        threads: that decode.
        progress: called with a line of text after each shard.

    Returns:
        Findings in the order they were made; none means that everything is as it should be.

    Raises:
        UserError: there is no manifest that can be read.
    """
    if isinstance(location(folder), str):
        raise UserError(
            f"{location(folder)} is not on this machine, and all of it must be read. Copy it here and check the copy."
        )
    manifest = Manifest.read(folder)
    findings = list(_check_manifest(manifest))
    seen = _Seen()
    with ThreadPoolExecutor(threads) as pool:
        for number, shard in enumerate(manifest.shards, 1):
            found = list(_check_shard(manifest, shard, seen, pool if pictures else None))
            findings += _shortened(found)
            if progress is not None:
                progress(f"{number}/{len(manifest.shards)} {shard.path}: {len(found) or 'no'} findings")
    for subject, counts in seen.timesteps.items():
        for timestep, count in counts.items():
            if count > 1:
                findings.append(Finding("error", subject, f"timestep {timestep} is there {count} times."))
    for capture, splits in seen.captures.items():
        if len(splits) > 1:
            findings.append(
                Finding("error", capture, "this capture is in both the training and the held-out split.")
            )
    return findings


def _check_manifest(manifest: Manifest) -> Iterator[Finding]:
    name = "manifest.json"
    for subject in sorted(set(manifest.train) & set(manifest.heldout)):
        yield Finding("error", name, f"{subject} is both a training and a held-out subject.")
    listed = set(manifest.train) | set(manifest.heldout)
    there = {shard.subject for shard in manifest.shards}
    for subject in sorted(listed - there):
        yield Finding("error", name, f"{subject} is in the split but has no shard.")
    for subject in sorted(there - listed):
        yield Finding("error", name, f"{subject} has shards but is in no split.")
    for split in SPLITS:
        if not manifest.subjects(split):
            yield Finding("warning", name, f"the {split} split is empty.")
    length = manifest.expression_length
    statistics = (manifest.expression_mean, manifest.expression_std)
    if any(len(values) != length or not np.isfinite(values).all() for values in statistics):
        yield Finding(
            "error", name, f"the statistics of the codes are not two lists of {length} finite numbers."
        )
    for what, values in (
        ("name", [s.path for s in manifest.shards]),
        ("hash", [s.sha256 for s in manifest.shards]),
    ):
        for value, count in Counter(values).items():
            if count > 1:
                yield Finding("error", name, f"{count} shards have the {what} {value}.")
    named = {shard.path for shard in manifest.shards}
    for path in sorted(Path(manifest.folder).glob("*.tar")):
        if path.name not in named:
            yield Finding("warning", path.name, "is beside the manifest but not in it.")


def _check_shard(
    manifest: Manifest, shard: ShardInfo, seen: _Seen, pool: ThreadPoolExecutor | None
) -> Iterator[Finding]:
    path = Path(manifest.folder) / shard.path
    if not path.is_file():
        yield Finding("error", shard.path, "is not there.")
        return
    size = path.stat().st_size
    if size != shard.bytes:
        yield Finding("error", shard.path, f"has {size} bytes where the manifest says {shard.bytes}.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        yield Finding(
            "error", shard.path, f"has the hash {digest[:12]}… where the manifest says {shard.sha256[:12]}…."
        )
    counts: Counter[str] = Counter()
    sample: dict[str, bytes] = {}
    key = ""
    views: dict[int, int] = {}
    try:
        for name, data in _walk(path):
            match = MEMBER.fullmatch(name)
            if match is None:
                yield Finding("error", f"{shard.path}: {name}", "is a member that no shard has.")
                continue
            if match[1] != key:
                if key:
                    yield from _check_sample(manifest, shard, key, sample, seen, views, pool)
                    counts[key.split("-")[0]] += 1
                key, sample = match[1], {}
            if match[2] in sample:
                yield Finding("error", f"{shard.path}: {name}", "is there twice.")
            sample[match[2]] = data
        if key:
            yield from _check_sample(manifest, shard, key, sample, seen, views, pool)
            counts[key.split("-")[0]] += 1
    except UserError as error:
        yield Finding("error", shard.path, str(error))
    for kind, expected in (("target", shard.targets), ("inputs", len(shard.inputs)), ("index", 1)):
        if counts[kind] != expected:
            yield Finding(
                "error", shard.path, f"has {counts[kind]} {kind} samples where the manifest says {expected}."
            )
    if views and tuple(views.get(i, -1) for i in range(shard.targets)) != shard.views:
        yield Finding(
            "error", shard.path, "has timesteps with other numbers of views than the manifest says."
        )


def _walk(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the regular members of a tar, from its raw headers.

    Raises:
        UserError: anything that a plain tar of files does not have.
    """
    block, size = tarfile.BLOCKSIZE, path.stat().st_size
    position = 0
    with path.open("rb") as file:
        while True:
            header = file.read(block)
            if header == bytes(block):
                return
            if len(header) < block:
                raise UserError(f"is cut short at byte {position}.")
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            except (tarfile.HeaderError, ValueError) as error:
                raise UserError(f"has no valid tar header at byte {position} ({error}).") from None
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                raise UserError(f"has the member {info.name!r} that is no regular file (type {info.type!r}).")
            if Path(info.name).name != info.name or info.name in ("", ".", ".."):
                raise UserError(f"has a member whose name leads elsewhere: {info.name!r}.")
            if info.size < 0 or info.size > LARGEST_MEMBER or position + block + info.size > size:
                raise UserError(
                    f"has a member {info.name} of {info.size} bytes, which goes past the end of the file."
                )
            padded = -(-info.size // block) * block
            yield info.name, file.read(padded)[: info.size]
            position += block + padded


def _check_sample(
    manifest: Manifest,
    shard: ShardInfo,
    key: str,
    sample: dict[str, bytes],
    seen: _Seen,
    views: dict[int, int],
    pool: ThreadPoolExecutor | None,
) -> Iterator[Finding]:
    where = f"{shard.path}: {key}"
    kind = key.split("-")[0]
    try:
        described: dict[str, Any] = json.loads(sample["json"])
        if kind == "index":
            return
        if described["kind"] != kind:
            yield Finding("error", where, f"says that it is a {described['kind']!r}.")
        if described["subject"] != shard.subject:
            yield Finding(
                "error", where, f"is of {described['subject']} where the manifest says {shard.subject}."
            )
        split = "train" if shard.subject in manifest.train else "heldout"
        seen.captures[described["capture"]].add(split)
        if kind == "target":
            cameras = described["cameras"]
            codes, names = [described["expression"]], [f"{i:03d}" for i in range(len(cameras))]
            views[int(key.split("-")[1])] = len(cameras)
            seen.timesteps[shard.subject][described["timestep"]] += 1
            for name, count in Counter(camera["camera"] for camera in cameras).items():
                if count > 1:
                    yield Finding("error", where, f"has the camera {name} {count} times.")
        else:
            cameras = described["pictures"]
            codes, names = (
                [picture["expression"] for picture in cameras],
                [f"{i:02d}" for i in range(len(cameras))],
            )
            timesteps = [picture["timestep"] for picture in cameras]
            wanted = 1 if manifest.settings.input_timesteps == "same" else len(cameras)
            if len(cameras) != manifest.settings.n_inputs or len(set(timesteps)) != wanted:
                yield Finding("error", where, f"has pictures of the timesteps {', '.join(timesteps)}.")
        yield from _check_codes(manifest, where, codes)
        yield from _check_cameras(manifest, where, cameras)
    except (KeyError, TypeError, ValueError) as error:
        yield Finding("error", f"{where}.json", f"cannot be read or lacks a field: {error!r}.")
        return
    priors = _prior_shapes(manifest) if kind == "inputs" else {}
    coded = extension(manifest.settings.codec)
    needed = {"json"} | {f"{name}.{end}" for name in names for end in (coded, "mask.png", *priors)}
    for member in sorted(needed - set(sample)):
        yield Finding("error", f"{where}.{member}", "is missing.")
    for member in sorted(set(sample) - needed):
        yield Finding("warning", f"{where}.{member}", "belongs to no picture.")
    whole = [name for name in names if {f"{name}.{coded}", f"{name}.mask.png"} <= set(sample)]
    if kind == "target" and whole:
        picture = hashlib.blake2b(sample[f"{whole[0]}.{coded}"], digest_size=16).digest()
        other = seen.pictures.setdefault(picture, (split, where))
        if other[0] != split:
            yield Finding("error", where, f"shows the same picture as {other[1]}, across the split.")
        elif other[1] != where:
            yield Finding("warning", where, f"shows the same picture as {other[1]}.")
    if pool is not None:
        for found in pool.map(lambda name: list(_check_picture(manifest, where, name, sample)), whole):
            yield from found
        for member in sorted(needed & set(sample)):
            if member[3:] in priors:
                yield from _check_prior(f"{where}.{member}", sample[member], *priors[member[3:]])


def _check_codes(manifest: Manifest, where: str, codes: list[Any]) -> Iterator[Finding]:
    for code in codes:
        if len(code) != manifest.expression_length:
            yield Finding(
                "error", where, f"has a code of {len(code)} numbers, not {manifest.expression_length}."
            )
        elif not np.isfinite(np.array(code, np.float64)).all():
            yield Finding("error", where, "has a code with numbers that are not finite.")


def _check_cameras(manifest: Manifest, where: str, cameras: list[Any]) -> Iterator[Finding]:
    K = np.array([camera["K"] for camera in cameras], np.float64).reshape(-1, 3, 3)
    poses = np.array([camera["world_to_camera"] for camera in cameras], np.float64).reshape(-1, 4, 4)
    names = [str(camera["camera"]) for camera in cameras]
    try:
        check_matrices(K, poses, "it")
    except UserError as error:
        yield Finding("error", where, f"cannot be: {error}")
        return
    x, y, z = np.einsum("vij,vj->iv", K, poses[:, :3, 3])
    outside = (z <= 0) | (x < 0) | (x > z * manifest.size) | (y < 0) | (y > z * manifest.size)
    for v in np.flatnonzero(outside):
        yield Finding("warning", where, f"has the head's centre outside the picture of camera {names[v]}.")


def _check_picture(manifest: Manifest, where: str, name: str, sample: dict[str, bytes]) -> Iterator[Finding]:
    image = np.empty((manifest.size, manifest.size, 3), np.uint8)
    mask = np.empty((manifest.size, manifest.size), np.uint8)
    try:
        member = f"{name}.{extension(manifest.settings.codec)}"
        decode_picture(sample[member], image, f"{where}.{member}", manifest.settings.codec)
        decode_mask(sample[f"{name}.mask.png"], mask, f"{where}.{name}.mask.png")
    except UserError as error:
        yield Finding("error", f"{where}.{name}", str(error))
        return
    if not mask.any():
        yield Finding("warning", f"{where}.{name}", "has an empty mask.")


def _prior_shapes(manifest: Manifest) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What each picture of an input set comes with: the end of the member's name to its type and shape."""
    priors, size = manifest.priors, manifest.size
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    if priors.position != "none":
        shapes["position.npy"] = ("float16", (3, size, size))
        shapes["confidence.npy"] = ("float16", (1, size, size))
    if priors.features != "none":
        kind = "int8" if priors.storage == "int8" else "float16"
        shapes["features.npy"] = (kind, (priors.feature_dim, *priors.feature_grid))
        if priors.storage == "int8":
            shapes["features-scale.npy"] = ("float16", (priors.feature_dim, 1, 1))
    return shapes


def _check_prior(where: str, data: bytes, kind: str, shape: tuple[int, ...]) -> Iterator[Finding]:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        yield Finding("error", where, f"cannot be read ({error}).")
        return
    if array.shape != shape or array.dtype != kind:
        yield Finding("error", where, f"is {array.dtype} {array.shape} where {kind} {shape} is declared.")
    elif not np.isfinite(array).all():
        yield Finding("error", where, "has numbers that are not finite.")
    elif where.endswith("confidence.npy") and float(array.min()) < 1:
        yield Finding("error", where, f"has a confidence of {float(array.min()):.3g}, below 1.")


def _shortened(found: list[Finding]) -> list[Finding]:
    """The findings of one shard, without the hundreds that say the same of each picture."""
    kept, counts = [], Counter[tuple[str, str]]()
    for finding in found:
        kind = (finding.severity, re.sub(r"\d+", "#", finding.what))
        counts[kind] += 1
        if counts[kind] <= MANY:
            kept.append(finding)
    shard = found[0].where.split(":")[0] if found else ""
    for (severity, _), count in counts.items():
        if count > MANY:
            kept.append(Finding(severity, shard, f"and {count - MANY} more findings of a kind told above."))
    return kept
