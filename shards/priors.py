"""Priors of input sets: position, confidence and feature maps in few bits, and shards written anew with them.

Positions and confidence are stored in 16 bits. Features are stored in 16 bits, or in 8 with one scale a
picture and channel: the smallest 16-bit scale s for which no |feature| of the channel exceeds 127 s.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from avatars.errors import UserError
from avatars.inputs import InputSet
from shards.manifest import Manifest, PriorError, PriorSettings, ShardInfo, write_json
from shards.reading import open_reader, read_description, read_input_set
from shards.tarfiles import INDEX_KEY, Data, ShardReader, ShardWriter

__all__ = [
    "PriorErrors",
    "PriorMaps",
    "encode_features",
    "encode_positions",
    "input_sets",
    "write_with_priors",
]

POSITION_MEMBERS = ("position.npy", "confidence.npy")
FEATURE_MEMBERS = ("features.npy", "features-scale.npy")


@dataclass
class PriorMaps:
    """The priors of one input set. None keeps what the shards have, or have not, of that kind.

    Attributes:
        positions: (N, 3, S, S) in the head frame, metres.
        confidence: (N, 1, S, S) trust in `positions` in DUSt3R's raw space, at least 1, where 1 is no trust.
        features: (N, D, h, w) a semantic vector a patch.
    """

    positions: Tensor | None = None
    confidence: Tensor | None = None
    features: Tensor | None = None


@dataclass
class _Differences:
    """Largest difference, sum of squares and how many."""

    largest: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, stored: NDArray, exact: NDArray) -> None:
        difference = stored.astype(np.float64) - exact
        if difference.size:
            self.largest = max(self.largest, float(np.abs(difference).max()))
            self.squares += float((difference**2).sum())
            self.count += difference.size

    def join(self, other: _Differences) -> None:
        self.largest = max(self.largest, other.largest)
        self.squares += other.squares
        self.count += other.count

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / max(self.count, 1))


@dataclass
class PriorErrors:
    """What storage costs, summed up over pictures, shards and subjects."""

    position: _Differences = dataclasses.field(default_factory=_Differences)
    features: _Differences = dataclasses.field(default_factory=_Differences)

    def join(self, other: PriorErrors) -> None:
        """Adds what another process or shard found."""
        self.position.join(other.position)
        self.features.join(other.features)

    def to_json(self) -> dict[str, Any]:
        """For a receipt."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PriorErrors:
        """Out of a receipt."""
        return cls(_Differences(**values["position"]), _Differences(**values["features"]))

    def summary(self) -> PriorError:
        """For the manifest."""
        position, features = self.position, self.features
        return PriorError(
            position_max=position.largest if position.count else None,
            position_rms=position.rms if position.count else None,
            features_max=features.largest if features.count else None,
            features_rms=features.rms if features.count else None,
        )


def encode_positions(
    positions: NDArray[np.float32], confidence: NDArray[np.float32], errors: PriorErrors
) -> dict[str, bytes]:
    """Members of one picture's position map (3, S, S) and confidence (1, S, S); adds what 16 bits cost to
    `errors`, where the confidence is above 1.
    """
    stored = positions.astype(np.float16)
    trusted = np.broadcast_to(confidence > 1, positions.shape)
    errors.position.add(stored[trusted], positions[trusted])
    largest = np.finfo(np.float16).max  # DUSt3R's confidence is an exponential
    return {
        "position.npy": _npy(stored),
        "confidence.npy": _npy(np.minimum(confidence, largest).astype(np.float16)),
    }


def encode_features(features: NDArray[np.float32], storage: str, errors: PriorErrors) -> dict[str, bytes]:
    """Members of one picture's feature map (D, h, w) in "fp16" or "int8"; adds what that costs to `errors`."""
    if storage == "fp16":
        stored = features.astype(np.float16)
        errors.features.add(stored, features)
        return {"features.npy": _npy(stored)}
    exact = np.abs(features).max(axis=(1, 2), keepdims=True) / 127
    scale = exact.astype(np.float16)
    scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale)  # (D, 1, 1)
    levels = features / np.where(scale > 0, scale, 1).astype(np.float32)
    quantised = np.clip(np.rint(levels), -127, 127).astype(np.int8)
    errors.features.add(quantised * scale.astype(np.float32), features)
    return {"features.npy": _npy(quantised), "features-scale.npy": _npy(scale)}


def input_sets(manifest: Manifest, shard: ShardInfo) -> Iterator[InputSet]:
    """The input sets of one shard, in the order of the file. `provenance["id"]` names each of them.

    Raises:
        UserError: the shard cannot be read.
    """
    reader = open_reader(manifest, shard, None)
    try:
        for j in range(len(shard.inputs)):
            yield read_input_set(reader, f"inputs-{j:03d}", manifest)
    finally:
        reader.close()


def write_with_priors(
    folder: str | Path,
    out: str | Path,
    compute: Callable[[InputSet], PriorMaps],
    settings: PriorSettings,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Copies a folder of shards and gives its input sets other priors. What is not a prior stays as it is.

    A copy that was stopped goes on with the first shard that is not whole; the manifest is written last.
    Equal shards, settings and computed maps give equal bytes.

    Args:
        folder: what `pack` or this function wrote.
        out: another folder; made when not there.
        compute: the priors of one input set. It is called once for every set of the shards that are not
            there yet, in the order of the manifest, and may return positions or features of None where the
            shards already have the ones that `settings` names, which are then copied.
        settings: what the new shards have; `feature_grid` may be left out.
        progress: called with a line of text after each shard.

    Returns:
        The manifest of the new shards, with the measured error of storage.

    Raises:
        UserError: no valid shards, a target that holds other shards, maps with numbers that are not finite,
            no space left.
        ValueError: `compute` returned maps that `settings` does not name, or of the wrong shape.
    """
    manifest, out = Manifest.load(folder), Path(out)
    _check_settings(settings)
    if isinstance(manifest.folder, str):
        raise UserError(f"{folder} is not on this machine. Copy the shards here and give that folder.")
    if (out / "manifest.json").exists():
        raise UserError(f"{out} already holds packed shards. Give another folder, or remove this one first.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        receipts = []
        for number, shard in enumerate(manifest.shards, 1):
            receipts.append(_write_shard(manifest, shard, out, compute, settings))
            if progress is not None:
                progress(f"{number}/{len(manifest.shards)} {shard.path}: {len(shard.inputs)} input sets")
        made = _manifest(manifest, out, settings, receipts)
        made.save()
        for shard in manifest.shards:
            _receipt_path(out, shard).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}). Make space or give another folder, then"
            " run the same command: finished shards are kept."
        ) from None
    return made


def _write_shard(
    manifest: Manifest,
    shard: ShardInfo,
    out: Path,
    compute: Callable[[InputSet], PriorMaps],
    settings: PriorSettings,
) -> dict[str, Any]:
    """Writes one shard with its new priors and a receipt; with a valid receipt there, only reads it."""
    receipt_path, path = _receipt_path(out, shard), out / shard.path
    fingerprint = {"source": shard.sha256, "priors": json.loads(json.dumps(dataclasses.asdict(settings)))}
    try:
        receipt: dict[str, Any] = json.loads(receipt_path.read_text())
        if receipt["fingerprint"] == fingerprint and path.stat().st_size == receipt["bytes"]:
            return receipt
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not written yet, or by another version: write it now
    errors, grids = PriorErrors(), set[tuple[int, int]]()
    reader = open_reader(manifest, shard, None)
    if not isinstance(reader, ShardReader):
        raise TypeError(f"{path} is read as a stream; only files can be copied")
    with ShardWriter(path) as writer:
        for key in reader.keys:
            if key == INDEX_KEY:
                continue
            members = reader.read(key, list(reader.extensions(key)))
            if key.startswith("inputs-"):
                inputs = read_input_set(reader, key, manifest)
                maps = compute(inputs)
                _check_maps(maps, inputs, manifest.priors, settings)
                described = read_description(reader, key)
                described |= {"prior": settings.position, "features": settings.features}
                members, grid = _with_maps(members, described, maps, manifest, settings, errors)
                grids.add(grid)
            writer.write(key, members)
    reader.close()
    if len(grids) > 1:
        raise ValueError(f"feature maps of several sizes: {sorted(grids)}")
    receipt = {
        "fingerprint": fingerprint,
        "bytes": writer.size,
        "sha256": writer.sha256,
        "index": list(writer.index),
        "grid": list(grids.pop()) if grids else [0, 0],
        "errors": errors.to_json(),
    }
    write_json(receipt_path, receipt)
    return receipt


def _with_maps(
    members: dict[str, Data],
    described: dict[str, Any],
    maps: PriorMaps,
    manifest: Manifest,
    settings: PriorSettings,
    errors: PriorErrors,
) -> tuple[dict[str, Data], tuple[int, int]]:
    """One input set's members with other priors, in the order in which `pack` writes them, and the size of
    a feature map.
    """
    made: dict[str, Data] = {"json": json.dumps(described, separators=(",", ":")).encode()}
    grid = manifest.priors.feature_grid if settings.features != "none" else (0, 0)
    for i in range(len(described["pictures"])):
        kept = {e: data for e, data in members.items() if e.startswith(f"{i:02d}.")}
        made |= {e: data for e, data in kept.items() if not e.endswith(".npy")}
        if maps.positions is not None and maps.confidence is not None:
            new = encode_positions(maps.positions[i].numpy(), maps.confidence[i].numpy(), errors)
            made |= {f"{i:02d}.{end}": data for end, data in new.items()}
        elif settings.position != "none":
            made |= {e: data for e, data in kept.items() if e[3:] in POSITION_MEMBERS}
        if maps.features is not None:
            grid = (maps.features.shape[2], maps.features.shape[3])
            new = encode_features(maps.features[i].float().numpy(), settings.storage, errors)
            made |= {f"{i:02d}.{end}": data for end, data in new.items()}
        elif settings.features != "none":
            made |= {e: data for e, data in kept.items() if e[3:] in FEATURE_MEMBERS}
    return made, grid


def _check_settings(settings: PriorSettings) -> None:
    if settings.storage not in ("fp16", "int8"):
        raise UserError(f"Features cannot be stored as {settings.storage!r}; it must be fp16 or int8.")
    if (settings.features == "none") != (settings.feature_dim == 0) or settings.feature_dim < 0:
        raise UserError(f"{settings.feature_dim} channels are declared of the features {settings.features}.")


def _check_maps(maps: PriorMaps, inputs: InputSet, old: PriorSettings, new: PriorSettings) -> None:
    """Refuses maps that do not fit the pictures and the settings."""
    name, n, (height, width) = inputs.provenance["id"], len(inputs), inputs.size
    given = {"positions": maps.positions, "confidence": maps.confidence, "features": maps.features}
    if (maps.positions is None) != (maps.confidence is None):
        raise ValueError(f"{name}: positions come with their confidence")
    same_features = dataclasses.replace(new, position=old.position, feature_grid=old.feature_grid) == old
    for what, tensor, wanted, there in (
        ("positions", maps.positions, new.position, new.position == old.position),
        ("features", maps.features, new.features, same_features),
    ):
        if tensor is not None and wanted == "none":
            raise ValueError(f"{name}: {what} were computed and the settings say none")
        if tensor is None and wanted != "none" and not there:
            raise ValueError(f"{name}: the settings say {what} {wanted} and none were computed")
    shapes: dict[str, tuple[int, ...]] = {
        "positions": (n, 3, height, width),
        "confidence": (n, 1, height, width),
    }
    for what, tensor in given.items():
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        fits = (
            shape == shapes[what] if what in shapes else len(shape) == 4 and shape[:2] == (n, new.feature_dim)
        )
        if not fits:
            raise ValueError(f"{name}: {what} have the shape {shape}")
        if what != "confidence" and not bool((tensor.abs() <= np.finfo(np.float16).max).all()):
            raise UserError(
                f"{name}: {what} have numbers that are not finite in 16 bits. Check the network's weights."
            )
    if maps.confidence is not None and not bool((maps.confidence >= 1).all()):
        raise UserError(f"{name}: there is a confidence below 1 or not finite. Check the network's weights.")


def _manifest(old: Manifest, out: Path, settings: PriorSettings, receipts: list[dict[str, Any]]) -> Manifest:
    """The manifest of the new shards."""
    grids = {tuple(receipt["grid"]) for receipt in receipts}
    if len(grids) > 1:
        raise ValueError(f"feature maps of several sizes: {sorted(grids)}")
    errors = PriorErrors()
    for receipt in receipts:
        errors.join(PriorErrors.from_json(receipt["errors"]))
    error = errors.summary()
    if settings.position == old.priors.position != "none":  # positions that were in 16 bits before
        error = dataclasses.replace(
            error, position_max=old.prior_error.position_max, position_rms=old.prior_error.position_rms
        )
    if settings.features != "none" and not errors.features.count:
        error = dataclasses.replace(
            error, features_max=old.prior_error.features_max, features_rms=old.prior_error.features_rms
        )
    height, width = grids.pop() if grids else (0, 0)
    return dataclasses.replace(
        old,
        folder=out,
        priors=dataclasses.replace(settings, feature_grid=(height, width)),
        prior_error=error,
        shards=tuple(
            dataclasses.replace(
                shard,
                bytes=receipt["bytes"],
                sha256=receipt["sha256"],
                index=(receipt["index"][0], receipt["index"][1]),
            )
            for shard, receipt in zip(old.shards, receipts, strict=True)
        ),
    )


def _receipt_path(out: Path, shard: ShardInfo) -> Path:
    return out / f"{shard.path}.written.json"


def _npy(array: NDArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
