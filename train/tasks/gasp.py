"""Training the GASP prior: everybody's pictures from one template, one network and a code a person."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gasp import ATTRIBUTES, GaspConfig, GaspPrior, Surface
from avatars.gasp.prior import Decoder
from avatars.head.mesh import HeadMesh
from avatars.method import Method
from avatars.rasterize import rasterize
from shards import Manifest
from train.config import LossConfig, TrainConfig
from train.losses import PictureLoss
from train.regularisers import displacement_penalty, size_penalty
from train.task import Batch, check_head, check_size, of_kind

__all__ = ["GaspTask", "GaspWithLoss"]


class GaspWithLoss(nn.Module):
    """The prior and its loss in one forward, as DeepSpeed's hooks want it."""

    weights: Tensor  # (N,) of the displacement penalty

    def __init__(
        self, config: GaspConfig, loss: LossConfig, people: tuple[str, ...], head: HeadMesh | None = None
    ) -> None:
        """The prior before training.

        Args:
            config: its shape and the weights of what holds it together.
            loss: weights of the picture losses.
            people: names of the people, in the order of their codes.
            head: the head that `config.head` names; loaded when None.
        """
        super().__init__()
        self.prior = GaspPrior(config, head)
        self.loss = PictureLoss(loss)
        self.rows = {name: row for row, name in enumerate(people)}
        weights = 1 - (1 - config.scalp_share) * self.prior.surface.scalp().float()
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Renders every example's views over random backgrounds and compares.

        Args:
            batch: what `shards.BatchLoader` yields.

        Returns:
            The mean loss over the batch, and its parts.
        """
        prior, config = self.prior, self.prior.config
        targets, masks = batch["target_images"].flatten(0, 1), batch["target_masks"].flatten(0, 1)
        views = batch["target_images"].shape[1]
        codes = prior.codes[self._rows(batch["ids"])]
        attributes = prior.attributes(codes)
        vertices = prior.surface.head.vertices(batch["identity"], batch["expression"])
        backgrounds = torch.cat([backgrounds_of(name, views) for name in batch["ids"]]).to(targets)
        pictures, alphas = [], []
        for index, gaussians in enumerate(prior.surface.attach(attributes, vertices)):
            cameras = Cameras(batch["target_K"][index], batch["target_world_to_camera"][index])
            behind = backgrounds[index * views : (index + 1) * views]
            height, width = targets.shape[-2:]
            rendering = rasterize(gaussians, cameras, (height, width), behind)
            pictures.append(rendering.image)
            alphas.append(rendering.alpha)
        predictions, alpha = torch.cat(pictures), torch.cat(alphas)
        wanted = targets + (1 - masks) * backgrounds[:, :, None, None]
        loss, parts = self.loss(predictions, wanted, batch["progress"])
        held = {
            "alpha": config.alpha * (alpha - masks).abs().mean(),
            "displacement": config.displacement
            * displacement_penalty(attributes[..., ATTRIBUTES["position"]], self.weights),
            "scale": config.scale
            * size_penalty(attributes[..., ATTRIBUTES["scale"]], config.largest, config.position_unit),
            "code": config.code_penalty * codes.square().sum(1).mean(),
        }
        loss = loss + torch.stack(list(held.values())).sum()
        return loss, parts | {name: value.detach() for name, value in held.items()}

    def _rows(self, ids: list[str]) -> list[int]:
        """The rows of the codes of the examples' people; an example's name begins with its person's."""
        return [self.rows[name.split("/", 1)[0]] for name in ids]


def backgrounds_of(example: str, views: int) -> Tensor:
    """(views, 3) random colours that depend on nothing but the example's name, so that a resumed run sees the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(example.encode()))
    return torch.rand(views, 3, generator=generator)


class GaspTask:
    """The GASP prior's task (arXiv 2412.07739)."""

    name = "gasp"
    reads_inputs = False
    prior_values = 0
    makes_avatars = False
    next_step = (
        "Fit people with it: headsplat fit gasp --network FOLDER (this one), and --inputs 1 for one picture."
    )

    def __init__(self, config: TrainConfig) -> None:
        self.config = of_kind(config.model, GaspConfig)
        self.loss = config.loss
        self.size = self.config.size
        self.most_gaussians = self.config.uv_resolution**2
        self.people: tuple[str, ...] = tuple(str(row) for row in range(self.config.people))
        if config.precision != "fp32":
            raise UserError(
                f"Recipe {config.recipe}: GASP's template is kept in millimetres, which bf16 rounds away; take "
                "--precision fp32."
            )

    def check(self, manifest: Manifest) -> None:
        """Pictures must be of the recipe's size and tracked with its head, and every person must have a code.

        Raises:
            UserError: one of them is not so.
        """
        config, people = self.config, manifest.subjects("train")
        check_size(manifest, config.size)
        check_head(manifest, config.head)
        if config.people != len(people):
            raise UserError(
                f"{manifest.folder} has {len(people)} people to train on and the prior has codes for {config.people}; "
                "take --model.people 0, or other shards."
            )
        self.people = people

    def check_weights(self) -> None:
        """LPIPS needs weights that a user brings.

        Raises:
            UserError: they are not there.
        """
        PictureLoss(self.loss).check_weights()

    def build(self) -> nn.Module:
        """The prior with its loss."""
        return GaspWithLoss(self.config, self.loss, self.people)

    def parameter_groups(self, module: nn.Module) -> list[tuple[float, list[Parameter]]]:
        """The network at the recipe's rate; codes, features and each part of the template at shares of their own."""
        prior, config = module.get_submodule("prior"), self.config
        shares = {
            "codes": config.rate_code,
            "features": config.rate_feature,
            **{name: getattr(config, f"rate_{name}") for name in ATTRIBUTES},
        }
        groups = [(share, [prior.get_parameter(name)]) for name, share in shares.items()]
        return [(1.0, list(prior.get_submodule("decoder").parameters())), *groups]

    def dry_pass(self, *, recompute: bool) -> Tensor:
        """The shared network for one person, on the meta device; nothing in it is computed twice."""
        count = len(Surface(self.config))
        with torch.device("meta"):
            decoder = Decoder(self.config)
            features = torch.empty(count, self.config.feature, requires_grad=True)
            return decoder(features, torch.empty(1, self.config.code)).sum()

    def method(self, state: dict[str, Tensor], expression_kind: str, device: str) -> Method:
        """There is none: a prior makes nobody before a fit.

        Raises:
            UserError: always.
        """
        raise UserError(f"A GASP prior makes no avatars by itself. {self.next_step}")

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes the prior alone."""
        self._prior(module).save(folder, provenance)

    @torch.no_grad()
    def verify_export(self, module: nn.Module, folder: Path) -> None:
        """Loads strictly, compares names, values and the attributes of the mean person.

        Raises:
            UserError: something differs.
        """
        prior, written = self._prior(module), GaspPrior.load(folder)
        expected, found = prior.state_dict(), written.state_dict()
        differing = [name for name in expected if not torch.equal(expected[name].float(), found[name])]
        code = prior.mean_code()[None]
        if differing or not torch.equal(prior.attributes(code), written.attributes(code)):
            raise UserError(
                f"{folder} reads back otherwise than it was written, in {', '.join(differing[:3])}."
            )

    def _prior(self, module: nn.Module) -> GaspPrior:
        prior = module.get_submodule("prior")
        if not isinstance(prior, GaspPrior):
            raise TypeError(f"expected GaspPrior, got {type(prior).__name__}")
        return prior
