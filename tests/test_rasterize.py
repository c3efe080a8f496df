"""The compiled CPU rasterizer against the reference, and the reference against finite differences."""

import math

import numpy as np
import pytest
import torch

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gaussians import Gaussians
from avatars.rasterize import backend_report, rasterize
from avatars.rasterize.cpu import count_work, rasterize_cpu
from avatars.rasterize.reference import rasterize_reference
from tests.rasterize_scenes import (
    FIELDS,
    assert_gradients_close,
    assert_pictures_close,
    draw,
    orbit,
    random,
    shell,
)

SIZE = (53, 70)  # neither a multiple of a tile nor of a vector


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads only get into each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compare(gaussians, cameras, size=SIZE, mode="classic", background=None, **tolerances):
    background = torch.tensor([0.9, 0.2, 0.5]) if background is None else background
    actual, v_actual = draw(rasterize_cpu, gaussians, cameras, size, background, mode)
    expected, v_expected = draw(
        rasterize_reference, gaussians, cameras, size, background, mode, torch.float64
    )
    assert_pictures_close(actual, expected)
    assert_gradients_close(v_actual, v_expected, **tolerances)
    return actual, v_actual


@pytest.mark.parametrize("mode", ["classic", "antialiased"])
@pytest.mark.parametrize("sh", [0, 1, 4, 9, 16])
def test_agrees_with_the_reference(mode, sh):
    rendering, _ = compare(shell(500, sh=sh, spread=0.006), orbit(2, SIZE), mode=mode)
    assert 0.1 < rendering.alpha.mean() < 0.9


@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_reference_gradients_are_derivatives(mode):
    g = shell(5, seed=3, sh=4, spread=0.03).to(dtype=torch.float64)
    cameras = orbit(2, (5, 7)).to(dtype=torch.float64)
    leaves = [getattr(g, name).clone().requires_grad_() for name in FIELDS]
    background = torch.tensor([[0.1, 0.9, 0.4], [0.6, 0.2, 0.0]], dtype=torch.float64, requires_grad=True)

    def function(*tensors):
        r = rasterize_reference(Gaussians(*tensors[:5]), cameras, (5, 7), tensors[5], mode)
        return r.image, r.alpha, r.depth

    torch.autograd.gradcheck(function, (*leaves, background), eps=1e-7, atol=1e-5, rtol=1e-4)


def from_front(distance=1.0, focal=60.0, size=SIZE):
    """One camera on +z that looks at the origin."""
    K = torch.tensor([[focal, 0, size[1] / 2], [0, focal, size[0] / 2], [0, 0, 1]])
    return Cameras.look_at(K, torch.tensor([[0.0, 0, distance]]), torch.zeros(3), torch.tensor([0.0, 1, 0]))


def replace(gaussians, **fields):
    return Gaussians(**{**vars(gaussians), **fields})


def behind_the_camera():
    g = shell(200)
    return replace(g, means=g.means * torch.tensor([1.0, 1.0, 25.0])), from_front()


def on_the_near_plane():
    g = shell(60, spread=0.002)
    z = 1 - 0.01 + torch.linspace(-0.004, 0.004, 60)  # half of them nearer than 1 cm
    return replace(
        g, means=torch.stack([g.means[:, 0] * 0.02, g.means[:, 1] * 0.02, z], dim=-1)
    ), from_front()


def needle_thin():
    g = shell(150, spread=0.004)
    return replace(
        g, scales=torch.tensor([0.5, 1e-5, 1e-7]).expand(150, 3), opacities=g.opacities * 0.3
    ), from_front()


def larger_than_the_picture():
    g = shell(12, spread=3.0)
    return replace(g, opacities=g.opacities * 0.2), from_front()


def far_beside_the_picture():  # the Jacobian's clamp is at work
    g = shell(100, spread=0.3)
    return replace(g, means=g.means * torch.tensor([12.0, 9.0, 1.0])), from_front()


def fully_opaque():
    return replace(shell(400, spread=0.01), opacities=torch.ones(400)), from_front()


def thousands_in_one_tile():
    g = shell(4000, spread=0.01)
    return replace(g, means=g.means * 0.05, opacities=g.opacities * 0.03 + 0.003), from_front()


def flat_and_tiny():
    g = shell(300)
    scales = g.scales.clone()
    scales[:100, 2] = 0
    scales[100:200, 1:] = 0
    scales[200:] = 0
    return replace(g, scales=scales), from_front(focal=90.0)


def equal_depths():
    g = shell(64, spread=0.02)
    return replace(g, means=g.means * torch.tensor([1.0, 1.0, 0.0])), from_front()


def long_and_short_quaternions():
    g = shell(200)
    lengths = torch.logspace(-10, 10, 200)[:, None]
    return replace(g, quats=torch.nn.functional.normalize(g.quats, dim=-1) * lengths), from_front()


ADVERSARIAL = [
    behind_the_camera,
    on_the_near_plane,
    needle_thin,
    larger_than_the_picture,
    far_beside_the_picture,
    fully_opaque,
    thousands_in_one_tile,
    flat_and_tiny,
    equal_depths,
]


@pytest.mark.parametrize("mode", ["classic", "antialiased"])
@pytest.mark.parametrize("scene", ADVERSARIAL, ids=lambda scene: scene.__name__)
def test_agrees_on_adversarial_scenes(scene, mode):
    gaussians, cameras = scene()
    compare(gaussians, cameras, mode=mode, tolerance=2e-3)


def test_quaternions_of_any_length_are_the_same_rotation():
    gaussians, cameras = long_and_short_quaternions()
    unit = replace(gaussians, quats=torch.nn.functional.normalize(gaussians.quats, dim=-1))
    a, v_a = draw(rasterize_cpu, gaussians, cameras, SIZE, torch.zeros(3))
    b, v_b = draw(rasterize_cpu, unit, cameras, SIZE, torch.zeros(3))
    torch.testing.assert_close(a.image, b.image, atol=1e-5, rtol=0)
    lengths = gaussians.quats.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(
        v_a["quats"] * lengths, v_b["quats"], atol=1e-3 * v_b["quats"].abs().max(), rtol=1e-3
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_to_draw_gives_the_background_and_its_gradient(backend):
    background = torch.tensor([0.25, 0.5, 1.0], requires_grad=True)
    r = rasterize(shell(0), orbit(2, SIZE), SIZE, background, backend=backend)
    assert torch.equal(r.image, background.detach()[None, :, None, None].expand(2, 3, *SIZE))
    assert not r.alpha.any()
    assert not r.depth.any()
    r.image.sum().backward()
    torch.testing.assert_close(background.grad, torch.full((3,), 2.0 * math.prod(SIZE)))


def test_zero_opacity_costs_nothing():
    g = shell(500)
    invisible = replace(g, opacities=torch.zeros(500))
    work = count_work(Gaussians.cat([invisible, g[:1]]), orbit(2, SIZE), SIZE)
    assert work["visible"] <= 2
    assert work["tile_pairs"] <= 2 * 20


def test_hidden_and_unseen_gaussians_have_zero_gradient_and_radius():
    g, cameras = behind_the_camera()
    rendering, gradients = draw(rasterize_cpu, g, cameras, SIZE, torch.zeros(3))
    unseen = (rendering.radii[0] == 0).all(-1)
    assert 0 < unseen.sum() < len(g)
    for name in FIELDS:
        assert not gradients[name][unseen].any(), name


def test_depth_is_that_of_the_surface():
    g = Gaussians(
        torch.tensor([[0.0, 0, 0]]), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), 0.05), torch.ones(1),
        torch.ones(1, 3),
    )  # fmt: skip
    r = rasterize(g, from_front(distance=0.7), SIZE)
    assert r.depth[0, 0, SIZE[0] // 2, SIZE[1] // 2] == pytest.approx(0.7, abs=1e-5)
    assert r.depth[0, 0, 0, 0] == 0


def test_background_per_camera_and_shared_agree():
    g, cameras = shell(300), orbit(2, SIZE)
    shared = torch.tensor([0.3, 0.1, 0.7])
    a, v_a = draw(rasterize_cpu, g, cameras, SIZE, shared)
    b, v_b = draw(rasterize_cpu, g, cameras, SIZE, shared.expand(2, 3))
    assert torch.equal(a.image, b.image)
    torch.testing.assert_close(v_a["background"], v_b["background"].sum(0))


def test_several_cameras_are_the_cameras_one_by_one():
    g, cameras = shell(700, sh=9), orbit(4, SIZE)
    together = rasterize(g, cameras, SIZE)
    for c in range(4):
        alone = rasterize(g, cameras[c], SIZE)
        assert torch.equal(together.image[c], alone.image[0])
        assert torch.equal(together.radii[c], alone.radii[0])


@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_one_thread_equals_two_and_five_bit_for_bit(mode):
    g, cameras = shell(4000, sh=4), orbit(3, (96, 80))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(draw(rasterize_cpu, g, cameras, (96, 80), torch.rand(3).fill_(0.3), mode))
    finally:
        torch.set_num_threads(before)
    (first, v_first), *others = results
    for rendering, gradients in others:
        for name in ("image", "alpha", "depth", "radii"):
            assert torch.equal(getattr(first, name), getattr(rendering, name)), name
        for name in v_first:
            assert torch.equal(v_first[name], gradients[name]), name


@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_without_gradients_the_picture_is_the_same_bit_for_bit(mode):
    g, cameras, size = shell(3000, sh=4), orbit(2, (90, 75)), (90, 75)
    background = torch.tensor([0.3, 0.6, 0.1])
    expected = draw(rasterize_cpu, g, cameras, size, background, mode)[0]
    means = g.means.clone().requires_grad_()
    with torch.no_grad():
        quiet = rasterize_cpu(replace(g, means=means), cameras, size, background, mode)
    for rendering in (quiet, rasterize_cpu(g, cameras, size, background, mode)):
        assert not rendering.image.requires_grad
        for name in ("image", "alpha", "depth", "radii"):
            assert torch.equal(getattr(rendering, name), getattr(expected, name)), name


def test_more_gaussians_in_a_tile_than_one_batch_stop_where_the_reference_stops():
    g = shell(1500, spread=0.02)
    compare(replace(g, means=g.means * 0.3, opacities=g.opacities * 0.2 + 0.01), orbit(1, SIZE))


def test_gradients_of_one_output_alone():
    g, cameras = shell(300), orbit(1, SIZE)
    zeros = [torch.zeros(1, k, *SIZE) for k in (3, 1, 1)]
    for i, name in enumerate(("image", "alpha", "depth")):
        weights = list(zeros)
        weights[i] = random(i, *zeros[i].shape)
        expected = draw(rasterize_cpu, g, cameras, SIZE, torch.ones(3), weights=weights)[1]
        leaf = g.means.clone().requires_grad_()
        r = rasterize_cpu(replace(g, means=leaf), cameras, SIZE, torch.ones(3))
        (getattr(r, name) * weights[i]).sum().backward()
        torch.testing.assert_close(leaf.grad, expected["means"])


def test_backward_can_run_twice():
    g, cameras = shell(200), orbit(1, SIZE)
    means = g.means.clone().requires_grad_()
    loss = rasterize_cpu(replace(g, means=means), cameras, SIZE).image.square().sum()
    first = torch.autograd.grad(loss, means, retain_graph=True)[0]
    rasterize_cpu(shell(300, seed=9), cameras, SIZE)  # must not reuse the lists that are still needed
    second = torch.autograd.grad(loss, means)[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_half_precision_is_drawn_in_float32(dtype, backend):
    g, cameras = shell(200), orbit(1, SIZE)
    means = g.means.to(dtype).requires_grad_()
    background = torch.zeros(3, dtype=dtype, requires_grad=True)
    r = rasterize(replace(g.to(dtype=dtype), means=means), cameras, SIZE, background, backend=backend)
    assert r.image.dtype == torch.float32
    r.image.sum().backward()
    assert means.grad.dtype == dtype
    assert means.grad.isfinite().all()
    assert background.grad.dtype == dtype


BAD = [
    *((field, value) for field in FIELDS for value in (math.nan, math.inf)),
    ("background", math.nan),
    ("scales", -0.1),
    ("opacities", 1.5),
    ("opacities", -0.5),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_values_name_the_field(backend, field, value):
    g, background = shell(1500), torch.ones(3)
    broken = background if field == "background" else getattr(g, field)
    broken.view(-1)[-1] = value
    with pytest.raises(UserError, match=field):
        rasterize(g, orbit(1, SIZE), SIZE, background, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_zero_quaternion_names_the_field(backend):
    g = shell(40)
    g.quats[7] = 0
    with pytest.raises(UserError, match="quats"):
        rasterize(g, orbit(1, SIZE), SIZE, backend=backend)


def test_bad_cameras_name_the_matrix():
    cameras = orbit(2, SIZE)
    pose = cameras.world_to_camera.clone()
    pose[1, 0, 3] = math.nan
    with pytest.raises(UserError, match="world_to_camera"):
        rasterize(shell(3), Cameras(cameras.K, pose), SIZE)
    K = cameras.K.clone()
    K[0, 0, 1] = 3.0
    with pytest.raises(UserError, match="skew"):
        rasterize(shell(3), Cameras(K, cameras.world_to_camera), SIZE)
    with pytest.raises(UserError, match="determinant 0"):
        rasterize(shell(3), Cameras(cameras.K, torch.zeros(2, 4, 4)), SIZE)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mode": "soft"}, "mode"),
        ({"size": (0, 4)}, "size"),
        ({"size": (20.5, 20)}, "size"),
        ({"size": (200_000, 20)}, "size"),
        ({"background": torch.zeros(5, 3)}, "background"),
        ({"backend": "opengl"}, "backend"),
    ],
)
def test_wrong_calls_are_refused(change, match):
    arguments = {"size": SIZE, "background": None, "mode": "classic", "backend": "auto"} | change
    with pytest.raises(ValueError, match=match):
        rasterize(shell(3), orbit(2, SIZE), **arguments)


def test_a_size_from_numpy_is_a_size():
    size = np.array([20, 30])
    assert rasterize(shell(3), orbit(1, (20, 30)), (size[0], size[1])).image.shape == (1, 3, 20, 30)


def test_camera_gradients_come_from_the_reference_only():
    cameras = orbit(1, SIZE)
    pose = cameras.world_to_camera.clone().requires_grad_()
    moving = Cameras(cameras.K, pose)
    with pytest.raises(ValueError, match="no gradient"):
        rasterize(shell(30), moving, SIZE, backend="cpu")
    rasterize(shell(30), moving, SIZE, backend="reference").image.sum().backward()
    assert pose.grad.abs().sum() > 0


def test_report_says_what_draws():
    report = backend_report("cpu")
    assert report.backend == "cpu"
    assert "threads" in report.reason
    assert backend_report("meta").backend == "reference"
