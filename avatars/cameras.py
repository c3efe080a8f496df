"""Pinhole cameras in the OpenCV convention: x right, y down, z forward; pixel centres at +0.5.

A pixel position is continuous: (0, 0) is the outer corner of the first pixel and (0.5, 0.5) its centre.
Resizing a picture therefore only multiplies focal lengths and principal points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Cameras"]


@dataclass(frozen=True)
class Cameras:
    """C pinhole cameras.

    Attributes:
        K: (C, 3, 3) intrinsics in pixels.
        world_to_camera: (C, 4, 4) rigid transforms from world points to camera points, metres.
    """

    K: Tensor  # (C, 3, 3)
    world_to_camera: Tensor  # (C, 4, 4)

    def __post_init__(self) -> None:
        if self.K.ndim != 3 or self.K.shape[1:] != (3, 3):
            raise ValueError(f"Cameras.K must be (C, 3, 3), not {tuple(self.K.shape)}")
        if self.world_to_camera.shape != (len(self.K), 4, 4):
            raise ValueError(
                f"Cameras.world_to_camera must be ({len(self.K)}, 4, 4) like K, "
                f"not {tuple(self.world_to_camera.shape)}"
            )

    @classmethod
    def from_camera_to_world(cls, K: Tensor, camera_to_world: Tensor) -> Cameras:
        """Cameras from (C, 4, 4) OpenCV camera-to-world matrices."""
        return cls(K, _invert_pose(camera_to_world))

    @classmethod
    def from_opengl_camera_to_world(cls, K: Tensor, camera_to_world: Tensor) -> Cameras:
        """Cameras from (C, 4, 4) OpenGL camera-to-world matrices (y up, z backward; Blender, NeRF)."""
        return cls.from_camera_to_world(K, camera_to_world * _yz_flip(camera_to_world))

    @classmethod
    def look_at(cls, K: Tensor, positions: Tensor, target: Tensor, up: Tensor) -> Cameras:
        """Cameras at `positions` that look at `target` with `up` upward in the picture.

        Args:
            K: (C, 3, 3) or (3, 3) intrinsics in pixels, shared when (3, 3).
            positions: (C, 3) camera centres, metres.
            target: (3,) or (C, 3) points to look at.
            up: (3,) or (C, 3) world directions, not parallel to the view.
        """
        forward = torch.nn.functional.normalize(target - positions, dim=-1)  # (C, 3)
        right = torch.nn.functional.normalize(
            torch.linalg.cross(forward, up.to(forward).expand_as(forward)), dim=-1
        )
        down = torch.linalg.cross(forward, right)
        rotation = torch.stack([right, down, forward], dim=-2)  # (C, 3, 3) world to camera
        return cls(
            K.to(rotation).expand(len(rotation), 3, 3),
            _pose(rotation, -(rotation @ positions[..., None])[..., 0]),
        )

    @staticmethod
    def cat(cameras: Sequence[Cameras]) -> Cameras:
        """All cameras of a list as one batch."""
        return Cameras(
            torch.cat([c.K for c in cameras]),
            torch.cat([c.world_to_camera for c in cameras]),
        )

    def __len__(self) -> int:
        return self.K.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Cameras:
        """A sub-batch. An integer keeps the batch dimension: `cameras[0]` is a batch of one."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):  # also ends `for camera in cameras`
                raise IndexError(f"camera {index} of {len(self)}")
            index = [index]
        if not isinstance(index, slice | Tensor):
            index = torch.as_tensor(index, dtype=torch.long)
        return Cameras(self.K[index], self.world_to_camera[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cameras:
        """The same cameras on another device or in another floating type."""
        return Cameras(
            self.K.to(device=device, dtype=dtype),
            self.world_to_camera.to(device=device, dtype=dtype),
        )

    @property
    def camera_to_world(self) -> Tensor:
        """(C, 4, 4) OpenCV camera-to-world matrices."""
        return _invert_pose(self.world_to_camera)

    @property
    def opengl_camera_to_world(self) -> Tensor:
        """(C, 4, 4) camera-to-world matrices for OpenGL camera axes (x right, y up, z backward)."""
        return self.camera_to_world * _yz_flip(self.world_to_camera)

    @property
    def centers(self) -> Tensor:
        """(C, 3) camera centres in the world, metres."""
        return self.camera_to_world[:, :3, 3]

    @property
    def view_directions(self) -> Tensor:
        """(C, 3) unit view directions (the camera's z axis) in the world."""
        return torch.nn.functional.normalize(self.world_to_camera[:, 2, :3], dim=-1)

    def resize(self, scale_x: float, scale_y: float) -> Cameras:
        """Cameras of pictures that are `scale_x` times as wide and `scale_y` times as high."""
        factors = self.K.new_tensor([scale_x, scale_y, 1.0])
        return Cameras(self.K * factors[:, None], self.world_to_camera)

    def crop(self, left: float, top: float) -> Cameras:
        """Cameras of pictures whose first `left` columns and `top` rows are cut off (negative: padded)."""
        offset = torch.zeros_like(self.K)
        offset[:, 0, 2] = left
        offset[:, 1, 2] = top
        return Cameras(self.K - offset, self.world_to_camera)

    def transform_world(self, transform: Tensor) -> Cameras:
        """Cameras for points given in another frame.

        Args:
            transform: (4, 4) or (C, 4, 4), takes points of the new frame to this world.

        Returns:
            Cameras with world-to-camera `world_to_camera @ transform`.
        """
        return Cameras(self.K, self.world_to_camera @ transform.to(self.world_to_camera))

    def rays(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """World rays through the pixel centres of (H, W) pictures.

        Returns:
            origins (C, 3, H, W), metres, and unit directions (C, 3, H, W).
        """
        directions = torch.nn.functional.normalize(self._pixel_directions(size), dim=1)
        return self.centers[:, :, None, None].expand_as(directions), directions

    def plucker(self, size: tuple[int, int]) -> Tensor:
        """(C, 6, H, W) Plücker coordinates (o × d, d) of the rays through the pixel centres."""
        origins, directions = self.rays(size)
        return torch.cat([torch.linalg.cross(origins, directions, dim=1), directions], dim=1)

    def unproject(self, depth: Tensor) -> Tensor:
        """World points of depth maps.

        Args:
            depth: (C, 1, H, W) camera z in metres (not the ray's length).

        Returns:
            (C, 3, H, W) metres. Where depth is 0 (no surface) the point is the camera's centre: mask it.
        """
        if depth.ndim != 4 or depth.shape[:2] != (len(self), 1):
            raise ValueError(f"depth must be ({len(self)}, 1, H, W), not {tuple(depth.shape)}")
        directions = self._pixel_directions((depth.shape[-2], depth.shape[-1]))  # camera z = 1
        return self.centers[:, :, None, None] + directions * depth

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel positions and depths of world points.

        Args:
            points: (N, 3) metres.

        Returns:
            pixels (C, N, 2) and camera z (C, N) in metres. A point behind a camera has a negative depth and a
            meaningless pixel.
        """
        rotation, translation = self.world_to_camera[:, :3, :3], self.world_to_camera[:, :3, 3]
        in_camera = points @ rotation.transpose(1, 2) + translation[:, None]  # (C, N, 3)
        homogeneous = in_camera @ self.K.transpose(1, 2)
        return homogeneous[..., :2] / homogeneous[..., 2:], in_camera[..., 2]

    def _pixel_directions(self, size: tuple[int, int]) -> Tensor:
        """(C, 3, H, W) world directions to the pixel centres, scaled so that camera z is 1."""
        height, width = size
        y, x = torch.meshgrid(
            torch.arange(height, device=self.K.device, dtype=self.K.dtype) + 0.5,
            torch.arange(width, device=self.K.device, dtype=self.K.dtype) + 0.5,
            indexing="ij",
        )
        pixels = torch.stack([x, y, torch.ones_like(x)]).reshape(3, -1)  # (3, H W)
        in_camera = torch.linalg.solve(self.K, pixels.expand(len(self), -1, -1))
        in_world = self.camera_to_world[:, :3, :3] @ in_camera
        return in_world.reshape(len(self), 3, height, width)


def _pose(rotation: Tensor, translation: Tensor) -> Tensor:
    """(C, 4, 4) from (C, 3, 3) and (C, 3)."""
    top = torch.cat([rotation, translation[..., None]], dim=-1)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(top), 1, 4)
    return torch.cat([top, bottom], dim=-2)


def _invert_pose(pose: Tensor) -> Tensor:
    """Inverse of (C, 4, 4) affine matrices; no orthonormality assumed, so a scaled world also works."""
    inverse = torch.linalg.inv(pose[:, :3, :3])
    return _pose(inverse, -(inverse @ pose[:, :3, 3:])[..., 0])


def _yz_flip(like: Tensor) -> Tensor:
    """Column signs that turn OpenCV camera axes into OpenGL's and back."""
    return like.new_tensor([1.0, -1.0, -1.0, 1.0])
