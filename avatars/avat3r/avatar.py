"""Avat3r as a method: pictures in, an avatar out that caches all that no expression changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from avatars.avat3r.config import Avat3rConfig
from avatars.avat3r.model import Avat3r, KeptAnchors, Views, activate
from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gaussians import Gaussians
from avatars.inputs import Background, InputSet

__all__ = ["MOST_VIEWS", "Avat3rAvatar", "Avat3rMethod", "views_of"]

MOST_VIEWS = 6  # what the paper shows; attention over the tokens of all views grows with their square


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
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Avat3rMethod:
        """Reads an exported model; its provenance says which kind of expression code drives it.

        Args:
            folder: what `Avat3r.save` wrote.
            dtype: arithmetic of the network. Positions and cameras stay float32.
        """
        model = Avat3r.load(folder)
        try:
            kind = json.loads((Path(folder) / "model.json").read_text())["provenance"]["expression_kind"]
        except KeyError as error:
            raise UserError(
                f"{Path(folder) / 'model.json'} lacks {error} and so the kind of expression code that drives it; "
                "export the checkpoint again."
            ) from None
        return cls(model.to(dtype), kind)

    @property
    def expression_length(self) -> int:
        """Length of the expression code."""
        return self.model.config.expression_dim

    @property
    def size(self) -> int:
        """Side in pixels of the square pictures that it takes."""
        return self.model.config.size

    @property
    def needs_positions(self) -> bool:
        """Whether its pictures must come with position maps."""
        return self.model.config.position_prior

    @property
    def input_background(self) -> Background:
        """Whether its pictures show what is behind the head."""
        return self.model.config.input_background

    @property
    def feature_prior(self) -> str | None:
        """Name of the prior whose feature maps its pictures must come with ("" for one that nobody wrote down), or
        None for a network that takes none.
        """
        return self.model.config.feature_prior if self.model.config.feature_dim else None

    @torch.no_grad()
    def create(self, inputs: InputSet) -> Avat3rAvatar:
        """Encodes the pictures once.

        Raises:
            UserError: the pictures' number, size, background, cameras, priors or expression codes are not what the
                network takes. Pictures with a background are cut out for a network that was trained without.
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
        inputs.check()
        if len(inputs) > MOST_VIEWS:
            raise UserError(
                f"The input set of {inputs.subject} has {len(inputs)} pictures and Avat3r takes 1 to {MOST_VIEWS}; "
                "leave some out, or pack the shards with fewer --input-views."
            )
        inputs = self._as_trained(inputs)
        self._check_features(inputs)
        views = views_of(inputs)
        return Avat3rAvatar(
            self.model,
            self.model.encode(views),
            self.model.anchors(views).kept(0),
            (inputs.images * 255).round().to(torch.uint8),
            inputs.cameras,
            self.expression_kind,
            inputs.provenance,
        )

    def _as_trained(self, inputs: InputSet) -> InputSet:
        """The pictures with a background or without, as the network knows them."""
        trained = self.model.config.input_background
        if trained == inputs.background:
            return inputs
        if trained == "kept":
            raise UserError(
                f"Avat3r was trained on pictures with what is behind the head, and the input set of {inputs.subject} "
                "is cut out of it; pack the shards with --input-background kept."
            )
        if self.model.config.feature_dim and inputs.features is not None:
            raise UserError(
                "Avat3r was trained on features of pictures that are cut out of what is behind the head, and the input "
                f"set of {inputs.subject} is not; pack the shards with --input-background masked."
            )
        return inputs.masked()

    def _check_features(self, inputs: InputSet) -> None:
        """Refuses features of another prior than those that the network was trained on, or none where it needs some."""
        config, own = self.model.config, inputs.provenance.get("features", "")
        if not config.feature_dim:
            return
        wanted = f"features {config.feature_prior or 'of some prior'} of {config.feature_dim} channels"
        if inputs.features is None:
            raise UserError(
                f"Avat3r was trained on pictures with {wanted}, and the input set of {inputs.subject} has none."
            )
        if inputs.features.shape[1] != config.feature_dim or (
            config.feature_prior and own and own != config.feature_prior
        ):
            raise UserError(
                f"Avat3r was trained on pictures with {wanted}, and the input set of {inputs.subject} has "
                f"{own or 'some'} of {inputs.features.shape[1]}; features of two priors, or reduced otherwise, mean "
                "different things."
            )


class Avat3rAvatar:
    """A person as Avat3r sees it: all that no expression changes, and the network that brings one in."""

    method = "avat3r"

    def __init__(
        self,
        model: Avat3r,
        tokens: Tensor,
        anchors: KeptAnchors,
        pictures: Tensor,
        cameras: Cameras,
        expression_kind: str,
        provenance: dict[str, Any],
    ) -> None:
        self.model = model
        self.tokens = tokens  # (1, N * T, D)
        self.anchors = anchors
        self.pictures = pictures  # (N, 3, H, W) uint8, what the avatar was made from
        self.cameras = cameras  # N, of these pictures
        self.expression_kind = expression_kind
        self.provenance = provenance

    @property
    def expression_length(self) -> int:
        """Length of the expression code."""
        return self.model.config.expression_dim

    def gaussians(self, expression: Tensor) -> Gaussians:
        """The person with the face that `expression` (E,) describes, in the head frame."""
        return self.sequence(expression[None])[0]

    @torch.no_grad()
    def sequence(self, expressions: Tensor) -> list[Gaussians]:
        """Several expressions in one pass of the layers that an expression reaches.

        Args:
            expressions: (B, E).

        Raises:
            UserError: codes of another length than the network's.
        """
        tokens = self.tokens.expand(len(expressions), -1, -1)
        raw = self.model.decode(tokens, expressions.to(tokens.device))  # (B, N, 14, H, W)
        unit = self.model.config.position_unit
        return [activate(one, self.anchors, unit) for one in raw]

    def save(self, folder: Path) -> None:
        """Writes a self-contained avatar: what is cached and the half of the network that drives it."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "tokens": self.tokens,
            "pictures": self.pictures,
            "cameras.K": self.cameras.K,
            "cameras.world_to_camera": self.cameras.world_to_camera,
        }
        state |= {f"anchors.{n}": t for n, t in vars(self.anchors).items()}
        for name, tensor in self.model.state_dict().items():
            if self.model.config.interleave or name.startswith(self.model.drive_prefixes):
                state[f"model.{name}"] = tensor
        save_file({n: t.detach().cpu().contiguous() for n, t in state.items()}, folder / "avatar.safetensors")
        description = {
            "method": self.method,
            "expression_kind": self.expression_kind,
            "config": self.model.config.to_json(),
            "gaussians": len(self.anchors.pixels),
            "provenance": self.provenance,
        }
        (folder / "avatar.json").write_text(json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Avat3rAvatar:
        """Reads what `save` wrote. The encoder's half of the network is not there and not needed.

        Raises:
            UserError: the two files do not belong together, or another version wrote them.
        """
        values = json.loads((folder / "avatar.json").read_text())
        state = load_file(folder / "avatar.safetensors")
        broken = UserError(
            f"{folder / 'avatar.safetensors'} does not fit its avatar.json; make the avatar again."
        )
        anchors = [f"anchors.{field.name}" for field in dataclasses.fields(KeptAnchors)]
        cameras = ["cameras.K", "cameras.world_to_camera"]
        if not {"tokens", "pictures", *anchors, *cameras} <= set(state):
            raise broken
        model = Avat3r(Avat3rConfig.from_json(values["config"])).to(state["tokens"].dtype)
        weights = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
        try:
            missing, unexpected = model.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise broken from error
        if unexpected or any(name.startswith(model.drive_prefixes) for name in missing):
            raise broken
        return cls(
            model.eval(),
            state["tokens"],
            KeptAnchors(*(state[name] for name in anchors)),
            state["pictures"],
            Cameras(*(state[name] for name in cameras)),
            values["expression_kind"],
            values["provenance"],
        )
