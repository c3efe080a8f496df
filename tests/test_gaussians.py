"""Gaussians: indexing, joining, moving, and the spherical harmonics that turn with them."""

import math

import pytest
import torch

from avatars.gaussians import (
    Gaussians,
    matrix_to_quaternion,
    quaternion_multiply,
    quaternion_to_matrix,
    rgb_to_sh,
    rotate_sh,
    sh_basis,
    sh_to_rgb,
)


def make(n=20, degree=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    colors = random(n, 3).sigmoid() if degree is None else random(n, (degree + 1) ** 2, 3)
    return Gaussians(random(n, 3), random(n, 4), random(n, 3).exp(), random(n).sigmoid(), colors)


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1
    )


def test_quaternions_and_matrices_agree():
    quats = torch.cat([unit(200, 4), torch.eye(4, dtype=torch.float64), unit(50, 4) * 1e-9 + torch.eye(4)[1]])
    matrices = quaternion_to_matrix(3 * quats)
    torch.testing.assert_close(matrices @ matrices.transpose(1, 2), torch.eye(3).double().expand_as(matrices))
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(len(quats), dtype=torch.float64))
    torch.testing.assert_close(quaternion_to_matrix(matrix_to_quaternion(matrices)), matrices)
    a, b = unit(9, 4, seed=1), unit(9, 4, seed=2)
    torch.testing.assert_close(
        quaternion_to_matrix(quaternion_multiply(a, b)), quaternion_to_matrix(a) @ quaternion_to_matrix(b)
    )


def test_a_quarter_turn_about_z_takes_x_to_y():
    quat = torch.tensor([math.sqrt(0.5), 0, 0, math.sqrt(0.5)])
    torch.testing.assert_close(quaternion_to_matrix(quat) @ torch.eye(3)[0], torch.eye(3)[1])


def test_basis_is_orthonormal_on_the_sphere():
    directions = unit(400_000, 3)
    basis = sh_basis(3, directions)
    gram = basis.T @ basis * (4 * math.pi / len(directions))
    torch.testing.assert_close(gram, torch.eye(16, dtype=torch.float64), atol=0.03, rtol=0)


def test_basis_signs_are_those_of_3dgs():
    x, y, z = torch.eye(3)
    assert sh_basis(1, x)[3] < 0
    assert sh_basis(1, y)[1] < 0
    assert sh_basis(1, z)[2] > 0


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_rotated_harmonics_are_the_same_function_turned(degree):
    coefficients = make(5, degree).colors
    rotation = quaternion_to_matrix(unit(4, seed=5))
    directions = unit(30, 3, seed=6)
    before = torch.einsum("dk,nkc->ndc", sh_basis(degree, directions), coefficients)
    after = torch.einsum(
        "dk,nkc->ndc", sh_basis(degree, directions @ rotation.T), rotate_sh(coefficients, rotation)
    )
    torch.testing.assert_close(after, before)


def test_similarity_moves_points_and_covariances():
    g = make(degree=3)
    rotation, translation = quaternion_to_matrix(unit(4, seed=9)), unit(3, seed=8)
    moved = g.transform(rotation, translation, 2.5)
    torch.testing.assert_close(moved.means, 2.5 * g.means @ rotation.T + translation)
    half = quaternion_to_matrix(g.quats) * g.scales[:, None]
    moved_half = quaternion_to_matrix(moved.quats) * moved.scales[:, None]
    expected = 2.5**2 * rotation @ half @ half.transpose(1, 2) @ rotation.T
    torch.testing.assert_close(moved_half @ moved_half.transpose(1, 2), expected)
    back = moved.transform(scale=1 / 2.5, translation=-translation / 2.5).transform(rotation.T)
    torch.testing.assert_close(back.means, g.means)
    torch.testing.assert_close(back.colors, g.colors)
    with pytest.raises(ValueError, match="positive"):
        g.transform(scale=0)


def test_index_prune_and_join():
    g = make(20)
    assert len(g[:7]) == 7
    assert torch.equal(g[[3, 1]].means, g.means[[3, 1]])
    kept = g.prune(0.5)
    assert 0 < len(kept) < 20
    assert torch.equal(kept.opacities, g.opacities[g.opacities >= 0.5])
    assert torch.equal(Gaussians.cat([g[:5], g[5:]]).colors, g.colors)


def test_joining_lifts_colours_to_the_highest_degree():
    rgb, sh = make(4), make(6, degree=2)
    both = Gaussians.cat([rgb, sh])
    assert both.sh_degree == 2
    torch.testing.assert_close(sh_to_rgb(both.colors[:4, 0]), rgb.colors)
    assert not both.colors[:4, 1:].any()
    assert sh.with_sh_degree(1).sh_degree == 1
    assert make(3).sh_degree is None
    torch.testing.assert_close(rgb_to_sh(sh_to_rgb(sh.colors)), sh.colors)


def test_gradients_pass_through_moves():
    g = make(6, degree=1)
    g.means.requires_grad_()
    g.transform(quaternion_to_matrix(unit(4)), scale=3.0).means.sum().backward()
    assert g.means.grad is not None
    assert not g.detach().means.requires_grad
    assert g.to(dtype=torch.float32).means.dtype == torch.float32


@pytest.mark.parametrize("field", ["quats", "scales", "opacities", "colors"])
def test_wrong_shapes_name_the_field(field):
    g = make(4)
    with pytest.raises(ValueError, match=field):
        Gaussians(**{**vars(g), field: torch.zeros(4, 5)})
