"""Priors of all input sets, computed once: actors fill a store of maps, then shards are written with them.

The store lies beside the shards. Features are kept by picture, under a hash of its pixels, so that a picture that
several input sets share is computed once; positions depend on the whole set and are kept by set. Every file names its
network by the hash of its weights and gets its name when it is whole, so the same command goes on after anything.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from avatars.errors import UserError
from cluster.fit import gpus_here, slots_here
from cluster.pool import Event, Job, Outcome, Report, run_jobs
from cluster.session import ray_session

if TYPE_CHECKING:
    from torch import Tensor

    from avatars.inputs import InputSet
    from avatars.priors import DUSt3RPrior, Features
    from avatars.priors.reduction import Reduction
    from avatars.priors.registry import NetworkFile
    from shards import Manifest, PriorError

__all__ = [
    "Precomputed",
    "PriorRequest",
    "Storage",
    "compute_subject",
    "fit_reduction",
    "precompute_priors",
    "storage_needed",
]

REDUCTION_PICTURES = 256
"""Pictures of training subjects that a reduction of channels is fitted to; each gives a vector a patch."""
REDUCTION_FILE = "features-reduction.safetensors"


@dataclass(frozen=True)
class PriorRequest:
    """Which maps to compute, and how.

    Attributes:
        position: weights of DUSt3R or MASt3R; None keeps the shards' own positions, or leaves them out.
        keep_position: whether to keep the shards' own positions where `position` is None.
        features: weights of a feature network, None for no features.
        channels: principal components to keep of the features; 0 for all channels.
        storage: how shards keep features; the store always keeps 16 bits.
        precision: of the networks.
        batch: pictures, or pairs of them, at a time.
    """

    position: NetworkFile | None = None
    keep_position: bool = True
    features: NetworkFile | None = None
    channels: int = 0
    storage: Literal["fp16", "int8"] = "fp16"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: int = 4


@dataclass(frozen=True)
class Storage:
    """Bytes that a precompute will write at most: pictures that sets share are stored once.

    Attributes:
        store_positions: of the store's position and confidence maps.
        store_features: of the store's feature maps.
        shards: of the new shards, pictures included.
        sets: input sets.
        pictures: pictures in them.
    """

    store_positions: int
    store_features: int
    shards: int
    sets: int
    pictures: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.store_positions + self.store_features + self.shards

    def __str__(self) -> str:
        return (
            f"{self.sets} input sets of {self.pictures} pictures need at most {self.total / 1e9:.3f} GB: positions "
            f"{self.store_positions / 1e9:.3f}, features {self.store_features / 1e9:.3f}, new shards "
            f"{self.shards / 1e9:.3f}"
        )


@dataclass(frozen=True)
class Precomputed:
    """What a precompute did.

    Attributes:
        manifest: of the new shards.
        pictures: feature maps computed now.
        sets: position maps computed now.
        found: maps that were in the store already, or of pictures that had been seen.
        seconds: that the actors computed, summed up.
    """

    manifest: Manifest
    pictures: int
    sets: int
    found: int
    seconds: float


def storage_needed(manifest: Manifest, request: PriorRequest) -> Storage:
    """What a precompute will write, from the manifest and the networks' shapes alone."""
    settings = manifest.settings
    sets = sum(len(shard.inputs) for shard in manifest.shards)
    pictures = sets * settings.n_inputs
    position = 2 * 4 * settings.size**2 * pictures  # x, y, z and confidence
    there = sum(shard.bytes for shard in manifest.shards)
    old, old_grid = manifest.priors, math.prod(manifest.priors.feature_grid)
    there -= position if old.position != "none" else 0
    there -= pictures * old.feature_dim * old_grid * (1 if old.storage == "int8" else 2)
    features = 0
    if request.features is not None:
        dim, grid = feature_shape(request.features)
        features = pictures * (request.channels or dim) * math.prod(grid)
    keeps = request.position is not None or (request.keep_position and old.position != "none")
    return Storage(
        store_positions=position if request.position else 0,
        store_features=2 * features,
        shards=there + (position if keeps else 0) + features * (1 if request.storage == "int8" else 2),
        sets=sets,
        pictures=pictures,
    )


def feature_shape(network: NetworkFile) -> tuple[int, tuple[int, int]]:
    """Channels and grid of a feature network's maps, without its weights where they are published ones."""
    from avatars.priors.features import SAPIENS

    kind, _, size = network.kind.partition("-")
    if kind == "sapiens" and size:
        return SAPIENS[size][0], (64, 64)
    model = _feature_prior(network, "fp32", "cpu")
    return model.dim, model.grid


def precompute_priors(
    folder: str | Path,
    out: str | Path,
    request: PriorRequest,
    *,
    store: str | Path | None = None,
    workers: int | None = None,
    cpus_per_actor: float = 1,
    gpus_per_actor: float | None = None,
    retries: int = 2,
    on_event: Callable[[Event], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Precomputed:
    """Computes the priors of every input set of a folder of shards, and writes shards that have them.

    May be called again at any time: maps in the store are not computed again, whole shards are not written again.
    Equal shards, weights and settings give equal bytes on one kind of machine. On several machines `folder` and
    `store` must be on storage that all of them share.

    Args:
        folder: packed shards.
        out: folder for the new ones.
        request: what to compute.
        store: where maps are kept; `folder` with "-priors" at the end when None. It may be removed afterwards.
        workers: actors at work at the same time, each on another subject; as many as there is room for when None.
        cpus_per_actor: CPUs, and threads, of each.
        gpus_per_actor: GPUs of each; None is one where this machine has any, and 0 elsewhere.
        retries: how often a subject is tried again whose actor died.
        on_event: told of what happens to the actors, in this process; a report has "sets" and "of".
        say: called with lines of text: what storage it will take, and each shard that is written.

    Raises:
        UserError: no such shards, `out` holds other shards, too little space, pictures or cameras that a network
            cannot use, a map in the store that is another network's or cut short, or no room for an actor.
    """
    from shards import Manifest, PriorSettings, write_with_priors

    tell = say or (lambda line: None)
    manifest = Manifest.load(folder)
    if isinstance(manifest.folder, str):
        raise UserError(f"{folder} is not on this machine. Copy the shards here and give that folder.")
    folder, out = Path(folder).resolve(), Path(out).resolve()
    kept_at = Path(store).resolve() if store else folder.with_name(f"{folder.name}-priors")
    if (out / "manifest.json").exists():
        raise UserError(f"{out} already holds packed shards. Give another folder, or remove this one first.")
    if request.channels and request.features is None:
        raise UserError(
            "There are no features to reduce the channels of; name a feature prior, or 0 channels."
        )
    needed = storage_needed(manifest, request)
    tell(f"{needed}.")
    _check_space(out, needed)

    if gpus_per_actor is None:
        gpus_per_actor = float(gpus_here() > 0)
    shared = {
        "folder": str(folder),
        "store": str(kept_at),
        "request": request,
        "gpu": gpus_per_actor > 0,
        "reduction": None,
    }

    def run(function: Callable[[dict[str, Any], Report], Any], jobs: list[Job]) -> list[Outcome]:
        here = min(len(jobs), workers or slots_here(cpus_per_actor, gpus_per_actor))
        with ray_session(here * cpus_per_actor, here * gpus_per_actor):
            outcomes = run_jobs(
                function,
                jobs,
                slots=min(len(jobs), workers or slots_here(cpus_per_actor, gpus_per_actor)),
                cpus=cpus_per_actor,
                gpus=gpus_per_actor,
                retries=retries,
                on_event=on_event,
            )
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if failed:
            raise UserError(
                f"The priors of {failed[0].name} could not be computed"
                f"{f', nor those of {len(failed) - 1} others' if len(failed) > 1 else ''}: {failed[0].error} "
                "What is computed is kept: run the same command again."
            )
        return outcomes

    outcomes: list[Outcome] = []
    reduction = None
    if request.position is not None or request.features is not None:
        if request.channels:
            file = _reduction_file(kept_at, request)
            if not file.is_file():
                run(fit_reduction, [Job("the reduction", {**shared, "file": str(file)})])
            reduction = _read_reduction(file)
            tell(
                f"{request.channels} principal components keep {100 * reduction.kept:.1f} % of the features' variance."
            )
            shared["reduction"] = str(file)
        subjects = [s for split in ("train", "heldout") for s in manifest.subjects(split)]
        outcomes = run(
            compute_subject, [Job(subject, {**shared, "subject": subject}) for subject in subjects]
        )

    settings = PriorSettings(
        position=_position_name(manifest, request),
        features=_feature_name(request, reduction),
        feature_dim=(request.channels or feature_shape(request.features)[0]) if request.features else 0,
        storage=request.storage,
    )
    done = [outcome.value for outcome in outcomes]
    try:
        if reduction is not None:
            reduction.save(out / REDUCTION_FILE)
        made = write_with_priors(folder, out, _Store(kept_at, request, reduction).read, settings, tell)
        made = replace(made, prior_error=_with_own_error(made.prior_error, done))
        made.save()
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}). Make space, then run it again."
        ) from None
    return Precomputed(
        made,
        pictures=sum(value["pictures"] for value in done),
        sets=sum(value["sets"] for value in done),
        found=sum(value["found"] for value in done),
        seconds=sum(value["seconds"] for value in done),
    )


def compute_subject(arguments: dict[str, Any], report: Report) -> dict[str, Any]:
    """Computes what the store lacks of one subject, in an actor or anywhere else.

    Args:
        arguments: as `precompute_priors` makes them.
        report: told "sets" and "of" after every input set.

    Returns:
        How many feature maps ("pictures") and position maps ("sets") were computed, how many were "found", and the
        "seconds" that the networks took, and under "position" and "features" what the store's 16 bits cost.
    """
    import time

    import torch

    request: PriorRequest = arguments["request"]
    device = _device(arguments["gpu"])
    reduction = _read_reduction(Path(arguments["reduction"])) if arguments["reduction"] else None
    store = _Store(Path(arguments["store"]), request, reduction)
    done: dict[str, Any] = {"pictures": 0, "sets": 0, "found": 0, "seconds": 0.0}
    used: dict[str, set[Path]] = {"position": set(), "features": set()}
    waiting: dict[Path, Tensor] = {}

    def flush() -> None:
        if not waiting or request.features is None:
            return
        start = time.perf_counter()
        features = _feature_prior(request.features, request.precision, device)(
            torch.stack(list(waiting.values())).to(device)
        )
        if reduction is not None:
            features = reduction(features)
        features = features.cpu()
        done["seconds"] += time.perf_counter() - start
        for path, feature in zip(waiting, features, strict=True):
            store.write(path, {"features": feature}, store.feature_identity)
            done["pictures"] += 1
        waiting.clear()

    sets = _sets_of(arguments["folder"], arguments["subject"])
    try:
        for number, load in enumerate(sets, 1):
            inputs = load()
            if request.position is not None:
                path = store.position_path(inputs)
                used["position"].add(path)
                if path.is_file():
                    done["found"] += 1
                else:
                    start = time.perf_counter()
                    prior = _position_prior(request.position, request.precision, device, request.batch)
                    moved = inputs.to(device)
                    try:
                        positions, confidence = prior(moved.images, moved.cameras, moved.masks)
                    except UserError as error:
                        raise UserError(f"{inputs.provenance['id']}: {error}") from None
                    done["seconds"] += time.perf_counter() - start
                    tensors = {"positions": positions.cpu(), "confidence": confidence.cpu()}
                    store.write(path, tensors, store.position_identity)
                    done["sets"] += 1
            if request.features is not None:
                for path, image in zip(store.feature_paths(inputs), inputs.images, strict=True):
                    used["features"].add(path)
                    if path in waiting or path.is_file():
                        done["found"] += 1
                        continue
                    waiting[path] = image
                    if len(waiting) == request.batch:
                        flush()
            report(sets=number, of=len(sets))
        flush()
    except OSError as error:
        raise UserError(
            f"{store.folder} cannot be written ({error.strerror or error}). Make space there or name another store."
        ) from None
    return done | {kind: store.cost(kind, sorted(paths)) for kind, paths in used.items()}


def fit_reduction(arguments: dict[str, Any], report: Report) -> None:
    """Fits the reduction of channels to pictures of training subjects, evenly spread, and writes its file."""
    from avatars.priors.reduction import ReductionFit
    from shards import Manifest

    request: PriorRequest = arguments["request"]
    if request.features is None:
        raise ValueError("a reduction needs features")
    device = _device(arguments["gpu"])
    manifest = Manifest.load(arguments["folder"])
    sets = [load for subject in manifest.subjects("train") for load in _sets_of(arguments["folder"], subject)]
    wanted = min(len(sets), max(1, REDUCTION_PICTURES // manifest.settings.n_inputs))
    model = _feature_prior(request.features, request.precision, device)
    fit = ReductionFit(model.dim)
    seen = set()
    for number in range(wanted):
        inputs = sets[number * len(sets) // wanted]()
        new = [i for i, digest in enumerate(picture_hashes(inputs)) if digest not in seen]
        seen.update(picture_hashes(inputs))
        for start in range(0, len(new), request.batch):
            fit.add(model(inputs.images[new[start : start + request.batch]].to(device)))
        report(sets=number + 1, of=wanted)
    if not fit.count:
        raise UserError(f"{manifest.folder} has no training subject to fit the reduction of channels to.")
    try:
        fit.result(request.channels).save(Path(arguments["file"]))
    except OSError as error:
        raise UserError(f"{arguments['file']} cannot be written ({error.strerror or error}).") from None


class _Store:
    """Maps on disk, by network and content."""

    def __init__(self, folder: Path, request: PriorRequest, reduction: Reduction | None) -> None:
        self.folder = folder
        self.reads_positions = request.position is not None
        self.reads_features = request.features is not None
        self.position_identity = _identity(request.position, request.precision)
        self.feature_identity = _identity(request.features, request.precision)
        if reduction is not None:
            self.feature_identity += f"-{reduction.name.replace(':', '-')}"

    def position_path(self, inputs: InputSet) -> Path:
        """Where the positions of a set are: by its pictures, masks and cameras."""
        digest = hashlib.sha256("".join(picture_hashes(inputs)).encode())
        for tensor in (inputs.masks, inputs.cameras.K, inputs.cameras.world_to_camera):
            digest.update(tensor.contiguous().numpy().tobytes())
        name = digest.hexdigest()[:32]
        return self.folder / "positions" / self.position_identity / name[:2] / f"{name}.safetensors"

    def feature_paths(self, inputs: InputSet) -> list[Path]:
        """Where the features of a set's pictures are: by their pixels."""
        parent = self.folder / "features" / self.feature_identity
        return [parent / name[:2] / f"{name}.safetensors" for name in picture_hashes(inputs)]

    def write(self, path: Path, tensors: dict[str, Tensor], identity: str) -> None:
        """Writes maps in 16 bits, with what that costs."""
        from safetensors.torch import save

        from avatars.files import write_whole

        exact = next(iter(tensors.values())).double()
        stored = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in stored.values()):
            raise UserError(
                f"The network {identity} gave numbers that are not finite in 16 bits; its weights cannot be right."
            )
        difference = next(iter(stored.values())).double() - exact
        if "confidence" in tensors:
            difference = difference[(tensors["confidence"] > 1).expand_as(difference)]
        largest = float(difference.abs().max()) if difference.numel() else 0.0
        cost = f"{largest!r} {float(difference.square().sum())!r} {difference.numel()}"
        # One entry: safetensors writes several in an order that changes from run to run.
        write_whole(path, save(stored, {"headsplat": f"{identity} {cost}"}))

    def read(self, inputs: InputSet) -> Any:
        """The `PriorMaps` of a set, for `write_with_priors`."""
        import torch

        from shards import PriorMaps

        maps = PriorMaps()
        if self.reads_positions:
            found = self._read(self.position_path(inputs), self.position_identity)
            maps.positions, maps.confidence = found["positions"].float(), found["confidence"].float()
        if self.reads_features:
            read = [self._read(path, self.feature_identity) for path in self.feature_paths(inputs)]
            shapes = {tuple(found["features"].shape) for found in read}
            if len(shapes) > 1:
                raise UserError(
                    f"{self.folder} has feature maps of the sizes {sorted(shapes)} for one input set; remove "
                    f"{self.folder / 'features' / self.feature_identity} and run the same command again."
                )
            maps.features = torch.stack([found["features"].float() for found in read])
        return maps

    def cost(self, kind: str, paths: Iterable[Path]) -> tuple[float, float, int]:
        """What 16 bits cost maps of the store: the largest difference, the sum of squares, how many numbers."""
        identity = self.position_identity if kind == "position" else self.feature_identity
        largest, squares, count = 0.0, 0.0, 0
        for path in paths:
            with self._opened(path, identity) as file:
                _, worst, sum_of_squares, numbers = file.metadata()["headsplat"].split()
            largest = max(largest, float(worst))
            squares, count = squares + float(sum_of_squares), count + int(numbers)
        return largest, squares, count

    def _read(self, path: Path, identity: str) -> dict[str, Tensor]:
        with self._opened(path, identity) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    @contextmanager
    def _opened(self, path: Path, identity: str) -> Iterator[Any]:
        """A file of the store, if it is whole and of this network."""
        from safetensors import SafetensorError, safe_open

        again = "Remove it and run the same command again."
        try:
            with safe_open(path, "pt") as file:
                network = (file.metadata() or {}).get("headsplat", "").split(" ")[0]
                if network != identity:
                    raise UserError(
                        f"{path} is of the network {network or 'unknown'}, not of {identity}. {again}"
                    )
                yield file
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}). {again}") from None


def _with_own_error(error: PriorError, done: list[dict[str, Any]]) -> PriorError:
    """The manifest's errors of storage, with what the store's 16 bits had cost before."""
    changed: dict[str, float] = {}
    for kind in ("position", "features"):
        costs = [value[kind] for value in done]
        if count := sum(cost[2] for cost in costs):
            rms = math.sqrt(sum(cost[1] for cost in costs) / count)
            changed[f"{kind}_max"] = max(cost[0] for cost in costs) + (getattr(error, f"{kind}_max") or 0.0)
            changed[f"{kind}_rms"] = math.hypot(rms, getattr(error, f"{kind}_rms") or 0.0)
    return replace(error, **changed)


def picture_hashes(inputs: InputSet) -> list[str]:
    """32 hexadecimal digits of each picture's pixels and size."""
    pixels = (inputs.images * 255).round().byte()  # what was decoded, exactly
    return [
        hashlib.sha256(
            f"{tuple(picture.shape)}".encode() + picture.contiguous().numpy().tobytes()
        ).hexdigest()[:32]
        for picture in pixels
    ]


def _sets_of(folder: str, subject: str) -> list[Callable[[], InputSet]]:
    """Each input set of a subject, decoded when it is called for."""
    from shards import Manifest, open_shards

    split = "train" if subject in Manifest.load(folder).train else "heldout"
    sets = open_shards(folder, split).read(subject).input_sets
    return [partial(sets.__getitem__, number) for number in range(len(sets))]


def _identity(network: NetworkFile | None, precision: str) -> str:
    return "" if network is None else f"{network.kind}-{network.sha256[:8]}-{precision}"


def _position_name(manifest: Manifest, request: PriorRequest) -> str:
    if request.position is not None:
        return f"{request.position.kind}:{request.position.sha256[:8]}"
    return manifest.priors.position if request.keep_position else "none"


def _feature_name(request: PriorRequest, reduction: Reduction | None) -> str:
    if request.features is None:
        return "none"
    kind = request.features.kind
    if kind == "sapiens":
        kind = _feature_prior(request.features, "fp32", "cpu").kind
    name = f"{kind}:{request.features.sha256[:8]}"
    return name if reduction is None else f"{name}+{reduction.name}"


def _reduction_file(store: Path, request: PriorRequest) -> Path:
    return (
        store
        / "features"
        / _identity(request.features, request.precision)
        / f"reduction-{request.channels}.safetensors"
    )


def _read_reduction(file: Path) -> Reduction:
    from avatars.priors.reduction import Reduction

    return Reduction.load(file)


@lru_cache(maxsize=1)
def _feature_prior(network: NetworkFile, precision: Literal["fp32", "bf16"], device: str) -> Features:
    """One network a process: an actor works on many subjects."""
    from avatars.priors.registry import load_feature_prior

    return load_feature_prior(network, precision=precision, device=device)


@lru_cache(maxsize=1)
def _position_prior(
    network: NetworkFile, precision: Literal["fp32", "bf16"], device: str, batch: int
) -> DUSt3RPrior:
    from avatars.priors.registry import load_position_prior

    return load_position_prior(network, precision=precision, device=device, batch=batch)


def _device(gpu: bool) -> str:
    import torch

    if gpu and not torch.cuda.is_available():
        raise UserError(
            "GPUs were asked for and PyTorch sees none in the actor; run `headsplat doctor` on its node."
        )
    return "cuda" if gpu else "cpu"


def _check_space(out: Path, needed: Storage) -> None:
    """Refuses what the disk cannot hold."""
    parent = out
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed.total:
        raise UserError(
            f"{parent} has {free / 1e9:.1f} GB free and the priors need up to {needed.total / 1e9:.1f} GB. Make space, "
            "or ask for fewer --channels or --storage int8."
        )
