"""Commands that make data: synthetic captures, and shards of any captures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from avatars.errors import UserError
from launch.options import parse
from launch.recipes import find_recipe
from launch.workspace import Workspace

__all__ = ["DEMO", "DemoCaptures", "check", "demo_shards", "info", "pack", "shards_for", "synth"]


@dataclass(frozen=True)
class DemoCaptures:
    """How much `make train` makes when no DATA is given."""

    subjects: int = 8
    timesteps: int = 5
    views: int = 80
    size: int = 128
    heldout: int = 2
    input_sets: int = 3


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


def synth(words: list[str]) -> None:
    """`headsplat synth OUT`."""
    from shards.synth import synthesize

    options = parse(SynthOptions, words, "synth")
    made = synthesize(
        options.out,
        subjects=options.subjects,
        timesteps=options.timesteps,
        views=options.views,
        size=options.size,
        seed=options.seed,
    )
    print(f"{len(made)} captures in {options.out}. Next: headsplat shards pack {options.out} SHARDS")


@dataclass(frozen=True)
class PackOptions:
    """Packs captures into self-contained shards with a manifest."""

    captures: Annotated[Path, tyro.conf.Positional]
    """Folder of captures, one folder a subject."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write the shards into."""
    size: int = 512
    """Side of the packed pictures in pixels."""
    heldout: int = 1
    """How many subjects are kept from training, the last by name."""
    input_sets: int = 4
    """Input sets of a subject."""
    input_views: int = 4
    """Pictures of an input set."""
    seed: int = 0
    """Seed of the input sets' drawing."""


def pack(words: list[str]) -> None:
    """`headsplat shards pack CAPTURES OUT`."""
    options = parse(PackOptions, words, "shards pack")
    manifest = pack_folder(options)
    print(f"{len(manifest.shards)} shards in {options.out}. Next: headsplat shards check {options.out}")


@dataclass(frozen=True)
class FolderOptions:
    """Names a folder of packed shards."""

    shards: Annotated[Path, tyro.conf.Positional]
    """Folder of packed shards."""


def demo_shards(workspace: Workspace, size: int, demo: DemoCaptures = DEMO) -> Path:
    """The demo's shards at a picture size, made if they are not there yet.

    Args:
        workspace: where captures and shards are kept.
        size: side of the packed pictures in pixels.
        demo: how much to make.
    """
    from shards.synth import synthesize

    out = workspace.shards / f"demo-{size}"
    if (out / "manifest.json").is_file():
        return out
    print(f"No DATA given: making {demo.subjects} synthetic people, {demo.timesteps} expressions x {demo.views} views each")
    synthesize(
        workspace.captures,
        subjects=demo.subjects,
        timesteps=demo.timesteps,
        views=demo.views,
        size=max(demo.size, size),
    )
    pack_folder(
        PackOptions(workspace.captures, out, size=size, heldout=demo.heldout, input_sets=demo.input_sets)
    )
    return out


def shards_for(data: Path | None, workspace: Workspace, recipe: str) -> Path:
    """The shards that a command works on: the ones given, or the demo's.

    Raises:
        UserError: `data` is given and is no folder of shards.
    """
    from shards import Manifest

    if data is not None:
        Manifest.load(data)  # says what is wrong before anything starts
        return data
    return demo_shards(workspace, find_recipe(recipe).model.size)
