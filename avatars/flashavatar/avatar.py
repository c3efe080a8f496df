"""FlashAvatar: Gaussians on the UV map of a parametric head, moved by its expressions and a small network."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.flashavatar.config import FlashAvatarConfig
from avatars.flashavatar.network import OffsetNetwork, encode_position
from avatars.gaussians import Gaussians, quaternion_multiply
from avatars.head.mesh import HeadMesh
from avatars.head.uv import open_rim, sample_uv
from avatars.method import check_codes

__all__ = ["FlashAvatar"]


class FlashAvatar(nn.Module):
    """One person's Gaussians on the UV map of a head.

    A Gaussian's centre is a fixed point of the posed mesh plus an offset; its rotation and scale are learned
    and changed by the same network; colour and opacity are learned and do not depend on the expression.
    """

    method = "flashavatar"
    identity: Tensor  # (I,)
    encoded: Tensor  # (N, 51) neutral positions, encoded

    def __init__(
        self,
        config: FlashAvatarConfig,
        head: HeadMesh,
        identity: Tensor,
        expression_kind: str,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """An avatar of the right shape; `train.fits.flashavatar` gives it a look.

        Args:
            config: its shape.
            head: the head that `config.head` names.
            identity: (I,) code of the person's head shape.
            expression_kind: what drives the head, for example "arkit-52".
            provenance: where the pictures came from; kept with the avatar.
        """
        super().__init__()
        self.config = config
        self._head = [head]  # in a list: heads are shared between avatars and are no part of one's parameters
        self.expression_kind = expression_kind
        self.provenance = dict(provenance or {})

        dropped = open_rim(head.faces, head.regions.get("boundary"))
        self.samples = sample_uv(head.uv, head.uv_faces, config.uv_resolution, dropped)
        count = len(self.samples)
        if count == 0:
            raise UserError(
                f"No pixel of a {config.uv_resolution}x{config.uv_resolution} UV map is covered by the head "
                f"{config.head!r}; choose a larger uv_resolution."
            )
        self.register_buffer("identity", identity.detach().float().clone())
        neutral = self.posed_centers(torch.zeros(1, head.n_expression, device=identity.device))[0]
        encoded = encode_position(neutral, config.octaves)
        self.register_buffer("encoded", encoded, persistent=False)

        self.offsets = OffsetNetwork(
            encoded.shape[1], head.n_expression, config.mlp_width, config.mlp_layers, config.zero_offset
        )
        coefficients = (config.sh_degree + 1) ** 2
        self.sh_dc = nn.Parameter(torch.zeros(count, 1, 3))
        self.sh_rest = nn.Parameter(torch.zeros(count, coefficients - 1, 3))
        self.opacity_logit = nn.Parameter(torch.zeros(count))
        self.log_scale = nn.Parameter(torch.zeros(count, 3))
        self.quaternion = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(count, 1))

    @property
    def head(self) -> HeadMesh:
        """The head that carries the Gaussians."""
        return self._head[0]

    @property
    def expression_length(self) -> int:
        """Length of the expression code."""
        return self.head.n_expression

    def _apply(self, fn: Any, recurse: bool = True) -> FlashAvatar:
        """Moves to another device (`to`, `cuda`, …) with a copy of the head, which others may use."""
        device = self.identity.device
        super()._apply(fn, recurse)
        if self.identity.device != device:
            head: Any = copy.deepcopy(self.head)
            self._head = [head.to(self.identity.device)]
            self.samples = self.samples.to(self.identity.device)
        return self

    @torch.no_grad()
    def posed_centers(self, expression: Tensor) -> Tensor:
        """The Gaussians' places on the posed mesh, before the network moves them.

        Args:
            expression: (B, E).

        Returns:
            (B, N, 3) metres, head frame.
        """
        identity = self.identity.expand(len(expression), -1)
        return self.samples.interpolate(self.head.vertices(identity, expression), self.head.faces)

    def deform(self, centers: Tensor, expression: Tensor, sh_degree: int | None = None) -> Gaussians:
        """Gaussians of one expression, differentiable in the avatar's parameters (paper equation 6).

        Args:
            centers: (N, 3) posed centres of this expression, as `posed_centers` gives them.
            expression: (E,).
            sh_degree: use only colours up to this degree; all of them when None.
        """
        config = self.config
        delta = self.offsets(self.encoded, expression)
        # A quaternion (exp(w), x, y, z): close to the identity at zero and never a zero vector.
        turn = torch.cat([delta[:, 3:4].exp(), delta[:, 4:7]], -1)
        if config.log_scale_multiply:
            log_scale = self.log_scale * delta[:, 7:].exp()
        else:
            log_scale = self.log_scale + delta[:, 7:]
        coefficients = ((config.sh_degree if sh_degree is None else sh_degree) + 1) ** 2
        return Gaussians(
            means=centers + config.offset_scale * delta[:, :3],
            quats=nn.functional.normalize(quaternion_multiply(self.quaternion, turn), dim=-1),
            scales=log_scale.exp(),
            opacities=self.opacity_logit.sigmoid(),
            colors=torch.cat([self.sh_dc, self.sh_rest[:, : coefficients - 1]], 1),
        )

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
        check_codes(self, expressions)
        codes = expressions.to(self.encoded)
        return [
            self.deform(centers, code) for centers, code in zip(self.posed_centers(codes), codes, strict=True)
        ]

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
            "gaussians": len(self.samples),
            "provenance": self.provenance,
        }
        (folder / "avatar.json").write_text(json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, head: HeadMesh | None = None) -> FlashAvatar:
        """Reads what `save` wrote.

        Args:
            folder: where the two files are.
            head: the head to put the Gaussians on; loaded by its name when None.

        Raises:
            UserError: the files do not belong together, or the head has another topology.
        """
        folder = Path(folder)
        description = json.loads((folder / "avatar.json").read_text())
        config = FlashAvatarConfig.from_json(description["config"])
        if not (folder / "avatar.safetensors").is_file():
            raise UserError(
                f"{folder} has an avatar.json and no avatar.safetensors; copy both, or fit the avatar again."
            )
        state = load_file(folder / "avatar.safetensors")
        if head is None:
            from avatars.head.tracked import load_head

            head = load_head(config.head)
        avatar = cls(
            config, head, state["identity"], description["expression_kind"], description["provenance"]
        )
        try:
            avatar.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"{folder / 'avatar.safetensors'} does not fit its avatar.json or the head {config.head!r}; "
                "fit the avatar again."
            ) from error
        return avatar.eval()
