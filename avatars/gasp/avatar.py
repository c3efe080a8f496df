"""A GASP avatar: one person's Gaussians on the head's triangles. No network runs when it is driven."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.gasp.config import GaspConfig
from avatars.gasp.surface import WIDTH, Surface
from avatars.gaussians import Gaussians
from avatars.head.mesh import HeadMesh
from avatars.method import check_codes

__all__ = ["GaspAvatar"]


class GaspAvatar(nn.Module):
    """One person. Expressions move the mesh, and the mesh carries the Gaussians; nothing else depends on them."""

    method = "gasp"
    attributes: Tensor  # (N, 14)
    identity: Tensor  # (I,)

    def __init__(
        self,
        config: GaspConfig,
        attributes: Tensor,
        identity: Tensor,
        expression_kind: str,
        provenance: dict[str, Any] | None = None,
        head: HeadMesh | None = None,
    ) -> None:
        """An avatar of given attributes.

        Args:
            config: names the head and the UV map that they sit on.
            attributes: (N, 14) as `avatars.gasp.ATTRIBUTES` orders them.
            identity: (I,) code of the person's head shape.
            expression_kind: what drives the head, for example "arkit-52".
            provenance: where the pictures and the prior came from; kept with the avatar.
            head: the head that `config.head` names; loaded when None.

        Raises:
            UserError: there are not as many attributes as the UV map has places.
        """
        super().__init__()
        self.config = config
        self.expression_kind = expression_kind
        self.provenance = dict(provenance or {})
        self.surface = Surface(config, head)
        if attributes.shape != (len(self.surface), WIDTH):
            raise UserError(
                f"A GASP avatar on a {config.uv_resolution}x{config.uv_resolution} UV map of the head {config.head!r} "
                f"has {len(self.surface)} Gaussians and these are {len(attributes)}; fit the avatar again."
            )
        self.register_buffer("attributes", attributes.detach().float().clone())
        self.register_buffer("identity", identity.detach().float().clone())
        self.surface.to(self.attributes.device)

    @property
    def expression_length(self) -> int:
        """Length of the expression code."""
        return self.surface.head.n_expression

    @torch.no_grad()
    def gaussians(self, expression: Tensor) -> Gaussians:
        """The person with the face that `expression` (E,) describes, in the head frame.

        Raises:
            UserError: the code has another length than the head's.
        """
        return self.sequence(expression[None])[0]

    @torch.no_grad()
    def sequence(self, expressions: Tensor) -> list[Gaussians]:
        """The person with each of several faces (B, E); the head is posed for all of them at once.

        Raises:
            UserError: the codes have another length than the head's.
        """
        head = self.surface.head
        check_codes(self, expressions)
        codes = expressions.to(self.identity)
        return self.surface.attach(
            self.attributes, head.vertices(self.identity.expand(len(codes), -1), codes)
        )

    def save(self, folder: Path) -> None:
        """Writes `avatar.json` and `avatar.safetensors`; the head itself is not copied, only named."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / "avatar.safetensors")
        description = {
            "method": self.method,
            "expression_kind": self.expression_kind,
            "config": self.config.to_json(),
            "gaussians": len(self.surface),
            "surface": self.surface.fingerprint(),
            "provenance": self.provenance,
        }
        (folder / "avatar.json").write_text(json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, head: HeadMesh | None = None) -> GaspAvatar:
        """Reads what `save` wrote.

        Args:
            folder: where the two files are.
            head: the head to put the Gaussians on; loaded by its name when None.

        Raises:
            UserError: the files do not belong together, or the head has another topology or UV map.
        """
        folder = Path(folder)
        description = json.loads((folder / "avatar.json").read_text())
        if not (folder / "avatar.safetensors").is_file():
            raise UserError(
                f"{folder} has an avatar.json and no avatar.safetensors; copy both, or fit the avatar again."
            )
        state = load_file(folder / "avatar.safetensors")
        if set(state) != {"attributes", "identity"}:
            raise UserError(
                f"{folder / 'avatar.safetensors'} does not fit its avatar.json; fit the avatar again."
            )
        avatar = cls(
            GaspConfig.from_json(description["config"]),
            state["attributes"],
            state["identity"],
            description["expression_kind"],
            description["provenance"],
            head,
        )
        if avatar.surface.fingerprint() != description["surface"]:
            raise UserError(
                f"{folder / 'avatar.json'} sits on a head {avatar.config.head!r} with other triangles or another UV "
                "map than the one here; fit the avatar again."
            )
        return avatar.eval()
