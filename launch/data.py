"""Commands that make data: synthetic captures, and shards of any captures."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from avatars.errors import UserError
from launch.options import parse
from launch.workspace import Workspace

if TYPE_CHECKING:
    from shards import Manifest

__all__ = [
    "DEMO",
    "DemoCaptures",
    "check",
    "demo_shards",
    "info",
    "pack",
    "shards_for",
    "shards_there",
    "synth",
]


@dataclass(frozen=True)
class DemoCaptures:
    """How much is made when no data are given."""

    subjects: int = 8
    """Synthetic people."""
    timesteps: int = 6
    """Moments of each, every one with its own expression."""
    views: int = 80
    """Cameras on the dome."""
    size: int = 128
    """Side of the pictures in pixels; at least the recipe's."""
    heldout: int = 2
    """People that are kept from training."""
    input_sets: int = 4
    """Input sets of a person."""
    seed: int = 0
    """People of one seed are always the same."""
    rig: Literal["dome", "nersemble"] = "dome"
    """Cameras all around, or up to 16 before the face."""


DEMO = DemoCaptures()


@dataclass(frozen=True)
class SynthOptions:
    """Makes synthetic multi-view captures of people that do not exist."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write into, one folder a subject."""
    subjects: int = DEMO.subjects
    """How many people."""
    timesteps: int = DEMO.timesteps
    """Moments of each, every one with its own expression."""
    views: int = DEMO.views
    """Cameras on the dome."""
    size: int = DEMO.size
    """Side of the square pictures in pixels."""
    seed: int = 0
    """People of one seed are always the same."""
    rig: Literal["dome", "nersemble"] = "dome"
    """Cameras all around like Ava-256's, or up to 16 before the face like NeRSemble's."""
    motion: Literal["random", "smooth"] = "random"
    """Independent expressions, or one smooth sequence."""
    quality: Literal["fast", "path"] = "fast"
    """Baked light without noise, or path tracing through Mitsuba (seconds a picture)."""
    tracking: tuple[Literal["metrical", "vhap", "ava256"], ...] = ()
    """Write every capture in these layouts of trackers and data sets as well, into OUT-metrical and so on."""
    workers: int | None = None
    """People at a time, on Ray; one a core by default, of the whole cluster where RAY_ADDRESS names one."""


def synth(words: list[str]) -> None:
    """`headsplat synth OUT`."""
    from cluster.synth import synthesize_population

    options = parse(SynthOptions, words, "synth")
    made = synthesize_population(
        options.out,
        subjects=options.subjects,
        timesteps=options.timesteps,
        views=options.views,
        size=options.size,
        seed=options.seed,
        rig_name=options.rig,
        motion=options.motion,
        quality=options.quality,
        tracking=options.tracking,
        workers=options.workers,
    )
    print(f"{len(made)} captures in {options.out}. Next: headsplat shards pack {options.out} SHARDS")


@dataclass(frozen=True)
class PackOptions:
    """Packs captures into self-contained shards with a manifest."""

    captures: Annotated[Path, tyro.conf.Positional]
    """Folder of captures, one folder a subject."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write the shards into."""
    sequence: str | None = None
    """Which sequence of each of NeRSemble's participants, where they have several."""
    size: int = 512
    """Side of the packed pictures in pixels."""
    heldout: int = 1
    """How many subjects are kept from training, the last by name."""
    heldout_subjects: tuple[str, ...] = ()
    """Which subjects are kept from training instead, by name."""
    input_sets: int = 4
    """Input sets of a shard."""
    input_views: int = 4
    """Pictures of an input set."""
    input_timesteps: Literal["different", "same"] = "different"
    """Whether they are of different timesteps, as Avat3r is trained, or all of the same."""
    input_background: Literal["masked", "kept"] = "masked"
    """Whether they are cut out of what is behind the head, as targets always are, or not."""
    k: int = 3
    """Input cameras are drawn among the k farthest from those drawn before."""
    max_input_degrees: float = 80.0
    """How far from straight before the face an input camera may stand."""
    prior: Literal["depth", "none"] = "depth"
    """Position maps from the captures' true depth, or none. Others: headsplat priors."""
    crop: Literal["head", "full"] = "head"
    """The largest square around the head, or the whole picture with black beside it where it is not square."""
    codec: Literal["jpeg", "png", "webp", "webp-lossless"] = "jpeg"
    """Of the pictures; png and webp-lossless lose nothing and take two to three times as many bytes as jpeg."""
    quality: int = 95
    """Of jpeg and webp, 1 to 100."""
    subsampling: Literal["444", "422", "420"] = "444"
    """Chroma subsampling of jpeg."""
    timesteps_per_shard: int = 256
    """Target timesteps of a shard."""
    seed: int = 0
    """Seed of the input sets' drawing."""
    workers: int = 1
    """Shards packed at the same time; more than one run on Ray."""


def pack(words: list[str]) -> None:
    """`headsplat shards pack CAPTURES OUT`."""
    options = parse(PackOptions, words, "shards pack")
    manifest = pack_folder(options)
    print(f"{len(manifest.shards)} shards in {options.out}. Next: headsplat shards check {options.out}")


@dataclass(frozen=True)
class CheckOptions:
    """Validates packed shards: files, hashes, cameras, masks, codes, splits."""

    shards: Annotated[Path, tyro.conf.Positional]
    """Folder of packed shards."""


@dataclass(frozen=True)
class InfoOptions:
    """Tells what is in packed shards."""

    shards: Annotated[Path, tyro.conf.Positional]
    """Folder of packed shards."""
    sheet: Path | None = None
    """Also draw a contact sheet into this PNG file."""


def check(words: list[str]) -> int:
    """`headsplat shards check SHARDS`: one line a finding, exit status 1 when any is an error."""
    from shards.checking import check as check_shards

    options = parse(CheckOptions, words, "shards check")
    findings = check_shards(options.shards, progress=lambda line: print(line, file=sys.stderr))
    for finding in findings:
        print(finding)
    if not findings:
        print(f"{options.shards}: nothing is wrong")
    return int(any(finding.severity == "error" for finding in findings))


def info(words: list[str]) -> None:
    """`headsplat shards info SHARDS`."""
    from shards.contents import contact_sheet
    from shards.contents import info as contents

    options = parse(InfoOptions, words, "shards info")
    print(contents(options.shards))
    if options.sheet is not None:
        print(f"Contact sheet: {contact_sheet(options.shards, options.sheet)}")


def pack_folder(options: PackOptions) -> Manifest:
    """Packs every capture in a folder.

    Raises:
        UserError: the folder is not there or holds no captures.
    """
    from cluster.packing import pack_folders
    from shards import find_captures

    return pack_folders(
        find_captures(options.captures, options.sequence),
        options.out,
        workers=options.workers,
        size=options.size,
        heldout=options.heldout_subjects or options.heldout,
        input_sets=options.input_sets,
        n_inputs=options.input_views,
        input_timesteps=options.input_timesteps,
        input_background=options.input_background,
        k=options.k,
        max_input_degrees=options.max_input_degrees,
        prior=options.prior,
        crop=options.crop,
        codec=options.codec,
        quality=options.quality,
        subsampling=options.subsampling,
        timesteps_per_shard=options.timesteps_per_shard,
        seed=options.seed,
        progress=print,
    )


def demo_shards(
    workspace: Workspace,
    size: int,
    demo: DemoCaptures,
    *,
    input_timesteps: Literal["different", "same"] = "different",
    surface: bool = False,
) -> Path:
    """The demo's shards at a picture size, made if they are not there yet.

    Args:
        workspace: where captures and shards are kept.
        size: side of the packed pictures in pixels.
        demo: how much to make.
        input_timesteps: of which the pictures of an input set are.
        surface: whether they have the features of `avatars.priors.SurfacePrior`.
    """
    from cluster.synth import synthesize_population
    from eval.hashing import short_hash

    # Other amounts than the default have a folder of their own, so that what is there is always what was asked for.
    name = f"demo-{size}" + ("" if demo == DEMO else f"-{short_hash(asdict(demo), 6)}")
    kind = ("-same-timestep" if input_timesteps == "same" else "") + ("-surface" if surface else "")
    out = workspace.shards / f"{name}{kind}"
    if (out / "manifest.json").is_file():
        return out
    print(
        f"Making {demo.subjects} synthetic people, {demo.timesteps} expressions x {demo.views} views each",
        flush=True,
    )
    captures = workspace.captures / name
    synthesize_population(
        captures,
        subjects=demo.subjects,
        timesteps=demo.timesteps,
        views=demo.views,
        size=max(demo.size, size),
        seed=demo.seed,
        rig_name=demo.rig,
    )
    # Shards without their features are no shards of the workspace that a later command could take for the demo's.
    packed = workspace.shards / "unfinished" / out.name if surface else out
    if not (packed / "manifest.json").is_file():
        options = PackOptions(captures, packed, size=size, heldout=demo.heldout, input_sets=demo.input_sets)
        pack_folder(replace(options, input_timesteps=input_timesteps))
    if surface:
        from launch.priors import write_surface_features

        write_surface_features(packed, out)
        shutil.rmtree(packed)
    return out


def shards_there(data: Path | None, workspace: Workspace) -> Path | None:
    """The shards given, or the only ones in the workspace, or None where it has none.

    Raises:
        UserError: `data` is no folder of shards, or the workspace has several to choose from.
    """
    from shards import Manifest

    if data is None:
        found = sorted(manifest.parent for manifest in workspace.shards.glob("*/manifest.json"))
        if len(found) > 1:
            names = ", ".join(str(folder) for folder in found)
            raise UserError(
                f"There are several folders of shards: {names}. Name one with --data (DATA= for make)."
            )
        return found[0] if found else None
    Manifest.load(data)
    return data


def shards_for(
    data: Path | None,
    workspace: Workspace,
    size: int,
    demo: DemoCaptures,
    *,
    input_timesteps: Literal["different", "same"] = "different",
    surface: bool = False,
) -> Path:
    """The shards that a training works on: the ones given, or the demo's.

    Args:
        data: folder of packed shards, or None.
        workspace: where the demo's are kept.
        size: side of the demo's packed pictures in pixels.
        demo: how much to make.
        input_timesteps: of the demo's, see `demo_shards`.
        surface: of the demo's, see `demo_shards`.

    Raises:
        UserError: `data` is given and is no folder of shards.
    """
    from shards import Manifest

    if data is None:
        return demo_shards(workspace, size, demo, input_timesteps=input_timesteps, surface=surface)
    Manifest.load(data)  # says what is wrong before anything starts
    return data
