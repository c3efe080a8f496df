"""FastAvatar as a method: one picture in, a driven avatar out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avatars.errors import UserError
from avatars.fastavatar.avatar import FastAvatar
from avatars.fastavatar.faces import FROZEN, crops, head_box, recogniser
from avatars.fastavatar.model import Decoder, Encoder, fingerprint, read_network
from avatars.inputs import InputSet

__all__ = ["FastAvatarMethod"]


GUIDED = "guided by the person's tracked head"


class FastAvatarMethod:
    """Makes avatars in one forward pass, from the **first** picture of an input set and nothing else.

    Neither cameras, expression codes nor tracking of the person are looked at. The picture may have any size.
    """

    name = "fastavatar"

    def __init__(
        self, decoder: Decoder, encoder: Encoder, expression_kind: str, provenance: dict[str, Any]
    ) -> None:
        self.decoder = decoder.eval()
        self.encoder = encoder.eval().to(memory_format=torch.channels_last)
        self.expression_kind = expression_kind
        self.provenance = provenance
        self.network = fingerprint(decoder)

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> FastAvatarMethod:
        """Reads what the encoder's training exported.

        Args:
            folder: with `model.json`.
            dtype: arithmetic of the networks; only float32, in which they take milliseconds.

        Raises:
            UserError: no whole model, or another arithmetic.
        """
        if dtype != torch.float32:
            raise UserError(
                "FastAvatar computes in float32; leave --precision out. It takes milliseconds as it is."
            )
        decoder, encoder, told, _ = read_network(folder)
        if encoder is None:
            raise UserError(
                f"{folder} holds only FastAvatar's decoder; train the encoder: headsplat launch fastavatar-encoder "
                f'--args="--model.decoder {folder}".'
            )
        return cls(decoder, encoder, told["provenance"]["expression_kind"], told["provenance"])

    @property
    def expression_length(self) -> int:
        """Length of the expression code."""
        return self.decoder.config.expression_dim

    @property
    def size(self) -> int:
        """Side in pixels of the square pictures that it is trained on."""
        return self.encoder.config.size

    @property
    def needs_positions(self) -> bool:
        """It takes a picture and nothing else."""
        return False

    @torch.no_grad()
    def latent(self, image: Tensor, mask: Tensor, who: str = "the person") -> Tensor:
        """The latent (d,) of one picture.

        Args:
            image: (3, H, W) sRGB in [0, 1].
            mask: (1, H, W) coverage, ones where there is no matte.
            who: for messages.

        Raises:
            UserError: it shows no face or several, is too small, or a frozen backbone's weights are missing.
        """
        box = head_box(image, mask, who)
        config = self.encoder.config
        if config.backbone not in FROZEN:
            return self.encoder(crops(image[None], box[None], config.backbone_size))[0]
        said = recogniser(config.backbone)(image)
        if said is None:
            raise UserError(
                f"The picture of {who} shows no face that dlib finds, which the backbone {config.backbone!r} needs; "
                "give a picture that looks at the camera."
            )
        return self.encoder(said[None].to(image))[0]

    def decode(self, latent: Tensor, **more: Any) -> FastAvatar:
        """The person of a w (d,), in one forward pass.

        Raises:
            UserError: a w of another length.
        """
        if latent.shape != (self.decoder.config.latent,):
            raise UserError(
                f"This FastAvatar decodes latents of {self.decoder.config.latent} numbers, not {tuple(latent.shape)}; "
                "they are of another checkpoint."
            )
        return self.decoder.avatar(latent, self.expression_kind, self.network, **more)

    def latent_of(self, avatar: FastAvatar, where: str | Path = "the avatar") -> Tensor:
        """The w that an avatar was decoded from.

        Raises:
            UserError: it has none, or one of another checkpoint.
        """
        if avatar.latent is None:
            raise UserError(
                f"{where} was fitted and has no latent; make it from a picture with headsplat create."
            )
        if avatar.network != self.network:
            raise UserError(
                f"The latent of {where} is of another checkpoint ({avatar.network}) than this model's "
                f"({self.network}); make the avatar again with this model."
            )
        return avatar.latent

    def create(self, inputs: InputSet) -> FastAvatar:
        """The person in the first picture of a set.

        Raises:
            UserError: as `latent`; another kind of expression codes; a set without a picture.
        """
        if inputs.expression_kind != self.expression_kind:
            raise UserError(
                f"FastAvatar was trained on {self.expression_kind} expression codes and the input set has "
                f"{inputs.expression_kind}."
            )
        inputs.check()
        used = inputs.first(1).masked()
        latent = self.latent(used.images[0], used.masks[0], inputs.subject)
        return self.decode(latent, provenance=used.provenance)

    def create_guided(self, inputs: InputSet) -> FastAvatar:
        """The same on the head that multi-view tracking found for this person, as the authors' guided mode has it.

        Such an avatar knows more than its picture; its variant keeps its rows out of tables of the others.

        Raises:
            UserError: as `create`; the pictures are not tracked with this head.
        """
        avatar = self.create(inputs)
        identity = inputs.identity
        if identity is None or inputs.head != avatar.head or identity.shape != avatar.identity.shape:
            raise UserError(
                f"The guided mode needs pictures that the head {avatar.head!r} tracked; those of {inputs.subject} "
                "are not. Leave the guidance out."
            )
        more = {name: getattr(avatar, name) for name in ("head", "uv_resolution", "expression_kind")}
        return FastAvatar(
            replace(avatar.local), identity, latent=avatar.latent, network=avatar.network, variant=GUIDED,
            provenance=avatar.provenance, **more,
        )  # fmt: skip
