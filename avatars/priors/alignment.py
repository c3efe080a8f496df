"""One cloud of points out of many pairs, in the frame and the scale of cameras that are known.

The objective is DUSt3R's global alignment (arXiv 2312.14132 section 3.4) with poses and intrinsics held fixed: a depth
for every pixel of every picture and a similarity for every pair, such that each pair's points lie where the depths
put them, at Euclidean distance weighted by the logarithm of the confidence. The published code minimises it with 300
steps of Adam over all depths. With the cameras known every depth is a closed form of the similarities, so what is
left are seven numbers a pair: damped Gauss-Newton steps on reweighted squares find them on a coarse grid of pixels,
and one pass over all pixels gives the depths.

Shape letters: N pictures, E pairs, M observations of a picture (the pairs it is in), P pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from avatars.cameras import Cameras
from avatars.errors import UserError

__all__ = ["Aligned", "PairMaps", "align", "check_overlap"]

COARSE = 128
"""Pixels a side, at least, on which the similarities are found."""
STEPS = 60
SETTLED = 1e-5
"""The similarities are found when a step lowers the objective by a smaller part than this, twice running."""
DEPTH_STEPS = 12
LEAST_WEIGHT = 1e-6
"""Of a pixel without any trust, so that it has a depth all the same."""
LEAST_DISTANCE = 1e-4
"""Of the cameras' distance: nearer points pull no harder, which keeps the reweighted squares finite."""


@dataclass(frozen=True)
class PairMaps:
    """What DUSt3R says about pairs of N pictures of the same size.

    Attributes:
        pairs: E ordered pairs (i, j) of picture numbers.
        points: (E, 2, 3, H, W) points of pictures i and j, both in camera i's frame, each pair in its own scale.
        confidence: (E, 2, 1, H, W) above 1, where 1 is no trust.
    """

    pairs: Sequence[tuple[int, int]]
    points: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Aligned:
    """The pictures' points in the frame of their cameras.

    Attributes:
        positions: (N, 3, H, W) in the cameras' world.
        confidence: (N, 1, H, W) raw: the largest that any pair gives.
        depth: (N, 1, H, W) camera z.
        start_loss: the objective after the closed-form start, on the coarse grid.
        loss: the objective at the end, on all pixels.
        steps: accepted Gauss-Newton steps.
        seconds: that the "similarities" and the "depths" took.
    """

    positions: Tensor
    confidence: Tensor
    depth: Tensor
    start_loss: float
    loss: float
    steps: int
    seconds: dict[str, float]


def align(maps: PairMaps, cameras: Cameras, masks: Tensor | None = None, *, coarse: int = COARSE) -> Aligned:
    """Places all pairs' points into the world of known cameras.

    Every picture's points lie on its own pixels' rays, so its own intrinsics are used; the published code takes
    picture i's for both pictures of a pair.

    Args:
        maps: the pairs; every picture is in at least one.
        cameras: N cameras of the pictures, at the maps' resolution.
        masks: (N, 1, H, W) foreground coverage; where it is 0 points do not count and confidence becomes 1.
        coarse: pixels a side, at least, on which the similarities are found; all pixels get their depths.

    Raises:
        UserError: fewer than two pictures, shapes that do not fit together, cameras of which one sees nothing that
            another sees, or pairs that contradict the cameras.
    """
    views = len(cameras)
    _check(maps, views, masks)
    height, width = maps.points.shape[-2:]
    check_overlap(cameras, (height, width))
    weights = maps.confidence.log().clamp_min(LEAST_WEIGHT)  # (E, 2, 1, H, W)
    if masks is not None:
        pictured = masks[torch.tensor(maps.pairs, device=masks.device)]  # (E, 2, 1, H, W)
        weights = torch.where(pictured > 0, weights, weights.new_tensor(LEAST_WEIGHT))
    if not bool((weights > LEAST_WEIGHT).any()):
        raise UserError("DUSt3R trusts none of its points: the pictures show nothing that can be matched.")

    origins = cameras.centers
    scale = float((origins[:, None] - origins).norm(dim=-1).max())
    stride = max(1, min(height, width) // coarse)
    rays = _rays(cameras, height, width)  # (N, 3, H, W)
    problem = _Problem(
        maps.pairs, maps.points, weights, rays, origins, cameras.camera_to_world, LEAST_DISTANCE * scale
    )
    with _one_thread(maps.points.device):
        times = [time.perf_counter()]
        coarser = problem.coarser(stride)
        similarities, start_loss, steps = coarser.solve(coarser.start())
        times.append(time.perf_counter())
        depth, loss = problem.depths(similarities)  # (N, H W)
        times.append(time.perf_counter())
    depth = depth.view(views, 1, height, width)
    confidence = torch.ones_like(depth)
    for (i, j), pair in zip(maps.pairs, maps.confidence, strict=True):
        confidence[i], confidence[j] = (
            torch.maximum(confidence[i], pair[0]),
            torch.maximum(confidence[j], pair[1]),
        )
    if masks is not None:
        confidence = torch.where(masks > 0, confidence, torch.ones_like(confidence))
    seconds = {"similarities": times[1] - times[0], "depths": times[2] - times[1]}
    return Aligned(
        origins[:, :, None, None] + depth * rays, confidence, depth, start_loss, loss, steps, seconds
    )


def check_overlap(cameras: Cameras, size: tuple[int, int]) -> None:
    """Refuses cameras that do not hang together by what they see.

    Args:
        cameras: N cameras.
        size: height and width of their pictures.

    Raises:
        UserError: two of them stand on one point, or one sees no place that any of those connected to the first
            sees.
    """
    origins = cameras.centers
    distances = (origins[:, None] - origins).norm(dim=-1)
    reach = float(distances.max())
    views = len(cameras)
    if not math.isfinite(reach):
        raise UserError("A camera of the input set holds numbers that are not finite.")
    if views > 1 and reach == 0.0:
        raise UserError(
            "All cameras of the input set stand on one point, so depth cannot be told. Take pictures from "
            "different places."
        )
    height, width = size
    x = torch.linspace(0.5, width - 0.5, 7).to(origins)
    y = torch.linspace(0.5, height - 0.5, 7).to(origins)
    pixels = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(7, 7).to(origins)]).flatten(1)
    directions = torch.linalg.solve(cameras.K, pixels.expand(views, -1, -1))  # (N, 3, 49)
    directions = cameras.camera_to_world[:, :3, :3] @ directions
    depths = reach * torch.logspace(-2, 1.5, 29).to(origins)
    places = origins[:, :, None, None] + directions[..., None] * depths  # (N, 3, 49, 29)
    sees = torch.zeros(views, views, dtype=torch.bool)
    for i in range(views):
        where, z = cameras.project(places[i].flatten(1).T)
        inside = (where >= 0).all(-1) & (where[..., 0] <= width) & (where[..., 1] <= height) & (z > 0)
        sees[i] = inside.any(1).cpu()
    sees |= sees.T.clone()
    reached = {0}
    while grown := {j for i in reached for j in range(views) if sees[i, j]} - reached:
        reached |= grown
    alone = sorted(set(range(views)) - reached)
    if alone:
        raise UserError(
            f"The camera of picture {alone[0]} sees nothing that the camera of picture 0 sees, directly or "
            "through the others. Check world_to_camera, or choose pictures that overlap."
        )


@dataclass(frozen=True)
class _Similarities:
    """Of E pairs: camera i's own frame to the world."""

    scales: Tensor  # (E,)
    rotations: Tensor  # (E, 3, 3)
    translations: Tensor  # (E, 3)

    def moved(self, step: Tensor) -> _Similarities:
        """After small turns (about the pair's own origin), growths and shifts (E, 7)."""
        turn = torch.zeros_like(self.rotations)
        x, y, z = step[:, :3].unbind(1)
        turn[:, 2, 1], turn[:, 0, 2], turn[:, 1, 0] = x, y, z
        turn = turn - turn.transpose(1, 2)
        return _Similarities(
            self.scales * step[:, 3].exp(),
            torch.linalg.matrix_exp(turn) @ self.rotations,
            self.translations + step[:, 4:],
        )


@dataclass(frozen=True)
class _Problem:
    """The objective on a grid of pixels."""

    pairs: Sequence[tuple[int, int]]
    points: Tensor  # (E, 2, 3, H, W)
    weights: Tensor  # (E, 2, 1, H, W)
    rays: Tensor  # (N, 3, H, W) at camera z = 1
    origins: Tensor  # (N, 3)
    camera_to_world: Tensor  # (N, 4, 4)
    least: float

    def coarser(self, stride: int) -> _Problem:
        """The same on every `stride`-th pixel."""

        def thin(maps: Tensor) -> Tensor:
            return maps[..., stride // 2 :: stride, stride // 2 :: stride]

        return _Problem(
            self.pairs,
            thin(self.points),
            thin(self.weights),
            thin(self.rays),
            self.origins,
            self.camera_to_world,
            self.least,
        )

    def start(self) -> _Similarities:
        """Each pair stands at camera i, as large as brings picture j's points nearest to camera j's rays.

        With rotation and origin given by camera i this is a weighted least-squares problem in the scale alone.
        """
        scales = []
        for e, (i, j) in enumerate(self.pairs):
            rotation = self.camera_to_world[i, :3, :3]
            ray = torch.nn.functional.normalize(self.rays[j].flatten(1), dim=0)  # (3, P)
            point = rotation @ self.points[e, 1].flatten(1)
            baseline = (self.origins[j] - self.origins[i])[:, None]
            across = point - ray * (ray * point).sum(0)
            offset = baseline - ray * (ray * baseline).sum(0)
            weight = self.weights[e, 1].flatten()
            scales.append((weight * across * offset).sum() / (weight * across * across).sum())
        found = torch.stack(scales)
        good = found.isfinite() & (found > 0)
        if not bool(good.any()):
            raise UserError(
                "What DUSt3R sees in the pictures contradicts their cameras. Check that pictures and cameras are in "
                "the same order, and that world_to_camera is in OpenCV axes."
            )
        found = torch.where(good, found, found[good].median())
        first = [i for i, _ in self.pairs]
        return _Similarities(found, self.camera_to_world[first, :3, :3], self.origins[first])

    def solve(self, start: _Similarities) -> tuple[_Similarities, float, int]:
        """The similarities that minimise the objective, its value at the start, and how many steps it took."""
        depth, start_loss = self.depths(start)
        current, loss, damping, settled, accepted = start, start_loss, 1e-4, 0, 0
        for _ in range(STEPS):
            matrix, gradient = self._normal_equations(current, depth)
            diagonal = matrix.diagonal().clone()
            trial, trial_depth, trial_loss = current, depth, math.inf
            while damping < 1e6:
                step = torch.linalg.solve(matrix + (damping * diagonal).diag(), gradient)
                trial = current.moved(step.view(-1, 7).to(current.scales))
                trial_depth, trial_loss = self.depths(trial, steps=2, near=depth)
                if trial_loss <= loss:
                    break
                damping *= 10
            if trial_loss > loss:
                break
            settled = settled + 1 if loss - trial_loss < SETTLED * loss else 0
            current, depth, loss = trial, trial_depth, trial_loss
            damping = max(damping / 10, 1e-8)
            accepted += 1
            if settled == 2:
                break
        return current, start_loss, accepted

    def depths(
        self, similarities: _Similarities, steps: int = DEPTH_STEPS, near: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """The best depth (N, P) of every pixel for given similarities, and the objective there.

        A point q is seen from a ray at the depth a that is nearest to it, and at distance b across: at depth d it
        is sqrt((d - a)² |ray|² + b²) away. Reweighted means of the a minimise the weighted sum of that.
        """
        found = []
        losses = [self.points.new_zeros(()), self.points.new_zeros(())]
        for n in range(len(self.origins)):
            seen = self._observations(n)
            q = self._placed(similarities, seen)  # (M, 3, P)
            ray = self.rays[n].flatten(1)  # (3, P)
            square = (ray * ray).sum(0)
            q = q - self.origins[n][:, None]
            a = (q * ray).sum(1) / square  # (M, P)
            across = (q - a[:, None] * ray).square().sum(1)
            weight = torch.stack([self.weights[e, side].flatten() for e, side in seen])
            depth = (weight * a).sum(0) / weight.sum(0) if near is None else near[n]
            for _ in range(steps):
                distance = ((depth - a).square() * square + across).sqrt()
                pull = weight / distance.clamp_min(self.least)
                depth = (pull * a).sum(0) / pull.sum(0)
            depth = depth.clamp_min(self.least)
            distance = ((depth - a).square() * square + across).sqrt()
            for (_, side), cost in zip(seen, (weight * distance).sum(1), strict=True):
                losses[side] += cost / (distance.shape[1] * len(self.pairs))
            found.append(depth)
        return torch.stack(found), float(losses[0] + losses[1])

    def _normal_equations(self, similarities: _Similarities, depth: Tensor) -> tuple[Tensor, Tensor]:
        """Matrix (7 E, 7 E) and right side (7 E,) of the reweighted squares, with every depth eliminated."""
        size = 7 * len(self.pairs)
        matrix = torch.zeros(size, size, dtype=torch.float64, device=depth.device)
        gradient = torch.zeros(size, dtype=torch.float64, device=depth.device)
        for n in range(len(self.origins)):
            seen = self._observations(n)
            edges = torch.tensor([e for e, _ in seen], device=depth.device)
            q = self._placed(similarities, seen)  # (M, 3, P)
            ray = self.rays[n].flatten(1)
            weight = torch.stack([self.weights[e, side].flatten() for e, side in seen])
            gap = self.origins[n][:, None] + depth[n] * ray - q  # (M, 3, P)
            pull = weight / gap.norm(dim=1).clamp_min(self.least)  # (M, P)
            own = (pull * (ray * ray).sum(0)).sum(0)  # (P,): what holds the depth
            best = (pull * ((q - self.origins[n][:, None]) * ray).sum(1)).sum(0) / own
            gap = gap + (best - depth[n]) * ray
            moves = _moves(q - similarities.translations[edges][:, :, None])  # (M, 7, 3, P)
            pulled = moves * pull[:, None, None]
            along = (pulled * ray).sum(2)  # (M, 7, P)
            where = (7 * edges[:, None] + torch.arange(7, device=depth.device)).flatten()
            blocks = torch.einsum("maxp,mbxp->mab", pulled, moves).double()
            together = -(along.flatten(0, 1) @ (along / own).flatten(0, 1).T).double()
            for m, block in enumerate(blocks):
                together[7 * m : 7 * m + 7, 7 * m : 7 * m + 7] += block
            matrix[where[:, None], where] += together
            gradient[where] += torch.einsum("maxp,mxp->ma", pulled, gap).flatten().double()
        return matrix, gradient

    def _observations(self, n: int) -> list[tuple[int, int]]:
        """(pair, side) of every pair that picture `n` is in."""
        return [(e, side) for e, pair in enumerate(self.pairs) for side in (0, 1) if pair[side] == n]

    def _placed(self, similarities: _Similarities, seen: list[tuple[int, int]]) -> Tensor:
        """Points (M, 3, P) of the observations in the world."""
        edges = [e for e, _ in seen]
        points = torch.stack([self.points[e, side].flatten(1) for e, side in seen])
        turned = (similarities.scales[edges, None, None] * similarities.rotations[edges]) @ points
        return turned + similarities.translations[edges][:, :, None]


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU the steps are many and short: handing their parts to other threads takes longer than doing them."""
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _moves(points: Tensor) -> Tensor:
    """How points (M, 3, P) relative to the pair's origin move with its seven numbers: (M, 7, 3, P)."""
    x, y, z = points.unbind(1)
    none, one = torch.zeros_like(x), torch.ones_like(x)
    rows = [
        (none, -z, y), (z, none, -x), (-y, x, none),  # turns: axis × point
        (x, y, z),  # growth
        (one, none, none), (none, one, none), (none, none, one),
    ]  # fmt: skip
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def _rays(cameras: Cameras, height: int, width: int) -> Tensor:
    """World directions (N, 3, H, W) to the pixel centres, at camera z = 1."""
    depth = cameras.K.new_ones(len(cameras), 1, height, width)
    return cameras.unproject(depth) - cameras.centers[:, :, None, None]


def _check(maps: PairMaps, views: int, masks: Tensor | None) -> None:
    if views < 2:
        raise UserError(
            "DUSt3R's position maps need at least two pictures of an input set: one picture does not tell the "
            "distance. Use the depth prior, or none."
        )
    height, width = maps.points.shape[-2:]
    edges = len(maps.pairs)
    if maps.points.shape != (edges, 2, 3, height, width) or maps.confidence.shape != (
        edges,
        2,
        1,
        height,
        width,
    ):
        raise UserError(
            f"{edges} pairs need points ({edges}, 2, 3, H, W) and confidence ({edges}, 2, 1, H, W), not "
            f"{tuple(maps.points.shape)} and {tuple(maps.confidence.shape)}."
        )
    if set(range(views)) != {n for pair in maps.pairs for n in pair}:
        raise UserError(f"The pairs are of other pictures than 0 to {views - 1}, or leave one out.")
    if masks is not None and masks.shape != (views, 1, height, width):
        raise UserError(f"Masks are {tuple(masks.shape)} where {(views, 1, height, width)} is expected.")
    if not bool(maps.points.isfinite().all() & maps.confidence.isfinite().all()):
        raise UserError("The pairs hold points that are not finite; the network's weights cannot be right.")
