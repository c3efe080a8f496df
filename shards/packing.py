"""Captures to shards.

Each shard is one subject's: K input sets first, then a run of target timesteps with all their views. A
subject's timesteps are shuffled before they are cut into shards, so neighbours in a shard are not neighbours
in time. Equal captures and settings give equal bytes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from avatars.errors import UserError
from avatars.inputs import Background
from shards.capture import Capture, View
from shards.codecs import CODECS, encode_picture, extension
from shards.draws import Draws
from shards.manifest import INPUT_BACKGROUNDS, Manifest, PackSettings, PriorSettings, ShardInfo, write_json
from shards.pictures import (
    CROPS,
    crop_and_resize,
    crop_window,
    encode_mask,
    fit_intrinsics,
    resample_depth,
)
from shards.priors import PriorErrors, encode_positions
from shards.tarfiles import ShardWriter
from shards.views import facing, k_farthest, view_directions

__all__ = ["draw_input_timesteps", "pack", "pack_shard", "shard_count"]

Receipt = dict[str, Any]
PackShards = Callable[[list[tuple[Capture, int]], Path, PackSettings], list[Receipt]]

CONFIDENT = float(np.e)  # true depth: log-confidence 1
NO_TRUST = 1.0  # log-confidence 0


@dataclass(frozen=True)
class _Picture:
    """One view, cut and resampled."""

    image: NDArray[np.uint8]  # (S, S, 3), black where the mask is zero unless the background is kept
    mask: NDArray[np.uint8]  # (S, S)
    depth: NDArray[np.float32] | None  # (S, S)
    K: NDArray[np.float64]  # (3, 3)
    world_to_camera: NDArray[np.float64]  # (4, 4), head frame


def pack(
    captures: Iterable[Capture],
    out: str | Path,
    *,
    size: int,
    heldout: int | Sequence[str],
    input_sets: int = 8,
    n_inputs: int = 4,
    seed: int = 0,
    prior: str = "depth",
    crop: str = "head",
    codec: str = "jpeg",
    quality: int = 95,
    subsampling: str = "444",
    k: int = 3,
    max_input_degrees: float = 80.0,
    timesteps_per_shard: int = 256,
    input_timesteps: Literal["different", "same"] = "different",
    input_background: Background = "masked",
    threads: int = 2,
    progress: Callable[[str], None] | None = None,
    pack_shards: PackShards | None = None,
) -> Manifest:
    """Packs captures into a folder of self-contained WebDataset shards with a manifest.

    A pack that was stopped, or killed, goes on where it was: shards that are complete are not packed again,
    and no file has its name before it is whole. The manifest is written last.

    Args:
        captures: recordings of different subjects, all with the same kind of expression code and head.
        out: folder for the shards; made when not there.
        size: side of the square pictures in pixels.
        heldout: names of the subjects to hold out from training, or how many (drawn by `seed`).
        input_sets: input sets at the head of each shard.
        n_inputs: pictures in an input set.
        seed: of all draws.
        prior: "depth" to store position maps from the captures' true depth, "none" to store no prior.
        crop: "head" for the largest square around the projected head, "full" for the whole picture, with black
            beside it where it is not square.
        codec: "jpeg", "png", "webp" or "webp-lossless". Masks are PNGs always.
        quality: of "jpeg" and "webp", 1 to 100; the others lose nothing.
        subsampling: of the chroma of "jpeg", "444", "422" or "420".
        k: input cameras are drawn among the k farthest from those drawn before.
        max_input_degrees: how far from straight before the face an input camera may stand.
        timesteps_per_shard: target timesteps in one shard.
        input_timesteps: each picture of an input set is of another timestep ("different"), as Avat3r is trained, or
            all are of one ("same"), as for its ablation without random timesteps.
        input_background: input pictures are cut out of what is behind the head ("masked") or not ("kept"); targets
            are always cut out.
        threads: pictures are read, cut and encoded by this many threads.
        progress: called with a line of text after each shard.
        pack_shards: packs all the (capture, number of shard) it is given and returns their receipts in the
            same order; None packs them one after the other here.

    Returns:
        The manifest, as saved.

    Raises:
        UserError: captures that do not fit together or lack what is asked for, a folder that holds other
            shards, a picture that cannot be read, no space left.
    """
    captures, out = list(captures), Path(out)
    settings = PackSettings(
        size=size,
        crop=crop,
        codec=codec,
        quality=quality,
        subsampling=subsampling,
        prior=prior,
        n_inputs=n_inputs,
        input_sets=input_sets,
        k=k,
        max_input_degrees=max_input_degrees,
        timesteps_per_shard=timesteps_per_shard,
        seed=seed,
        input_timesteps=input_timesteps,
        input_background=input_background,
    )
    _check_settings(settings)
    _check_captures(captures, settings)
    train, held = _split([capture.subject for capture in captures], heldout, seed)
    if (out / "manifest.json").exists():
        raise UserError(f"{out} already holds packed shards. Give another folder, or remove this one first.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        asked = [(c, number) for c in captures for number in range(shard_count(c, settings))]
        if pack_shards is not None:
            receipts = pack_shards(asked, out, settings)
        else:
            receipts = []
            for capture, number in asked:
                receipts.append(pack_shard(capture, number, out, settings, threads=threads))
                if progress is not None:
                    progress(f"{len(receipts)}/{len(asked)} {describe(receipts[-1])}")
        manifest = _manifest(out, settings, captures, receipts, train, held)
        manifest.save()
        for capture, number in asked:
            _receipt_path(_shard_path(out, capture, number)).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}). Make space or give another folder, then"
            " run the same command: finished shards are kept."
        ) from None
    return manifest


def shard_count(capture: Capture, settings: PackSettings) -> int:
    """How many shards a capture becomes."""
    return -(-len(capture.timestep_ids) // settings.timesteps_per_shard)


def describe(receipt: Receipt) -> str:
    """A few words about a packed shard."""
    return f"{receipt['shard']['path']}: {len(receipt['shard']['views'])} timesteps"


def pack_shard(
    capture: Capture, number: int, out: Path, settings: PackSettings, *, threads: int = 2
) -> Receipt:
    """Packs one shard of a capture and leaves a receipt; with a valid receipt there, does nothing but read
    it.

    Independent of all other shards, so any number of processes may work on different ones of one folder.

    Returns:
        The receipt: the shard as the manifest lists it, and what its storage costs.
    """
    path = _shard_path(out, capture, number)
    fingerprint = {
        "settings": dataclasses.asdict(settings),
        "capture": capture.capture_id,
        "timesteps": len(capture.timestep_ids),
    }
    receipt = _read_receipt(path, fingerprint)
    if receipt is not None:
        return receipt
    order = Draws(settings.seed, capture.subject, "timesteps").permutation(len(capture.timestep_ids))
    start, errors = number * settings.timesteps_per_shard, PriorErrors()
    targets = order[start : start + settings.timesteps_per_shard]
    with ThreadPoolExecutor(threads) as pool:
        shard = _pack_shard(capture, targets, number, path, settings, pool, errors)
    receipt = {"fingerprint": fingerprint, "shard": dataclasses.asdict(shard), "errors": errors.to_json()}
    write_json(_receipt_path(path), receipt)
    return receipt


def draw_input_timesteps(timesteps: int, n_inputs: int, input_sets: int, draws: Draws) -> list[list[int]]:
    """Draws `n_inputs` different timesteps for each of `input_sets` sets.

    A set is drawn among the timesteps that the sets before it used least. Sets then share as few timesteps
    as they can, and few timesteps, if any, are in all sets and therefore no set's target.
    """
    used = [0] * timesteps
    sets = []
    for _ in range(input_sets):
        shuffled = draws.permutation(timesteps)
        drawn = sorted(shuffled, key=lambda t: used[t])[:n_inputs]  # stable: random among equals
        for t in drawn:
            used[t] += 1
        sets.append(drawn)
    return sets


def _pack_shard(
    capture: Capture,
    targets: list[int],
    number: int,
    path: Path,
    settings: PackSettings,
    pool: ThreadPoolExecutor,
    errors: PriorErrors,
) -> ShardInfo:
    """Writes one shard; returns its line in the manifest."""
    draws = Draws(settings.seed, capture.subject, "inputs", number)
    different = 1 if settings.input_timesteps == "same" else settings.n_inputs
    drawn = draw_input_timesteps(len(capture.timestep_ids), different, settings.input_sets, draws)
    place = {t: i for i, t in enumerate(targets)}
    views = []
    with ShardWriter(path) as writer:
        for j, timesteps in enumerate(drawn):
            steps = timesteps * (settings.n_inputs // different)
            writer.write(f"inputs-{j:03d}", _input_set(capture, steps, j, settings, draws, errors))
        for i, t in enumerate(targets):
            members, count = _target(capture, t, settings, pool)
            writer.write(f"target-{i:05d}", members)
            views.append(count)
    return ShardInfo(
        path=path.name,
        subject=capture.subject,
        bytes=writer.size,
        sha256=writer.sha256,
        index=writer.index,
        views=tuple(views),
        inputs=tuple(tuple(place[t] for t in timesteps if t in place) for timesteps in drawn),
    )


def _input_set(
    capture: Capture, timesteps: list[int], j: int, settings: PackSettings, draws: Draws, errors: PriorErrors
) -> dict[str, bytes]:
    """Members of one input set."""
    matrices = [capture.camera_matrices(t)[1] for t in timesteps]
    directions = np.stack([view_directions(m) for m in matrices])
    allowed = _input_cameras(directions, settings)
    repeat = len(capture.camera_ids) < len(timesteps)  # one camera's video: the head turns instead
    pictures: dict[int, _Picture] = {}
    while len(pictures) < len(timesteps):  # a dropped frame bars that camera at that timestep; draw again
        try:
            cameras = k_farthest(directions, len(timesteps), settings.k, draws, allowed, repeat)
        except ValueError:
            raise UserError(
                f"{capture.capture_id}: too few pictures for an input set at timesteps"
                f" {', '.join(capture.timestep_ids[t] for t in timesteps)}. Widen max_input_degrees or"
                " leave it out."
            ) from None
        pictures = {}
        for i, (t, v) in enumerate(zip(timesteps, cameras, strict=True)):
            uncut = settings.input_background == "kept"
            picture = _picture(capture, t, v, settings, depth=settings.prior == "depth", uncut=uncut)
            if picture is None:
                allowed[i, v] = False
            else:
                pictures[i] = picture
    description = {
        **_provenance(capture, settings),
        "kind": "inputs",
        "set": j,
        "pictures": [
            {
                "timestep": capture.timestep_ids[t],
                "camera": capture.camera_ids[v],
                "expression": _numbers(capture.expressions[t]),
                "K": _numbers(pictures[i].K),
                "world_to_camera": _numbers(pictures[i].world_to_camera),
            }
            for i, (t, v) in enumerate(zip(timesteps, cameras, strict=True))
        ],
    }
    members = {"json": _json(description)}
    for i, picture in sorted(pictures.items()):
        members[f"{i:02d}.{extension(settings.codec)}"] = _encode(picture, settings)
        members[f"{i:02d}.mask.png"] = encode_mask(picture.mask)
        if settings.prior == "depth":
            positions, confidence = _true_prior(picture, capture)
            encoded = encode_positions(positions, confidence, errors)
            members |= {f"{i:02d}.{end}": data for end, data in encoded.items()}
    return members


def _input_cameras(directions: NDArray, settings: PackSettings) -> NDArray[np.bool_]:
    """Which cameras (N, V) may give an input: those before the face; the nearest ones where those are too
    few.
    """
    allowed = facing(directions, settings.max_input_degrees)
    for i in np.flatnonzero(allowed.sum(1) < settings.n_inputs):
        allowed[i, np.argsort(-directions[i, :, 2], kind="stable")[: settings.n_inputs]] = True
    return allowed


def _target(
    capture: Capture, t: int, settings: PackSettings, pool: ThreadPoolExecutor
) -> tuple[dict[str, bytes], int]:
    """Members of one target timestep, and how many views it has."""

    def encoded(v: int) -> tuple[_Picture, bytes, bytes] | None:
        picture = _picture(capture, t, v, settings, depth=False)
        if picture is None:
            return None
        return picture, _encode(picture, settings), encode_mask(picture.mask)

    found = [
        (v, view)
        for v, view in enumerate(pool.map(encoded, range(len(capture.camera_ids))))
        if view is not None
    ]
    if not found:
        raise UserError(
            f"{capture.capture_id}: timestep {capture.timestep_ids[t]} has no picture. Leave it out."
        )
    description = {
        **_provenance(capture, settings),
        "kind": "target",
        "timestep": capture.timestep_ids[t],
        "expression": _numbers(capture.expressions[t]),
        "cameras": [
            {
                "camera": capture.camera_ids[v],
                "K": _numbers(picture.K),
                "world_to_camera": _numbers(picture.world_to_camera),
            }
            for v, (picture, _, _) in found
        ],
    }
    members = {"json": _json(description)}
    for i, (_, (_, data, mask)) in enumerate(found):
        members[f"{i:03d}.{extension(settings.codec)}"] = data
        members[f"{i:03d}.mask.png"] = mask
    return members, len(found)


def _encode(picture: _Picture, settings: PackSettings) -> bytes:
    return encode_picture(picture.image, settings.codec, settings.quality, settings.subsampling)


def _picture(
    capture: Capture, t: int, v: int, settings: PackSettings, *, depth: bool, uncut: bool = False
) -> _Picture | None:
    """One view, cut and resampled; None for a dropped frame. `uncut` keeps what is behind the head."""
    view: View | None = capture.view(t, v, depth=depth)
    if view is None:
        return None
    K, world_to_camera = (matrices[v] for matrices in capture.camera_matrices(t))
    window = crop_window(K, world_to_camera, view.mask.shape, settings.crop)
    mask = crop_and_resize(view.mask, window, settings.size)
    seen = capture.uncut(t, v) if uncut else view.image
    if seen is None:
        return None
    image = crop_and_resize(seen, window, settings.size)
    return _Picture(
        image=image if uncut else image * (mask > 0)[..., None],
        mask=mask,
        depth=None if view.depth is None else resample_depth(view.depth, window, settings.size),
        K=fit_intrinsics(K, window, settings.size),
        world_to_camera=world_to_camera,
    )


def _true_prior(picture: _Picture, capture: Capture) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Position map (3, S, S) in the head frame, metres, and confidence (1, S, S), from true depth."""
    if picture.depth is None:
        raise UserError(
            f"{capture.capture_id} has no depth. Pack it with prior none, or make priors for it first."
        )
    known = (picture.depth > 0) & (picture.mask > 0)
    size = len(picture.depth)
    x, y = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    pixels = np.stack([x, y, np.ones_like(x)], -1)  # (S, S, 3)
    in_camera = pixels @ np.linalg.inv(picture.K).T * picture.depth[..., None]
    rotation, translation = picture.world_to_camera[:3, :3], picture.world_to_camera[:3, 3]
    positions = np.where(known[..., None], (in_camera - translation) @ rotation, 0.0)
    confidence = np.where(known, CONFIDENT, NO_TRUST)
    return positions.transpose(2, 0, 1).astype(np.float32), confidence[None].astype(np.float32)


def _provenance(capture: Capture, settings: PackSettings) -> dict[str, Any]:
    """What every sample says about where it comes from."""
    return {
        "subject": capture.subject,
        "capture": capture.capture_id,
        "layout": capture.layout,
        "expression_kind": capture.expression_kind,
        "head": capture.head,
        "identity": None if capture.identity is None else _numbers(capture.identity),
        "size": settings.size,
        "prior": settings.prior,
        "features": "none",
    }


def _numbers(array: NDArray) -> Any:
    """Nested lists of numbers with nine digits, which is exact for float32."""
    return _nested(array.tolist())


def _nested(value: Any) -> Any:
    return [_nested(item) for item in value] if isinstance(value, list) else float(f"{value:.9g}")


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _check_settings(settings: PackSettings) -> None:
    """Refuses settings that cannot be."""
    limits = {
        "size": (8, 8192),
        "quality": (1, 100),
        "n_inputs": (1, 64),
        "input_sets": (1, 999),
        "k": (1, 10_000),
        "timesteps_per_shard": (1, 99_999),
    }
    for name, (low, high) in limits.items():
        if not low <= getattr(settings, name) <= high:
            raise UserError(f"{name} is {getattr(settings, name)}; it must be from {low} to {high}.")
    if settings.prior not in ("depth", "none"):
        raise UserError(f"There is no prior {settings.prior!r} to pack; the priors are depth and none.")
    if settings.input_timesteps not in ("different", "same"):
        raise UserError(f"input_timesteps is {settings.input_timesteps!r}; it must be different or same.")
    if settings.input_background not in INPUT_BACKGROUNDS:
        raise UserError(f"input_background is {settings.input_background!r}; it must be masked or kept.")
    if settings.crop not in CROPS:
        raise UserError(f"There is no crop {settings.crop!r}; the crops are {' and '.join(CROPS)}.")
    if settings.codec not in CODECS:
        raise UserError(f"There is no codec {settings.codec!r}; the codecs are {', '.join(CODECS)}.")
    if settings.subsampling not in ("444", "422", "420"):
        raise UserError(f"subsampling is {settings.subsampling!r}; it must be 444, 422 or 420.")


def _check_captures(captures: list[Capture], settings: PackSettings) -> None:
    """Refuses captures that cannot be in one set of shards."""
    if not captures:
        raise UserError("There are no captures to pack. Give at least one capture folder.")
    first = captures[0]
    seen: dict[str, Capture] = {}
    stems: dict[str, str] = {}
    for capture in captures:
        for part in ("expressions", "head pose", "masks"):
            capture.require(part, "packing")
        if capture.subject in seen:
            raise UserError(
                f"{capture.subject} is in two captures, {seen[capture.subject].capture_id} and"
                f" {capture.capture_id}."
                " Give one capture a subject."
            )
        seen[capture.subject] = capture
        stem = _file_stem(capture.subject)
        if stem in stems:
            raise UserError(
                f"The subjects {stems[stem]!r} and {capture.subject!r} would share file names. Rename one."
            )
        stems[stem] = capture.subject
        for field, ours, theirs in (
            ("expression kind", capture.expression_kind, first.expression_kind),
            ("code length", capture.expressions.shape[1], first.expressions.shape[1]),
            ("head", capture.head, first.head),
        ):
            if ours != theirs:
                raise UserError(
                    f"{capture.capture_id} has the {field} {ours} where {first.capture_id} has {theirs}."
                    " Pack them into different folders."
                )
        same = settings.input_timesteps == "same"
        different = 1 if same else settings.n_inputs
        if len(capture.timestep_ids) <= different:
            raise UserError(
                f"{capture.capture_id} has {len(capture.timestep_ids)} timesteps; {different} input timesteps"
                " and a target need at least one more. Record more, or lower --input-views (n_inputs)."
            )
        if same and len(capture.camera_ids) < settings.n_inputs:
            raise UserError(
                f"{capture.capture_id} has {len(capture.camera_ids)} cameras, too few for {settings.n_inputs}"
                " pictures of the same timestep. Pack inputs of different timesteps, or lower --input-views (n_inputs)."
            )
        if settings.input_background == "kept" and not capture.has_background:
            raise UserError(
                f"{capture.capture_id} is of the layout {capture.layout}, whose pictures have nothing behind the head"
                " to keep. Pack it with --input-background masked."
            )
        if settings.prior == "depth" and not capture.has_depth:
            raise UserError(
                f"{capture.capture_id} has no depth. Pack it with prior none, or make priors for it first."
            )


def _split(subjects: list[str], heldout: int | Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out subjects, in the order given."""
    if isinstance(heldout, int):
        if not 0 <= heldout < len(subjects):
            raise UserError(
                f"heldout is {heldout} of {len(subjects)} subjects; at least one must be left to train on."
            )
        ranked = Draws(seed, "split").permutation(len(subjects))
        held = {sorted(subjects)[i] for i in ranked[:heldout]}
    else:
        held = set(heldout)
        for name in heldout:
            if name not in subjects:
                raise UserError(f"heldout names {name}, which is none of the captures' subjects.")
    return [s for s in subjects if s not in held], [s for s in subjects if s in held]


def _manifest(
    out: Path,
    settings: PackSettings,
    captures: list[Capture],
    receipts: list[Receipt],
    train: list[str],
    heldout: list[str],
) -> Manifest:
    """The manifest of finished shards."""
    first = captures[0]
    codes = np.concatenate(
        [c.expressions.astype(np.float64) for c in captures if c.subject in train or not train]
    )
    shards, errors = [], PriorErrors()
    for receipt in receipts:
        errors.join(PriorErrors.from_json(receipt["errors"]))
        shard = receipt["shard"]
        lists = {"index": tuple(shard["index"]), "views": tuple(shard["views"])}
        inputs = tuple(tuple(steps) for steps in shard["inputs"])
        shards.append(ShardInfo(**{**shard, **lists, "inputs": inputs}))
    return Manifest(
        folder=out,
        expression_kind=first.expression_kind,
        expression_length=first.expressions.shape[1],
        expression_mean=tuple(codes.mean(0).tolist()),
        expression_std=tuple(codes.std(0).tolist()),
        head=first.head,
        settings=settings,
        priors=PriorSettings(position=settings.prior),
        prior_error=errors.summary(),
        train=tuple(train),
        heldout=tuple(heldout),
        shards=tuple(shards),
    )


def _file_stem(subject: str) -> str:
    """A subject's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", subject)


def _shard_path(out: Path, capture: Capture, number: int) -> Path:
    return out / f"{_file_stem(capture.subject)}-{number:04d}.tar"


def _receipt_path(path: Path) -> Path:
    return path.with_name(path.name + ".packed.json")


def _read_receipt(path: Path, fingerprint: dict[str, Any]) -> Receipt | None:
    """A finished shard's receipt, if there is one for the same capture and settings and the shard is there."""
    try:
        receipt: Receipt = json.loads(_receipt_path(path).read_text())
        whole = path.stat().st_size == receipt["shard"]["bytes"]
        return receipt if whole and receipt["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
