"""Fits a FlashAvatar to a person's pictures (paper section 4.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.flashavatar import FlashAvatar, FlashAvatarConfig, paper_model
from avatars.gaussians import Gaussians, rgb_to_sh
from avatars.head.mesh import HeadMesh
from avatars.head.uv import surface_frames
from avatars.inputs import InputSet
from avatars.rasterize import rasterize
from train.fits.look import neighbour_distance, sample_colors, spread_colors
from train.fits.mouth import lip_points, mouth_masks
from train.fits.pictures import FitPictures
from train.perceptual import load_lpips

__all__ = [
    "FlashAvatarFit",
    "FlashAvatarFitConfig",
    "flashavatar_cpu",
    "flashavatar_cpu_many",
    "flashavatar_gpu",
    "flashavatar_gpu_many",
    "flashavatar_paper",
]

THICKNESS = 0.3
"""Start of a Gaussian across the surface, as a share of its size along it (only with `look="pictures"`)."""
MOST_LOOKED_AT = 32
"""Pictures that give the first colours; evenly spread where there are more."""
MOST_POSED = 256
"""Expressions whose posed points are kept in memory; of more than these a point is posed when it is drawn."""


OURS: dict[str, Any] = {
    "look": "pictures",
    "size": 0.5,
    "opacity": 0.98,
    "background": "random",
    "keep_unseen_colors": True,
    "expression_dropout": 0.5,
}
"""What our recipes share: an opaque skin in the pictures' colours to start from, and brakes on what a few pictures
cannot know."""


@dataclass(frozen=True)
class FlashAvatarFitConfig:
    """A complete fit. The defaults are the authors' optimisation; recipes below choose the rest."""

    model: FlashAvatarConfig = field(default_factory=FlashAvatarConfig)
    """The avatar's shape."""
    steps: int = 150_000
    """Optimiser steps."""
    pictures_per_step: int = 1
    """Pictures rendered for one step; of one expression where it has so many, which the network and the head then
    serve with one pass."""
    most_a_pass: int = 2_000
    """Pictures are drawn in passes, each in an order of its own; a pass takes at most so many, as the authors'."""
    checkpoint_every: int = 5_000
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the network's start and of the order of pictures."""

    look: Literal["grey", "pictures"] = "grey"
    """Start grey, round and of `opacity`, as the authors do, or flat on the skin in the pictures' colours
    (ours)."""
    keep_unseen_colors: bool = False
    """What no picture shows keeps the colour of its start (ours). It gets gradients all the same, through what
    covers it and is not quite opaque, and they paint it with noise."""
    expression_dropout: float = 0.0
    """How often a step hides the expression from the offset network (ours), divided by the number of pictures
    that share an expression. Where every picture has an expression of its own the network could otherwise
    explain each picture by itself, in a shape that no other expression and no other view fits."""
    mirror: bool = True
    """With `look="pictures"`: what no picture shows may take its colour from the other side of the face."""
    size: float = 1.0
    """Size at the start, as a share of the distance to the nearest neighbours."""
    opacity: float = 0.1
    """Opacity at the start."""
    background: Literal["green", "black", "white", "random"] = "green"
    """What pictures and renderings stand on: the authors' green, or a new random colour each step, which
    keeps Gaussians from painting the background (ours)."""

    huber_delta: float = 0.1
    """Where the Huber loss turns from square to linear."""
    mouth_weight: float = 40.0
    """Weight of the same loss inside the mouth."""
    lpips_weight: float = 0.05
    """Weight of LPIPS (VGG); left out, and said so, where its weights are not on this machine."""
    lpips_from: int = 15_000
    """Steps before LPIPS counts."""
    sh_every: int = 500
    """Steps between degrees of spherical harmonics."""
    rate_color: float = 0.0025
    """Adam rate of the constant colour; the view-dependent part has a twentieth of it."""
    rate_opacity: float = 0.05
    """Adam rate of the opacity logit."""
    rate_scale: float = 0.005
    """Adam rate of the log-scale."""
    rate_rotation: float = 0.001
    """Adam rate of the quaternion."""
    rate_offsets: float = 1e-4
    """Adam rate of the offset network."""
    final_rate: float = 1.0
    """All rates fall exponentially to this share at the last step; 1 keeps them constant, as the authors
    do."""

    def __post_init__(self) -> None:
        for name in ("steps", "pictures_per_step", "most_a_pass", "checkpoint_every", "sh_every"):
            if getattr(self, name) < 1:
                raise UserError(f"FlashAvatar: {name} is {getattr(self, name)} and must be at least 1.")
        for name in ("size", "final_rate", "huber_delta"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise UserError(f"FlashAvatar: {name} is {value} and must be above 0 and at most 1.")
        if not 0 < self.opacity < 1:
            raise UserError(f"FlashAvatar: opacity is {self.opacity} and must be above 0 and below 1.")

    @property
    def method(self) -> str:
        """Name of the method."""
        return "flashavatar"

    def build(
        self, inputs: InputSet | FitPictures, device: str = "cpu", head: HeadMesh | None = None
    ) -> FlashAvatarFit:
        """A fit at step 0.

        Args:
            inputs: the person's pictures, with the head that tracks them.
            device: where to compute.
            head: the head to fit on; loaded by its name when None.
        """
        return FlashAvatarFit(self, inputs, device, head)


def flashavatar_paper() -> FlashAvatarFitConfig:
    """The authors' program, made for minutes of video: 128², 150,000 steps, offsets of up to a metre."""
    return FlashAvatarFitConfig(model=paper_model())


def flashavatar_gpu() -> FlashAvatarFitConfig:
    """The paper's sizes and rates with our start and switches, for a few pictures; minutes on a GPU."""
    return FlashAvatarFitConfig(
        steps=10_000,
        checkpoint_every=1_000,
        lpips_from=3_000,
        final_rate=0.1,
        **OURS,
    )


def flashavatar_cpu() -> FlashAvatarFitConfig:
    """A small avatar in about ten seconds on one CPU core, from pictures of about 100 pixels."""
    return FlashAvatarFitConfig(
        model=FlashAvatarConfig(uv_resolution=96, sh_degree=0, mlp_width=64, mlp_layers=3),
        steps=500,
        checkpoint_every=100,
        lpips_weight=0.0,
        rate_color=0.003,
        rate_scale=0.01,
        rate_rotation=0.003,
        rate_offsets=3e-3,
        final_rate=0.1,
        **OURS,
    )


def flashavatar_gpu_many() -> FlashAvatarFitConfig:
    """`flashavatar_gpu` for hundreds of pictures: they say themselves how the expression moves the Gaussians."""
    return replace(
        flashavatar_gpu(),
        steps=10_000,
        pictures_per_step=4,
        lpips_from=5_000,
        expression_dropout=0.0,
        keep_unseen_colors=False,
    )


def flashavatar_cpu_many() -> FlashAvatarFitConfig:
    """An avatar of the paper's 128² from hundreds of pictures of about 128 pixels; some minutes on one CPU core."""
    few = flashavatar_cpu()
    model = FlashAvatarConfig(uv_resolution=128, sh_degree=1, mlp_width=64, mlp_layers=3)
    return replace(
        few,
        model=model,
        steps=2_000,
        pictures_per_step=2,
        checkpoint_every=250,
        expression_dropout=0.0,
        keep_unseen_colors=False,
        rate_color=0.01,
        rate_scale=0.03,
    )


class FlashAvatarFit:
    """One person's FlashAvatar on its way."""

    def __init__(
        self,
        config: FlashAvatarFitConfig,
        inputs: InputSet | FitPictures,
        device: str = "cpu",
        head: HeadMesh | None = None,
    ) -> None:
        """Builds the avatar and gives it its first look.

        Raises:
            UserError: the pictures are not tracked with the configured head, or show no face.
        """
        inputs = FitPictures.of(inputs)
        identity = _tracked_identity(config, inputs)
        if head is None:
            from avatars.head.tracked import load_head

            head = load_head(config.model.head)
        if inputs.expressions.shape[1] != head.n_expression:
            raise UserError(
                f"The pictures of {inputs.subject} have {inputs.expression_kind} codes of "
                f"{inputs.expressions.shape[1]} numbers and the head {config.model.head!r} takes "
                f"{head.n_expression}."
            )
        kind = getattr(head, "expression_kind", inputs.expression_kind)
        if kind != inputs.expression_kind:
            raise UserError(
                f"The pictures of {inputs.subject} have {inputs.expression_kind} codes and the head "
                f"{config.model.head!r} is driven by {kind}; track them with that head."
            )
        self.config = config
        self.step = 0
        self.notes: list[str] = list(getattr(head, "notes", ()))
        self.inputs = inputs.to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = FlashAvatar(config.model, head, identity.cpu(), inputs.expression_kind, inputs.provenance)
        self.model = model.to(device)
        self.codes, self.code_of = _distinct(self.inputs.expressions)  # (D, E), and of each picture its row
        self.dropout = config.expression_dropout * len(self.codes) / len(self.inputs)
        self.centers = self.model.posed_centers(self.codes[:MOST_POSED])  # (at most D, N, 3)
        self.lips = self._lips()  # (D, L, 3)
        self._first_look()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.rates = {
            "sh_dc": config.rate_color,
            "sh_rest": config.rate_color / 20,
            "opacity_logit": config.rate_opacity,
            "log_scale": config.rate_scale,
            "quaternion": config.rate_rotation,
        }
        groups: list[dict[str, Any]] = [
            {"params": [self.model.get_parameter(name)], "lr": rate, "eps": 1e-15}
            for name, rate in self.rates.items()
        ]
        groups.append(
            {"params": list(self.model.offsets.parameters()), "lr": config.rate_offsets, "eps": 1e-8}
        )
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999))
        self.lpips = self._lpips()
        self._order: tuple[int, list[int]] | None = None  # number of a pass, and its pictures
        self._mouth_of: dict[int, tuple[tuple[slice, slice], Tensor] | None] = {}

    def advance(self) -> dict[str, float]:
        """Renders a few of the pictures and takes a step towards them."""
        config = self.config
        decay = config.final_rate ** (self.step / config.steps)
        rates = [*self.rates.values(), config.rate_offsets]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * decay
        chosen = self._drawn()
        rows = self.code_of[chosen].tolist()
        groups = [
            [picture for picture, row in zip(chosen, rows, strict=True) if row == one]
            for one in dict.fromkeys(rows)
        ]
        parts = [(len(group) / len(chosen), self._losses(group)) for group in groups]
        means = {
            name: torch.stack([share * part[name] for share, part in parts]).sum() for name in parts[0][1]
        }
        loss = torch.stack(list(means.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.keep_unseen_colors:
            for name in ("sh_dc", "sh_rest"):
                self.model.get_parameter(name).grad[~self.seen] = 0  # type: ignore[index]
        self.optimizer.step()
        self.step += 1
        return {"loss": loss.item(), **{name: value.item() for name, value in means.items()}}

    def state_dict(self) -> dict[str, Any]:
        """Parameters, the optimiser and the order of pictures to come."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`'s output."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])

    def avatar(self) -> FlashAvatar:
        """The avatar as fitted so far."""
        return self.model.eval()

    def _drawn(self) -> list[int]:
        """The pictures of this step; each pass goes through at most `most_a_pass` of them, in its own order."""
        count = len(self.inputs)
        a_pass = min(count, self.config.most_a_pass)
        a_step = min(self.config.pictures_per_step, a_pass)
        number, place = divmod(self.step, -(-a_pass // a_step))
        if self._order is None or self._order[0] != number:
            # A pure function of the seed and the pass: a fit that goes on needs no memory of it.
            generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + number)
            pictures = torch.randperm(count, generator=generator)[:a_pass]
            self._order = (number, _together(pictures, self.code_of.cpu(), a_step, generator))
        return self._order[1][place * a_step : (place + 1) * a_step]

    def _posed(self, picture: int) -> Tensor:
        """(N, 3) points on the posed mesh of a picture."""
        row = int(self.code_of[picture])
        if row < len(self.centers):
            return self.centers[row]
        return self.model.posed_centers(self.codes[row : row + 1])[0]

    def _losses(self, pictures: list[int]) -> dict[str, Tensor]:
        """Means over pictures of one expression."""
        config, inputs = self.config, self.inputs
        degree = min(config.model.sh_degree, self.step // config.sh_every)
        background = self._background(len(pictures))
        expression = inputs.expressions[pictures[0]]
        if self.dropout and float(torch.rand((), generator=self.generator)) < self.dropout:
            expression = torch.zeros_like(expression)
        gaussians = self.model.deform(self._posed(pictures[0]), expression, degree)
        cameras = inputs.cameras[pictures]
        rendered = rasterize(gaussians, cameras, inputs.size, background).image
        image, mask = inputs.take(pictures)
        target = image + (1 - mask) * background[:, :, None, None]
        mouth = self._mouths(pictures)
        losses = {"huber": nn.functional.huber_loss(rendered, target, delta=config.huber_delta)}
        if config.mouth_weight:
            inside = nn.functional.huber_loss(rendered * mouth, target * mouth, delta=config.huber_delta)
            losses["mouth"] = config.mouth_weight * inside
        if self.lpips is not None and self.step >= config.lpips_from:
            losses["lpips"] = (
                config.lpips_weight * self.lpips(rendered * mask * 2 - 1, target * mask * 2 - 1).mean()
            )
        return losses

    def _mouths(self, pictures: list[int]) -> Tensor:
        """(P, 1, H, W) masks; each is drawn once and kept as the part of the picture that it covers."""
        height, width = self.inputs.size
        masks = torch.zeros(len(pictures), 1, height, width, device=self.lips.device)
        for mask, picture in zip(masks, pictures, strict=True):
            if picture not in self._mouth_of:
                lips = self.lips[self.code_of[picture]][None]
                drawn = mouth_masks(lips, self.inputs.cameras[picture], self.inputs.size)[0, 0]
                rows, columns = (drawn.any(side).nonzero()[:, 0].tolist() for side in (1, 0))
                place = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)) if rows else None
                self._mouth_of[picture] = None if place is None else (place, drawn[place])
            if (mouth := self._mouth_of[picture]) is not None:
                place, part = mouth
                mask[0][place] = part
        return masks

    def _background(self, count: int) -> Tensor:
        """(count, 3) colours."""
        colors = {"green": (0.0, 1.0, 0.0), "black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0)}
        if self.config.background == "random":
            return torch.rand(count, 3, generator=self.generator).to(self.centers)
        return torch.tensor(colors[self.config.background]).expand(count, 3).to(self.centers)

    def _vertices(self, pictures: Tensor) -> Tensor:
        """(P, V, 3) posed heads of some of the pictures."""
        identity = self.model.identity.expand(len(pictures), -1)
        return self.model.head.vertices(identity, self.inputs.expressions[pictures])

    def _lips(self) -> Tensor:
        """(D, L, 3) points whose outline is that of the mouth, for each expression.

        Raises:
            UserError: no picture shows the face, or the head does not say where its lips are.
        """
        model, inputs = self.model, self.inputs
        points, margin = lip_points(model.head)
        lips = torch.cat(
            [
                model.head.vertices(model.identity.expand(len(codes), -1), codes)[:, points]
                for codes in self.codes.split(MOST_POSED)
            ]
        )
        lips = lips.mean(1, keepdim=True) + margin * (lips - lips.mean(1, keepdim=True))
        middle = lips[self.code_of].mean(1)  # (P, 3)
        facing = (inputs.cameras.centers - middle)[:, 2] > 0  # +z comes out of the face
        height, width = inputs.size
        for picture in facing.nonzero()[:, 0].tolist():
            pixels, depth = inputs.cameras[picture].project(middle[picture, None])
            x, y = pixels[0, 0].tolist()
            if float(depth) > 0 and 0 <= x < width and 0 <= y < height:
                return lips
        raise UserError(
            f"The face of {inputs.subject} is in none of the {len(inputs)} pictures: all show it from behind, or the "
            "cameras or head poses belong to other pictures."
        )

    def _lpips(self) -> nn.Module | None:
        if not self.config.lpips_weight or self.config.lpips_from >= self.config.steps:
            return None
        network, why_not = load_lpips()
        if network is None:
            self.notes.append(f"LPIPS left out of the loss: {why_not}")
            return None
        return network.to(self.centers.device)

    @torch.no_grad()
    def _first_look(self) -> None:
        """Sets scales, opacities and, where asked for, directions and colours.

        Raises:
            UserError: no picture shows any of the head.
        """
        config, model, inputs = self.config, self.model, self.inputs
        count = len(inputs)
        few = torch.linspace(0, count - 1, min(count, MOST_LOOKED_AT)).long().unique()
        triangles = model.samples.triangles
        corners = self._vertices(few)[:, model.head.faces[triangles]]  # (P, N, 3, 3)
        uv = model.head.uv[model.head.uv_faces[triangles]]  # (N, 3, 2)
        rotations, lengths, _ = surface_frames(corners[0], uv, model.samples.resolution)
        thickness = THICKNESS * lengths.prod(1, keepdim=True).sqrt()
        flat = torch.cat([lengths, thickness], 1)  # (N, 3)

        posed = torch.stack([self._posed(picture) for picture in few.tolist()])  # (P, N, 3)
        images, masks = inputs.take(few.tolist())
        skin = Gaussians(posed[0], rotations, 0.7 * flat, torch.full_like(flat[:, 0], 0.99), flat)
        depths = [
            rasterize(replace(skin, means=means), inputs.cameras[p], inputs.size).depth
            for p, means in zip(few.tolist(), posed, strict=True)
        ]
        normals = torch.linalg.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0])
        colors, weights = sample_colors(
            posed,
            nn.functional.normalize(normals, dim=-1),
            images,
            masks,
            torch.cat(depths),
            inputs.cameras[few],
            slack=3 * float(lengths.median()),
        )
        self.seen = weights > 0
        if not bool(self.seen.any()):
            raise UserError(
                f"No picture of {inputs.subject} shows the tracked head; its cameras or its head poses belong to "
                "other pictures."
            )

        model.opacity_logit.fill_(math.log(config.opacity / (1 - config.opacity)))
        if config.look == "grey":
            placed = model.deform(self.centers[0], inputs.expressions[0]).means
            model.log_scale.copy_((config.size * neighbour_distance(placed)).log()[:, None].expand(-1, 3))
        else:
            model.quaternion.copy_(rotations)
            model.log_scale.copy_((config.size * flat).log())
            neutral = model.posed_centers(torch.zeros_like(inputs.expressions[:1]))[0]
            model.sh_dc.copy_(rgb_to_sh(spread_colors(neutral, colors, weights, config.mirror))[:, None])


def _together(pictures: Tensor, code_of: Tensor, a_step: int, generator: torch.Generator) -> list[int]:
    """The pictures in an order in which those of a step share an expression, as far as there are so many.

    Args:
        pictures: (P,) in random order.
        code_of: of every picture, which expression it has.
        a_step: pictures of one step.
        generator: shuffles the steps.
    """
    of_code: dict[int, list[int]] = {}
    for picture in pictures.tolist():
        of_code.setdefault(int(code_of[picture]), []).append(picture)
    full = [
        own[first : first + a_step]
        for own in of_code.values()
        for first in range(0, len(own) - a_step + 1, a_step)
    ]
    rest = [picture for own in of_code.values() for picture in own[len(own) - len(own) % a_step :]]
    order = torch.randperm(len(full), generator=generator).tolist()
    return [picture for index in order for picture in full[index]] + rest


def _distinct(expressions: Tensor) -> tuple[Tensor, Tensor]:
    """The different codes (D, E) in the order in which they come, and (P,) which of them each picture has."""
    found: dict[bytes, int] = {}
    rows = [found.setdefault(code.tobytes(), len(found)) for code in expressions.cpu().numpy()]
    row_of = torch.tensor(rows, dtype=torch.long, device=expressions.device)
    first = [rows.index(row) for row in range(len(found))]
    return expressions[first], row_of


def _tracked_identity(config: FlashAvatarFitConfig, inputs: FitPictures) -> Tensor:
    """The person's identity code (I,), after a look at whether these pictures can be fitted at all."""
    if inputs.identity is None or inputs.head is None:
        raise UserError(
            f"FlashAvatar needs a tracked head and the pictures of {inputs.subject} have none (no identity "
            "code); "
            "track the capture with a parametric head, or use a method that needs no tracking, such as "
            "avat3r."
        )
    if inputs.head != config.model.head:
        raise UserError(
            f"The pictures of {inputs.subject} are tracked with the head {inputs.head!r} and this fit is set "
            "up for "
            f"{config.model.head!r}; give --head {inputs.head}."
        )
    if len(inputs) == 0 or not len(inputs) == len(inputs.expressions) == len(inputs.cameras) == len(
        inputs.masks
    ):
        raise UserError(
            f"The input set of {inputs.subject} has {len(inputs)} pictures, {len(inputs.masks)} masks, "
            f"{len(inputs.cameras)} cameras and {len(inputs.expressions)} expression codes; a fit needs one "
            "of each "
            "for every picture."
        )
    return inputs.identity
