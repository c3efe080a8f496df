"""`headsplat priors`: position and feature maps of all input sets, computed by Ray actors into new shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from avatars.errors import UserError
from launch.options import parse

if TYPE_CHECKING:
    from avatars.priors.registry import NetworkFile
    from cluster.pool import Event
    from shards import Manifest

__all__ = ["PriorOptions", "priors", "write_surface_features"]


@dataclass(frozen=True)
class PriorOptions:
    """Computes the priors of every input set and writes shards that have them. Goes on where it stopped."""

    shards: Annotated[Path, tyro.conf.Positional]
    """Folder of packed shards."""
    out: Path
    """Folder for the new shards."""
    position: Literal["auto", "depth", "dust3r", "mast3r", "none"] = "auto"
    """Where position maps come from: a network, the true depth that the shards were packed with, or nowhere. auto is
    dust3r where its weights are found, and depth where they are not and the shards have it."""
    features: str = "none"
    """Feature network: none, sapiens-0.3b to sapiens-2b, sapiens (any size, with --feature-weights), dinov2-small to
    dinov2-giant (also -registers), sapiens2-0.1b to sapiens2-5b; surface is no network, but places on the tracked head,
    for synthetic captures."""
    position_weights: Path | None = None
    """Weight file of the position network; looked for in the folder HEADSPLAT_WEIGHTS by default."""
    feature_weights: Path | None = None
    """Weight file of the feature network; looked for in the folder HEADSPLAT_WEIGHTS by default."""
    storage: Literal["fp16", "int8"] = "fp16"
    """How the shards keep features; int8 has a scale a picture and channel."""
    channels: int = 0
    """Principal components of the features to keep, fitted to the training subjects; 0 keeps all channels."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the networks' weights and products; auto is bf16 on GPUs and fp32 on CPUs."""
    batch: int = 4
    """Pictures, or pairs of them, that a network takes at a time."""
    workers: int | None = None
    """Ray actors at work; as many as there are GPUs, or CPUs, by default."""
    cpus: float = 1
    """CPUs, and threads, of each actor."""
    gpus: float | None = None
    """GPUs of each actor, fractions allowed; one where there are any, by default."""
    store: Path | None = None
    """Folder where maps are kept between runs; SHARDS-priors by default."""


def priors(words: list[str]) -> int:
    """`headsplat priors SHARDS --out NEW`."""
    options = parse(PriorOptions, words, "priors")
    _check(options)
    from cluster.fit import gpus_here
    from cluster.priors import PriorRequest, precompute_priors
    from shards import Manifest

    manifest = Manifest.load(options.shards)
    if options.features == "surface":
        return surface(options, manifest)
    position = _position(options, manifest)
    features = _features(options)
    gpus = float(gpus_here() > 0) if options.gpus is None else options.gpus
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if gpus else "fp32"
    for network in (position, features):
        if network is not None:
            print(
                f"{network.kind}: {network.path} sha256 {network.sha256[:16]}, {network.licence}", flush=True
            )
    request = PriorRequest(
        position=position,
        keep_position=options.position != "none",
        features=features,
        channels=options.channels,
        storage=options.storage,
        precision=precision,
        batch=options.batch,
    )
    done = precompute_priors(
        options.shards,
        options.out,
        request,
        store=options.store,
        workers=options.workers,
        cpus_per_actor=options.cpus,
        gpus_per_actor=gpus,
        on_event=Progress(),
        say=lambda line: print(line, flush=True),
    )
    settings = done.manifest.priors
    print(
        f"{options.out}: positions {settings.position}, features {settings.features}; {done.sets} sets and "
        f"{done.pictures} pictures computed in {done.seconds:.1f} s of the actors, {done.found} maps were there"
    )
    error = done.manifest.prior_error
    if error.position_rms is not None:
        print(f"stored positions are off by {1e3 * error.position_rms:.2g} mm (rms)")
    if error.features_rms is not None:
        print(f"stored features are off by {error.features_rms:.3g} (rms)")
    return 0


def surface(options: PriorOptions, manifest: Manifest) -> int:
    """`--features surface`: what cannot be is refused, and the rest computed here and now."""
    if manifest.priors.position != "depth" or options.position not in ("auto", "depth"):
        raise UserError(
            "--features surface needs the shards' own position maps from true depth, and there are "
            f"{manifest.priors.position}; pack captures that carry depth and leave --position out."
        )
    if options.channels or options.feature_weights is not None:
        raise UserError("--features surface has no weights and no --channels to reduce; leave them out.")
    if manifest.head != "makehuman":
        raise UserError(
            f"--features surface needs captures tracked with the built-in head, and {options.shards} has "
            f"{manifest.head or 'no tracked head'}."
        )
    made = write_surface_features(options.shards, options.out, options.storage)
    print(f"{options.out}: positions {made.priors.position}, features {made.priors.features}")
    return 0


def write_surface_features(folder: Path, out: Path, storage: Literal["fp16", "int8"] = "fp16") -> Manifest:
    """Shards with the features of `SurfacePrior`.

    Args:
        folder: shards with true depth, tracked with the built-in head.
        out: folder for the new ones.
        storage: how they keep features.
    """
    from avatars.head import ParametricHead
    from avatars.priors import SurfacePrior
    from shards import PriorMaps, PriorSettings, write_with_priors

    prior = SurfacePrior(ParametricHead.load("makehuman"))
    settings = PriorSettings("depth", prior.name, prior.dim, storage)
    return write_with_priors(folder, out, lambda inputs: PriorMaps(features=prior(inputs)), settings, print)


class Progress:
    """A line for every tenth part of a subject, and for what goes wrong."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        if event.kind != "progress":
            reason = f": {event.report['error']}" if "error" in event.report else ""
            print(f"  {event.name}: {event.kind}{reason}", flush=True)
            return
        number, of = event.report.get("sets"), event.report.get("of")
        if number is None or not of:
            return
        tenth = 10 * number // of
        if tenth > self._told.get(event.name, 0):
            self._told[event.name] = tenth
            print(f"  {event.name}: input set {number}/{of}", flush=True)


def _check(options: PriorOptions) -> None:
    if options.channels < 0:
        raise UserError(f"--channels is {options.channels}; it must be 0 or more.")
    if options.batch < 1:
        raise UserError(f"--batch is {options.batch}; it must be at least 1.")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers is {options.workers}; it must be at least 1.")
    if options.position_weights is not None and options.position not in ("auto", "dust3r", "mast3r"):
        raise UserError(f"--position-weights is of no use with --position {options.position}.")
    if options.feature_weights is not None and options.features == "none":
        raise UserError("--feature-weights is of no use without --features.")


def _position(options: PriorOptions, manifest: Manifest) -> NetworkFile | None:
    """The position network, or None where the shards' own positions, or none, are wanted.

    Raises:
        UserError: there are no weights, and no depth to go without them.
    """
    from avatars.priors.registry import find_network
    from avatars.weights import MissingWeights

    if options.position == "none":
        return None
    there = manifest.priors.position
    if options.position == "depth":
        if there != "depth":
            raise UserError(
                f"{options.shards} has positions {there}, not from true depth. Pack captures that carry depth with "
                "`headsplat shards pack --prior depth`."
            )
        return None
    kind = "dust3r" if options.position == "auto" else options.position
    try:
        return find_network(kind, options.position_weights)
    except MissingWeights as reason:
        if options.position == "auto" and options.position_weights is None and there != "none":
            print(f"No weights of {kind}: the positions that the shards have ({there}) are kept.", flush=True)
            return None
        instead = (
            "keep the shards' own with --position depth"
            if there == "depth"
            else "go without: --position none"
        )
        raise UserError(f"{kind}: {reason}. Or {instead}.") from None


def _features(options: PriorOptions) -> NetworkFile | None:
    from avatars.priors.registry import find_network
    from avatars.weights import MissingWeights

    if options.features == "none":
        return None
    try:
        return find_network(options.features, options.feature_weights)
    except MissingWeights as reason:
        raise UserError(f"{options.features}: {reason}. Or go without, with --features none.") from None
