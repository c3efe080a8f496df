"""Training Avat3r: predict the Gaussians of a new expression and compare pictures of them from new views."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from avatars.avat3r import Avat3r, Avat3rConfig, Avat3rMethod, Views
from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.rasterize import rasterize
from shards import Manifest
from train.config import LossConfig, TrainConfig
from train.losses import PictureLoss
from train.task import Batch, check_codes, check_size, of_kind

__all__ = ["Avat3rTask", "views_from_batch"]

INPUT_VIEWS = 4  # pictures of a person (Avat3r section 4.1)
EXPRESSION_LAYERS = ("model.cross_blocks.", "model.expression_tokens.")


def views_from_batch(batch: Batch) -> Views:
    """The input pictures of a training batch as the network takes them."""
    return Views(
        images=batch["input_images"],
        K=batch["input_K"],
        world_to_camera=batch["input_world_to_camera"],
        positions=batch.get("input_positions"),
        confidence=batch.get("input_confidence"),
        features=batch.get("input_features"),
    )


class Avat3rWithLoss(nn.Module):
    """The network and its loss in one forward, as DeepSpeed's hooks want it."""

    def __init__(self, config: Avat3rConfig, loss: LossConfig) -> None:
        super().__init__()
        self.model = Avat3r(config)
        self.loss = PictureLoss(loss)
        self.deviation_weight = config.deviation_weight

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Renders every example's target views and compares.

        Args:
            batch: what `shards.BatchLoader` yields.

        Returns:
            The mean loss over the batch, and its parts.
        """
        maps = self.model(views_from_batch(batch), batch["expression"])
        targets = batch["target_images"]  # (B X, V, 3, H, W)
        height, width = targets.shape[-2:]
        pictures = []
        for index in range(targets.shape[0]):
            cameras = Cameras(batch["target_K"][index], batch["target_world_to_camera"][index])
            pictures.append(rasterize(maps.gaussians(index), cameras, (height, width)).image)
        predictions, wanted = torch.cat(pictures), targets.flatten(0, 1)
        loss, parts = self.loss(predictions, wanted, batch["progress"])
        if self.deviation_weight:
            people, views = len(maps.anchors.keep), targets.shape[1]
            errors = (predictions - wanted).unflatten(0, (people, -1, views))
            deviation = (errors - errors.mean(1, keepdim=True)).abs().mean()
            loss = loss + self.deviation_weight * deviation
            parts["deviation"] = deviation.detach()
        parts["gaussians"] = maps.anchors.keep.float().sum() / len(maps.anchors.keep)
        return loss, parts


class Avat3rTask:
    """The Avat3r task (arXiv 2502.20220 section 4.1)."""

    name = "avat3r"
    reads_inputs = True
    makes_avatars = True
    next_step = ""

    def __init__(self, config: TrainConfig) -> None:
        self.config = of_kind(config.model, Avat3rConfig)
        self.loss = config.loss
        self.input_timesteps = config.data.input_timesteps
        self.size = self.config.size
        self.expressions = config.data.expressions
        self.prior_values = 4 * self.size**2 * self.config.position_prior + (
            self.config.feature_dim * self.config.grid**2
        )
        self.most_gaussians = INPUT_VIEWS * self.size**2
        self.codes: tuple[Tensor, Tensor] | None = None  # mean and deviation, once shards have been looked at

    def check(self, manifest: Manifest) -> None:
        """Pictures and expression codes must be of the network's size, input sets of the recipe's kind, and priors
        there if it needs them. Remembers how the codes are spread.

        Raises:
            UserError: one of them is not.
        """
        config, settings = self.config, manifest.settings
        check_size(manifest, config.size)
        check_codes(manifest, config.expression_dim)
        if settings.input_timesteps != self.input_timesteps:
            raise UserError(
                f"{manifest.folder} holds input sets of {settings.input_timesteps} timesteps and the recipe's "
                f"--data.input-timesteps is {self.input_timesteps}; pack them with `headsplat shards pack "
                f"--input-timesteps {self.input_timesteps}`, or change the recipe."
            )
        if settings.input_background != config.input_background:
            raise UserError(
                f"{manifest.folder} holds input pictures with the background {settings.input_background} and the "
                f"recipe's --model.input-background is {config.input_background}; leave the option out, or pack with "
                f"`headsplat shards pack --input-background {config.input_background}`."
            )
        priors = manifest.priors
        if config.position_prior and priors.position == "none":
            raise UserError(
                f"{manifest.folder} has no position maps and the recipe needs them; make them with "
                "`headsplat priors --position`, or switch --model.position-prior and --model.position-skip off."
            )
        if config.feature_dim and config.feature_dim != priors.feature_dim:
            raise UserError(
                f"{manifest.folder} has features {priors.features} of {priors.feature_dim} channels and the recipe's "
                f"--model.feature-dim is {config.feature_dim}; make them with `headsplat priors --features`, or set it "
                f"to {priors.feature_dim}."
            )
        if config.feature_dim and config.feature_prior not in ("", priors.features):
            raise UserError(
                f"{manifest.folder} has features {priors.features} and --model.feature-prior says "
                f"{config.feature_prior}; leave the option out, or make those features with `headsplat priors`."
            )
        self.codes = torch.tensor(manifest.expression_mean), torch.tensor(manifest.expression_std)

    def check_weights(self) -> None:
        """LPIPS sets in late, and its weights must be there from the start.

        Raises:
            UserError: they are not.
        """
        PictureLoss(self.loss).check_weights()

    def build(self) -> nn.Module:
        """The network with its loss; its fresh weights expect the codes of the shards that were checked."""
        module = Avat3rWithLoss(self.config, self.loss)
        if self.codes is not None:
            module.model.expect_codes(*self.codes)
        return module

    def parameter_groups(self, module: nn.Module) -> list[tuple[float, list[Parameter]]]:
        """The layers that bring the expression in at a rate of their own, where the recipe says so."""
        rate = self.config.expression_rate
        if rate == 1.0:
            return [(1.0, list(module.parameters()))]
        groups: dict[bool, list[Parameter]] = {False: [], True: []}
        for name, parameter in module.named_parameters():
            groups[name.startswith(EXPRESSION_LAYERS)].append(parameter)
        return [(1.0, groups[False]), (rate, groups[True])]

    def method(self, state: dict[str, Tensor], expression_kind: str, device: str) -> Avat3rMethod:
        """The network alone, in float32."""
        module = Avat3rWithLoss(self.config, self.loss)
        module.load_state_dict(state)
        return Avat3rMethod(module.model.to(device), expression_kind)

    def dry_pass(self, *, recompute: bool) -> Tensor:
        """The network on four pictures of one person and an example's expressions, on the meta device."""
        keep = self.config.checkpoint_activations and recompute
        with torch.device("meta"):
            model = Avat3r(replace(self.config, checkpoint_activations=keep))
            views, expression = self._made_up()
            codes = expression.expand(self.expressions, -1)
            return model(views, codes).raw.sum()

    def _made_up(self) -> tuple[Views, Tensor]:
        """One person's pictures and an expression code, of the right shapes, on the default device."""
        config = self.config
        pictures = torch.rand(1, INPUT_VIEWS, 3, config.size, config.size)
        focal = 2.0 * config.size
        K = torch.tensor([[focal, 0, config.size / 2], [0, focal, config.size / 2], [0, 0, 1.0]])
        poses = torch.eye(4).repeat(1, INPUT_VIEWS, 1, 1)
        poses[..., 2, 3] = 1.0  # the head is a metre before each camera
        features = torch.rand(1, INPUT_VIEWS, config.feature_dim, config.grid, config.grid)
        views = Views(
            images=pictures,
            K=K.expand(1, INPUT_VIEWS, 3, 3),
            world_to_camera=poses,
            positions=pictures * 0.1 if config.position_prior else None,
            confidence=1 + 2 * pictures[:, :, :1] if config.position_prior else None,
            features=features if config.feature_dim else None,
        )
        return views, torch.rand(1, config.expression_dim)

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes the network alone."""
        model = module.get_submodule("model")
        if not isinstance(model, Avat3r):
            raise TypeError(f"expected Avat3r, got {type(model).__name__}")
        model.save(folder, provenance)

    @torch.no_grad()
    def verify_export(self, module: nn.Module, folder: Path) -> None:
        """Loads strictly, compares names, values and the Gaussian maps of made-up pictures.

        Raises:
            UserError: something differs.
        """
        model, written = module.get_submodule("model").eval(), Avat3r.load(folder).eval()
        expected, found = model.state_dict(), written.state_dict()
        differing = [n for n in expected if n not in found or not torch.equal(expected[n].float(), found[n])]
        if differing or set(found) - set(expected):
            raise UserError(
                f"{folder} reads back otherwise than it was written, in {', '.join(differing[:3])}."
            )
        views, expression = self._made_up()
        if not torch.equal(model(views, expression).raw, written(views, expression).raw):
            raise UserError(
                f"{folder} reads back with equal weights and another forward pass; do not use it."
            )
