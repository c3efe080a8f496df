"""Mesh operations the heads share: triangulation, refinement, open rims and what closes them, UV maps. numpy only."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

__all__ = [
    "catmull_clark",
    "close_rim",
    "free_box",
    "open_rims",
    "rasterize_uv",
    "sample_texture",
    "triangulate",
    "vertex_normals",
]

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


def triangulate(quads: Ints) -> Ints:  # (Q, 4) -> (2Q, 3)
    """Split quads along their first diagonal; the two triangles of quad q are rows 2q and 2q + 1."""
    return np.stack([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]], axis=1).reshape(-1, 3)


def vertex_normals(vertices: Floats, faces: Ints) -> Floats:
    """Area-weighted unit normals, (V, 3), of a triangle mesh; zero where a vertex has no area around it."""
    a, b, c = vertices[faces[:, 0]], vertices[faces[:, 1]], vertices[faces[:, 2]]
    face = np.cross(b - a, c - a)
    normals = np.empty_like(vertices)
    for axis in range(3):
        weights = np.repeat(face[:, axis], 3)
        normals[:, axis] = np.bincount(faces.reshape(-1), weights=weights, minlength=len(vertices))
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return normals / np.maximum(length, 1e-20)


def _edges(quads: Ints) -> tuple[Ints, Ints, Ints]:
    """Unique edges (E, 2), the edge of each quad side (Q, 4), and how many quads share each edge (E,)."""
    sides = np.stack([quads, np.roll(quads, -1, axis=1)], axis=-1).reshape(-1, 2)
    unique, inverse, count = np.unique(
        np.sort(sides, axis=1), axis=0, return_inverse=True, return_counts=True
    )
    return unique, inverse.reshape(quads.shape), count


def catmull_clark(quads: Ints, n_vertices: int, *, smooth: bool = True) -> tuple[sparse.csr_matrix, Ints]:
    """One Catmull-Clark step as a linear operator, so that it can be applied to any pose of the mesh.

    Args:
        quads: (Q, 4) vertex ids.
        n_vertices: number of vertices V that the quads index.
        smooth: False gives plain bilinear refinement (old vertices stay), which is what UVs need.

    Returns:
        A sparse (V + E + Q, V) matrix that maps old vertices to new ones, and the (4Q, 4) new quads.
        Quad q becomes rows 4q to 4q + 3. On a boundary the cubic B-spline rule holds the curve.
    """
    edges, side_edge, edge_count = _edges(quads)
    n_edges, n_quads = len(edges), len(quads)
    rows = np.repeat(np.arange(n_quads), 4)
    face_points = sparse.csr_matrix(
        (np.full(4 * n_quads, 0.25), (rows, quads.ravel())), (n_quads, n_vertices)
    )
    rows = np.repeat(np.arange(n_edges), 2)
    midpoints = sparse.csr_matrix((np.full(2 * n_edges, 0.5), (rows, edges.ravel())), (n_edges, n_vertices))
    edge_points, old_points = midpoints, sparse.identity(n_vertices, format="csr")

    if smooth:
        # An inner edge point is the mean of its two ends and its two face points.
        inner = (edge_count == 2).astype(float)
        edge_of_quad = sparse.csr_matrix(
            (np.full(4 * n_quads, 0.5), (side_edge.ravel(), np.repeat(np.arange(n_quads), 4))),
            (n_edges, n_quads),
        )
        faces_at_edge = edge_of_quad @ face_points
        edge_points = sparse.diags(1 - 0.5 * inner) @ midpoints + sparse.diags(0.5 * inner) @ faces_at_edge
        # An inner vertex moves to (F + 2R + (n - 3)P) / n; a boundary vertex to 3/4 P + 1/8 of its two neighbours.
        ends, ones = edges.ravel(), np.ones(2 * n_edges)
        vertex_edge = sparse.csr_matrix(
            (ones, (ends, np.repeat(np.arange(n_edges), 2))), (n_vertices, n_edges)
        )
        vertex_quad = sparse.csr_matrix(
            (np.ones(4 * n_quads), (quads.ravel(), np.repeat(np.arange(n_quads), 4))), (n_vertices, n_quads)
        )
        n_e = np.maximum(np.asarray(vertex_edge.sum(axis=1)).ravel(), 1)
        n_f = np.maximum(np.asarray(vertex_quad.sum(axis=1)).ravel(), 1)
        inner_rule = (
            sparse.diags(1 / (n_e * n_f)) @ (vertex_quad @ face_points)
            + sparse.diags(2 / n_e**2) @ (vertex_edge @ midpoints)
            + sparse.diags((n_e - 3) / n_e)
        )
        border_edges = sparse.diags((edge_count == 1).astype(float))
        border_rule = 0.25 * (vertex_edge @ border_edges @ midpoints) + 0.5 * sparse.identity(n_vertices)
        on_border = np.zeros(n_vertices)
        on_border[edges[edge_count == 1].ravel()] = 1
        used = np.zeros(n_vertices)
        used[quads.ravel()] = 1
        old_points = (
            sparse.diags(used * (1 - on_border)) @ inner_rule
            + sparse.diags(on_border) @ border_rule
            + sparse.diags(1 - used)
        )

    refine = sparse.vstack([old_points, edge_points, face_points]).tocsr()
    side = side_edge + n_vertices
    centre = np.arange(n_quads) + n_vertices + n_edges
    corners = [np.stack([quads[:, k], side[:, k], centre, side[:, k - 1]], axis=1) for k in range(4)]
    return refine, np.stack(corners, axis=1).reshape(-1, 4)


def open_rims(faces: Ints) -> list[Ints]:
    """The closed curves on which a triangle mesh ends: sides that one triangle has and no other.

    Args:
        faces: (F, 3) vertex ids, turned alike.

    Returns:
        For each rim its vertex ids, once each, in the direction in which the triangles run along it; ordered by
        their smallest id. A rim that touches itself is none, because what closes it would be a matter of choice.
    """
    sides = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    _, place, count = np.unique(np.sort(sides, axis=1), axis=0, return_inverse=True, return_counts=True)
    border = sides[count[place.ravel()] == 1].tolist()
    following = dict(border)
    touching = {a for a, n in Counter(a for a, _ in border).items() if n > 1}
    rims, seen = [], set[int]()
    for start in sorted(following):
        rim: list[int] = []
        at = start
        while at not in seen and at in following:
            seen.add(at)
            rim.append(at)
            at = following[at]
        if rim and at == start and touching.isdisjoint(rim):
            rims.append(np.array(rim))
    return rims


def close_rim(rim: Ints, points: Floats) -> Ints:
    """Triangles that close an open rim as a zip does: they run across it, from the one end in x to the other.

    Args:
        rim: (n,) vertex ids as `open_rims` gives them.
        points: (V, 3) vertices; the rim's two ends are where it has the least and the greatest x.

    Returns:
        (n - 2, 3) faces on the rim's own vertices, turned as the mesh around it is.
    """
    x, n = points[rim, 0], len(rim)
    first, last = int(x.argmin()), int(x.argmax())
    there = [(first + k) % n for k in range((last - first) % n + 1)]
    back = [(first - k) % n for k in range((first - last) % n + 1)]  # the other way round, to the same end
    faces, i, j = [], 0, 0
    while i + 1 < len(there) or j + 1 < len(back):
        # The side goes on whose next vertex comes first; the two meet at the end, which needs no triangle.
        onward = j + 1 == len(back) or (i + 1 < len(there) and x[there[i + 1]] <= x[back[j + 1]])
        corners = (there[i], back[j], there[i + 1]) if onward else (there[i], back[j], back[j + 1])
        if len({*corners}) == 3:
            faces.append(corners)
        i, j = (i + 1, j) if onward else (i, j + 1)
    return rim[np.array(faces)]


def free_box(uv: Floats, uv_faces: Ints, *, width: float, aspect: float = 2.0, grid: int = 256) -> Floats:
    """Where a UV map has nothing yet: the largest box up to `width`, `aspect` times as wide as high.

    Args:
        uv: (U, 2) coordinates of the layout.
        uv_faces: (F, 3) indices into them.
        width: of the map, at most.
        aspect: width over height.
        grid: pixels to a side that are looked at; one of them is left free around the box.

    Returns:
        (u0, v0, u1, v1). Of several places of that size the highest, then the leftmost.

    Raises:
        ValueError: no free box is even a sixteenth as wide as asked for.
    """
    taken = np.zeros((grid + 1, grid + 1), np.int64)
    taken[1:, 1:] = (rasterize_uv(uv, uv_faces, grid)[0] >= 0).cumsum(0).cumsum(1)
    for across in range(round(width * grid), round(width * grid / 16) - 1, -1):
        wide, high = across + 2, round(across / aspect) + 2  # with the pixel around
        inside = taken[high:, wide:] - taken[:-high, wide:] - taken[high:, :-wide] + taken[:-high, :-wide]
        rows, columns = np.nonzero(inside == 0)
        if len(rows):
            left, top = columns[0] + 1, rows[0] + 1
            return np.array([left, grid - top - (high - 2), left + across, grid - top]) / grid
    raise ValueError("the UV map has no free place")


def rasterize_uv(uv: Floats, uv_faces: Ints, resolution: int) -> tuple[Ints, Floats]:
    """Which triangle covers each pixel centre of a square UV map.

    A pixel (row i, column j) samples u = (j + 0.5) / N and v = 1 - (i + 0.5) / N, so that the map reads upright. The
    inside test is plain (edges included); where triangles overlap the first one keeps the pixel. This is the
    rule that reproduces FlashAvatar's Table 2 on the FLAME template.

    Returns:
        triangle (N, N), -1 where nothing covers the pixel, and barycentrics (N, N, 3).
    """
    n = resolution
    corner = np.stack([uv[:, 0] * n, (1 - uv[:, 1]) * n], axis=1)[uv_faces]  # (F, 3, 2) in pixels
    low = np.maximum(np.ceil(corner.min(axis=1) - 0.5).astype(np.int64), 0)
    high = np.minimum(np.floor(corner.max(axis=1) - 0.5).astype(np.int64), n - 1)
    extent = np.maximum(high - low + 1, 0)
    count = extent[:, 0] * extent[:, 1]
    face = np.repeat(np.arange(len(uv_faces)), count)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    x = low[face, 0] + within % extent[face, 0]
    y = low[face, 1] + within // extent[face, 0]
    point = np.stack([x, y], axis=1) + 0.5
    a, b, c = (corner[face, k] for k in range(3))
    area = _cross(b - a, c - a)
    with np.errstate(divide="ignore", invalid="ignore"):
        w0, w1 = _cross(c - b, point - b) / area, _cross(a - c, point - c) / area
    w2 = 1 - w0 - w1
    inside = (area != 0) & (np.minimum(np.minimum(w0, w1), w2) >= 0)
    triangle = np.full((n, n), -1, dtype=np.int64)
    weights = np.zeros((n, n, 3))
    order = np.flatnonzero(inside)[
        ::-1
    ]  # reversed: of several writers the first triangle is the last to write
    triangle[y[order], x[order]] = face[order]
    weights[y[order], x[order]] = np.stack([w0, w1, w2], axis=1)[order]
    return triangle, weights


def _cross(a: Floats, b: Floats) -> Floats:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def sample_texture(image: Floats, uv: Floats) -> Floats:
    """Bilinear values, (..., C), of an image (H, W, C) at uv (..., 2), v up, clamped at the border."""
    height, width = image.shape[:2]
    x = np.clip(uv[..., 0] * width - 0.5, 0, width - 1)
    y = np.clip((1 - uv[..., 1]) * height - 0.5, 0, height - 1)
    x0, y0 = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    top = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
    bottom = image[y1, x0] * (1 - fx) + image[y1, x1] * fx
    return top * (1 - fy) + bottom * fy
