"""Pairs with seeded noise, placed into the world of known cameras."""

from __future__ import annotations

import math

import pytest
import torch
from published_weights import write_dust3r
from tiny_captures import pack_tiny

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.priors import DUSt3R, DUSt3RPrior, PairMaps, PositionPrior, align, pair_maps
from shards import Manifest, input_sets

RADII = torch.tensor([0.075, 0.105, 0.09])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: handing parts of them to another thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ring(size, views=4, spread=0.8, focal=3.8):
    """Cameras a metre before a head, each with a focal length of its own."""
    angles = torch.linspace(-spread, spread, views)
    heights = torch.linspace(-0.1, 0.1, views)
    K = torch.tensor([[focal * size, 0, size / 2], [0, focal * size, size / 2], [0, 0, 1]]).repeat(
        views, 1, 1
    )
    K[:, :2, :2] *= 1 - 0.06 * torch.arange(views)[:, None, None]
    positions = torch.stack([angles.sin(), heights, angles.cos()], 1)
    return Cameras.look_at(K, positions, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))


def head(cameras, size):
    """Points (N, 3, S, S) of an ellipsoid before a far sphere, and masks (N, 1, S, S)."""
    origins, directions = cameras.rays((size, size))
    o, d = origins / RADII.view(3, 1, 1), directions / RADII.view(3, 1, 1)
    a, b, c = (d * d).sum(1, keepdim=True), (o * d).sum(1, keepdim=True), (o * o).sum(1, keepdim=True) - 1
    inside = b * b - a * c
    distance = torch.where(inside > 0, (-b - inside.clamp_min(0).sqrt()) / a, torch.full_like(a, 1.15))
    return origins + distance * directions, (inside > 0).float()


def seen_in_pairs(cameras, points, masks, *, noise, scale=0.3, bend=0.0, seed=0):
    """Pairs as a network sees them: own scale each (e^±scale), noise in parts of the distance, a wrong turn."""
    drawn = torch.Generator().manual_seed(seed)
    views = len(cameras)
    pairs = [(i, j) for i in range(views) for j in range(views) if i != j]
    maps, trust = [], []
    for i, j in pairs:
        pose = cameras.world_to_camera[i]
        factor = 2 * math.exp(scale * (2 * torch.rand((), generator=drawn).item() - 1))
        axis = bend * torch.randn(3, generator=drawn)
        turn = torch.linalg.matrix_exp(torch.linalg.cross(torch.eye(3), axis.expand(3, 3), dim=1))
        both = (
            torch.einsum("ab,vbhw->vahw", turn @ pose[:3, :3], points[[i, j]])
            + (turn @ pose[:3, 3:])[..., None]
        )
        maps.append(factor * both * (1 + noise * torch.randn(both.shape, generator=drawn)))
        trust.append(
            1 + (0.2 + masks[[i, j]]) * (1.5 * torch.rand(masks[[i, j]].shape, generator=drawn)).exp()
        )
    return PairMaps(pairs, torch.stack(maps), torch.stack(trust))


def error_mm(aligned, points, masks):
    """Median distance to the truth on the head, millimetres."""
    return 1000 * float((aligned.positions - points).norm(dim=1, keepdim=True)[masks > 0].median())


def adam(maps, cameras, depth, iterations=300):
    """The published way: Adam over all log-depths and similarities, 300 steps, cosine rate; the final objective."""
    views, (height, width) = len(cameras), maps.points.shape[-2:]
    rays = cameras.unproject(torch.ones(views, 1, height, width)) - cameras.centers[:, :, None, None]
    log_depth = depth.log().clone().requires_grad_()
    scale = torch.ones(len(maps.pairs)).requires_grad_()
    turn = torch.zeros(len(maps.pairs), 3).requires_grad_()
    shift = torch.zeros(len(maps.pairs), 3).requires_grad_()
    unit = torch.stack([(cameras.centers[j] - cameras.centers[i]).norm() for i, j in maps.pairs])
    optimizer = torch.optim.Adam([log_depth, scale, turn, shift], lr=0.01, betas=(0.9, 0.9))
    weights = maps.confidence.log()
    poses = cameras.camera_to_world

    def objective():
        world = cameras.centers[:, :, None, None] + log_depth.exp() * rays
        total = 0.0
        for e, (i, j) in enumerate(maps.pairs):
            rotation = torch.linalg.matrix_exp(torch.linalg.cross(torch.eye(3), turn[e].expand(3, 3), dim=1))
            rotation = rotation @ poses[i, :3, :3]
            placed = (
                (scale[e].exp() / math.e)
                * start_scale[e]
                * torch.einsum("ab,vbhw->vahw", rotation, maps.points[e])
            )
            placed = placed + (poses[i, :3, 3] + unit[e] * shift[e])[:, None, None]
            distance = (world[[i, j]] - placed).norm(dim=1, keepdim=True)
            total = total + (weights[e] * distance).sum() / (height * width * len(maps.pairs))
        return total

    # A fair start: each pair's scale by the ratio of median depths.
    start_scale = torch.stack(
        [depth[i].median() / maps.points[e, 0, 2].median() for e, (i, _) in enumerate(maps.pairs)]
    )
    for step in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = 1e-6 + 0.01 * 0.5 * (1 + math.cos(math.pi * step / iterations))
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(objective())


def test_noise_of_one_percent_leaves_two_and_a_half_millimetres():
    """One percent of a metre is 10 mm a pixel and pair; six observations a pixel leave a quarter of it."""
    cameras = ring(96)
    points, masks = head(cameras, 96)
    aligned = align(seen_in_pairs(cameras, points, masks, noise=0.01, bend=0.02), cameras)
    assert aligned.positions.shape == (4, 3, 96, 96)
    assert aligned.confidence.shape == (4, 1, 96, 96)
    assert error_mm(aligned, points, masks) < 2.5
    assert aligned.loss <= aligned.start_loss * 1.001


def test_without_noise_the_truth_comes_back():
    cameras = ring(64)
    points, masks = head(cameras, 64)
    aligned = align(seen_in_pairs(cameras, points, masks, noise=0.0, bend=0.05), cameras)
    assert error_mm(aligned, points, masks) < 0.2


def test_the_objective_ends_as_low_as_300_steps_of_adam_take_it():
    cameras = ring(16, views=3)
    points, masks = head(cameras, 16)
    maps = seen_in_pairs(cameras, points, masks, noise=0.01, bend=0.03)
    aligned = align(maps, cameras)
    theirs = adam(maps, cameras, cameras.project(points.permute(0, 2, 3, 1).reshape(-1, 3))[1].view(3, 3, 16, 16)[
        torch.arange(3), torch.arange(3)
    ][:, None])  # fmt: skip
    assert aligned.loss <= theirs * 1.01
    assert aligned.loss >= theirs * 0.9  # the same objective, not another one


def test_a_coarse_grid_finds_the_same_similarities():
    cameras = ring(96)
    points, masks = head(cameras, 96)
    maps = seen_in_pairs(cameras, points, masks, noise=0.01, bend=0.02)
    coarse, fine = align(maps, cameras, coarse=32), align(maps, cameras, coarse=96)
    assert coarse.loss <= fine.loss * 1.002
    assert error_mm(coarse, points, masks) < error_mm(fine, points, masks) + 0.1


def test_view_j_uses_its_own_intrinsics():
    """Cameras with focal lengths that differ by half: the truth comes back only with each view's own."""
    cameras = ring(64)
    K = cameras.K.clone()
    K[1::2, :2, :2] *= 1.5
    cameras = Cameras(K, cameras.world_to_camera)
    points, masks = head(cameras, 64)
    assert error_mm(align(seen_in_pairs(cameras, points, masks, noise=0.0), cameras), points, masks) < 0.2


def test_points_lie_on_their_own_pixels_rays():
    cameras = ring(32)
    points, masks = head(cameras, 32)
    aligned = align(seen_in_pairs(cameras, points, masks, noise=0.02), cameras)
    for n in range(4):
        pixels, depth = cameras[n].project(aligned.positions[n].flatten(1).T)
        grid = torch.stack(torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="xy"), -1)
        torch.testing.assert_close(pixels[0].view(32, 32, 2), grid, atol=1e-2, rtol=0)
        torch.testing.assert_close(depth[0].view(32, 32), aligned.depth[n, 0], atol=1e-4, rtol=0)


def test_what_the_mask_excludes_does_not_count():
    cameras = ring(48)
    points, masks = head(cameras, 48)
    maps = seen_in_pairs(cameras, points, masks, noise=0.005)
    junk = torch.where(masks[torch.tensor(maps.pairs)] > 0, maps.points, 50 * torch.randn_like(maps.points))
    aligned = align(PairMaps(maps.pairs, junk, maps.confidence), cameras, masks)
    assert error_mm(aligned, points, masks) < 1.5
    assert bool((aligned.confidence[masks == 0] == 1).all())
    assert bool((aligned.confidence[masks > 0] > 1).all())


def test_confidence_is_the_largest_that_a_pair_gives():
    cameras = ring(16, views=2)
    points, masks = head(cameras, 16)
    maps = seen_in_pairs(cameras, points, masks, noise=0.0)
    aligned = align(maps, cameras)
    torch.testing.assert_close(
        aligned.confidence[0], torch.maximum(maps.confidence[0, 0], maps.confidence[1, 1])
    )
    torch.testing.assert_close(
        aligned.confidence[1], torch.maximum(maps.confidence[0, 1], maps.confidence[1, 0])
    )


def test_a_synthetic_captures_input_sets_come_back(tmp_path):
    """True positions of packed captures, seen in noisy pairs: 1 % of a metre ends below 3 mm, 0.1 % below 0.4 mm."""
    manifest = Manifest.load(pack_tiny(tmp_path, subjects=2, timesteps=5, views=6, size=48, input_sets=1))
    for shard in manifest.shards:
        for inputs in input_sets(manifest, shard):
            trusted = (inputs.confidence > 1).float()
            for noise, limit in ((0.01, 3.0), (0.001, 0.4)):
                maps = seen_in_pairs(inputs.cameras, inputs.positions, trusted, noise=noise, bend=0.02)
                assert error_mm(align(maps, inputs.cameras, trusted), inputs.positions, trusted) < limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_finds_the_same():
    cameras = ring(64)
    points, masks = head(cameras, 64)
    maps = seen_in_pairs(cameras, points, masks, noise=0.01)
    here = align(maps, cameras, masks)
    there = align(
        PairMaps(maps.pairs, maps.points.cuda(), maps.confidence.cuda()), cameras.to("cuda"), masks.to("cuda")
    )
    assert there.loss == pytest.approx(here.loss, rel=1e-3)
    assert float((there.positions.cpu() - here.positions).norm(dim=1).median()) < 1e-4


def refusal(maps, cameras):
    with pytest.raises(UserError) as error:
        align(maps, cameras)
    return str(error.value)


def test_sets_that_cannot_be_aligned_are_refused_in_a_sentence():
    cameras = ring(16)
    points, masks = head(cameras, 16)
    maps = seen_in_pairs(cameras, points, masks, noise=0.0)

    assert "at least two pictures" in refusal(maps, cameras[0])

    away = cameras.world_to_camera.clone()
    away[2] = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])) @ away[2]  # looks the other way
    assert "picture 2 sees nothing" in refusal(maps, Cameras(cameras.K, away))

    one_point = Cameras(cameras.K, cameras.world_to_camera[:1].expand(4, -1, -1))
    assert "stand on one point" in refusal(maps, one_point)

    nowhere = cameras.world_to_camera.clone()
    nowhere[0, 0, 3] = math.nan
    assert "not finite" in refusal(maps, Cameras(cameras.K, nowhere))

    blind = PairMaps(maps.pairs, maps.points, torch.ones_like(maps.confidence))
    assert "trusts none" in refusal(blind, cameras)

    behind = PairMaps(maps.pairs, -maps.points, maps.confidence)
    assert "contradicts their cameras" in refusal(behind, cameras)

    broken = maps.points.clone()
    broken[0, 0, 0, 3, 3] = math.inf
    assert "not finite" in refusal(PairMaps(maps.pairs, broken, maps.confidence), cameras)

    assert "leave one out" in refusal(PairMaps(maps.pairs[:2], maps.points[:2], maps.confidence[:2]), cameras)
    assert "need points" in refusal(PairMaps(maps.pairs, maps.points[:3], maps.confidence), cameras)


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return DUSt3RPrior(DUSt3R.load(write_dust3r(tmp_path_factory.mktemp("weights") / "tiny.pth")), batch=4)


def test_the_prior_gives_maps_of_the_pictures_size(prior):
    assert isinstance(prior, PositionPrior)
    for size in (32, 48, 24):  # the network's own, shrunk to it, grown to it
        cameras = ring(size)
        _, masks = head(cameras, size)
        images = masks * torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
        positions, confidence = prior(images, cameras, masks)
        assert positions.shape == (4, 3, size, size)
        assert confidence.shape == (4, 1, size, size)
        assert bool((confidence[masks == 0] == 1).all())
        pixels, _ = cameras[1].project(positions[1].flatten(1).T)
        assert float((pixels[0, 0] - 0.5).abs().max()) < 0.05  # still on its own pixel's ray
    assert prior.name == f"dust3r:{prior.network.sha256[:8]}"


def test_pictures_of_the_networks_size_are_not_resized(prior, monkeypatch):
    seen = []
    encode = prior.network.encode
    monkeypatch.setattr(prior.network, "encode", lambda images: seen.append(images.clone()) or encode(images))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prior(images, ring(32))
    assert torch.equal(torch.cat(seen), images)
    with torch.no_grad():
        assert pair_maps(prior.network, images).points.shape == (12, 2, 3, 32, 32)


def test_the_prior_refuses_what_it_cannot_place(prior):
    cameras = ring(32)
    with pytest.raises(UserError, match="at least two pictures"):
        prior(torch.rand(1, 3, 32, 32), cameras[0])
    with pytest.raises(UserError, match="multiples of 16"):
        prior(torch.rand(4, 3, 32, 30), cameras)
    with pytest.raises(UserError, match="3 pictures and 4 cameras"):
        prior(torch.rand(3, 3, 32, 32), cameras)
    mixed = [torch.rand(3, 32, 32), torch.rand(3, 32, 32), torch.rand(3, 48, 32), torch.rand(3, 32, 32)]
    with pytest.raises(UserError, match=r"Picture 2 is \(3, 48, 32\) and picture 0 is \(3, 32, 32\)"):
        prior(mixed, cameras)
