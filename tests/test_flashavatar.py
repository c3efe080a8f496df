"""FlashAvatar: which Gaussians there are, where they go, and what is written to disk."""

from __future__ import annotations

import json
import math

import pytest
import torch
from egg_head import EggHead, painted_egg

from avatars.errors import UserError
from avatars.flashavatar import FlashAvatar, FlashAvatarConfig, paper_model
from avatars.flashavatar.network import OffsetNetwork, encode_position
from avatars.gaussians import quaternion_to_matrix
from avatars.head.uv import open_rim, sample_uv
from avatars.method import load_avatar

SQUARE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def test_every_pixel_of_a_covered_square_has_the_triangle_that_holds_its_centre():
    samples = sample_uv(SQUARE, torch.tensor([[0, 1, 2], [0, 2, 3]]), 5)
    assert samples.pixels.tolist() == list(range(25))
    for pixel, triangle in zip(samples.pixels.tolist(), samples.triangles.tolist(), strict=True):
        u, v = (pixel % 5 + 0.5) / 5, 1 - (pixel // 5 + 0.5) / 5  # row 0 is the top
        assert triangle == (0 if u > v - 1e-6 else 1)  # the diagonal belongs to the first triangle


def test_barycentric_weights_give_back_the_pixel_centres_whatever_the_winding():
    generator = torch.Generator().manual_seed(0)
    uv = torch.rand(30, 2, generator=generator)
    faces = torch.arange(30).view(10, 3)
    samples = sample_uv(uv, faces, 64)
    found = samples.interpolate(uv, faces)
    centre = torch.stack([samples.pixels % 64 + 0.5, 64 - (samples.pixels // 64 + 0.5)], -1) / 64
    torch.testing.assert_close(found, centre)
    torch.testing.assert_close(samples.barycentric.sum(1), torch.ones(len(samples)))
    turned = sample_uv(uv, faces[:, [0, 2, 1]], 64)
    assert torch.equal(samples.pixels, turned.pixels)
    assert torch.equal(samples.triangles, turned.triangles)


def test_covered_pixels_are_those_of_a_plain_inside_test():
    generator = torch.Generator().manual_seed(1)
    uv = torch.rand(12, 2, generator=generator)
    faces = torch.arange(12).view(4, 3)
    expected = {}
    for pixel in range(32 * 32):
        x, y = (pixel % 32 + 0.5) / 32, 1 - (pixel // 32 + 0.5) / 32
        for triangle in range(4):
            corners = uv[faces[triangle]].tolist()
            sides = [
                (bx - ax) * (y - ay) - (by - ay) * (x - ax)
                for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True)
            ]
            if all(s >= 0 for s in sides) or all(s <= 0 for s in sides):
                expected[pixel] = triangle
                break
    samples = sample_uv(uv, faces, 32)
    assert dict(zip(samples.pixels.tolist(), samples.triangles.tolist(), strict=True)) == expected


def test_excluded_triangles_leave_holes_and_hide_nothing():
    faces = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 2, 3]])
    samples = sample_uv(SQUARE, faces, 8, torch.tensor([True, False, False]))
    assert set(samples.triangles.tolist()) == {2}  # what triangle 0 had is dropped, not given to its twin


def test_only_a_head_that_is_open_below_has_a_rim_without_gaussians():
    egg = EggHead()  # its lowest ring ends in a hole
    assert torch.equal(open_rim(egg.faces, egg.regions["boundary"]), egg.regions["boundary"])
    closed = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 1], [1, 3, 2]])
    cap = torch.tensor([False, False, False, True])
    assert open_rim(closed, cap) is None
    assert torch.equal(open_rim(closed[1:], cap[1:]), cap[1:])  # its neighbour is gone
    assert open_rim(closed, None) is None


def test_the_network_sees_position_and_expression_together():
    torch.manual_seed(0)
    network = OffsetNetwork(encoding=9, expression=4, width=8, layers=2, zero_output=False)
    encoded, expression = torch.randn(5, 9), torch.randn(4)
    joined = torch.cat([encoded, expression.expand(5, -1)], -1)
    torch.testing.assert_close(
        network(encoded, expression), torch.tanh(network.output(network.hidden(joined)))
    )


def test_the_encoding_has_the_position_and_eight_octaves():
    encoded = encode_position(torch.tensor([[0.1, -0.2, 0.3]]), 8)
    assert encoded.shape == (1, 51)
    assert encoded[0, :3].tolist() == pytest.approx([0.1, -0.2, 0.3])
    assert encoded[0, 3 + 3 * 5].item() == pytest.approx(math.sin(0.1 * 2**5), abs=1e-6)
    assert encoded[0, 27 + 3 * 7 + 1].item() == pytest.approx(math.cos(-0.2 * 2**7), abs=1e-6)


def test_the_paper_network_has_the_authors_number_of_parameters():
    network = OffsetNetwork(encoding=51, expression=120, width=256, layers=6, zero_output=False)
    assert sum(p.numel() for p in network.parameters()) == 375_562


def test_gaussians_start_on_the_surface_and_follow_the_expression():
    avatar = painted_egg()
    closed, opened = avatar.gaussians(torch.zeros(3)), avatar.gaussians(torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(closed.means, avatar.posed_centers(torch.zeros(1, 3))[0])
    moved = (opened.means - closed.means).norm(dim=1)
    lowest = closed.means[moved.argmax()]
    assert moved.max() > 0.01
    assert abs(lowest[1] + 0.04) < 0.02
    assert lowest[2] > 0  # the mouth, in front


def test_the_open_rim_has_no_gaussians():
    head = EggHead()
    avatar = FlashAvatar(FlashAvatarConfig(uv_resolution=32), head, torch.zeros(2), "arkit-52")
    assert not head.regions["boundary"][avatar.samples.triangles].any()
    assert len(avatar.samples) == 32 * 32 - (avatar.samples.resolution // 12 + 1) * 32


@pytest.mark.parametrize("multiply", [False, True])
def test_the_network_changes_rotation_and_scale_as_the_configuration_says(multiply):
    config = FlashAvatarConfig(uv_resolution=16, mlp_width=8, mlp_layers=1, log_scale_multiply=multiply)
    avatar = FlashAvatar(config, EggHead(), torch.zeros(2), "arkit-52")
    with torch.no_grad():
        avatar.log_scale.fill_(-6.0)
        avatar.quaternion.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]).expand_as(avatar.quaternion))
        avatar.offsets.output.bias.copy_(torch.linspace(-0.5, 0.5, 10))
    made = avatar.gaussians(torch.zeros(3))
    o = torch.tanh(torch.linspace(-0.5, 0.5, 10))
    torch.testing.assert_close(made.means[0], avatar.posed_centers(torch.zeros(1, 3))[0, 0] + 0.05 * o[:3])
    expected = torch.exp(-6.0 * o[7:].exp()) if multiply else torch.exp(-6.0 + o[7:])
    torch.testing.assert_close(made.scales[0], expected)
    delta = torch.cat([o[3:4].exp(), o[4:7]])
    base = quaternion_to_matrix(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(quaternion_to_matrix(made.quats[0]), base @ quaternion_to_matrix(delta))


def test_the_paper_model_moves_gaussians_from_the_start_and_ours_does_not():
    torch.manual_seed(0)
    for config, still in ((paper_model(16), False), (FlashAvatarConfig(uv_resolution=16), True)):
        avatar = FlashAvatar(config, EggHead(), torch.zeros(2), "arkit-52")
        moved = avatar.gaussians(torch.zeros(3)).means - avatar.posed_centers(torch.zeros(1, 3))[0]
        assert bool((moved == 0).all()) == still


def test_every_parameter_gets_a_gradient():
    config = FlashAvatarConfig(uv_resolution=16, mlp_width=8, mlp_layers=2, zero_offset=False)
    avatar = FlashAvatar(config, EggHead(), torch.zeros(2), "arkit-52")
    made = avatar.deform(avatar.posed_centers(torch.zeros(1, 3))[0], torch.zeros(3))
    sum(value.sin().sum() for value in vars(made).values()).backward()
    for name, parameter in avatar.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_colours_up_to_a_degree_use_only_its_coefficients():
    avatar = FlashAvatar(FlashAvatarConfig(uv_resolution=16), EggHead(), torch.zeros(2), "arkit-52")
    centers = avatar.posed_centers(torch.zeros(1, 3))[0]
    assert [avatar.deform(centers, torch.zeros(3), d).colors.shape[1] for d in (0, 1, 3, None)] == [
        1,
        4,
        16,
        16,
    ]


def test_an_avatar_reads_back_as_it_was_written(tmp_path):
    avatar = painted_egg()
    avatar.provenance["subject"] = "egg"
    avatar.save(tmp_path)
    again = FlashAvatar.load(tmp_path, EggHead())
    expression = torch.tensor([0.3, 0.2, 0.1])
    before, after = avatar.gaussians(expression), again.gaussians(expression)
    for name, value in vars(before).items():
        assert torch.equal(value, getattr(after, name)), name
    assert (again.method, again.expression_kind) == ("flashavatar", "arkit-52")
    assert again.provenance == {"subject": "egg"}


def test_the_built_in_head_carries_gaussians_and_load_avatar_finds_the_method(tmp_path):
    from avatars.head import ParametricHead

    head = ParametricHead.load("makehuman")
    config = FlashAvatarConfig(uv_resolution=32, sh_degree=0, mlp_width=8, mlp_layers=1)
    avatar = FlashAvatar(config, head, torch.zeros(head.n_identity), head.expression_kind)
    avatar.save(tmp_path)
    again = load_avatar(tmp_path)
    assert again.method == "flashavatar"
    made = again.gaussians(torch.zeros(head.n_expression))
    assert made.means.abs().max() < 0.3
    assert len(made) == json.loads((tmp_path / "avatar.json").read_text())["gaussians"] > 500


def test_files_that_do_not_belong_together_are_a_sentence(tmp_path):
    painted_egg().save(tmp_path)
    description = json.loads((tmp_path / "avatar.json").read_text())
    description["config"]["uv_resolution"] = 24
    (tmp_path / "avatar.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"avatar\.safetensors does not fit its avatar\.json"):
        FlashAvatar.load(tmp_path, EggHead())
    description["config"]["colour"] = "blue"
    (tmp_path / "avatar.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="unknown fields colour"):
        FlashAvatar.load(tmp_path, EggHead())
    del description["config"]["colour"]
    (tmp_path / "avatar.json").write_text(json.dumps(description))
    (tmp_path / "avatar.safetensors").unlink()
    with pytest.raises(UserError, match=r"no avatar\.safetensors"):
        FlashAvatar.load(tmp_path, EggHead())


def test_a_code_of_another_length_is_a_sentence():
    with pytest.raises(UserError, match=r"arkit-52 codes of 3 numbers, not by \(52,\)"):
        painted_egg().gaussians(torch.zeros(52))
