"""A person as FastAvatar makes it: Gaussians fixed to the triangles of a head, which expressions move."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from avatars.errors import UserError
from avatars.fastavatar.surface import LocalGaussians, place, seats_of
from avatars.gaussians import Gaussians
from avatars.method import check_codes

if TYPE_CHECKING:
    from avatars.head import ParametricHead

__all__ = ["FastAvatar", "average", "shared_head"]

FIELDS = ("offsets", "quats", "log_scales", "opacities", "colors")


@lru_cache(maxsize=4)
def shared_head(name: str, device: str = "cpu") -> ParametricHead:
    """The head of that name on a device, once a process."""
    from avatars.head import ParametricHead

    return ParametricHead.load(name).to(device)


class FastAvatar:
    """N Gaussians in the frames of their triangles, and the identity code of the head that carries them.

    Expressions move the head, and the Gaussians ride along (ours: the paper's version 1 has one expression).
    Colours and sizes stay as they are.

    Attributes:
        local: the Gaussians.
        identity: (I,) code of the head.
        head: its name.
        uv_resolution: the layout, see `seats_of`.
        expression_kind: what drives it.
        latent: (d,) the w that it was decoded from, None for a fit.
        network: fingerprint of the decoder that w belongs to, empty for a fit.
        variant: how it was made where that must not be mixed with others in a table; empty for most.
    """

    method = "fastavatar"

    def __init__(
        self,
        local: LocalGaussians,
        identity: Tensor,
        *,
        head: str,
        uv_resolution: int,
        expression_kind: str,
        latent: Tensor | None = None,
        network: str = "",
        variant: str = "",
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.local, self.identity = local, identity
        self.head, self.uv_resolution = head, uv_resolution
        self.expression_kind = expression_kind
        self.latent, self.network, self.variant = latent, network, variant
        self.provenance = dict(provenance or {})
        self._head = shared_head(head, str(identity.device))
        self._seats = seats_of(self._head, uv_resolution).to(identity.device)
        if len(self._seats) != len(local.offsets):
            raise UserError(
                f"This FastAvatar has {len(local.offsets)} Gaussians and the head {head!r} seats {len(self._seats)}; "
                "another version of the head made it. Make the avatar again."
            )

    def __len__(self) -> int:
        return len(self.local.offsets)

    @property
    def expression_length(self) -> int:
        """Length of the expression code."""
        return self._head.n_expression

    def gaussians(self, expression: Tensor) -> Gaussians:
        """The person with the face that `expression` (E,) describes, in the head frame."""
        return self.sequence(expression[None])[0]

    @torch.no_grad()
    def sequence(self, expressions: Tensor) -> list[Gaussians]:
        """The person with each of several faces (B, E); the head is posed for all of them at once.

        Raises:
            UserError: codes of another length than the head's.
        """
        check_codes(self, expressions)
        codes = expressions.to(self.identity)
        vertices = self._head.vertices(self.identity.expand(len(codes), -1), codes)
        return [place(self.local, *posed) for posed in zip(*self._seats.posed(vertices), strict=True)]

    def save(self, folder: Path) -> None:
        """Writes `avatar.json` and `avatar.safetensors`; the head itself is only named."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self.local, name) for name in FIELDS} | {"identity": self.identity}
        if self.latent is not None:
            state["latent"] = self.latent
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in state.items()},
            folder / "avatar.safetensors",
        )
        description = {
            "method": self.method,
            "expression_kind": self.expression_kind,
            "head": self.head,
            "uv_resolution": self.uv_resolution,
            "network": self.network,
            "variant": self.variant,
            "gaussians": len(self),
            "provenance": self.provenance,
        }
        (folder / "avatar.json").write_text(json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> FastAvatar:
        """Reads what `save` wrote.

        Raises:
            UserError: the two files do not belong together.
        """
        folder = Path(folder)
        told = json.loads((folder / "avatar.json").read_text())
        path = folder / "avatar.safetensors"
        if not path.is_file():
            raise UserError(f"{folder} has an avatar.json and no avatar.safetensors; copy both.")
        state = load_file(path)
        if not {*FIELDS, "identity"} <= set(state) or len(state["offsets"]) != told.get("gaussians"):
            raise UserError(f"{path} does not fit its avatar.json; make the avatar again.")
        return cls(
            LocalGaussians(*(state[name] for name in FIELDS)),
            state["identity"],
            head=told["head"],
            uv_resolution=told["uv_resolution"],
            expression_kind=told["expression_kind"],
            latent=state.get("latent"),
            network=told["network"],
            variant=told["variant"],
            provenance=told["provenance"],
        )


def average(avatars: Sequence[FastAvatar]) -> FastAvatar:
    """The template: the mean of every parameter over people whose Gaussians correspond one to one (paper section 3.1).

    Means are of log-scales, logits, harmonics and offsets; quaternions are turned to one hemisphere first. The head's
    identity code is averaged as well (ours; the paper gives the subject's tracked head to the decoder instead).

    Raises:
        UserError: nobody, or people of different layouts.
    """
    if not avatars:
        raise UserError("A template is the average of people, and there is none; fit some first.")
    first = avatars[0]
    for avatar in avatars:
        same = (avatar.head, avatar.uv_resolution, avatar.expression_kind, avatar.local.colors.shape)
        if same != (first.head, first.uv_resolution, first.expression_kind, first.local.colors.shape):
            raise UserError(
                "The avatars of a template must be of one head, one layout and one degree of colour; fit them with one "
                "recipe."
            )
    means = {
        name: torch.stack([getattr(avatar.local, name) for avatar in avatars]).mean(0)
        for name in FIELDS
        if name != "quats"
    }
    quats = torch.nn.functional.normalize(torch.stack([avatar.local.quats for avatar in avatars]), dim=-1)
    signs = torch.where((quats * quats[:1]).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    means["quats"] = torch.nn.functional.normalize((quats * signs).mean(0), dim=-1)
    return FastAvatar(
        LocalGaussians(**means),
        torch.stack([avatar.identity for avatar in avatars]).mean(0),
        head=first.head,
        uv_resolution=first.uv_resolution,
        expression_kind=first.expression_kind,
        variant="template",
        provenance={"template_of": len(avatars)},
    )
