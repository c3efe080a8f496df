"""A set of 3D Gaussians as a small dataclass of tensors, and the spherical harmonics of their colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SH_C0", "Gaussians", "quaternion_to_matrix", "rgb_to_sh", "rotate_sh", "sh_basis", "sh_to_rgb"]

SH_C0 = 0.28209479177387814
"""Value of the constant spherical harmonic: rgb = 0.5 + SH_C0 * dc."""


@dataclass
class Gaussians:
    """N Gaussians with activated values: linear scales and opacities in [0, 1], as a rasterizer uses them.

    Attributes:
        means: (N, 3) centres, metres.
        quats: (N, 4) rotations wxyz; need not be normalised, must not be zero.
        scales: (N, 3) standard deviations along the rotated axes, metres, >= 0.
        opacities: (N,) in [0, 1].
        colors: (N, 3) sRGB, or (N, K, 3) spherical harmonics with K = 1, 4, 9 or 16 (degree 0 to 3, 3DGS
            order and signs; the picture's colour is max(0.5 + basis · coefficients, 0)).
    """

    means: Tensor  # (N, 3)
    quats: Tensor  # (N, 4)
    scales: Tensor  # (N, 3)
    opacities: Tensor  # (N,)
    colors: Tensor  # (N, 3) or (N, K, 3)

    def __post_init__(self) -> None:
        n = self.means.shape[0]
        for name, shape in (("means", (n, 3)), ("quats", (n, 4)), ("scales", (n, 3)), ("opacities", (n,))):
            if getattr(self, name).shape != shape:
                raise ValueError(f"Gaussians.{name} must be {shape}, not {tuple(getattr(self, name).shape)}")
        colors = tuple(self.colors.shape)
        if colors != (n, 3) and not (
            len(colors) == 3 and colors[0] == n and colors[1] in (1, 4, 9, 16) and colors[2] == 3
        ):
            raise ValueError(f"Gaussians.colors must be ({n}, 3) or ({n}, 1|4|9|16, 3), not {colors}")

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def sh_degree(self) -> int | None:
        """Degree of the spherical harmonics (0 to 3), or None for plain RGB."""
        return None if self.colors.ndim == 2 else math.isqrt(self.colors.shape[1]) - 1

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Gaussians:
        """The chosen Gaussians: a slice, indices or a (N,) boolean mask."""
        if not isinstance(index, slice | Tensor):
            index = torch.as_tensor(index, dtype=torch.long, device=self.means.device)
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Gaussians:
        """The same Gaussians on another device or in another floating type."""
        return self._map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def detach(self) -> Gaussians:
        """The same values, cut off from the graph that made them."""
        return self._map(Tensor.detach)

    @staticmethod
    def cat(sets: Sequence[Gaussians]) -> Gaussians:
        """All Gaussians of several sets. RGB and lower SH degrees are lifted to the highest."""
        degrees = [-1 if g.sh_degree is None else g.sh_degree for g in sets]
        lifted = sets if max(degrees) < 0 else [g.with_sh_degree(max(degrees)) for g in sets]
        return Gaussians(
            *(
                torch.cat([getattr(g, name) for g in lifted])
                for name in ("means", "quats", "scales", "opacities", "colors")
            )
        )

    def with_sh_degree(self, degree: int) -> Gaussians:
        """The same Gaussians with spherical harmonics of `degree`: padded with zeros, or cut."""
        if degree not in (0, 1, 2, 3):
            raise ValueError(f"SH degree must be 0 to 3, not {degree}")
        coefficients = rgb_to_sh(self.colors)[:, None] if self.colors.ndim == 2 else self.colors
        count = (degree + 1) ** 2
        padding = coefficients.new_zeros(len(self), max(0, count - coefficients.shape[1]), 3)
        colors = torch.cat([coefficients[:, :count], padding], dim=1)
        return Gaussians(self.means, self.quats, self.scales, self.opacities, colors)

    def transform(
        self, rotation: Tensor | None = None, translation: Tensor | None = None, scale: float = 1.0
    ) -> Gaussians:
        """The Gaussians after x -> scale * rotation @ x + translation; spherical harmonics turn with them.

        Args:
            rotation: (3, 3) rotation matrix, identity when None.
            translation: (3,) metres, zero when None.
            scale: positive factor.
        """
        if scale <= 0:
            raise ValueError(f"scale must be positive, not {scale}")
        means, quats, colors = self.means * scale, self.quats, self.colors
        if rotation is not None:
            rotation = rotation.to(means)
            means = means @ rotation.T
            quats = quaternion_multiply(matrix_to_quaternion(rotation).expand_as(quats), quats)
            if colors.ndim == 3:
                colors = rotate_sh(colors, rotation)
        if translation is not None:
            means = means + translation.to(means)
        return Gaussians(means, quats, self.scales * scale, self.opacities, colors)

    def prune(self, min_opacity: float = 1 / 255) -> Gaussians:
        """Without those that no picture can show: opacity below `min_opacity`."""
        return self[self.opacities >= min_opacity]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Gaussians:
        return Gaussians(
            change(self.means),
            change(self.quats),
            change(self.scales),
            change(self.opacities),
            change(self.colors),
        )


def quaternion_to_matrix(quats: Tensor) -> Tensor:
    """(..., 4) quaternions wxyz of any length to (..., 3, 3) rotation matrices."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """(..., 3, 3) rotation matrices to (..., 4) unit quaternions wxyz with w >= 0.

    Of the four ways to divide, the one with the largest divisor is used, so no rotation loses digits.
    """
    m = rotation
    trace = m[..., 0, 0] + m[..., 1, 1] + m[..., 2, 2]
    yz, zx, xy = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    sx, sy, sz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    candidates = torch.stack(  # row c is 4 q_c q
        [
            torch.stack([1 + trace, yz, zx, xy], dim=-1),
            torch.stack([yz, 1 + 2 * m[..., 0, 0] - trace, sx, sy], dim=-1),
            torch.stack([zx, sx, 1 + 2 * m[..., 1, 1] - trace, sz], dim=-1),
            torch.stack([xy, sy, sz, 1 + 2 * m[..., 2, 2] - trace], dim=-1),
        ],
        dim=-2,
    )
    divisors = candidates.diagonal(dim1=-2, dim2=-1)
    best = divisors.max(-1).indices  # argmax takes three times as long on processors
    quats = candidates.gather(-2, best[..., None, None].expand(*best.shape, 1, 4))[..., 0, :]
    quats = torch.nn.functional.normalize(quats, dim=-1)
    return torch.where(quats[..., :1] < 0, -quats, quats)


def quaternion_multiply(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product of (..., 4) quaternions wxyz: the rotation b followed by the rotation a."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        dim=-1,
    )


def rgb_to_sh(rgb: Tensor) -> Tensor:
    """The constant SH coefficient of an sRGB colour."""
    return (rgb - 0.5) / SH_C0


def sh_to_rgb(dc: Tensor) -> Tensor:
    """The sRGB colour of a constant SH coefficient, not clamped."""
    return dc * SH_C0 + 0.5


def sh_basis(degree: int, directions: Tensor) -> Tensor:
    """Real spherical harmonics in 3DGS order and signs (Kerbl et al. 2023; the signs of Sloan, JCGT 2013).

    Args:
        degree: 0 to 3.
        directions: (..., 3) unit vectors from the camera to the Gaussian.

    Returns:
        (..., (degree + 1)²) basis values.
    """
    x, y, z = directions.unbind(-1)
    values = [torch.full_like(x, SH_C0)]
    if degree >= 1:
        c1 = 0.4886025119029199
        values += [-c1 * y, c1 * z, -c1 * x]
    if degree >= 2:
        c2 = 1.0925484305920792
        values += [
            c2 * x * y,
            -c2 * y * z,
            0.31539156525252005 * (3 * z * z - 1),
            -c2 * x * z,
            0.5462742152960396 * (x * x - y * y),
        ]
    if degree >= 3:
        c3, c31 = 0.5900435899266435, 0.4570457994644658
        values += [
            -c3 * y * (3 * x * x - y * y),
            2.890611442640554 * x * y * z,
            -c31 * y * (5 * z * z - 1),
            0.3731763325901154 * z * (5 * z * z - 3),
            -c31 * x * (5 * z * z - 1),
            1.445305721320277 * z * (x * x - y * y),
            -c3 * x * (x * x - 3 * y * y),
        ]
    return torch.stack(values, dim=-1)


def rotate_sh(coefficients: Tensor, rotation: Tensor) -> Tensor:
    """Spherical harmonics of a function after the rotation: f'(d) = f(rotationᵀ d).

    Each degree is closed under rotation, so its matrix follows from the basis at a few directions.

    Args:
        coefficients: (N, K, 3), K = 1, 4, 9 or 16.
        rotation: (3, 3).
    """
    degree = math.isqrt(coefficients.shape[1]) - 1
    directions = torch.nn.functional.normalize(
        torch.randn(32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1
    )
    turned = directions @ rotation.detach().to(device="cpu", dtype=torch.float64)  # rows are rotationᵀ d
    before, after = sh_basis(degree, directions), sh_basis(degree, turned)
    parts = [coefficients[:, :1]]
    for band in range(1, degree + 1):
        rows = slice(band * band, (band + 1) ** 2)
        matrix = torch.linalg.lstsq(before[:, rows], after[:, rows]).solution.to(coefficients)
        parts.append(torch.einsum("ij,njc->nic", matrix, coefficients[:, rows]))
    return torch.cat(parts, dim=1)
