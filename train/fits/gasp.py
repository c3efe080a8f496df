"""Fits a GASP avatar to a person's pictures in three stages (reference sheet of the paper, section on fitting)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.gasp import ATTRIBUTES, GaspAvatar, GaspConfig, GaspPrior, Surface
from avatars.gasp.config import small_model
from avatars.gaussians import Gaussians
from avatars.head.mesh import HeadMesh
from avatars.inputs import InputSet
from avatars.rasterize import rasterize
from train.config import LossConfig
from train.fits.look import sample_colors, spread_colors
from train.fits.pictures import FitPictures
from train.fits.tracked import check_tracking, tracked_identity
from train.losses import picture_loss
from train.perceptual import load_lpips
from train.regularisers import displacement_penalty, size_penalty

__all__ = ["ABLATIONS", "GaspFit", "GaspFitConfig", "ablated", "gasp_cpu", "gasp_gpu"]

INVERT, TUNE, REFINE = range(3)
MOST_LOOKED_AT = 16
"""Pictures that give the first colours of a fit without prior; evenly spread where there are more."""


@dataclass(frozen=True)
class GaspFitConfig:
    """A complete fit. The paper gives the stages, what is free in each, and their steps; the rest is ours."""

    network: str = ""
    """Folder of the prior, as its training exported it."""
    model: GaspConfig = field(default_factory=GaspConfig)
    """Head and UV map that the prior must be of; without prior the shape of the avatar."""
    prior: Literal["network", "none"] = "network"
    """Start from the trained network, or from a plain head whose Gaussians are fitted without any."""
    variant: str = ""
    """Name of an ablation, which keeps its results apart."""
    invert_steps: int = 500
    """Stage 1: only the identity code is free."""
    tune_steps: int = 500
    """Stage 2: only the shared network is free."""
    refine_steps: int = 100
    """Stage 3: only the Gaussians' own attributes are free."""
    pictures_per_step: int = 1
    """Pictures rendered for one step. Ours."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of backgrounds and of the order of pictures."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the picture losses; LPIPS is left out, and said so, where its weights are not on this machine."""
    anchor: float = 1.0
    """Weight of L_prior, the mean square distance to stage 1's attributes, in stages 2 and 3. Ours."""
    rate_invert: float = 1e-2
    """Adam rate of the code. Ours."""
    rate_tune: float = 1e-4
    """Adam rate of the network. Ours."""
    rate_refine: float = 0.1
    """Adam rates of the attributes as a share of 3D Gaussian Splatting's. Ours."""
    final_rate: float = 0.1
    """In each stage rates fall exponentially to this share. Ours."""
    look: Literal["grey", "pictures"] = "grey"
    """Without prior: start grey, or in the pictures' colours, spread over what no picture shows."""

    def __post_init__(self) -> None:
        for name in ("invert_steps", "tune_steps", "refine_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"GASP: {name} is {getattr(self, name)} and must not be negative.")
        for name in ("steps", "pictures_per_step", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"GASP: {name} is {getattr(self, name)} and must be at least 1.")
        if not 0 < self.final_rate <= 1:
            raise UserError(f"GASP: final_rate is {self.final_rate} and must be above 0 and at most 1.")
        if self.prior == "none" and self.invert_steps + self.tune_steps > 0:
            raise UserError("GASP: without a prior there is nothing to invert or tune; set those steps to 0.")

    @property
    def method(self) -> str:
        """Name of the folder of results."""
        return f"gasp-{self.variant}" if self.variant else "gasp"

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return self.invert_steps + self.tune_steps + self.refine_steps

    def build(
        self, inputs: InputSet | FitPictures, device: str = "cpu", head: HeadMesh | None = None
    ) -> GaspFit:
        """A fit at step 0.

        Args:
            inputs: the person's pictures, with the head that tracks them.
            device: where to compute.
            head: the head to fit on; loaded by its name when None.
        """
        return GaspFit(self, inputs, device, head)


def gasp_gpu() -> GaspFitConfig:
    """The paper's stages on a prior of the paper's size."""
    return GaspFitConfig(loss=LossConfig(lpips=0.1, lpips_start=0.0))


def gasp_cpu() -> GaspFitConfig:
    """Fewer steps on a prior of `gasp-prior-cpu`; about ten seconds on one CPU core."""
    return GaspFitConfig(
        model=small_model(), invert_steps=200, tune_steps=200, refine_steps=100, rate_tune=1e-3
    )


ABLATIONS: dict[str, dict[str, Any]] = {
    "no-prior": {"prior": "none", "invert_steps": 0, "tune_steps": 0, "anchor": 0.0, "rate_refine": 1.0},
    "no-inversion": {"invert_steps": 0},
    "no-tuning": {"tune_steps": 0},
    "no-anchor": {"anchor": 0.0},
    "one-person": {},
}
"""The paper's ablations as changes of a fit. A fit without prior spends all steps on the Gaussians themselves, at the
full rates of 3D Gaussian Splatting; "one-person" takes a prior of one person (`gasp-prior-one`)."""


def ablated(make: Callable[[], GaspFitConfig], row: str) -> Callable[[], GaspFitConfig]:
    """The recipe of an ablation of another recipe."""

    def recipe() -> GaspFitConfig:
        base = make()
        changes = dict(ABLATIONS[row])
        if changes.get("prior") == "none":
            changes["refine_steps"] = base.steps
        return replace(base, variant=row, **changes)

    return recipe


class GaspFit:
    """One person's GASP avatar on its way."""

    def __init__(
        self,
        config: GaspFitConfig,
        inputs: InputSet | FitPictures,
        device: str = "cpu",
        head: HeadMesh | None = None,
    ) -> None:
        """Reads the prior and looks at the pictures.

        Raises:
            UserError: there is no prior, it is of another head or UV map, or the pictures cannot be fitted with it.
        """
        inputs = FitPictures.of(inputs)
        identity = tracked_identity(inputs, config.model.head, "GASP")
        self.config, self.step, self.notes = config, 0, list[str]()
        self.inputs = inputs.to(device)
        self.prior: GaspPrior | None = None
        self.provenance = dict(inputs.provenance)
        if config.prior == "network":
            self.prior = _prior(config, head).to(device).requires_grad_(False)
            self.surface = self.prior.surface
            self.provenance["prior"] = config.network
        else:
            self.surface = Surface(config.model, head).to(device)
        self.shape = self.surface.config
        mesh = self.surface.head
        if inputs.expressions.shape[1] != mesh.n_expression:
            raise UserError(
                f"The pictures of {inputs.subject} have {inputs.expression_kind} codes of "
                f"{inputs.expressions.shape[1]} numbers and the head {config.model.head!r} takes {mesh.n_expression}."
            )
        check_tracking(self.inputs, mesh)
        self.identity = identity.to(device)
        self.weights = 1 - (1 - self.shape.scalp_share) * self.surface.scalp().float()
        self.lpips = self._lpips()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.stage: int | None = None
        self.code: Tensor | None = None if self.prior is None else self.prior.mean_code().clone()
        self.anchor: Tensor | None = None  # (N, 14) the attributes at the end of stage 1
        self.parts: dict[str, Tensor] = {}  # the attributes themselves, once stage 3 has begun
        self.optimizer: torch.optim.Adam | None = None
        if self.prior is None:
            start = self.surface.start()
            if config.look == "pictures":
                start[:, ATTRIBUTES["color"]] = self._seen_colors(start)
            self.parts = {name: start[:, columns].clone() for name, columns in ATTRIBUTES.items()}

    def advance(self) -> dict[str, float]:
        """Renders a few of the pictures over random backgrounds and takes a step towards them."""
        config = self.config
        stage, done, length = self._place()
        if stage != self.stage or self.optimizer is None:
            self._enter(stage)
        optimizer = self.optimizer
        if optimizer is None:
            raise RuntimeError("a stage was entered without an optimiser")
        decay = config.final_rate ** (done / length)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * decay
        attributes = self.attributes()
        losses = self._losses(attributes)
        if self.anchor is not None and config.anchor:
            losses["prior"] = config.anchor * (attributes - self.anchor).square().mean()
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        self.step += 1
        return {"loss": loss.item(), **{name: value.item() for name, value in losses.items()}}

    def attributes(self) -> Tensor:
        """(N, 14) the Gaussians' attributes as fitted so far."""
        if self.parts:
            return torch.cat(list(self.parts.values()), 1)
        if self.prior is None or self.code is None:
            raise RuntimeError("a fit without prior has its attributes from the start")
        return self.prior.attributes(self.code[None])[0]

    def state_dict(self) -> dict[str, Any]:
        """What is free in any stage, the optimiser of this one, and the random backgrounds to come."""
        return {
            "step": self.step,
            "stage": self.stage,
            "code": None if self.code is None else self.code.detach(),
            "decoder": None if self.prior is None else self.prior.decoder.state_dict(),
            "parts": {name: value.detach() for name, value in self.parts.items()},
            "anchor": self.anchor,
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`'s output."""
        device = self.identity.device

        def own(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        self.step = state["step"]
        self.code, self.anchor = own(state["code"]), own(state["anchor"])
        self.parts = {name: value.to(device) for name, value in state["parts"].items()}
        if self.prior is not None:
            self.prior.decoder.load_state_dict(state["decoder"])
        self.generator.set_state(state["generator"])
        self.stage = None
        if state["optimizer"] is not None:
            self._enter(state["stage"])
            if self.optimizer is not None:
                self.optimizer.load_state_dict(state["optimizer"])

    def avatar(self) -> GaspAvatar:
        """The avatar as fitted so far; the prior is no part of it."""
        with torch.no_grad():
            attributes = self.attributes()
        return GaspAvatar(
            self.shape,
            attributes,
            self.identity,
            self.inputs.expression_kind,
            self.provenance,
            self.surface.head,
        ).eval()

    def _place(self) -> tuple[int, int, int]:
        """The stage of the next step, steps done in it, and its length."""
        before = 0
        lengths = (self.config.invert_steps, self.config.tune_steps, self.config.refine_steps)
        for stage, length in enumerate(lengths):
            if self.step < before + length:
                return stage, self.step - before, length
            before += length
        raise RuntimeError("the fit is over")

    def _enter(self, stage: int) -> None:
        """Frees what a stage optimises, from where the stages before have left it."""
        config, prior = self.config, self.prior
        if prior is not None and self.anchor is None and stage != INVERT:
            self.anchor = self.attributes().detach()
        groups: list[dict[str, Any]]
        if stage == REFINE:
            if not self.parts:
                reached = self.attributes().detach()
                self.parts = {name: reached[:, columns] for name, columns in ATTRIBUTES.items()}
            self.parts = {name: value.detach().clone().requires_grad_() for name, value in self.parts.items()}
            rates = refinement_rates(self.shape.position_unit, config.rate_refine)
            groups = [
                {"params": [self.parts[name]], "rate": rate, "eps": 1e-15} for name, rate in rates.items()
            ]
        elif prior is None or self.code is None:
            raise RuntimeError("a fit without prior has only the last stage")
        elif stage == INVERT:
            self.code = self.code.detach().clone().requires_grad_()
            groups = [{"params": [self.code], "rate": config.rate_invert}]
        else:
            self.code = self.code.detach()
            prior.decoder.requires_grad_()
            groups = [{"params": list(prior.decoder.parameters()), "rate": config.rate_tune}]
        self.optimizer = torch.optim.Adam(groups, lr=0.0)
        self.stage = stage

    def _losses(self, attributes: Tensor) -> dict[str, Tensor]:
        inputs, shape, weights = self.inputs, self.shape, self.config.loss
        chosen = self._drawn()
        codes = inputs.expressions[chosen]
        vertices = self.surface.head.vertices(self.identity.expand(len(chosen), -1), codes)
        backgrounds = torch.rand(len(chosen), 3, generator=self.generator).to(attributes)
        drawn = [
            rasterize(gaussians, inputs.cameras[picture], inputs.size, behind)
            for gaussians, picture, behind in zip(
                self.surface.attach(attributes, vertices), chosen, backgrounds, strict=True
            )
        ]
        rendered = torch.cat([one.image for one in drawn])
        alpha = torch.cat([one.alpha for one in drawn])
        images, masks = inputs.take(chosen)
        wanted = images + (1 - masks) * backgrounds[:, :, None, None]
        losses = {
            "picture": picture_loss(rendered, wanted, weights)[0],
            "alpha": shape.alpha * (alpha - masks).abs().mean(),
            "displacement": shape.displacement
            * displacement_penalty(attributes[:, ATTRIBUTES["position"]], self.weights),
            "scale": shape.scale
            * size_penalty(attributes[:, ATTRIBUTES["scale"]], shape.largest, shape.position_unit),
        }
        if self.stage == INVERT and self.code is not None:
            losses["code"] = shape.code_penalty * self.code.square().sum()
        if self.lpips is not None:
            losses["lpips"] = weights.lpips * self.lpips(rendered * 2 - 1, wanted * 2 - 1).mean()
        return losses

    def _drawn(self) -> list[int]:
        """The pictures of this step; each pass goes through all of them in an order of its own."""
        count = len(self.inputs)
        a_step = min(self.config.pictures_per_step, count)
        number, place = divmod(self.step, -(-count // a_step))
        # A pure function of the seed and the pass: a fit that goes on needs no memory of it.
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + number)
        return torch.randperm(count, generator=generator)[place * a_step : (place + 1) * a_step].tolist()

    def _lpips(self) -> nn.Module | None:
        if not self.config.loss.lpips:
            return None
        network, why_not = load_lpips()
        if network is None:
            self.notes.append(f"LPIPS left out of the loss: {why_not}")
            return None
        return network.to(self.identity.device)

    @torch.no_grad()
    def _seen_colors(self, attributes: Tensor) -> Tensor:
        """(N, 3) colours of the surface in the pictures; what none shows has those of its nearest neighbours."""
        inputs, surface = self.inputs, self.surface
        few = torch.linspace(0, len(inputs) - 1, min(len(inputs), MOST_LOOKED_AT)).long().unique().tolist()
        codes = inputs.expressions[few]
        vertices = surface.head.vertices(self.identity.expand(len(few), -1), codes)
        corners = vertices[:, surface.head.faces[surface.triangles]]  # (P, N, 3, 3)
        normals = torch.linalg.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0])
        skins: list[Gaussians] = surface.attach(attributes, vertices)
        depths = [
            rasterize(skin, inputs.cameras[picture], inputs.size).depth
            for skin, picture in zip(skins, few, strict=True)
        ]
        images, masks = inputs.take(few)
        colors, weights = sample_colors(
            torch.stack([skin.means for skin in skins]),
            nn.functional.normalize(normals, dim=-1),
            images,
            masks,
            torch.cat(depths),
            inputs.cameras[few],
            slack=0.01,
        )
        return spread_colors(skins[0].means, colors, weights, mirror=True)


def refinement_rates(position_unit: float, share: float) -> dict[str, float]:
    """Adam rates of the attributes: 3D Gaussian Splatting's (Kerbl et al. 2023), times a share.

    Args:
        position_unit: metres that a one in the position attribute is; the rate of positions is in metres.
        share: of all rates.
    """
    splatting = {
        "position": 1.6e-4 / position_unit,
        "rotation": 1e-3,
        "scale": 5e-3,
        "opacity": 5e-2,
        "color": 2.5e-3,
    }
    return {name: share * rate for name, rate in splatting.items()}


def _prior(config: GaspFitConfig, head: HeadMesh | None) -> GaspPrior:
    """The prior that a fit starts from.

    Raises:
        UserError: none is named, or it is of another head or UV map.
    """
    if not config.network:
        raise UserError(
            "A GASP fit starts from a trained prior: give --network FOLDER, the export of a training. `make train "
            "RECIPE=gasp-prior-cpu` makes one in minutes."
        )
    prior = GaspPrior.load(config.network, head)
    found = prior.config
    if found.head != config.model.head:
        raise UserError(
            f"The prior in {config.network} sits on the head {found.head!r} and this fit on {config.model.head!r}; "
            f"give --head {found.head}, or another prior."
        )
    if found.uv_resolution != config.model.uv_resolution:
        raise UserError(
            f"The prior in {config.network} has a UV map of {found.uv_resolution} pixels and this fit one of "
            f"{config.model.uv_resolution}; give --uv-resolution {found.uv_resolution}, or another prior."
        )
    if config.variant == "one-person" and found.people != 1:
        raise UserError(
            f"The prior in {config.network} is of {found.people} people and this ablation takes one of a single "
            "person; `make train RECIPE=gasp-prior-one` makes one."
        )
    return prior
