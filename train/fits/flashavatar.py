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
from avatars.gaussians import SH_C0, Gaussians, rgb_to_sh
from avatars.inputs import InputSet
from avatars.rasterize import rasterize
from train.fits.look import neighbour_distance, quaternions_from_z, sample_colors, spread_colors
from train.fits.mouth import mouth_masks
from train.fits.perceptual import load_lpips

__all__ = ["FlashAvatarFit", "FlashAvatarFitConfig", "flashavatar", "flashavatar_cpu", "flashavatar_paper"]

THICKNESS = 0.3
"""Start of a Gaussian across the surface, as a share of its size along it (only with `look="pictures"`)."""
MOST_LOOKED_AT = 32
"""Pictures that give the first colours; evenly spread where there are more."""


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
    mirror: bool = True
    """With `look="pictures"`: what no picture shows may take its colour from the other side of the face."""
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
    anchor_weight: float = 0.0
    """Pull towards the start of everything that is learned (ours): a side that no picture shows keeps its
    first look instead of drifting with the optimiser's noise."""
    expression_dropout: float = 0.0
    """How often a step hides the expression from the offset network (ours). Where every picture has another
    expression, the network could otherwise explain each picture by itself and learn nothing about the head."""

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
        for name in ("opacity", "final_rate", "huber_delta"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(
                    f"FlashAvatar: {name} is {getattr(self, name)} and must be above 0, at most 1."
                )

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


def flashavatar() -> FlashAvatarFitConfig:
    """The paper's sizes and rates with our steadier start, for few pictures or many; minutes on a GPU."""
    return FlashAvatarFitConfig(
        model=FlashAvatarConfig(),
        steps=10_000,
        checkpoint_every=1_000,
        look="pictures",
        opacity=0.9,
        background="random",
        lpips_from=3_000,
        anchor_weight=1e-3,
        final_rate=0.1,
    )


def flashavatar_cpu() -> FlashAvatarFitConfig:
    """A small avatar in about half a minute on one CPU core, from pictures of about 100 pixels."""
    return FlashAvatarFitConfig(
        model=FlashAvatarConfig(uv_resolution=64, sh_degree=0, mlp_width=64, mlp_layers=3),
        steps=600,
        checkpoint_every=200,
        look="pictures",
        opacity=0.9,
        background="random",
        lpips_weight=0.0,
        anchor_weight=1e-3,
        rate_color=0.01,
        rate_scale=0.01,
        rate_rotation=0.003,
        rate_offsets=1e-3,
        final_rate=0.1,
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
        self.mouths = self._mouths()  # (P, 1, H, W)
        self._first_look()
        self.start = {name: value.detach().clone() for name, value in self.model.named_parameters()}
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
        if config.expression_dropout and torch.rand((), generator=self.generator) < config.expression_dropout:
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
        if config.anchor_weight:
            losses["anchor"] = config.anchor_weight * self._drift(self.centers[picture], gaussians)
        return losses

    def _drift(self, centers: Tensor, gaussians: Gaussians) -> Tensor:
        """How far Gaussians are from their start: centimetres, log-scales, colours, opacities; squared."""
        start = self.start
        moved = (gaussians.means - centers).square().sum(-1).mean() / 0.01**2
        grown = (gaussians.scales.log() - start["log_scale"]).square().mean()
        painted = (SH_C0 * (self.model.sh_dc - start["sh_dc"])).square().mean()
        faded = (gaussians.opacities - start["opacity_logit"].sigmoid()).square().mean()
        return moved + grown + painted + faded

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
        """Sets scales, opacities and, where asked for, directions and colours."""
        config, model, inputs = self.config, self.model, self.inputs
        opacity = torch.tensor(config.opacity)
        model.opacity_logit.fill_(float(torch.logit(opacity)))
        placed = model.deform(self.centers[0], inputs.expressions[0]).means
        size = neighbour_distance(placed)
        model.log_scale.copy_(size.log()[:, None].expand(-1, 3))
        colors, normals = self._seen_colors(slack=3 * float(size.median()))
        if config.look == "pictures":
            model.quaternion.copy_(quaternions_from_z(normals))
            model.log_scale[:, 2] += math.log(THICKNESS)
            model.sh_dc.copy_(rgb_to_sh(colors)[:, None])

    def _seen_colors(self, slack: float) -> tuple[Tensor, Tensor]:
        """(N, 3) colours as the pictures show them, and (N, 3) normals of the first picture's surface.

        Raises:
            UserError: no picture shows any of the head.
        """
        model = self.model
        few = torch.linspace(0, len(self.inputs) - 1, min(len(self.inputs), MOST_LOOKED_AT)).long().unique()
        inputs, centers = self.inputs, self.centers[few]
        faces = model.head.faces[model.samples.triangles]  # (N, 3)
        a, b, c = self._vertices(few)[:, faces].unbind(2)  # (P, N, 3) each
        normals = nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=-1)
        solid = model.deform(centers[0], inputs.expressions[few[0]])
        depths = [
            rasterize(
                replace(solid, means=centers[row], opacities=torch.full_like(solid.opacities, 0.99)),
                inputs.cameras[picture],
                inputs.size,
            ).depth
            for row, picture in enumerate(few.tolist())
        ]
        colors, weights = sample_colors(
            centers,
            normals,
            inputs.images[few],
            inputs.masks[few],
            torch.cat(depths),
            inputs.cameras[few],
            slack,
        )
        if not bool((weights > 0).any()):
            raise UserError(
                f"No picture of {inputs.subject} shows the tracked head; its cameras or its head poses do "
                "not "
                "belong to its pictures."
            )
        neutral = model.posed_centers(torch.zeros_like(inputs.expressions[:1]))[0]
        return spread_colors(neutral, colors, weights, self.config.mirror), normals[0]


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
