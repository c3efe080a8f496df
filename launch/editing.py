"""FastAvatar's own commands: `template`, and people changed by their latents: `interpolate`, `attributes`, `edit`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from avatars.errors import UserError
from launch.options import parse

if TYPE_CHECKING:
    from torch import Tensor

    from avatars.fastavatar import FastAvatar
    from avatars.fastavatar.method import FastAvatarMethod
    from shards.reading import ShardSet

__all__ = ["attributes", "edit", "interpolate", "label_people", "strip", "template"]

STRIP = "strip.png"
UNITS = {
    "age": "0 (young) to 1 (old)",
    "masculinity": "0 to 1",
    "skin tone": "the generator's tones, 0 (light) to 7 (dark)",
    "width": "centimetres between the ears",
    "hair": "centimetres",
}
"""Attributes of synthetic people, with what one unit of each is."""


@dataclass(frozen=True)
class TemplateOptions:
    """Fits every training person with Gaussians that correspond one to one, and averages them."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write the template into, an avatar that --model.template takes."""
    data: Path
    """Folder of packed shards."""
    fits: Path | None = None
    """Folder of the fits, which are kept and gone on with; beside OUT by default."""
    recipe: str = "fastavatar-template"
    """Recipe of the fits; the one for this machine's hardware by default."""
    steps: int | None = None
    """Optimiser steps of each fit; the recipe's by default."""
    uv_resolution: int | None = None
    """Layout: a Gaussian a covered pixel of a UV map of this side, 0 for one a triangle; the recipe's by default."""
    sh_degree: int | None = None
    """Degree of the colours; the recipe's by default."""
    views: int = 24
    """Cameras that each person is fitted to."""
    workers: int | None = None
    """Fits at a time; as many as there is room for by default, in the cluster that RAY_ADDRESS names or here."""
    cpus: float = 1
    """CPUs of each fit."""
    gpus: float | None = None
    """GPUs of each fit; by default one where this machine has any."""


def template(words: list[str]) -> int:
    """`headsplat template OUT --data SHARDS`."""
    from avatars.fastavatar import FastAvatar, average
    from cluster.fit import fit_subjects
    from launch.fitting import Progress
    from train.fits import FitSource

    options = parse(TemplateOptions, words, "template")
    overrides = {
        name: value
        for name in ("steps", "uv_resolution", "sh_degree")
        if (value := getattr(options, name)) is not None
    }
    found = fit_subjects(
        options.recipe,
        options.data,
        options.fits or options.out.with_name(f"{options.out.name}-fits"),
        source=FitSource("views", views=options.views),
        overrides=overrides,
        split="train",
        workers=options.workers,
        cpus_per_actor=options.cpus,
        gpus_per_actor=options.gpus,
        on_event=Progress(),
    )
    if found.failures:
        name, reason = next(iter(found.failures.items()))
        raise UserError(
            f"{len(found.failures)} of {len(found.results)} people could not be fitted, {name} because: {reason}"
        )
    mean = average([FastAvatar.load(result.folder) for result in found.results])
    mean.save(options.out)
    print(f"{options.out}: {len(mean)} Gaussians, the mean of {len(found.results)} people")
    return 0


@dataclass(frozen=True)
class InterpolateOptions:
    """Makes the people between two avatars, one forward pass each."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of the FastAvatar that made both avatars."""
    first: Annotated[Path, tyro.conf.Positional]
    """Folder of the avatar to start from."""
    second: Annotated[Path, tyro.conf.Positional]
    """Folder of the avatar to end with."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder for numbered avatars and a picture of them all, strip.png."""
    count: int = 7
    """How many people, both ends included."""
    size: int = 128
    """Side of each picture in the strip, in pixels."""


def interpolate(words: list[str]) -> int:
    """`headsplat interpolate MODEL FIRST SECOND OUT`."""
    from avatars.fastavatar.editing import between
    from avatars.fastavatar.method import FastAvatarMethod

    options = parse(InterpolateOptions, words, "interpolate")
    check_size(options.size)
    method = FastAvatarMethod.load(options.model)
    first, second = (method.latent_of(read(folder), folder) for folder in (options.first, options.second))
    latents = between(first, second, options.count)
    provenance = {"between": [str(options.first), str(options.second)]}
    started = time.perf_counter()
    people = [
        method.decode(latent, provenance=provenance | {"place": place / (options.count - 1)})
        for place, latent in enumerate(latents)
    ]
    seconds = (time.perf_counter() - started) / len(people)
    for place, person in enumerate(people):
        person.save(options.out / f"{place:02d}")
    strip(people, options.out / STRIP, options.size)
    print(f"{options.out}: {len(people)} people, {1e3 * seconds:.1f} ms each, and {STRIP}")
    return 0


@dataclass(frozen=True)
class AttributesOptions:
    """Finds how a model's latents move with age, hair and more, from labelled synthetic people."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a FastAvatar; directions.json is written into it."""
    data: Path
    """Packed shards of synthetic people."""
    captures: Path
    """The captures that the shards were packed from: their capture.json holds the labels."""
    pictures: int = 4
    """Pictures of each person that are looked at, the most frontal ones of a timestep; w is their mean."""


def attributes(words: list[str]) -> int:
    """`headsplat attributes MODEL --data SHARDS --captures CAPTURES`."""
    from avatars.fastavatar.editing import fit_directions
    from avatars.fastavatar.method import FastAvatarMethod
    from shards import open_shards

    options = parse(AttributesOptions, words, "attributes")
    method = FastAvatarMethod.load(options.model)
    shards = open_shards(options.data, "train")
    labels = label_people(options.captures, shards.subjects)
    latents = latents_of(method, shards, options.pictures)
    directions = fit_directions(latents, labels, UNITS, method.network)
    directions.save(options.model)
    for name, (low, high) in directions.ranges.items():
        print(
            f"  {name:<12} {low:7.2f} to {high:6.2f}, one unit moves w by {directions.steps[name].norm():.3f}  "
            f"({UNITS[name]})"
        )
    print(f"{options.model}/directions.json: {len(labels)} attributes of {directions.people} people")
    return 0


@dataclass(frozen=True)
class EditOptions:
    """Changes one attribute of a person, in one forward pass."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of the FastAvatar that made the avatar, with directions.json."""
    avatar: Annotated[Path, tyro.conf.Positional]
    """Folder of the avatar."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder for the changed avatar."""
    attribute: str
    """What to change: age, masculinity, skin tone, width, hair."""
    amount: float
    """By how much, in the attribute's unit; negative for less."""


def edit(words: list[str]) -> int:
    """`headsplat edit MODEL AVATAR OUT --attribute age --amount 0.5`."""
    from avatars.fastavatar.editing import read_directions
    from avatars.fastavatar.method import FastAvatarMethod

    options = parse(EditOptions, words, "edit")
    method = FastAvatarMethod.load(options.model)
    directions = read_directions(options.model, method.network)
    latent = method.latent_of(read(options.avatar), options.avatar)
    started = time.perf_counter()
    moved = directions.moved(latent, options.attribute, options.amount)
    changed = {"attribute": options.attribute, "amount": options.amount, "edited": str(options.avatar)}
    person = method.decode(moved, provenance=changed)
    seconds = time.perf_counter() - started
    person.save(options.out)
    unit = directions.units[options.attribute]
    print(
        f"{options.out}: {options.attribute} {options.amount:+g} ({unit}), decoded in {1e3 * seconds:.1f} ms"
    )
    return 0


def label_people(captures: Path, subjects: Sequence[str]) -> dict[str, Tensor]:
    """Labels (P,) by attribute of synthetic people, from the captures that the generator wrote.

    Age, masculinity and tone are written there; the width of the head comes from its identity code, and the length of
    the hair from the haircut's name.

    Raises:
        UserError: a capture is not there, or is no synthetic one.
    """
    import torch

    from avatars.fastavatar import shared_head
    from shards.synth.hair import STYLES

    rows, codes = [], []
    for subject in subjects:
        path = captures / subject / "capture.json"
        try:
            told = json.loads(path.read_text())
            look = told["appearance"]
            style = STYLES.get(look["hair"])
            hair = 100 * style.length if style is not None else 0.0
            rows.append([look["age"], look["masculinity"], look["tone"], hair])
            codes.append(told["head"]["identity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} holds no labels; name the folder of the synthetic captures that the shards were packed from."
            ) from error
    head = shared_head("makehuman")
    calm = torch.zeros(len(codes), head.n_expression)
    ears = head.vertices(torch.tensor(codes), calm)[:, head.landmarks68[[0, 16]]]
    age, masculinity, tone, hair = torch.tensor(rows).T
    return {
        "age": age,
        "masculinity": masculinity,
        "skin tone": tone,
        "width": 100 * (ears[:, 0] - ears[:, 1]).norm(dim=-1),
        "hair": hair,
    }


def latents_of(method: FastAvatarMethod, shards: ShardSet, pictures: int) -> Tensor:
    """The mean w (P, d) of some pictures of each person of shards."""
    import torch

    from eval.protocol import frontal_first

    latents = []
    for subject in shards.subjects:
        target = shards.read(subject).targets[0]
        views = frontal_first(target.cameras)[:pictures]
        seen = [
            method.latent(image, mask, subject)
            for image, mask in zip(target.images(views), target.masks(views), strict=True)
        ]
        latents.append(torch.stack(seen).mean(0))
    return torch.stack(latents)


def read(folder: Path) -> FastAvatar:
    """An avatar of this method.

    Raises:
        UserError: it is another's, or none.
    """
    from avatars.fastavatar import FastAvatar
    from avatars.method import load_avatar

    avatar = load_avatar(folder)
    if not isinstance(avatar, FastAvatar):
        raise UserError(f"{folder} is an avatar of {avatar.method}; only FastAvatar's have a latent to move.")
    return avatar


def strip(people: Sequence[FastAvatar], path: Path, size: int) -> None:
    """One picture of several people side by side, calm and from the front."""
    import torch
    from PIL import Image

    from avatars.method import render
    from eval.movies import portrait_cameras

    camera = portrait_cameras(1, size)
    calm = torch.zeros(people[0].expression_length)
    pictures = [render(person, calm, camera, (size, size)).image[0] for person in people]
    pixels = (torch.cat(pictures, -1).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def check_size(size: int) -> None:
    """Refuses pictures that show nothing.

    Raises:
        UserError: fewer than 16 pixels.
    """
    if size < 16:
        raise UserError(f"--size is {size}; a picture needs at least 16 pixels to a side.")
