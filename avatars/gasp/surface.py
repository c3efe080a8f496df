"""Gaussians that hang on the triangles of a head: attributes in each triangle's frame to Gaussians in the head's."""

from __future__ import annotations

import copy
import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.gasp.config import GaspConfig
from avatars.gaussians import Gaussians, matrix_to_quaternion, quaternion_multiply
from avatars.head.mesh import HeadMesh, triangle_frames
from avatars.head.uv import open_rim, sample_uv, surface_frames

__all__ = ["ATTRIBUTES", "WIDTH", "Surface"]

ATTRIBUTES = {
    "position": slice(0, 3),  # off the surface, in the triangle's frame, in position units of the mean head
    "rotation": slice(3, 7),  # quaternion wxyz in the triangle's frame, of any length
    "scale": slice(7, 10),  # logarithm of the standard deviations in metres, on the mean head
    "opacity": slice(10, 11),  # logit
    "color": slice(11, 14),  # sRGB, not clamped; no dependence on the view
}
"""Where each part of a Gaussian is in its row of attributes."""
WIDTH = 14


class Surface(nn.Module):
    """The places of N Gaussians on a head, one for each covered pixel of its UV map.

    Nothing here is learned or saved: it follows from the head and the resolution.
    """

    triangles: Tensor  # (N,)
    barycentric: Tensor  # (N, 3)
    rest: Tensor  # (F,)

    def __init__(self, config: GaspConfig, head: HeadMesh | None = None) -> None:
        """Finds the places.

        Args:
            config: names the head and the resolution.
            head: the head that `config.head` names; loaded when None.

        Raises:
            UserError: the head covers no pixel of the map, or is not there.
        """
        super().__init__()
        with torch.device("cpu"):  # a network that is only counted is built on the meta device; this is not
            if head is None:
                from avatars.head.tracked import load_head

                head = load_head(config.head)
            dropped = open_rim(head.faces, head.regions.get("boundary"))
            samples = sample_uv(head.uv, head.uv_faces, config.uv_resolution, dropped)
            if len(samples) == 0:
                raise UserError(
                    f"No pixel of a {config.uv_resolution}x{config.uv_resolution} UV map is covered by the head "
                    f"{config.head!r}; choose a larger uv_resolution."
                )
            self._head = [head]  # in a list: heads are shared and no part of anybody's parameters
            self.config = config
            self.pixels = samples.pixels
            self.register_buffer("triangles", samples.triangles, persistent=False)
            self.register_buffer("barycentric", samples.barycentric, persistent=False)
            self.register_buffer("rest", triangle_frames(self.mean_head(), head.faces)[1], persistent=False)

    def __len__(self) -> int:
        return len(self.triangles)

    @property
    def head(self) -> HeadMesh:
        """The head that carries the Gaussians."""
        return self._head[0]

    def mean_head(self) -> Tensor:
        """(V, 3) the neutral face of the mean person."""
        head: Any = self.head
        zero = {"dtype": torch.float32, "device": head.faces.device}
        return head.vertices(
            torch.zeros(1, head.n_identity, **zero), torch.zeros(1, head.n_expression, **zero)
        )[0]

    def fingerprint(self) -> str:
        """A short hash of what the places depend on: triangles, UV layout and resolution."""
        digest = hashlib.sha256(str(self.config.uv_resolution).encode())
        for tensor in (self.head.faces, self.head.uv_faces):
            digest.update(tensor.cpu().long().numpy().tobytes())
        digest.update(self.head.uv.cpu().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def scalp(self) -> Tensor:
        """(N,) bool: the Gaussians that sit on the scalp.

        Raises:
            UserError: the head does not say where that is.
        """
        regions = self.head.regions
        if "scalp" not in regions:
            raise UserError(
                f"The head {self.config.head!r} has no region 'scalp', which GASP must know to let hair grow; put the "
                "head's masks beside it (FLAME_masks.pkl for FLAME)."
            )
        return regions["scalp"][self.triangles]

    def start(self) -> Tensor:
        """(N, 14) grey Gaussians that cover the mean head's skin as the pixels of its UV map do."""
        config, head = self.config, self.head
        vertices = self.mean_head()
        uv = head.uv[head.uv_faces[self.triangles]]  # (N, 3, 2)
        turn, lengths, _ = surface_frames(
            vertices[head.faces[self.triangles]], uv, config.uv_resolution
        )  # (N, 4) in the head's frame
        frames, _ = triangle_frames(vertices, head.faces)
        inverse = matrix_to_quaternion(frames.transpose(-1, -2))[self.triangles]
        lengths = lengths.clamp_min(1e-4)
        thickness = 0.3 * lengths.prod(1, keepdim=True).sqrt()
        attributes = torch.zeros(len(self), WIDTH, device=vertices.device)
        attributes[:, ATTRIBUTES["rotation"]] = quaternion_multiply(inverse, turn)
        attributes[:, ATTRIBUTES["scale"]] = (config.start_size * torch.cat([lengths, thickness], 1)).log()
        attributes[:, ATTRIBUTES["opacity"]] = math.log(config.start_opacity / (1 - config.start_opacity))
        attributes[:, ATTRIBUTES["color"]] = 0.5
        return attributes

    def attach(self, attributes: Tensor, vertices: Tensor) -> list[Gaussians]:
        """Gaussians of posed heads, differentiable in the attributes (GaussianAvatars, arXiv 2312.02069, equation 4).

        A Gaussian starts at its pixel's place on the triangle, not at the triangle's centre as there, and its frame
        grows with the triangle relative to the mean head, so that attributes are in metres for triangles of any size.

        Args:
            attributes: (B, N, 14), or (N, 14) for all of them.
            vertices: (B, V, 3) posed heads, metres.

        Returns:
            B sets of N Gaussians in the head frame.
        """
        attributes = attributes.expand(len(vertices), -1, -1)
        faces, chosen = self.head.faces, self.triangles
        turn, size = triangle_frames(vertices, faces)  # (B, F, 3, 3), (B, F)
        quaternion = matrix_to_quaternion(turn)[:, chosen]
        grown = (size / self.rest.clamp_min(1e-6))[:, chosen, None]  # (B, N, 1)
        corners = vertices[:, faces[chosen]]  # (B, N, 3, 3)
        surface = (corners * self.barycentric[:, :, None]).sum(2)
        offset = self.config.position_unit * attributes[..., ATTRIBUTES["position"]] * grown
        means = surface + (turn[:, chosen] @ offset[..., None])[..., 0]
        own = nn.functional.normalize(attributes[..., ATTRIBUTES["rotation"]], dim=-1)
        quats = quaternion_multiply(quaternion, own)
        scales = attributes[..., ATTRIBUTES["scale"]].exp() * grown
        opacities = attributes[..., 10].sigmoid()
        colors = attributes[..., ATTRIBUTES["color"]]
        return [Gaussians(*one) for one in zip(means, quats, scales, opacities, colors, strict=True)]

    def _apply(self, fn: Any, recurse: bool = True) -> Surface:
        """Moves to another device (`to`, `cuda`, …) with a copy of the head, which others may use."""
        device = self.rest.device
        super()._apply(fn, recurse)
        if self.rest.device != device:
            head: Any = copy.deepcopy(self.head)
            self._head = [head.to(self.rest.device)]
        return self
