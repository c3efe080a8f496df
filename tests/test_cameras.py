"""Cameras: every conversion is checked against a second way to say the same thing."""

import pytest
import torch

from avatars.cameras import Cameras

UP = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)


@pytest.fixture
def cameras():
    generator = torch.Generator().manual_seed(3)
    positions = torch.randn(5, 3, generator=generator, dtype=torch.float64) + torch.tensor([0.0, 0.0, 3.0])
    K = torch.tensor([[90.0, 0, 33.0], [0, 110.0, 21.0], [0, 0, 1]], dtype=torch.float64)
    return Cameras.look_at(K, positions, torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64), UP)


def test_look_at_puts_the_target_on_the_principal_point(cameras):
    pixels, depth = cameras.project(torch.tensor([[0.1, 0.2, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(pixels, pixels.new_tensor([33.0, 21.0]).expand(5, 1, 2))
    torch.testing.assert_close(
        depth[:, 0], (cameras.centers - pixels.new_tensor([0.1, 0.2, 0.0])).norm(dim=-1)
    )


def test_up_is_up_and_x_is_right():
    K = torch.eye(3, dtype=torch.float64)
    camera = Cameras.look_at(K, 2 * UP[None].roll(1, 1), torch.zeros(3, dtype=torch.float64), UP)  # from +z
    pixels, _ = camera.project(torch.tensor([[0.0, 1, 0], [1, 0, 0]], dtype=torch.float64))
    assert pixels[0, 0, 1] < 0  # upward is toward smaller rows
    assert pixels[0, 1, 0] > 0
    torch.testing.assert_close(camera.view_directions, -UP[None].roll(1, 1))


def test_indexing_keeps_the_batch(cameras):
    assert len(cameras[0]) == 1
    assert torch.equal(cameras[-1].K, cameras.K[4:])
    assert torch.equal(cameras[1:3].world_to_camera, cameras.world_to_camera[1:3])
    assert torch.equal(cameras[torch.tensor([4, 0])].world_to_camera, cameras.world_to_camera[[4, 0]])
    assert torch.equal(cameras[[4, 0]].world_to_camera, cameras.world_to_camera[[4, 0]])
    assert torch.equal(Cameras.cat(list(cameras)).world_to_camera, cameras.world_to_camera)
    with pytest.raises(IndexError):
        cameras[5]


def test_rays_meet_the_points_that_project_to_their_pixels(cameras):
    origins, directions = cameras.rays((7, 6))
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(5, 7, 6, dtype=torch.float64))
    for c in range(5):
        points = (origins[c] + 2.5 * directions[c]).flatten(1).T
        pixels, _ = cameras[c].project(points)
        y, x = torch.meshgrid(torch.arange(7.0), torch.arange(6.0), indexing="ij")
        expected = torch.stack([x + 0.5, y + 0.5], dim=-1).reshape(1, -1, 2).double()
        torch.testing.assert_close(pixels, expected)


def test_plucker_is_moment_then_direction(cameras):
    moment, direction = cameras.plucker((4, 5)).split(3, dim=1)
    origins, directions = cameras.rays((4, 5))
    torch.testing.assert_close(direction, directions)
    torch.testing.assert_close(torch.linalg.cross(origins + 7 * directions, directions, dim=1), moment)


def test_unproject_inverts_project(cameras):
    depth = torch.rand(5, 1, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    points = cameras.unproject(depth)
    for c in range(5):
        pixels, z = cameras[c].project(points[c].flatten(1).T)
        torch.testing.assert_close(z[0], depth[c].flatten())
        torch.testing.assert_close(pixels[0, 0], pixels.new_tensor([0.5, 0.5]))


def test_resize_and_crop_follow_the_picture(cameras):
    point = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64)
    pixels, _ = cameras.project(point)
    resized, _ = cameras.resize(2.0, 0.5).project(point)
    cropped, _ = cameras.crop(4, -3).project(point)
    torch.testing.assert_close(resized, pixels * pixels.new_tensor([2.0, 0.5]))
    torch.testing.assert_close(cropped, pixels - pixels.new_tensor([4.0, -3.0]))


def test_camera_to_world_conversions_round_trip(cameras):
    again = Cameras.from_camera_to_world(cameras.K, cameras.camera_to_world)
    torch.testing.assert_close(again.world_to_camera, cameras.world_to_camera)
    again = Cameras.from_opengl_camera_to_world(cameras.K, cameras.opengl_camera_to_world)
    torch.testing.assert_close(again.world_to_camera, cameras.world_to_camera)
    backward = cameras.opengl_camera_to_world[:, :3, 2]  # OpenGL looks along -z
    torch.testing.assert_close(backward, -cameras.view_directions)
    torch.testing.assert_close(cameras.opengl_camera_to_world[:, :3, 3], cameras.centers)


def test_transform_world_moves_the_frame_not_the_picture(cameras):
    head_to_world = Cameras.look_at(
        torch.eye(3, dtype=torch.float64), torch.tensor([[0.4, 0.1, 0.2]]).double(), UP, UP.roll(1)
    ).world_to_camera[0]
    point = torch.tensor([[0.05, 0.02, 0.1]], dtype=torch.float64)
    in_world = point @ head_to_world[:3, :3].T + head_to_world[:3, 3]
    torch.testing.assert_close(
        cameras.transform_world(head_to_world).project(point)[0], cameras.project(in_world)[0]
    )
    per_camera = cameras.transform_world(head_to_world.expand(5, 4, 4))
    torch.testing.assert_close(per_camera.project(point)[0], cameras.project(in_world)[0])


def test_to_changes_the_type(cameras):
    assert cameras.to(dtype=torch.float32).K.dtype == torch.float32


@pytest.mark.parametrize(("K", "pose"), [((3, 3), (1, 4, 4)), ((2, 3, 3), (1, 4, 4)), ((1, 3, 3), (1, 3, 4))])
def test_wrong_shapes_are_refused(K, pose):
    with pytest.raises(ValueError, match="must be"):
        Cameras(torch.zeros(K), torch.zeros(pose))
