"""The GASP prior: a template head of Gaussians, and one network that turns it into any person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.gasp.config import GaspConfig
from avatars.gasp.surface import ATTRIBUTES, WIDTH, Surface
from avatars.head.mesh import HeadMesh

__all__ = ["Decoder", "GaspPrior"]


class Decoder(nn.Module):
    """The shared network D: a Gaussian's feature and a person's code to a change of the Gaussian's attributes.

    The first layer works on both separately and adds, which is the same as on both side by side and needs the code's
    part once a person instead of once a Gaussian.
    """

    def __init__(self, config: GaspConfig) -> None:
        super().__init__()
        self.from_feature = nn.Linear(config.feature, config.width)
        self.from_code = nn.Linear(config.code, config.width, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.layers - 1))
        self.output = nn.Linear(config.width, WIDTH)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Tensor, codes: Tensor) -> Tensor:
        """(B, N, 14) from (N, feature) and (B, code)."""
        values = torch.relu(self.from_feature(features) + self.from_code(codes)[:, None])
        for layer in self.hidden:
            values = torch.relu(layer(values))
        return self.output(values)


class GaspPrior(nn.Module):
    """Attributes of Gaussian i of person j: C_i + D(f_i, z_j) (reference sheet of the paper, section on the prior)."""

    def __init__(self, config: GaspConfig, head: HeadMesh | None = None) -> None:
        """A prior that knows nothing yet: everybody is the grey mean head.

        Args:
            config: its shape.
            head: the head that `config.head` names; loaded when None.
        """
        super().__init__()
        self.config = config
        self.surface = Surface(config, head)
        start = self.surface.start()
        self.position, self.rotation, self.scale, self.opacity, self.color = (
            nn.Parameter(start[:, columns].clone()) for columns in ATTRIBUTES.values()
        )
        self.features = nn.Parameter(config.feature_noise * torch.randn(len(self.surface), config.feature))
        self.codes = nn.Parameter(config.code_noise * torch.randn(config.people, config.code))
        self.decoder = Decoder(config)

    @property
    def template(self) -> Tensor:
        """(N, 14) the attributes C that everybody shares."""
        return torch.cat([getattr(self, name) for name in ATTRIBUTES], 1)

    def attributes(self, codes: Tensor) -> Tensor:
        """(B, N, 14) attributes of the people with these codes (B, code)."""
        return self.template + self.decoder(self.features, codes)

    def mean_code(self) -> Tensor:
        """(code,) the middle of the people that it was trained on."""
        return self.codes.mean(0) if len(self.codes) else self.codes.new_zeros(self.config.code)

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes `model.safetensors` (float32) and `model.json` (configuration, what it sits on, provenance)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        description = {
            "method": self.config.method,
            "config": self.config.to_json(),
            "gaussians": len(self.surface),
            "surface": self.surface.fingerprint(),
            "provenance": provenance,
        }
        (folder / "model.json").write_text(json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, head: HeadMesh | None = None) -> GaspPrior:
        """Reads what `save` wrote; every name must match.

        Args:
            folder: what a training exported.
            head: the head that carries the Gaussians; loaded by its name when None.

        Raises:
            UserError: the folder holds no prior, another method's model, or one that sits on another head or UV map.
        """
        folder = Path(folder)
        description = folder / "model.json"
        if not description.is_file():
            raise UserError(
                f"{folder} holds no model.json, so it is no prior. Train one with `make train RECIPE=gasp-prior-cpu`, "
                "or name the export folder of one."
            )
        values = json.loads(description.read_text())
        if values.get("method") != GaspConfig.method:
            raise UserError(
                f"{description} describes a model of {values.get('method')!r}, not a prior of gasp; name the export "
                "folder of a gasp-prior training."
            )
        config = GaspConfig.from_json(values["config"])
        prior = cls(config, head)
        if prior.surface.fingerprint() != values["surface"]:
            raise UserError(
                f"{description} was trained on a head {config.head!r} with other triangles or another UV map than the "
                "one here; train the prior again on this head, or bring the head that it was trained on."
            )
        try:
            prior.load_state_dict(load_file(folder / "model.safetensors"))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{folder / 'model.safetensors'} is not there or does not fit its model.json; copy both files, or "
                "export the training again."
            ) from error
        return prior
