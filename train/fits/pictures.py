"""Which pictures a fit is made from: an input set, many views of several expressions, or one camera's video.

What is not fitted to is what the result is measured on, so the choice of one is the choice of the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.inputs import InputSet
from eval.protocol import Protocol, choose_timesteps, choose_views, frontal_first

if TYPE_CHECKING:
    from shards import Capture, SubjectShards

__all__ = ["FitPictures", "FitSource", "Selection", "from_capture", "from_shards", "select"]


@dataclass(frozen=True)
class FitSource:
    """What a fit is made from. All but `pictures` and `input_set` are for "views" and "video"."""

    pictures: Literal["inputs", "views", "video"] = "inputs"
    """An input set, as Avat3r gets it; many cameras at several expressions; or one camera's video."""
    input_set: int = 0
    """Which of the packed input sets: the pictures for "inputs", the expressions for "views"."""
    views: int = 40
    """Cameras fitted to, spread as far as they go; 0 for all that are not held out."""
    held_views: int = Protocol.views
    """Cameras of a capture that are kept to measure on; of shards the protocol decides."""
    held_timesteps: float = 0.2
    """Share of a capture's timesteps, the last ones, that is kept to measure on. The authors keep 500 frames."""
    size: int = 512
    """Side of a capture's pictures in pixels; smaller ones stay as they are. Shards have a size of their own."""
    inputs: int = 0
    """For "inputs": only the first so many pictures of the input set; 0 for all."""

    def __post_init__(self) -> None:
        for name in ("views", "held_views", "input_set", "inputs"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)} and must not be negative.")
        if not 0 <= self.held_timesteps < 1:
            raise UserError(f"held_timesteps is {self.held_timesteps} and must be at least 0 and below 1.")
        if self.size < 16:
            raise UserError(f"size is {self.size} and must be at least 16 pixels.")


@dataclass
class FitPictures:
    """Pictures of one person, a few or thousands, kept as bytes where they came as bytes.

    Attributes:
        images: (P, 3, H, W) uint8, or float in [0, 1]; sRGB, black where the mask is zero.
        masks: (P, 1, H, W) uint8, or float in [0, 1]: foreground coverage.
        cameras: P cameras in the head frame of each picture.
        expressions: (P, E) codes.
        expression_kind: what they mean.
        subject: name of the person.
        head: name of the head that tracked the pictures, or None.
        identity: (I,) its identity code, or None.
        provenance: where the pictures come from; travels into the avatar.
    """

    images: Tensor
    masks: Tensor
    cameras: Cameras
    expressions: Tensor
    expression_kind: str
    subject: str
    head: str | None = None
    identity: Tensor | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        return self.images.shape[-2], self.images.shape[-1]

    def take(self, pictures: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Some of the pictures (n, 3, H, W) and their masks (n, 1, H, W), as floats in [0, 1]."""
        index = torch.as_tensor(pictures, dtype=torch.long, device=self.images.device)
        return _floats(self.images[index]), _floats(self.masks[index])

    def spread(self, count: int) -> FitPictures:
        """At most `count` of the pictures, evenly spread."""
        kept = torch.linspace(0, len(self) - 1, min(count, len(self))).long()
        places = kept.tolist()
        return replace(
            self,
            images=self.images[kept],
            masks=self.masks[kept],
            cameras=self.cameras[kept],
            expressions=self.expressions[kept],
            provenance={
                key: [value[place] for place in places] if key in ("timesteps", "camera_ids") else value
                for key, value in self.provenance.items()
            },
        )

    def to(self, device: str) -> FitPictures:
        """The same pictures on `device`."""
        return replace(
            self,
            images=self.images.to(device),
            masks=self.masks.to(device),
            cameras=self.cameras.to(device=device),
            expressions=self.expressions.to(device),
            identity=None if self.identity is None else self.identity.to(device),
        )

    @classmethod
    def of(cls, inputs: InputSet | FitPictures) -> FitPictures:
        """An input set without what only networks need of it: priors, and what is behind the head."""
        if isinstance(inputs, FitPictures):
            return inputs
        inputs = inputs.masked()
        return cls(
            inputs.images,
            inputs.masks,
            inputs.cameras,
            inputs.expressions,
            inputs.expression_kind,
            inputs.subject,
            inputs.head,
            inputs.identity,
            inputs.provenance,
        )


@dataclass(frozen=True)
class Selection:
    """Pairs of (timestep, view) indices."""

    fitted: list[tuple[int, int]]
    """The pictures of the fit."""
    held: list[tuple[int, int]]
    """Pictures of expressions and, with several cameras, from views that the fit never sees."""


def select(source: FitSource, timesteps: int, cameras: Cameras) -> Selection:
    """Parts a capture into what is fitted to and what is measured on.

    The last timesteps are held out, as the authors do with their videos. A fit to views also holds out cameras, by the
    rule of the evaluation's protocol, and a fit to a video sees one camera, the most frontal, and is measured from it.

    Args:
        source: what the fit is made from.
        timesteps: how many the capture has.
        cameras: its V cameras at the first timestep, in the head frame.

    Raises:
        UserError: there is nothing left to fit to.
    """
    last = timesteps - round(source.held_timesteps * timesteps)
    if source.pictures == "video":
        fitted = held = [frontal_first(cameras)[0]]
    else:
        held = choose_views(cameras, [], source.held_views) if source.held_views else []
        fitted = choose_views(cameras, held, source.views) if len(held) < len(cameras) else []
    if last < 1 or not fitted:
        raise UserError(
            f"{timesteps} timesteps and {len(cameras)} cameras leave nothing to fit to when "
            f"{source.held_timesteps:g} of the timesteps and {source.held_views} cameras are held out; hold out less."
        )
    return Selection(
        [(t, v) for t in range(last) for v in fitted], [(t, v) for t in range(last, timesteps) for v in held]
    )


def from_shards(subject: SubjectShards, source: FitSource) -> InputSet | FitPictures:
    """The pictures of a packed subject.

    "views" are those of the input set's expressions from cameras that the evaluation does not measure from: what it
    measures are then unseen views of unseen expressions, the same as for every other method.

    Raises:
        UserError: no such input set, or the shards have no picture of this kind.
    """
    if source.input_set >= len(subject.input_sets):
        raise UserError(
            f"{subject.subject} has {len(subject.input_sets)} input sets and number {source.input_set} was asked for; "
            "numbers start at 0."
        )
    inputs = subject.input_sets[source.input_set]
    if source.inputs > len(inputs):
        raise UserError(
            f"{subject.subject} has input sets of {len(inputs)} pictures and {source.inputs} were asked for; ask for "
            "fewer, or pack the captures with larger input sets."
        )
    if source.pictures == "inputs":
        return inputs.first(source.inputs) if source.inputs else inputs
    if source.pictures == "video":
        raise UserError("Shards hold input sets and views; a video is fitted from captures: give --captures.")

    targets, used = subject.targets, inputs.provenance
    measured = choose_timesteps([target.timestep for target in targets], used["timesteps"], 0)
    first = targets[measured[0]]
    input_views = [first.camera_ids.index(name) for name in set(used["camera_ids"]) & set(first.camera_ids)]
    held = choose_views(first.cameras, input_views, Protocol.views)
    chosen = [first.camera_ids[view] for view in choose_views(first.cameras, held, source.views)]
    fitted = [target for target in targets if target.timestep in set(used["timesteps"])]
    places = [
        (target, [target.camera_ids.index(name) for name in chosen if name in target.camera_ids])
        for target in fitted
    ]
    count = sum(len(views) for _, views in places)
    images = torch.empty((count, 3, *inputs.size), dtype=torch.uint8)
    masks = torch.empty((count, 1, *inputs.size), dtype=torch.uint8)
    at = 0
    for target, views in places:
        images[at : at + len(views)] = _bytes(target.images(views))
        masks[at : at + len(views)] = _bytes(target.masks(views))
        at += len(views)
    return FitPictures(
        images,
        masks,
        Cameras.cat([target.cameras[views] for target, views in places]),
        torch.cat([target.expression.expand(len(views), -1) for target, views in places]),
        inputs.expression_kind,
        inputs.subject,
        inputs.head,
        inputs.identity,
        {
            **inputs.provenance,
            "pictures": "views",
            "timesteps": [target.timestep for target, views in places for _ in views],
            "camera_ids": [target.camera_ids[view] for target, views in places for view in views],
        },
    )


def from_capture(capture: Capture, source: FitSource) -> tuple[FitPictures, FitPictures | None]:
    """The pictures of a capture to fit to, and those to measure on (None when nothing is held out).

    Raises:
        UserError: the capture lacks what a fit needs, its pictures and its tracking differ in length, or the pictures
            take more memory than there is.
    """
    if source.pictures == "inputs":
        raise UserError(
            "A capture holds no input sets: pack it (headsplat shards pack) and give --data, or ask for --pictures "
            "views."
        )
    for what in ("expressions", "head pose", "masks"):
        capture.require(what, "a fit")
    _check_lengths(capture)
    selection = select(source, len(capture.timestep_ids), capture.cameras(0))
    side = min(*capture.size, source.size)
    need = 4 * side**2 * (len(selection.fitted) + len(selection.held))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > 0.8 * free:
        raise UserError(
            f"{len(selection.fitted)} pictures of {capture.subject} with {side} pixels take {need / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free; ask for fewer views or a smaller size."
        )
    held = _read(capture, selection.held, side, source) if selection.held else None
    return _read(capture, selection.fitted, side, source), held


def _read(capture: Capture, places: list[tuple[int, int]], side: int, source: FitSource) -> FitPictures:
    from shards.pictures import crop_and_resize, crop_window, fit_intrinsics

    images, masks, intrinsics, poses, kept = [], [], [], [], []
    for t, v in places:
        view = capture.view(t, v, depth=False)
        if view is None:
            continue  # a dropped frame
        K, world_to_camera = (matrices[v] for matrices in capture.camera_matrices(t))
        window = crop_window(K, world_to_camera, view.mask.shape)
        mask = torch.from_numpy(crop_and_resize(view.mask, window, side).copy())
        image = torch.from_numpy(crop_and_resize(view.image, window, side).copy())
        images.append(image.permute(2, 0, 1) * (mask > 0))
        masks.append(mask[None])
        intrinsics.append(torch.from_numpy(fit_intrinsics(K, window, side)).float())
        poses.append(torch.from_numpy(world_to_camera).float())
        kept.append((t, v))
    if not kept:
        raise UserError(
            f"{capture.subject} has none of the pictures that were asked for; all frames are dropped."
        )
    return FitPictures(
        torch.stack(images),
        torch.stack(masks),
        Cameras(torch.stack(intrinsics), torch.stack(poses)),
        torch.from_numpy(capture.expressions[[t for t, _ in kept]]).float(),
        capture.expression_kind,
        capture.subject,
        capture.head,
        None if capture.identity is None else torch.from_numpy(capture.identity).float(),
        {
            "capture": capture.capture_id,
            "layout": capture.layout,
            "pictures": source.pictures,
            "timesteps": [capture.timestep_ids[t] for t, _ in kept],
            "camera_ids": [capture.camera_ids[v] for _, v in kept],
        },
    )


def _check_lengths(capture: Capture) -> None:
    """A tracked video has a picture for each of the tracker's frames; a shift between the two would ruin the fit."""
    from shards.readers.metrical import MetricalCapture, checkpoint_folder

    if not isinstance(capture, MetricalCapture):
        return
    folder = checkpoint_folder(capture.path)
    frames = len(list(folder.glob("*.frame"))) if folder is not None else 0
    pictures = len(list((capture.path / "imgs").glob("*.jpg")))
    if frames != pictures:
        raise UserError(
            f"{folder} has {frames} tracked frames and {capture.path / 'imgs'} has {pictures} pictures; track the "
            "video again or remove the pictures that were not tracked."
        )


def _bytes(values: Tensor) -> Tensor:
    return (values * 255).round().to(torch.uint8)


def _floats(values: Tensor) -> Tensor:
    return values.float() / 255 if values.dtype == torch.uint8 else values
