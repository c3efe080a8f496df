"""Fits one person's Gaussians in the layout that all people share: what FastAvatar's template is averaged from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.fastavatar import FastAvatar, FastAvatarConfig, LocalGaussians, place, seats_of, shared_head
from avatars.gaussians import Gaussians, rgb_to_sh
from avatars.inputs import InputSet
from avatars.rasterize import rasterize
from train.config import LossConfig
from train.fits.look import neighbour_distance, sample_colors, spread_colors
from train.fits.pictures import FitPictures
from train.losses import picture_loss

__all__ = [
    "FastAvatarTemplateFit",
    "FastAvatarTemplateFitConfig",
    "fastavatar_template_cpu",
    "fastavatar_template_gpu",
    "first_look",
]

MOST_LOOKED_AT = 24
"""Pictures that give the first colours."""
THICKNESS = 0.3
"""Start of a Gaussian across the surface, as a share of its size along it."""
LOOKS = {"log_scales": 0.01, "opacities": 0.05, "colors": 0.01, "quats": 0.005}
"""Adam rates beside the offsets'."""


@dataclass(frozen=True)
class FastAvatarTemplateFitConfig:
    """A fit of one person with a fixed number of Gaussians, each on its own triangle.

    The authors' program has no such step; their paper's figure and the template's size say what it must give (section
    3.1). Optimiser, rates and start are ours.
    """

    model: FastAvatarConfig = field(default_factory=FastAvatarConfig)
    """Layout and colours; the networks' sizes do not matter."""
    steps: int = 2_000
    """Optimiser steps."""
    pictures_per_step: int = 4
    """Pictures rendered for one step."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the order of pictures."""
    rate_offsets: float = 2e-4
    """Adam rate of the offsets, metres a step."""
    offset_decay: float = 1.0
    """Weight of the mean squared offset in cm², so that a Gaussian which no picture shows stays where it is."""
    final_rate: float = 0.1
    """All rates fall exponentially to this share at the last step."""

    def __post_init__(self) -> None:
        for name in ("steps", "pictures_per_step", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"FastAvatar's template: {name} is {getattr(self, name)}; it must be at least 1."
                )

    @property
    def method(self) -> str:
        """Name of the folder of fits."""
        return "fastavatar-template"

    def build(self, inputs: InputSet | FitPictures, device: str = "cpu") -> FastAvatarTemplateFit:
        """A fit at step 0."""
        return FastAvatarTemplateFit(self, inputs, device)


def fastavatar_template_gpu() -> FastAvatarTemplateFitConfig:
    """A Gaussian on every triangle with colours of degree 3, as the paper's template has."""
    return FastAvatarTemplateFitConfig()


def fastavatar_template_cpu() -> FastAvatarTemplateFitConfig:
    """Some thousand Gaussians of one colour each; seconds on one CPU core."""
    return FastAvatarTemplateFitConfig(
        model=FastAvatarConfig(uv_resolution=64, sh_degree=0),
        steps=120,
        pictures_per_step=1,
        checkpoint_every=60,
        rate_offsets=5e-4,
    )


class FastAvatarTemplateFit:
    """One person of the template on the way."""

    def __init__(
        self, config: FastAvatarTemplateFitConfig, inputs: InputSet | FitPictures, device: str = "cpu"
    ) -> None:
        """Seats the Gaussians and gives them the pictures' colours.

        Raises:
            UserError: the pictures are not tracked with the configured head, or show none of it.
        """
        inputs = FitPictures.of(inputs)
        if inputs.identity is None or inputs.head != config.model.head:
            raise UserError(
                f"FastAvatar's template needs pictures that the head {config.model.head!r} tracked, and those of "
                f"{inputs.subject} are tracked with {inputs.head or 'none'}."
            )
        self.config, self.step, self.notes = config, 0, list[str]()
        self.inputs, self.identity = inputs.to(device), inputs.identity.to(device)
        inputs = self.inputs
        head = shared_head(config.model.head, device)
        if inputs.expressions.shape[1] != head.n_expression or len(self.identity) != head.n_identity:
            raise UserError(
                f"The pictures of {inputs.subject} have {inputs.expressions.shape[1]} expression and "
                f"{len(self.identity)} identity numbers; the head {config.model.head!r} takes {head.n_expression} "
                f"and {head.n_identity}."
            )
        seats = seats_of(head, config.model.uv_resolution).to(device)
        self.codes, self.code_of = inputs.expressions.unique(dim=0, return_inverse=True)
        vertices = head.vertices(self.identity.expand(len(self.codes), -1), self.codes)
        self.centers, self.frames = seats.posed(vertices)
        local = first_look(self.centers[0], config.model)
        seen = self._looked_at(local)
        local.colors[:, 0] = rgb_to_sh(spread_colors(self.centers[0], *seen, mirror=True))
        self.parameters = {name: nn.Parameter(value) for name, value in vars(local).items()}
        rates = {"offsets": config.rate_offsets, **LOOKS}
        self.rates = [rates[name] for name in self.parameters]
        groups = [{"params": [value], "lr": rates[name]} for name, value in self.parameters.items()]
        self.optimizer = torch.optim.Adam(groups, eps=1e-15)

    def advance(self) -> dict[str, float]:
        """Renders a few of the pictures and takes a step towards them."""
        config, inputs = self.config, self.inputs
        decay = config.final_rate ** (self.step / config.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * decay
        # The order is a pure function of the seed and the step: a fit that goes on needs no memory of it.
        generator = torch.Generator().manual_seed(1_000_003 * config.seed + self.step)
        chosen = torch.randperm(len(inputs), generator=generator)[: config.pictures_per_step].tolist()
        images, masks = inputs.take(chosen)
        background = torch.rand(3, generator=generator).to(images)
        rendered = [
            rasterize(self._posed(int(self.code_of[p])), inputs.cameras[p], inputs.size, background).image
            for p in chosen
        ]
        target = images + (1 - masks) * background[:, None, None]
        fidelity, parts = picture_loss(torch.cat(rendered), target, LossConfig())
        stray = config.offset_decay * (100 * self.parameters["offsets"]).square().mean() / 100
        loss = fidelity + stray
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.parameters["offsets"].clamp_(-config.model.offset, config.model.offset)
        self.step += 1
        return {"loss": loss.item(), "stray": stray.item(), **{n: float(v) for n, v in parts.items()}}

    def state_dict(self) -> dict[str, Any]:
        """Parameters and the optimiser."""
        values = {name: value.detach() for name, value in self.parameters.items()}
        return {"step": self.step, "parameters": values, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`'s output."""
        self.step = state["step"]
        with torch.no_grad():
            for name, value in state["parameters"].items():
                self.parameters[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])

    def avatar(self) -> FastAvatar:
        """The person as fitted so far."""
        local = LocalGaussians(**{name: value.detach().clone() for name, value in self.parameters.items()})
        return FastAvatar(
            local,
            self.identity,
            head=self.config.model.head,
            uv_resolution=self.config.model.uv_resolution,
            expression_kind=self.inputs.expression_kind,
            provenance=self.inputs.provenance,
        )

    def _posed(self, code: int) -> Gaussians:
        return place(LocalGaussians(**self.parameters), self.centers[code], self.frames[code])

    @torch.no_grad()
    def _looked_at(self, local: LocalGaussians) -> tuple[Tensor, Tensor]:
        """Colours of the seats as the pictures show them, and how well each is seen.

        Raises:
            UserError: no picture shows any of the head.
        """
        inputs = self.inputs
        few = torch.linspace(0, len(inputs) - 1, min(len(inputs), MOST_LOOKED_AT)).long().unique()
        codes = self.code_of[few]
        images, masks = inputs.take(few.tolist())
        skin = replace(local, opacities=torch.full_like(local.opacities, 5.0))
        depths = [
            rasterize(
                place(skin, self.centers[code], self.frames[code]), inputs.cameras[p], inputs.size
            ).depth
            for p, code in zip(few.tolist(), codes.tolist(), strict=True)
        ]
        slack = 3 * float(local.log_scales[:, 0].median().exp())
        colors, weights = sample_colors(
            self.centers[codes],
            self.frames[codes][..., 2],
            images,
            masks,
            torch.cat(depths),
            inputs.cameras[few],
            slack,
        )
        if not bool((weights > 0).any()):
            raise UserError(
                f"No picture of {inputs.subject} shows the tracked head; its cameras or its head poses belong to other "
                "pictures."
            )
        return colors, weights


def first_look(centers: Tensor, config: FastAvatarConfig) -> LocalGaussians:
    """Grey, flat and nearly opaque Gaussians on their seats, as wide as their neighbours are far.

    Args:
        centers: (N, 3) seats.
        config: its degree of colours counts.
    """
    count = len(centers)
    wide = (0.6 * neighbour_distance(centers)).clamp(1e-4, 0.02).log()
    quats = centers.new_zeros(count, 4)
    quats[:, 0] = 1
    return LocalGaussians(
        offsets=torch.zeros_like(centers),
        quats=quats,
        log_scales=torch.stack([wide, wide, wide + math.log(THICKNESS)], -1),
        opacities=centers.new_full((count,), math.log(0.9 / 0.1)),
        colors=centers.new_zeros(count, (config.sh_degree + 1) ** 2, 3),
    )
