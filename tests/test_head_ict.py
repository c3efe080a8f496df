"""ICT-FaceKit's reader, on a made-up model in exactly the published layout: names, counts and order of its files."""

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from avatars.errors import UserError
from avatars.head import ParametricHead, ict
from avatars.head.geometry import open_rims, rasterize_uv

SIDED = [
    "browDown",
    "browInnerUp",
    "browOuterUp",
    "cheekPuff",
    "cheekSquint",
    "eyeBlink",
    "eyeLookDown",
    "eyeLookIn",
    "eyeLookOut",
    "eyeLookUp",
    "eyeSquint",
    "eyeWide",
    "mouthDimple",
    "mouthFrown",
    "mouthLowerDown",
    "mouthPress",
    "mouthSmile",
    "mouthStretch",
    "mouthUpperUp",
    "noseSneer",
]
WHOLE = [
    "jawForward",
    "jawLeft",
    "jawOpen",
    "jawRight",
    "mouthClose",
    "mouthFunnel",
    "mouthLeft",
    "mouthPucker",
    "mouthRight",
    "mouthRollLower",
    "mouthRollUpper",
    "mouthShrugLower",
    "mouthShrugUpper",
]
PUBLISHED = [f"{name}_{side}" for name in SIDED for side in "LR"] + WHOLE
# First vertex and polygon of every part, the README's table.
STARTS = [(0, 0), (9409, 9230), (11248, 11144), (13294, 13226), (13678, 13630), (14062, 14034), (17039, 17006),
          (21451, 21496), (22221, 22296), (23021, 23094), (23791, 23894), (24591, 24692), (26719, 26384)]  # fmt: skip
MOVED = 700  # the vertex that a shape file moves


def obj(points: np.ndarray, changed: dict[int, str] | None = None, tail: str = "") -> str:
    rows = [f"v {x:.4f} {y:.4f} {z:.4f}" for x, y, z in points]
    for vertex, row in (changed or {}).items():
        rows[vertex] = row
    return "\n".join(["# ICT FaceKit", "mtllib ICTFaceModelMaterial.mtl", *rows]) + "\n" + tail


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder FaceXModel: parts are strips of quads and triangles; shape k moves vertex 700 + k."""
    folder = tmp_path_factory.mktemp("ict") / "FaceXModel"
    folder.mkdir()
    rng = np.random.default_rng(0)
    points = rng.normal(0, 4, (26719, 3)).round(4)
    points[21451:23021, 0] += 30  # the left eye is on +x
    points[23021:24591, 0] -= 30
    points[:200, 1] -= 60  # the edge of the bust
    uv, lines = [], []
    for (v0, p0), (v1, p1) in pairwise(STARTS):
        n = p1 - p0
        for k in range(n):
            ids = [v0 + (k + j) % (v1 - v0) for j in range(3 if k % 40 == 0 else 4)]
            base = len(uv)
            u, w = (k % 100) / 100, (k // 100) / 100
            uv += [(u, w), (u + 0.009, w), (u + 0.009, w + 0.009), (u, w + 0.009)]
            lines.append("f " + " ".join(f"{i + 1}/{base + j + 1}" for j, i in enumerate(ids)))
    tail = "\n".join([f"vt {u:.4f} {w:.4f}" for u, w in uv] + ["usemtl M_Face"] + lines) + "\n"
    (folder / "generic_neutral_mesh.obj").write_text(obj(points, tail=tail))
    rows = obj(points).splitlines()
    first = next(k for k, row in enumerate(rows) if row.startswith("v "))

    def shape(name, k):
        moved = points[MOVED + k] + [1.0, 2.0, 3.0]
        changed = list(rows)
        changed[first + MOVED + k] = "v {:.4f} {:.4f} {:.4f}".format(*moved)
        (folder / f"{name}.obj").write_text("\n".join(changed) + "\n")

    for k in range(100):
        shape(f"identity{k:03d}", k)
    for k, name in enumerate(PUBLISHED):
        shape(name, 200 + k)
    landmarks = np.arange(1000, 1068).tolist()
    (folder / "vertex_indices.json").write_text(json.dumps({"idx_to_landmark_verts": landmarks}))
    return folder, points


@pytest.fixture(scope="module")
def head(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADSPLAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield ParametricHead.load("ict", model[0])


def test_the_published_names_are_the_ones_read():
    assert len(PUBLISHED) == 53
    read = [file for files in ict.EXPRESSIONS.values() for file in files]
    assert sorted(read) == sorted(PUBLISHED)
    assert list(ict.EXPRESSIONS) == list(ParametricHead.load().expression_names)
    assert ict.EXPRESSIONS["eyeBlinkLeft"] == ["eyeBlink_L"]
    assert ict.EXPRESSIONS["browInnerUp"] == ["browInnerUp_L", "browInnerUp_R"]
    assert ict.EXPRESSIONS["mouthLeft"] == ["mouthLeft"]
    assert ict.EXPRESSIONS["tongueOut"] == []


def test_shapes_are_metres_and_in_arkits_order(head, model):
    _, points = model
    assert (head.n_vertices, head.n_identity, head.n_expression) == (24591, 100, 52)
    assert head.expression_kind == "arkit-52"
    still = head.vertices(torch.zeros(1, 100), torch.zeros(1, 52))[0]
    assert torch.allclose(still[0] - still[1], torch.tensor(points[0] - points[1]).float() / 100, atol=1e-5)
    code = torch.zeros(1, 100)
    code[0, 7] = 2.0
    moved = head.vertices(code, torch.zeros(1, 52))[0] - still
    assert torch.allclose(moved[MOVED + 7], torch.tensor([0.02, 0.04, 0.06]), atol=1e-4)
    assert (moved.norm(dim=-1) > 1e-6).sum() == 1
    for name, files in ict.EXPRESSIONS.items():
        code = torch.zeros(1, 52)
        code[0, head.expression_names.index(name)] = 1.0
        moved = head.vertices(torch.zeros(1, 100), code)[0] - still
        expected = {MOVED + 200 + PUBLISHED.index(file) for file in files}
        assert set((moved.norm(dim=-1) > 1e-6).nonzero()[:, 0].tolist()) == expected


def test_parts_regions_and_uv(head):
    assert head.faces.max() < 24591
    assert len(head.faces) == sum(1 if k % 40 == 0 else 2 for a, b in pairwise(STARTS[:-1])
                                  for k in range(b[1] - a[1]))  # fmt: skip
    masks = torch.stack([head.regions[name] for name in ict.LABELS])
    assert (masks.sum(0) == 1).all()
    assert head.faces[head.regions["eye"]].min() == 21451
    assert head.faces[head.regions["teeth"]].unique().numel() == 4412
    triangle, _ = rasterize_uv(head.uv.numpy(), head.uv_faces.numpy(), 256)
    backwards, _ = rasterize_uv(head.uv.numpy(), head.uv_faces.numpy()[::-1].copy(), 256)
    covered = triangle >= 0
    assert (
        triangle[covered] == len(head.uv_faces) - 1 - backwards[covered]
    ).mean() > 0.99  # nothing overlaps
    assert head.landmarks68.tolist() == list(range(1000, 1068))
    assert len(head.boundary_vertices)


def test_eyes_and_neck_turn_and_the_jaw_says_that_it_does_not(head):
    zeros = torch.zeros(1, 100), torch.zeros(1, 52)
    still = head.vertices(*zeros)[0]
    turned = head.vertices(*zeros, eyes=torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.0, 0.0]]))[0] - still
    assert turned[21451:23021].norm(dim=-1).max() > 0.005
    assert turned[:21451].abs().max() < 1e-6
    assert turned[23021:].abs().max() < 1e-6
    bent = head.vertices(*zeros, neck=torch.tensor([[0.2, 0.0, 0.0]]))[0] - still
    assert bent[head.boundary_vertices].abs().max() < 1e-6
    assert bent[head.landmarks68].norm(dim=-1).max() > 0.005
    with pytest.raises(UserError, match="no jaw that turns"):
        head.vertices(*zeros, jaw=torch.zeros(1, 3))


def test_the_second_load_reads_the_cache_and_changed_files_are_read_again(model, tmp_path, monkeypatch):
    import os

    folder, _ = model
    monkeypatch.setenv("HEADSPLAT_CACHE", str(tmp_path))
    reads = []

    def build(where):
        reads.append(where)
        return {"identity_basis": np.zeros((1, 1, 3), np.float32)}

    monkeypatch.setattr(ict, "build", build)
    monkeypatch.setattr(ParametricHead, "__init__", lambda self, arrays, **_: None)
    ParametricHead.load("ict", folder)
    ParametricHead.load("ict", folder)
    assert len(reads) == 1
    os.utime(folder / "jawOpen.obj", (1, 1))
    ParametricHead.load("ict", folder)
    assert len(reads) == 2


def test_incomplete_or_foreign_files_are_reported(model, tmp_path):
    import shutil

    folder, _ = model
    with pytest.raises(UserError, match="needs ICT-FaceKit's folder"):
        ParametricHead.load("ict")
    with pytest.raises(UserError, match="holds no ICT-FaceKit"):
        ict.build(tmp_path)
    copy = tmp_path / "FaceXModel"
    shutil.copytree(folder, copy)
    (copy / "jawOpen.obj").unlink()
    with pytest.raises(UserError, match=r"lacks jawOpen\.obj"):
        ict.build(tmp_path)
    shutil.copy(folder / "jawOpen.obj", copy)
    (copy / "vertex_indices.json").write_text("{}")
    with pytest.raises(UserError, match="no 68 landmarks"):
        ict.build(tmp_path)
    shutil.copy(folder / "vertex_indices.json", copy)
    rows = (folder / "identity000.obj").read_text().splitlines()
    (copy / "identity000.obj").write_text("\n".join(rows[:-5]))
    with pytest.raises(UserError, match=r"identity000\.obj has 26714 vertices"):
        ict.build(tmp_path)
    (copy / "generic_neutral_mesh.obj").write_text("v 0 0 0\nf 1 2 3\n")
    with pytest.raises(UserError, match="not a Wavefront OBJ with UVs"):
        ict.build(tmp_path)


def test_the_mouth_socket_closes_the_lips_of_the_published_mesh():
    """Face, bust, mouth and eye sockets share the vertices of their rims: what is left open is the edge of the bust."""
    folder = Path(os.environ.get("HEADSPLAT_WEIGHTS", "none")) / "FaceXModel"
    if not (folder / "generic_neutral_mesh.obj").is_file():
        pytest.skip("HEADSPLAT_WEIGHTS has no FaceXModel of ICT-FaceKit")
    _, uv, polygons, corners = ict._read_mesh(folder / "generic_neutral_mesh.obj")
    label, faces, _, _ = ict._cut(polygons, uv, corners)
    lips = ict._read_landmarks(folder / "vertex_indices.json")[48:]
    skin = label == ict.LABELS.index("skin")
    cavities = np.isin(label, [ict.LABELS.index("mouth"), ict.LABELS.index("socket")])
    assert len(open_rims(faces[skin])) == 4  # bust, mouth, both eyes
    (bust,) = open_rims(faces[skin | cavities])
    assert not np.isin(bust, lips).any()
