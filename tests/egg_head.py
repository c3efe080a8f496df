"""A stand-in for a parametric head: an egg whose mouth opens, small enough for tests of what stands on
heads."""

from __future__ import annotations

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.flashavatar import FlashAvatar, FlashAvatarConfig
from avatars.gaussians import rgb_to_sh
from avatars.inputs import InputSet
from avatars.rasterize import rasterize

ROWS, COLUMNS = 12, 16
RADII = (0.075, 0.105, 0.09)
MOUTH = (0.0, -0.04)


class EggHead(torch.nn.Module):
    """ROWS x COLUMNS quads; identity code 0 widens it, expression code 0 opens the mouth, code 1 lifts the
    top."""

    def __init__(self) -> None:
        super().__init__()
        v, u = torch.meshgrid(
            torch.linspace(0, 1, ROWS + 1), torch.linspace(0, 1, COLUMNS + 1), indexing="ij"
        )
        polar, azimuth = torch.pi * (0.02 + 0.96 * v), 2 * torch.pi * (u - 0.5)
        points = torch.stack([polar.sin() * azimuth.sin(), -polar.cos(), polar.sin() * azimuth.cos()], -1)
        self.register_buffer("template", points.reshape(-1, 3) * torch.tensor(RADII))
        self.register_buffer("uv", torch.stack([u, v], -1).reshape(-1, 2))
        corner = (torch.arange(ROWS)[:, None] * (COLUMNS + 1) + torch.arange(COLUMNS)).reshape(-1)
        a, b, c, d = corner, corner + 1, corner + COLUMNS + 2, corner + COLUMNS + 1
        faces = torch.stack([torch.stack([a, b, c], -1), torch.stack([a, c, d], -1)], 1).reshape(-1, 3)
        self.register_buffer("faces", faces)
        self.uv_faces = faces
        self.n_identity, self.n_expression = 2, 3
        boundary = torch.zeros(len(faces), dtype=torch.bool)
        boundary[: 2 * COLUMNS] = True  # the lowest ring
        self.regions = {"boundary": boundary}
        around = torch.linspace(0, 2 * torch.pi, 13)[:-1]
        lips = torch.stack([MOUTH[0] + 0.025 * around.cos(), MOUTH[1] + 0.015 * around.sin()], -1)
        front = torch.where(self.template[:, 2] > 0, 0.0, 1.0)
        nearest = ((self.template[:, None, :2] - lips).square().sum(-1) + front[:, None]).argmin(0)
        landmarks = torch.zeros(68, dtype=torch.long)
        landmarks[48:60] = nearest
        self.register_buffer("landmarks68", landmarks)

    def vertices(self, identity: Tensor, expression: Tensor) -> Tensor:
        points = self.template * (
            1 + 0.1 * identity[:, None, :1] * torch.tensor([1.0, 0.0, 0.0]).to(identity)
        )
        x, y, z = self.template.unbind(-1)
        near_mouth = torch.exp(-((x - MOUTH[0]) ** 2 + (y - MOUTH[1]) ** 2) / 0.02**2) * (z > 0)
        down = torch.stack([torch.zeros_like(x), -0.02 * near_mouth, torch.zeros_like(x)], -1)
        up = torch.stack([torch.zeros_like(x), 0.02 * (y > 0.05), torch.zeros_like(x)], -1)
        return points + expression[:, :1, None] * down + expression[:, 1:2, None] * up


def cameras_around(degrees: list[float], size: int) -> Cameras:
    """Cameras a metre away, turned about the vertical; 0 looks into the face."""
    angle = torch.deg2rad(torch.tensor(degrees))
    positions = torch.stack([angle.sin(), 0.05 * torch.ones_like(angle), angle.cos()], -1)
    K = torch.tensor([[3.8 * size, 0, size / 2], [0, 3.8 * size, size / 2], [0, 0, 1.0]])
    return Cameras.look_at(K, positions, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))


def painted_egg(expression_kind: str = "arkit-52") -> FlashAvatar:
    """A known avatar to take pictures of: opaque, with colours that change smoothly over the egg."""
    torch.manual_seed(0)
    config = FlashAvatarConfig(uv_resolution=48, sh_degree=0, mlp_width=8, mlp_layers=1)
    avatar = FlashAvatar(config, EggHead(), torch.tensor([0.5, 0.0]), expression_kind)
    centers = avatar.posed_centers(torch.zeros(1, 3))[0]
    with torch.no_grad():
        avatar.sh_dc.copy_(rgb_to_sh(0.5 + 0.4 * torch.sin(60 * centers + 1.0))[:, None])
        avatar.opacity_logit.fill_(5.0)
        avatar.log_scale.fill_(-5.5)
    return avatar.eval()


def pictures_of(avatar: FlashAvatar, degrees: list[float], expressions: Tensor, size: int = 40) -> InputSet:
    """An input set of the painted egg, one picture an expression."""
    cameras = cameras_around(degrees, size)
    drawn = [
        rasterize(avatar.gaussians(expressions[i]), cameras[i], (size, size)) for i in range(len(degrees))
    ]
    return InputSet(
        images=torch.cat([picture.image for picture in drawn]).clamp(0, 1),
        masks=torch.cat([picture.alpha for picture in drawn]),
        cameras=cameras,
        positions=None,
        confidence=None,
        features=None,
        expressions=expressions,
        expression_kind=avatar.expression_kind,
        subject="egg",
        head="egg",
        identity=avatar.identity.clone(),
        provenance={"timesteps": [f"{i:05d}" for i in range(len(degrees))]},
    )
