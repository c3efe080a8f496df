"""Training batches out of shards, prefetched by threads in the trainer's own process.

The plan says what is in a batch; threads fetch and decode just the pictures that it uses, straight into the
batch's arrays. All decoders release the interpreter lock, so no process and no copy between
processes is needed.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from avatars.errors import UserError
from shards.manifest import Manifest, ShardInfo
from shards.plans import Example, Plan
from shards.reading import (
    Reader,
    decode_views,
    fill_features,
    fill_positions,
    float_masks,
    float_pictures,
    open_reader,
    read_description,
)
from shards.stores import ShardCache

__all__ = ["BatchLoader", "to_float"]

log = logging.getLogger(__name__)

OPEN_SHARDS = 256  # file handles kept; a rank reads far fewer side by side


class BatchLoader:
    """The micro-batches of one rank, without end.

    Iterating gives micro-batches number `start`, `start + 1`, … of the plan, each a dict. Its B examples have one row
    each, those of their targets X each (R = B X), the rows of an example one after the other:

    | key | shape |
    | --- | --- |
    | input_images | (B, N, 3, H, W) float sRGB, on black unless the shards keep what is behind the head |
    | input_masks | (B, N, 1, H, W) |
    | input_K, input_world_to_camera | (B, N, 3, 3), (B, N, 4, 4) in the head frame |
    | input_positions, input_confidence | (B, N, 3, H, W) metres, (B, N, 1, H, W); absent without a prior |
    | input_features | (B, N, D, h, w) a vector a patch; absent without a feature prior |
    | expression | (R, E) code of the target timestep |
    | identity | (R, I) code of the person's head; absent without a tracked head |
    | target_images, target_masks | (R, v, 3, H, W), (R, v, 1, H, W) |
    | target_K, target_world_to_camera | (R, v, 3, 3), (R, v, 4, 4) in the head frame |
    | ids | R names: subject/timestep/input set/views@place in the plan |

    Args:
        folder: where `pack` wrote, or a URL of a copy of it.
        split: "train" or "heldout".
        seed: of the order and all draws.
        micro_batch: examples in a batch, B.
        world_size: number of ranks.
        rank: of these.
        start: number of the first micro-batch.
        views: target views of an example, v.
        threads: decoding threads. They change nothing in what comes out.
        prefetch: batches that are worked on ahead of the one asked for.
        cache: keeps copies of remote shards; without one they are streamed.
        tolerate: shards that cannot be read and are put aside before one more ends the run.
        inputs: whether the pictures, cameras and priors of the input sets are read; absent otherwise.
        expressions: target timesteps of an example, X.
        raw: pictures and masks as they are decoded, uint8 in [0, 255], and priors as they are stored,
            float16, or int8 with `input_features_scale` (B, N, D, 1, 1) float16: a fifth of the memory.
            `to_float` makes of them what comes without `raw`; `input_background` tells it what the pictures are.

    Attributes:
        step: number of the next micro-batch.
        wait_seconds: time that `next` has waited for data so far.
        quarantined: shards that were put aside, each with the reason.

    Raises:
        UserError: no valid shards; when iterating, a shard that cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        seed: int,
        micro_batch: int,
        world_size: int = 1,
        rank: int = 0,
        start: int = 0,
        views: int = 8,
        threads: int = 2,
        prefetch: int = 2,
        raw: bool = False,
        cache: ShardCache | None = None,
        tolerate: int = 0,
        inputs: bool = True,
        expressions: int = 1,
    ) -> None:
        self.manifest = Manifest.load(folder)
        shards = self.manifest.split(split)
        if expressions > 1 and isinstance(self.manifest.folder, str) and cache is None:
            raise UserError(
                f"{folder} is streamed front to back, and {expressions} expressions an example jump about in a shard: "
                "give --data.cache a folder for copies."
            )
        self.plan = Plan(shards, seed=seed, views=views, expressions=expressions)
        self.step = start
        self.wait_seconds = 0.0
        self._place: dict[str, int] = {"micro_batch": micro_batch, "world_size": world_size, "rank": rank}
        self.quarantined: dict[str, str] = {}
        self._tolerate, self._quarantine = tolerate, threading.Lock()
        self._shards = _OpenShards(self.manifest, shards, cache)
        self._buffers = _Buffers()
        self._prefetch, self._raw, self._inputs = prefetch, raw, inputs
        self._identity: int | None = None  # numbers of the head's code, once a shard has been looked into
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="headsplat-loader")
        self._ahead: deque[_Pending] = deque()
        self._asked = start

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        started = time.perf_counter()
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(self._ask(self._asked))
            self._asked += 1
        batch = self._ahead.popleft().result()
        self.step += 1
        self.wait_seconds += time.perf_counter() - started
        return batch

    def close(self) -> None:
        """Stops the threads and closes the files."""
        for pending in self._ahead:
            pending.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self._shards.close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, step: int) -> _Pending:
        """Starts the work on one micro-batch."""
        examples = self.plan.batch(step, **self._place)
        settings = self.manifest.settings
        size, n, v = settings.size, settings.n_inputs, self.plan.views
        pixels, prior = (np.uint8, np.float16) if self._raw else (np.float32, np.float32)
        picture = (size, size, 3) if self._raw else (3, size, size)
        layout: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
            "expression": (np.float32, (self.manifest.expression_length,)),
            "target_images": (pixels, (v, *picture)),
            "target_masks": (pixels, (v, 1, size, size)),
            "target_K": (np.float32, (v, 3, 3)),
            "target_world_to_camera": (np.float32, (v, 4, 4)),
        }
        if self._identity is None:
            self._identity = self._identity_length() if self.manifest.head is not None else 0
        if self._identity:
            layout["identity"] = (np.float32, (self._identity,))
        priors = self.manifest.priors
        if self._inputs:
            layout["input_images"] = (pixels, (n, *picture))
            layout["input_masks"] = (pixels, (n, 1, size, size))
            layout["input_K"] = (np.float32, (n, 3, 3))
            layout["input_world_to_camera"] = (np.float32, (n, 4, 4))
        if self._inputs and priors.position != "none":
            layout["input_positions"] = (prior, (n, 3, size, size))
            layout["input_confidence"] = (prior, (n, 1, size, size))
        if self._inputs and priors.features != "none":
            quantised = self._raw and priors.storage == "int8"
            channels = (n, priors.feature_dim)
            layout["input_features"] = (np.int8 if quantised else prior, (*channels, *priors.feature_grid))
            if quantised:
                layout["input_features_scale"] = (np.float16, (*channels, 1, 1))
        each = {name: 1 if name.startswith("input_") else self.plan.expressions for name in layout}
        arrays = {
            name: self._buffers.take((len(examples) * each[name], *shape), kind)
            for name, (kind, shape) in layout.items()
        }
        futures = [
            self._pool.submit(
                self._fill,
                example,
                {name: array[i * each[name] : (i + 1) * each[name]] for name, array in arrays.items()},
            )
            for i, example in enumerate(examples)
        ]
        told: dict[str, str] = {}
        if self._raw and self._inputs:
            told["input_background"] = settings.input_background
        return _Pending(arrays, futures, told)

    def _identity_length(self) -> int:
        """Numbers of the head's code, from the first shard that can be read; 0 where no shard has one."""
        for shard in self.plan.shards:
            try:
                with closing(open_reader(self.manifest, shard, self._shards.cache)) as reader:
                    return len(read_description(reader, "inputs-000")["identity"] or ())
            except UserError:
                continue  # told, and put aside, when an example asks for it
        return 0

    def _fill(self, example: Example, out: dict[str, NDArray[Any]]) -> list[str]:
        """Reads one example, or the one that takes its place, into its rows of the batch; returns its
        targets' names.
        """
        for substitute in range(self.plan.epoch_length):
            tried = self.plan.example(example.position + substitute) if substitute else example
            if self.plan.shards[tried.shard].path in self.quarantined:
                continue
            try:
                return self._read(tried, out)
            except UserError as error:
                self._put_aside(self.plan.shards[tried.shard].path, error)
        raise UserError(f"{self.manifest.folder} has no shard left that can be read.")

    def _put_aside(self, path: str, error: UserError) -> None:
        """Puts an unreadable shard aside, or ends the run where that is not tolerated (any more)."""
        with self._quarantine:
            if path in self.quarantined:
                return
            if len(self.quarantined) >= self._tolerate:
                if not self._tolerate:
                    raise error
                raise UserError(
                    f"More than {self._tolerate} shards cannot be read, the last because: {error}"
                )
            self.quarantined[path] = str(error)
        log.warning(
            "%s is put aside (%d of %d tolerated): %s", path, len(self.quarantined), self._tolerate, error
        )

    def _read(self, example: Example, out: dict[str, NDArray[Any]]) -> list[str]:
        """Reads one example into its rows of the batch; returns its targets' names."""
        with self._shards.reader(example) as reader:
            inputs = f"inputs-{example.input_set:03d}"
            if self._inputs or "identity" in out:
                described = read_description(reader, inputs)
            if "identity" in out:
                for row in out["identity"]:
                    _fill_identity(reader, described["identity"], row)
            names = [f"{i:02d}" for i in range(self.manifest.settings.n_inputs)]
            if self._inputs:
                kept = self.manifest.settings.input_background == "kept"
                self._fill_views(reader, inputs, names, out["input_images"][0], out["input_masks"][0], kept)
                _fill_cameras(described["pictures"], out["input_K"][0], out["input_world_to_camera"][0])
            if "input_positions" in out:
                fill_positions(reader, inputs, names, out["input_positions"][0], out["input_confidence"][0])
            if "input_features" in out:
                storage, scales = self.manifest.priors.storage, out.get("input_features_scale")
                fill_features(
                    reader,
                    inputs,
                    names,
                    out["input_features"][0],
                    storage,
                    None if scales is None else scales[0],
                )
            names = [f"{i:03d}" for i in example.views]
            rows = {key: array for key, array in out.items() if not key.startswith("input_")}
            return [
                self._read_target(
                    reader, example, target, names, {key: array[i] for key, array in rows.items()}
                )
                for i, target in enumerate((example.target, *example.others))
            ]

    def _read_target(
        self, reader: Reader, example: Example, target: int, names: list[str], out: dict[str, NDArray[Any]]
    ) -> str:
        """Reads one target timestep of an example into its row; returns its name."""
        key = f"target-{target:05d}"
        described = read_description(reader, key)
        self._fill_views(reader, key, names, out["target_images"], out["target_masks"])
        cameras = [described["cameras"][i] for i in example.views]
        _fill_cameras(cameras, out["target_K"], out["target_world_to_camera"])
        out["expression"][:] = described["expression"]
        views = ",".join(str(camera["camera"]) for camera in cameras)
        inputs = f"inputs-{example.input_set:03d}"
        return f"{described['subject']}/{described['timestep']}/{inputs}/{views}@{example.position}"

    def _fill_views(
        self,
        reader: Reader,
        key: str,
        names: list[str],
        images: NDArray[Any],
        masks: NDArray[Any],
        kept: bool = False,
    ) -> None:
        """Decodes views into their rows of a batch, through a copy unless they stay as they are; with their background
        where it is `kept`.
        """
        if self._raw:
            decode_views(reader, key, names, images, masks[:, 0], self.manifest.settings.codec)
            return
        size = self.manifest.size
        pixels = np.empty((len(names), size, size, 3), np.uint8)
        coverage = np.empty((len(names), size, size), np.uint8)
        decode_views(reader, key, names, pixels, coverage, self.manifest.settings.codec)
        float_pictures(pixels, None if kept else coverage, out=images)
        float_masks(coverage, out=masks)


def to_float(batch: dict[str, Any]) -> dict[str, Any]:
    """Makes of a raw batch, on whatever device it is, what comes without `raw`."""
    made = dict(batch)
    kept = made.pop("input_background", "masked") == "kept"
    for kind in ("input", "target"):
        if f"{kind}_images" not in batch:
            continue
        images, masks = batch[f"{kind}_images"], batch[f"{kind}_masks"]
        if not (kept and kind == "input"):
            images = images * (masks > 0)
        made[f"{kind}_images"] = images.to(torch.float32, copy=True).mul_(1 / 255).contiguous()
        made[f"{kind}_masks"] = masks.float().mul_(1 / 255)
    for name in ("input_positions", "input_confidence", "input_features"):
        if name in batch:
            made[name] = batch[name].float()
    if (scale := made.pop("input_features_scale", None)) is not None:
        made["input_features"].mul_(scale.float())
    return made


def _fill_identity(reader: Reader, identity: list[float] | None, out: NDArray[np.float32]) -> None:
    if identity is None or len(identity) != len(out):
        raise UserError(
            f"{reader.path}: its person has a head code of {len(identity or ())} numbers and others have {len(out)}. "
            "Pack captures that one head tracked."
        )
    out[:] = identity


def _fill_cameras(
    described: list[dict[str, Any]], K: NDArray[np.float32], poses: NDArray[np.float32]
) -> None:
    for i, camera in enumerate(described):
        K[i] = camera["K"]
        poses[i] = camera["world_to_camera"]


@dataclass
class _Pending:
    """A batch that threads are filling."""

    arrays: dict[str, NDArray[Any]]
    futures: list[Future[list[str]]]
    told: dict[str, str]

    def result(self) -> dict[str, Any]:
        """Waits; raises what a thread raised."""
        try:
            ids = [name for future in self.futures for name in future.result()]
        except BaseException:
            self.cancel()
            raise
        batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        for name in {"input_images", "target_images"} & set(batch):
            if batch[name].shape[-1] == 3 and batch[name].dtype == torch.uint8:  # decoders write (H, W, 3)
                batch[name] = batch[name].permute(0, 1, 4, 2, 3)
        return {**batch, **self.told, "ids": ids}

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()


class _Buffers:
    """Arrays for batches, used again once nobody holds the batch: touching new memory costs as much as
    decoding.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[int, ...], type[np.generic]], list[NDArray[Any]]] = {}

    def take(self, shape: tuple[int, ...], kind: type[np.generic]) -> NDArray[Any]:
        """An array that is in no batch; what is in it is left over."""
        arrays = self._made.setdefault((shape, kind), [])
        for i in range(len(arrays)):
            if sys.getrefcount(arrays[i]) == 2:  # the list's reference, and the one of the call itself
                return arrays[i]
        arrays.append(np.empty(shape, kind))
        return arrays[-1]


class _OpenShards:
    """Readers of the shards in use; the one unused for longest is closed when there are too many.

    A file is shared by all lanes. A stream is one lane's: it only goes forward.
    """

    def __init__(self, manifest: Manifest, shards: list[ShardInfo], cache: ShardCache | None) -> None:
        self._manifest, self._shards, self.cache = manifest, shards, cache
        self._streams = isinstance(manifest.folder, str) and cache is None
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[int, int], _Shared] = OrderedDict()

    def reader(self, example: Example) -> _Shared:
        """The reader of an example's shard, to be used in a `with` block: it is not closed meanwhile."""
        place = (example.shard, example.lane if self._streams else -1)
        with self._lock:
            shared = self._open.get(place)
            if shared is None:
                shared = self._open[place] = _Shared(self, self._shards[example.shard])
            shared.users += 1
            self._open.move_to_end(place)
            unused = [place for place, other in self._open.items() if not other.users]
            for old in unused[: max(len(self._open) - OPEN_SHARDS, 0)]:
                self._open.pop(old).close()
            return shared

    def open(self, shard: ShardInfo) -> Reader:
        return open_reader(self._manifest, shard, self.cache)

    def release(self, shared: _Shared) -> None:
        with self._lock:
            shared.users -= 1

    def close(self) -> None:
        with self._lock:
            for shared in self._open.values():
                shared.close()
            self._open.clear()


class _Shared:
    """A shard reader that several threads use, opened by the first of them."""

    def __init__(self, owner: _OpenShards, shard: ShardInfo) -> None:
        self._owner, self._shard = owner, shard
        self._lock = threading.Lock()
        self._reader: Reader | None = None
        self.users = 0

    def __enter__(self) -> Reader:
        try:
            with self._lock:
                if self._reader is None:
                    self._reader = self._owner.open(self._shard)
                return self._reader
        except BaseException:
            self._owner.release(self)
            raise

    def __exit__(self, *error: object) -> None:
        self._owner.release(self)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
