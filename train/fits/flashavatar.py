"""Fits a FlashAvatar to a person's pictures (paper section 4.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.flashavatar import FlashAvatar, FlashAvatarConfig, paper_model
from avatars.flashavatar.avatar import HeadMesh
from avatars.gaussians import Gaussians, rgb_to_sh
from avatars.inputs import InputSet
from avatars.rasterize import rasterize
from train.fits.look import neighbour_distance, sample_colors, spread_colors, surface_frames
from train.fits.mouth import mouth_masks
from train.fits.perceptual import load_lpips

__all__ = [
    "FlashAvatarFit",
    "FlashAvatarFitConfig",
    "flashavatar_cpu",
    "flashavatar_gpu",
    "flashavatar_paper",
]

THICKNESS = 0.3
"""Start of a Gaussian across the surface, as a share of its size along it (only with `look="pictures"`)."""
MOST_LOOKED_AT = 32
"""Pictures that give the first colours; evenly spread where there are more."""


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
    """Pictures rendered for one step, drawn without repeats."""
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
        for name in ("steps", "pictures_per_step", "checkpoint_every", "sh_every"):
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

    def build(self, inputs: InputSet, device: str = "cpu", head: HeadMesh | None = None) -> FlashAvatarFit:
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
    """The paper's sizes and rates with our start and switches, for few pictures or many; minutes on a GPU."""
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


class FlashAvatarFit:
    """One person's FlashAvatar on its way."""

    def __init__(
        self,
        config: FlashAvatarFitConfig,
        inputs: InputSet,
        device: str = "cpu",
        head: HeadMesh | None = None,
    ) -> None:
        """Builds the avatar and gives it its first look.

        Raises:
            UserError: the pictures are not tracked with the configured head, or show no face.
        """
        identity = _tracked_identity(config, inputs)
        if head is None:
            from avatars.head import ParametricHead

            head = ParametricHead.load(config.model.head)
        if inputs.expressions.shape[1] != head.n_expression:
            raise UserError(
                f"The pictures of {inputs.subject} have {inputs.expression_kind} codes of "
                f"{inputs.expressions.shape[1]} numbers and the head {config.model.head!r} takes "
                f"{head.n_expression}."
            )
        self.config = config
        self.step = 0
        self.notes: list[str] = []
        self.inputs = inputs.to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = FlashAvatar(config.model, head, identity.cpu(), inputs.expression_kind, inputs.provenance)
        self.model = model.to(device)
        self.centers = self.model.posed_centers(self.inputs.expressions)  # (P, N, 3)
        distinct = len(self.inputs.expressions.unique(dim=0))
        self.dropout = config.expression_dropout * distinct / len(self.inputs)
        self.mouths = self._mouths()  # (P, 1, H, W)
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

    def advance(self) -> dict[str, float]:
        """Renders a few of the pictures and takes a step towards them."""
        config = self.config
        decay = config.final_rate ** (self.step / config.steps)
        rates = [*self.rates.values(), config.rate_offsets]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * decay
        background = self._background()
        order = torch.randperm(len(self.inputs), generator=self.generator)
        chosen = order[: config.pictures_per_step].tolist()

        parts = [self._losses(picture, background) for picture in chosen]
        means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
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

    def _losses(self, picture: int, background: Tensor) -> dict[str, Tensor]:
        config, inputs = self.config, self.inputs
        degree = min(config.model.sh_degree, self.step // config.sh_every)
        expression = inputs.expressions[picture]
        if self.dropout and float(torch.rand((), generator=self.generator)) < self.dropout:
            expression = torch.zeros_like(expression)
        gaussians = self.model.deform(self.centers[picture], expression, degree)
        rendered = rasterize(gaussians, inputs.cameras[picture], inputs.size, background).image
        mask = inputs.masks[picture : picture + 1]
        target = inputs.images[picture : picture + 1] + (1 - mask) * background[:, None, None]
        mouth = self.mouths[picture : picture + 1]
        losses = {"huber": nn.functional.huber_loss(rendered, target, delta=config.huber_delta)}
        if config.mouth_weight:
            inside = nn.functional.huber_loss(rendered * mouth, target * mouth, delta=config.huber_delta)
            losses["mouth"] = config.mouth_weight * inside
        if self.lpips is not None and self.step >= config.lpips_from:
            losses["lpips"] = (
                config.lpips_weight * self.lpips(rendered * mask * 2 - 1, target * mask * 2 - 1).mean()
            )
        return losses

    def _background(self) -> Tensor:
        colors = {"green": (0.0, 1.0, 0.0), "black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0)}
        if self.config.background == "random":
            return torch.rand(3, generator=self.generator).to(self.centers)
        return torch.tensor(colors[self.config.background]).to(self.centers)

    def _vertices(self, pictures: Tensor) -> Tensor:
        """(P, V, 3) posed heads of some of the pictures."""
        identity = self.model.identity.expand(len(pictures), -1)
        return self.model.head.vertices(identity, self.inputs.expressions[pictures])

    def _mouths(self) -> Tensor:
        landmarks = self._vertices(torch.arange(len(self.inputs)))[:, self.model.head.landmarks68]
        return mouth_masks(landmarks, self.inputs.cameras, self.inputs.size)

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

        skin = Gaussians(self.centers[0], rotations, 0.7 * flat, torch.full_like(flat[:, 0], 0.99), flat)
        depths = [
            rasterize(replace(skin, means=self.centers[p]), inputs.cameras[p], inputs.size).depth
            for p in few.tolist()
        ]
        normals = torch.linalg.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0])
        colors, weights = sample_colors(
            self.centers[few],
            nn.functional.normalize(normals, dim=-1),
            inputs.images[few],
            inputs.masks[few],
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


def _tracked_identity(config: FlashAvatarFitConfig, inputs: InputSet) -> Tensor:
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
            f"{config.model.head!r}; set --model.head {inputs.head}."
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
