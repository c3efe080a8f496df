"""The pictures that identify a person, with everything that is known about them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError

__all__ = ["Background", "InputSet"]

Background = Literal["masked", "kept"]
"""What input pictures show where the mask is zero: nothing (black), or what was behind the head."""


@dataclass
class InputSet:
    """N pictures of one person, each from its own timestep, in the person's head frame.

    Attributes:
        images: (N, 3, H, W) float sRGB in [0, 1]; with `background` "masked" black where the mask is zero and masks
            are known, with "kept" as the camera saw it. `masked` cuts them out.
        masks: (N, 1, H, W) foreground coverage in [0, 1].
        cameras: N cameras in the head frame, metres.
        positions: (N, 3, H, W) position maps in the head frame, metres, or None without a position prior.
        confidence: (N, 1, H, W) trust in `positions`, in DUSt3R's raw space (>= 1, where 1 is no trust), or None.
        features: (N, D, h, w) semantic features per patch, or None without a feature prior.
        expressions: (N, E) expression code of each picture.
        expression_kind: what the codes mean: "arkit-52", "ava-256" or "flame-135".
        subject: name of the person in the capture.
        head: name of the parametric head that tracked the capture, or None.
        identity: (I,) identity code of that head, or None.
        provenance: where the pictures come from (timesteps, camera ids, dataset); travels into exports.
        background: whether the pictures show what is behind the head.
    """

    images: Tensor
    masks: Tensor
    cameras: Cameras
    positions: Tensor | None
    confidence: Tensor | None
    features: Tensor | None
    expressions: Tensor
    expression_kind: str
    subject: str
    head: str | None = None
    identity: Tensor | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    background: Background = "masked"

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        return self.images.shape[-2], self.images.shape[-1]

    def check(self) -> None:
        """Refuses what no picture of a head can have.

        Raises:
            UserError: no pictures, another number of cameras, masks or codes, a camera that is no rigid transform, or
                a value that is not finite.
        """
        who = f"The input set of {self.subject}"
        if len(self) == 0:
            raise UserError(f"{who} has no picture; give at least one.")
        counts = {
            "cameras": len(self.cameras.K),
            "masks": len(self.masks),
            "expression codes": len(self.expressions),
        }
        for name, count in counts.items():
            if count != len(self):
                raise UserError(
                    f"{who} has {len(self)} pictures and {count} {name}; give one to each picture."
                )
        for name, values in (("K", self.cameras.K), ("world_to_camera", self.cameras.world_to_camera)):
            if not bool(torch.isfinite(values).all()):
                raise UserError(f"{who} has a camera whose {name} is not finite; calibrate it again.")
        rotation = self.cameras.world_to_camera[:, :3, :3].double()
        unit = torch.eye(3, dtype=rotation.dtype, device=rotation.device)
        off = (rotation @ rotation.transpose(1, 2) - unit).abs().amax((1, 2))
        wrong = (off > 1e-3) | (torch.linalg.det(rotation) < 0)
        if bool(wrong.any()):
            raise UserError(
                f"{who} has a camera (number {int(wrong.nonzero()[0, 0])}) whose world_to_camera is no rotation with"
                " a translation; scale and mirroring have no place in it."
            )
        if not bool(torch.isfinite(self.images).all()):
            raise UserError(f"{who} has a picture with values that are not finite; read it again.")

    def masked(self) -> InputSet:
        """The set with its pictures over black, colours times coverage, for whoever has no use for a background.

        Feature maps of pictures with a background are left out: their networks have seen it. Positions stay.
        """
        if self.background == "masked":
            return self
        return replace(self, images=self.images * self.masks, features=None, background="masked")

    def first(self, count: int) -> InputSet:
        """The set of only its first pictures; its provenance says which those are."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:count]

        kept = {
            key: value[:count] if key in ("timesteps", "camera_ids") else value
            for key, value in self.provenance.items()
        }
        return replace(
            self,
            images=self.images[:count],
            masks=self.masks[:count],
            cameras=self.cameras[slice(count)],
            positions=cut(self.positions),
            confidence=cut(self.confidence),
            features=cut(self.features),
            expressions=self.expressions[:count],
            provenance=kept,
        )

    def to(self, device: str) -> InputSet:
        """The same set with every tensor on `device`."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            images=self.images.to(device),
            masks=self.masks.to(device),
            cameras=self.cameras.to(device=device),
            positions=move(self.positions),
            confidence=move(self.confidence),
            features=move(self.features),
            expressions=self.expressions.to(device),
            identity=move(self.identity),
        )
