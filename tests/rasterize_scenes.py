"""Scenes and comparisons that the rasterizer's tests share."""

import torch

from avatars.cameras import Cameras
from avatars.gaussians import Gaussians

FIELDS = ("means", "quats", "scales", "opacities", "colors")


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orbit(count, size, distance=0.8, focal=1.8, seed=5):
    """Cameras around the origin; the principal point is not in the middle."""
    height, width = size
    positions = (
        torch.nn.functional.normalize(random(seed, count, 3) * torch.tensor([1, 0.4, 1]), dim=-1) * distance
    )
    f = focal * max(size)
    K = torch.tensor([[f, 0, width / 2 + 1.3], [0, f * 1.05, height / 2 - 0.7], [0, 0, 1]])
    return Cameras.look_at(K, positions, torch.zeros(3), torch.tensor([0.0, 1, 0]))


def shell(count, seed=0, sh=0, spread=0.004):
    """Gaussians on an ellipsoid the size of a head."""
    means = torch.nn.functional.normalize(random(seed, count, 3), dim=-1) * torch.tensor([0.09, 0.12, 0.1])
    scales = (random(seed + 1, count, 3) * 0.5).exp() * spread
    opacities = (random(seed + 2, count) + 0.5).sigmoid()
    colors = random(seed + 3, count, sh, 3) * 0.4 if sh else random(seed + 3, count, 3).sigmoid()
    return Gaussians(means, random(seed + 4, count, 4), scales, opacities, colors)


def draw(rasterizer, gaussians, cameras, size, background, mode="classic", dtype=torch.float32, weights=None):
    """The rendering, and gradients of a random linear function of it to all fields and the background."""
    leaves = [getattr(gaussians, name).detach().to(dtype).clone().requires_grad_() for name in FIELDS]
    leaves.append(background.detach().to(dtype).clone().requires_grad_())
    rendering = rasterizer(Gaussians(*leaves[:5]), cameras.to(dtype=dtype), size, leaves[5], mode)
    outputs = (rendering.image, rendering.alpha, rendering.depth)
    if weights is None:
        weights = [random(40 + i, *o.shape) for i, o in enumerate(outputs)]
    sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    gradients = dict(zip((*FIELDS, "background"), (leaf.grad for leaf in leaves), strict=True))
    return rendering, gradients


def assert_pictures_close(actual, expected, tolerance=2e-5, flips=5e-3):
    """Equal to `tolerance`, except for a few pixels in which a Gaussian on a threshold falls the other way.

    Alpha near 1/255, transmittance near 1e-4 and two centres at one depth are decided by the last bit of a float.
    """
    for name in ("image", "alpha", "depth"):
        a, e = getattr(actual, name).detach().double(), getattr(expected, name).detach().double()
        assert a.shape == e.shape
        assert a.isfinite().all(), name
        scale = max(1.0, e.abs().max().item())
        error = (a - e).abs().amax(dim=1) / scale
        assert (error > tolerance).double().mean() <= flips, (name, error.max())
        assert error.max() <= 0.05, (name, error.max())
    assert (actual.radii != expected.radii).double().mean() <= flips


def assert_gradients_close(actual, expected, tolerance=2e-4, norm=2e-2):
    """Nearly all Gaussians equal to `tolerance` of the typical size, and all together within `norm`."""
    for name, e in expected.items():
        a, e = actual[name].double(), e.double()
        assert a.isfinite().all(), name
        if not e.numel():
            continue
        length = e.norm()
        assert (a - e).norm() <= norm * length + 1e-6, (name, ((a - e).norm() / length).item())
        rows = (a - e).reshape(len(e), -1).norm(dim=1)
        typical = length / max(1, len(e)) ** 0.5
        assert rows.quantile(0.97) <= tolerance * typical + 1e-7, (
            name,
            (rows.quantile(0.97) / typical).item(),
        )
