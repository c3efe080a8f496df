"""`headsplat create` makes an avatar of a few pictures; `headsplat drive` shows it with other expressions."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from avatars.errors import UserError
from launch.options import parse

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from avatars.inputs import InputSet
    from avatars.method import Avatar, Method
    from shards import Manifest
    from shards.reading import SubjectShards

__all__ = ["create", "drive"]

ACROSS, MOST_ON_SHEET = 6, 96


@dataclass(frozen=True)
class CreateOptions:
    """Makes an avatar of a few pictures with cameras, by a trained network."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder that a training exported, for example work/runs/avat3r-cpu/export."""
    avatar: Annotated[Path, tyro.conf.Positional]
    """Folder to write the avatar into."""
    pictures: Path | None = None
    """Folder of pictures with their cameras in pictures.json."""
    data: Path | None = None
    """Packed shards to take an input set from, instead of pictures."""
    subject: str = ""
    """With --data: whose input set; the first held-out person's by default."""
    input_set: int = 0
    """With --data: which of the person's input sets."""
    weights: Path | None = None
    """DUSt3R's file, for pictures without position maps; looked for in HEADSPLAT_WEIGHTS by default."""
    feature_weights: Path | None = None
    """The feature network's file, for a model trained with features; looked for in HEADSPLAT_WEIGHTS by default."""
    feature_reduction: Path | None = None
    """features-reduction.safetensors beside the training's shards, for a model trained with fewer channels."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network; bf16 drives faster where the hardware has it."""
    guided: bool = False
    """FastAvatar only: put the Gaussians on the head that tracking found for this person, instead of predicting it.
    Needs tracked pictures, so --data; tables keep such avatars in rows of their own."""


def create(words: list[str]) -> None:
    """`headsplat create MODEL AVATAR --pictures FOLDER`."""
    import torch

    from avatars.avat3r import Avat3rMethod
    from avatars.fastavatar.method import FastAvatarMethod
    from avatars.method import load_method

    options = parse(CreateOptions, words, "create")
    if (options.pictures is None) == (options.data is None):
        raise UserError("Say where the pictures are: --pictures FOLDER, or --data SHARDS with --subject.")
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    method = load_method(options.model, dtype)
    if options.guided and not isinstance(method, FastAvatarMethod):
        raise UserError(f"--guided is for FastAvatar, and {options.model} is {method.name}; leave it out.")
    inputs = chosen_inputs(options, method)
    started = time.perf_counter()
    if method.needs_positions and inputs.positions is None:
        inputs = with_positions(inputs, options.weights)
    if isinstance(method, Avat3rMethod) and method.feature_prior is not None and inputs.features is None:
        inputs = with_features(
            inputs, method.feature_prior, options.feature_weights, options.feature_reduction
        )
    if options.guided and isinstance(method, FastAvatarMethod):
        avatar: Avatar = method.create_guided(inputs)
    else:
        avatar = method.create(inputs)
    seconds = time.perf_counter() - started
    avatar.save(options.avatar)
    print(
        f"{options.avatar}: {method.name} of {inputs.subject} from {len(inputs)} pictures in {seconds:.2f} s, "
        f"driven by {avatar.expression_kind} codes"
    )


def chosen_inputs(options: CreateOptions, method: Method) -> InputSet:
    """The pictures that the options name, as the method takes them."""
    from avatars.avat3r import Avat3rMethod

    background = method.input_background if isinstance(method, Avat3rMethod) else "masked"
    if options.pictures is not None:
        from shards.photographs import read_photographs

        return read_photographs(
            options.pictures, method.size, method.expression_kind, method.expression_length, background
        )
    from shards import Manifest

    assert options.data is not None  # `create` has checked it
    person = chosen_person(Manifest.load(options.data), options.subject)
    subject, sets = person.subject, person.input_sets
    if not 0 <= options.input_set < len(sets):
        raise UserError(
            f"{subject} has {len(sets)} input sets and --input-set is {options.input_set}; count from 0."
        )
    inputs = sets[options.input_set]
    return inputs.masked() if background == "masked" else inputs


def chosen_person(manifest: Manifest, subject: str) -> SubjectShards:
    """The named person of some shards; without a name the first held-out one."""
    from shards import open_shards

    subject = subject or (manifest.heldout or manifest.train)[0]
    return open_shards(manifest.folder, "heldout" if subject in manifest.heldout else "train").read(subject)


def with_positions(inputs: InputSet, weights: Path | None) -> InputSet:
    """The same pictures with DUSt3R's position maps.

    Raises:
        UserError: DUSt3R's weights are not here, or it cannot place these pictures.
    """
    from avatars.priors import DUSt3R, DUSt3RPrior
    from avatars.weights import MissingWeights, find

    try:
        file = find("dust3r", weights).path
    except MissingWeights as reason:
        raise UserError(
            f"The pictures of {inputs.subject} have no position maps, and making them needs DUSt3R: {reason}"
        ) from reason
    prior = DUSt3RPrior(DUSt3R.load(file))
    print(f"Position maps by {prior.name}", flush=True)
    positions, confidence = prior(inputs.images, inputs.cameras, inputs.masks)
    return replace(
        inputs,
        positions=positions,
        confidence=confidence,
        provenance=inputs.provenance | {"prior": prior.name},
    )


def with_features(inputs: InputSet, name: str, weights: Path | None, reduction: Path | None) -> InputSet:
    """The same pictures with the features that a network was trained on.

    Args:
        inputs: pictures without features.
        name: of the prior as shards name it, for example "dinov2-small:1a2b3c4d+pca64:5e6f7a8b".
        weights: the feature network's file, or None to look for it.
        reduction: the file of the principal components, where the name has some.

    Raises:
        UserError: nothing computes such features from pictures, or the network or the reduction is not here or is
            another one.
    """
    from avatars.priors.reduction import Reduction
    from avatars.priors.registry import FEATURE_PRIORS, find_network, load_feature_prior
    from avatars.weights import MissingWeights

    network_name, _, reduction_name = name.partition("+")
    kind = network_name.partition(":")[0]
    if kind not in FEATURE_PRIORS and not kind.startswith("sapiens-"):
        raise UserError(
            f"The model was trained on features ({name or 'nobody wrote down which'}) that cannot be computed from "
            "pictures alone; take an input set from shards that have them, with --data, or another model."
        )
    reduce = None
    if reduction_name:
        if reduction is None:
            raise UserError(
                f"The model was trained on features with fewer channels ({reduction_name}); give with "
                "--feature-reduction the features-reduction.safetensors that lies beside its training's shards."
            )
        reduce = Reduction.load(reduction)
        if reduce.name != reduction_name:
            raise UserError(
                f"{reduction} holds the reduction {reduce.name}, and the model was trained on {reduction_name}."
            )
    try:
        network = find_network(kind if kind in FEATURE_PRIORS else "sapiens", weights)
    except MissingWeights as reason:
        raise UserError(
            f"The model was trained on features {name}, and making them needs {reason}"
        ) from reason
    prior = load_feature_prior(network)
    if prior.name != network_name:
        raise UserError(
            f"{network.path} is {prior.name}, and the model was trained on the features of {network_name}; give that "
            "file with --feature-weights."
        )
    features = prior(inputs.images) if reduce is None else reduce(prior(inputs.images))
    print(f"Features by {name}", flush=True)
    return replace(inputs, features=features, provenance=inputs.provenance | {"features": name})


@dataclass(frozen=True)
class DriveOptions:
    """Drives an avatar: a video, single pictures, or Gaussians to load elsewhere."""

    avatar: Annotated[Path, tyro.conf.Positional]
    """Folder of an avatar of any method."""
    output: Annotated[Path, tyro.conf.Positional]
    """NAME.mp4 for a video, NAME.png for one sheet of all pictures under those that the avatar was made from, else a
    folder of numbered files."""
    expressions: Path | None = None
    """Codes to show: .npy, .json or .csv (Live Link Face); a made-up smooth sequence by default."""
    data: Path | None = None
    """Packed shards: show the expressions that a person in them made, instead."""
    subject: str = ""
    """With --data: whose; the first held-out person's by default."""
    frames: int = 96
    """Length of the made-up sequence."""
    fps: int = 24
    """Pictures a second of the video."""
    size: int = 256
    """Side of the pictures in pixels."""
    sweep: float = 25.0
    """Degrees to either side that the camera swings; 0 keeps it straight ahead."""
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Colour behind the head, each from 0 to 1."""
    files: Literal["png", "ply", "splat", "spz"] = "png"
    """What a folder gets: pictures, or the Gaussians of each expression."""
    seed: int = 0
    """Of the made-up sequence."""


def drive(words: list[str]) -> None:
    """`headsplat drive AVATAR OUTPUT`."""
    import torch
    from PIL import Image

    from avatars.export import save_gaussians
    from avatars.method import load_avatar
    from eval.movies import frames, portrait_cameras, write_video

    options = parse(DriveOptions, words, "drive")
    if options.size < 16 or options.fps < 1 or options.frames < 1:
        raise UserError("--size must be at least 16, --fps and --frames at least 1.")
    if not all(0 <= value <= 1 for value in options.background):
        raise UserError(f"--background {options.background} must be three numbers from 0 to 1.")
    avatar = load_avatar(options.avatar)
    codes = chosen_expressions(options, avatar)
    cameras = portrait_cameras(len(codes), options.size, options.sweep)
    pictures = frames(avatar, codes, cameras, options.size, torch.tensor(options.background))
    started = time.perf_counter()
    if options.output.suffix == ".mp4":
        write_video(pictures, options.output, options.fps)
    elif options.output.suffix == ".png":
        write_sheet(getattr(avatar, "pictures", None), list(pictures), options.output)
    elif options.output.suffix:
        raise UserError(
            f"{options.output}: end it in .mp4 for a video or in .png for one sheet, or give a folder for single files."
        )
    else:
        options.output.mkdir(parents=True, exist_ok=True)
        if options.files == "png":
            for number, picture in enumerate(pictures):
                Image.fromarray(picture).save(options.output / f"{number:05d}.png")
        else:
            provenance = {"avatar": avatar.method, "made_from": getattr(avatar, "provenance", {})}
            for number, code in enumerate(codes):
                path = options.output / f"{number:05d}.{options.files}"
                save_gaussians(avatar.gaussians(code), path, provenance=provenance)
    seconds = time.perf_counter() - started
    print(f"{options.output}: {len(codes)} expressions in {seconds:.1f} s, writing included")


def write_sheet(made_from: Tensor | None, pictures: list[NDArray[np.uint8]], path: Path) -> None:
    """One picture: what the avatar was made from in the first line, then what it shows, at most six to a line.

    Args:
        made_from: (N, 3, H, W) uint8, where the avatar keeps its pictures.
        pictures: (S, S, 3) each.
        path: the PNG file.

    Raises:
        UserError: more pictures than a sheet can show.
    """
    import io

    from PIL import Image

    from avatars.files import write_whole

    if len(pictures) > MOST_ON_SHEET:
        raise UserError(
            f"{path}: a sheet shows up to {MOST_ON_SHEET} expressions and there are {len(pictures)}; choose some with "
            "--expressions or --frames."
        )
    side, gap = pictures[0].shape[0], 4
    given = (
        [] if made_from is None else [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in made_from]
    )
    shown = [Image.fromarray(picture) for picture in pictures]
    across = max(min(len(shown), ACROSS), len(given))
    lines = [given] if given else []
    lines += [shown[start : start + across] for start in range(0, len(shown), across)]
    rule = 3 * gap if given else 0  # the line of inputs stands apart
    size = (across * (side + gap) - gap, len(lines) * (side + gap) - gap + rule)
    sheet = Image.new("RGB", size, (255, 255, 255))
    for number, line in enumerate(lines):
        for column, picture in enumerate(line):
            x = column * (side + gap) + (across - len(line)) * (side + gap) // 2
            sheet.paste(picture.resize((side, side)), (x, number * (side + gap) + (rule if number else 0)))
    content = io.BytesIO()
    sheet.save(content, "PNG")
    write_whole(path, content.getvalue())


def chosen_expressions(options: DriveOptions, avatar: Avatar) -> Tensor:
    """The codes (T, E) that the options name."""
    import numpy as np
    import torch

    kind, length = avatar.expression_kind, avatar.expression_length
    if options.expressions is not None and options.data is not None:
        raise UserError("Give --expressions or --data, not both.")
    if options.expressions is not None:
        from avatars.expressions import read_expressions

        return read_expressions(options.expressions, kind, length)
    if options.data is not None:
        from shards import Manifest

        manifest = Manifest.load(options.data)
        if manifest.expression_kind != kind:
            raise UserError(
                f"{options.data} holds {manifest.expression_kind} codes and the avatar is driven by {kind}."
            )
        return torch.stack([t.expression for t in chosen_person(manifest, options.subject).targets])
    if kind != "arkit-52":
        raise UserError(f"This avatar is driven by {kind} codes; give some with --expressions or --data.")
    from shards.synth.expressions import smooth_sequence

    return torch.from_numpy(smooth_sequence(np.random.default_rng(options.seed), options.frames))
