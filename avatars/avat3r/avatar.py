"""Avat3r as a method: pictures in, an avatar out that caches all that no expression changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from avatars.avat3r.config import Avat3rConfig
from avatars.avat3r.model import Avat3r, Views
from avatars.errors import UserError
from avatars.gaussians import Gaussians
from avatars.inputs import InputSet

__all__ = ["Avat3rAvatar", "Avat3rMethod", "views_of"]

VIEW_TENSORS = ("images", "K", "world_to_camera", "positions", "confidence")


def views_of(inputs: InputSet) -> Views:
    """An input set as a batch of one."""

    def batch(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[None]

    return Views(
        images=inputs.images[None],
        K=inputs.cameras.K[None],
        world_to_camera=inputs.cameras.world_to_camera[None],
        positions=batch(inputs.positions),
        confidence=batch(inputs.confidence),
        features=batch(inputs.features),
    )


class Avat3rMethod:
    """Makes avatars with a trained network, in one forward pass of its encoder."""

    name = "avat3r"

    def __init__(self, model: Avat3r, expression_kind: str) -> None:
        self.model = model.eval()
        self.expression_kind = expression_kind

    @classmethod
    def load(cls, folder: str | Path) -> Avat3rMethod:
        """Reads an exported model; its provenance says which kind of expression code drives it."""
        model = Avat3r.load(folder)
        provenance = json.loads((Path(folder) / "model.json").read_text())["provenance"]
        return cls(model, provenance["expression_kind"])

    @torch.no_grad()
    def create(self, inputs: InputSet) -> Avat3rAvatar:
        """Encodes the pictures once.

        Raises:
            UserError: the pictures' size or expression codes are not what the network was trained on.
        """
        config = self.model.config
        if inputs.size != (config.size, config.size):
            raise UserError(
                f"Avat3r was trained on pictures of {config.size}x{config.size} pixels and the input set has "
                f"{inputs.size[0]}x{inputs.size[1]}; pack the shards with --size {config.size}."
            )
        if inputs.expression_kind != self.expression_kind:
            raise UserError(
                f"Avat3r was trained on {self.expression_kind} expression codes and the input set has "
                f"{inputs.expression_kind}."
            )
        views = views_of(inputs)
        return Avat3rAvatar(
            self.model, self.model.encode(views), views, self.expression_kind, inputs.provenance
        )


class Avat3rAvatar:
    """A person as Avat3r sees it: cached tokens, the pictures and their position maps."""

    method = "avat3r"

    def __init__(
        self, model: Avat3r, tokens: Tensor, views: Views, expression_kind: str, provenance: dict[str, Any]
    ) -> None:
        self.model = model
        self.tokens = tokens  # (1, N * T, D)
        self.views = views  # batch of one
        self.expression_kind = expression_kind
        self.provenance = provenance

    @torch.no_grad()
    def gaussians(self, expression: Tensor) -> Gaussians:
        """Runs only the layers that the expression reaches.

        Args:
            expression: (E,).
        """
        maps = self.model.decode(self.tokens, expression[None].to(self.tokens.device), self.views)
        return maps.gaussians(0)

    def save(self, folder: Path) -> None:
        """Writes a self-contained avatar: what is cached and the half of the network that drives it."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {"tokens": self.tokens}
        state |= {f"views.{n}": t for n in VIEW_TENSORS if (t := getattr(self.views, n)) is not None}
        for name, tensor in self.model.state_dict().items():
            if self.model.config.interleave or name.startswith(self.model.drive_prefixes):
                state[f"model.{name}"] = tensor
        save_file({n: t.detach().cpu().contiguous() for n, t in state.items()}, folder / "avatar.safetensors")
        description = {
            "method": self.method,
            "expression_kind": self.expression_kind,
            "config": self.model.config.to_json(),
            "provenance": self.provenance,
        }
        (folder / "avatar.json").write_text(json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Avat3rAvatar:
        """Reads what `save` wrote. The encoder's half of the network is not there and not needed."""
        values = json.loads((folder / "avatar.json").read_text())
        state = load_file(folder / "avatar.safetensors")
        model = Avat3r(Avat3rConfig.from_json(values["config"]))
        weights = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or any(name.startswith(model.drive_prefixes) for name in missing):
            raise UserError(
                f"{folder / 'avatar.safetensors'} does not fit its avatar.json; make the avatar again."
            )
        views = Views(**{n: state.get(f"views.{n}") for n in VIEW_TENSORS})  # type: ignore[arg-type]
        return cls(model.eval(), state["tokens"], views, values["expression_kind"], values["provenance"])
