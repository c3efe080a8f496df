import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import cKDTree

from avatars.errors import UserError
from avatars.head import ParametricHead
from avatars.head.makehuman import ARKIT_NAMES
from shards.synth import raster, synthesize
from shards.synth.capture import DEPTH_UNIT, subject_seed
from shards.synth.dome import TARGET, golden_camera, look_at, rig
from shards.synth.expressions import POSES, code, random_expression, smooth_sequence
from shards.synth.light import Light, bake, sphere
from shards.synth.raster import depth_buffer
from shards.synth.render import render
from shards.synth.subject import draw_identity, draw_subject, pose

SETTINGS = {"subjects": 2, "timesteps": 2, "views": 6, "size": 64, "seed": 3}


@pytest.fixture(scope="module")
def captures(tmp_path_factory) -> list[Path]:
    return synthesize(tmp_path_factory.mktemp("captures"), **SETTINGS, progress=False)


def index_of(folder: Path) -> dict:
    return json.loads((folder / "capture.json").read_text())


def read(folder: Path, kind: str, t: int, v: int) -> np.ndarray:
    return np.asarray(Image.open(folder / kind / f"{t:05d}" / f"c{v:02d}.png"))


def head_camera(index: dict, t: int, v: int) -> tuple[np.ndarray, np.ndarray]:
    camera = index["cameras"][v]
    pose = np.array(camera["world_to_camera"]) @ np.array(index["timesteps"][t]["head_to_world"])
    return np.array(camera["K"]), pose


def unproject(depth: np.ndarray, K: np.ndarray, pose: np.ndarray) -> np.ndarray:
    row, column = np.nonzero(depth > 0)
    pixel = np.stack([column + 0.5, row + 0.5, np.ones(len(row))])
    camera = (np.linalg.inv(K) @ pixel) * depth[row, column]
    return (pose[:3, :3].T @ (camera - pose[:3, 3:])).T


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_layout_is_the_one_that_readers_expect(captures):
    assert [folder.name for folder in captures] == ["s0000", "s0001"]
    index = index_of(captures[0])
    assert index["schema"] == 1
    assert index["layout"] == "headsplat-synthetic"
    assert index["subject"] == "s0000"
    assert index["seed"] == 3
    assert index["size"] == [64, 64]
    assert index["expression_kind"] == "arkit-52"
    assert index["expression_names"] == list(ARKIT_NAMES)
    assert index["depth_unit"] == DEPTH_UNIT == 6.25e-5
    assert index["head"]["model"] == "makehuman"
    assert len(index["head"]["identity"]) == 100
    assert [camera["id"] for camera in index["cameras"]] == [f"c{i:02d}" for i in range(6)]
    assert [step["id"] for step in index["timesteps"]] == ["00000", "00001"]
    assert len(index["timesteps"][1]["expression"]) == 52
    for step in index["timesteps"]:
        rotation = np.array(step["head_to_world"])[:3, :3]
        assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(rotation) > 0
    for kind, mode in (("image", "RGB"), ("mask", "L"), ("depth", "I;16")):
        files = sorted((captures[0] / kind).rglob("*.png"))
        assert len(files) == 12
        with Image.open(files[0]) as picture:
            assert picture.mode == mode
            assert picture.size == (64, 64)


def test_depth_lies_on_the_parametric_head(captures):
    """The skin in the depth maps is the head's surface, through the head-frame camera of the contract."""
    head = ParametricHead.load()
    for folder in captures:
        index = index_of(folder)
        identity = torch.tensor(index["head"]["identity"])[None]
        for t, step in enumerate(index["timesteps"]):
            vertices = head.vertices(identity, torch.tensor(step["expression"])[None])[0]
            corners = vertices[head.faces]
            weights = torch.distributions.Dirichlet(torch.ones(3)).sample((6, len(corners)))
            surface = torch.cat([vertices, (weights[..., None] * corners).sum(-2).flatten(0, 1)])
            tree = cKDTree(surface.numpy())
            depth = read(folder, "depth", t, 0) * DEPTH_UNIT  # the camera straight ahead
            points = unproject(depth, *head_camera(index, t, 0))
            face = points[(points[:, 1] < 0.03) & (np.abs(points[:, 0]) < 0.05) & (points[:, 1] > -0.09)]
            assert len(face) > 100
            distance = tree.query(face)[0]
            assert np.quantile(distance, 0.9) < 0.003
            assert np.median(distance) < 0.0012


def test_depth_maps_of_two_views_agree(captures):
    index = index_of(captures[0])
    depths = [read(captures[0], "depth", 1, v) * DEPTH_UNIT for v in range(6)]
    compared = 0
    for a in range(6):
        points = unproject(depths[a], *head_camera(index, 1, a))
        for b in range(6):
            K, pose = head_camera(index, 1, b)
            camera = points @ pose[:3, :3].T + pose[:3, 3]
            pixel = camera @ K.T
            x, y = (pixel[:, 0] / pixel[:, 2]).astype(int), (pixel[:, 1] / pixel[:, 2]).astype(int)
            inside = (x >= 0) & (y >= 0) & (x < 64) & (y < 64)
            seen = depths[b][y[inside], x[inside]]
            behind = camera[inside, 2] - seen
            # A point on a surface may be hidden in another view but can hardly float in front of what that sees: only
            # at silhouettes, where neighbouring pixels (5 mm) see different things, and where hair is loose.
            floating = (behind < -0.008) & (seen > 0)
            assert floating.mean() < 0.12
            compared += (np.abs(behind) < 0.004).sum()
    assert compared > 10_000


def test_mask_image_and_depth_go_together(captures):
    for folder in captures:
        image, mask, depth = (read(folder, kind, 1, 0) for kind in ("image", "mask", "depth"))
        assert ((depth > 0) <= (mask > 0)).all()
        assert (depth[mask == 255] > 0).all()
        assert image[mask == 0].max() < 40  # a dark studio
        assert image[mask == 255].mean() > 30
        assert 0.2 < (mask > 127).mean() < 0.8
        assert 0.9 < depth[depth > 0].min() * DEPTH_UNIT < 1.2
        assert not mask[0].any()  # the crown is in the picture
        soft = (mask > 0) & (mask < 255)
        assert 0.005 < soft.mean() < 0.2


def test_people_and_expressions_differ(captures):
    one, other = (index_of(folder) for folder in captures)
    assert one["head"]["identity"] != other["head"]["identity"]
    assert one["timesteps"][1]["expression"] != other["timesteps"][1]["expression"]
    assert not any(one["timesteps"][0]["expression"])
    assert (read(captures[0], "image", 0, 0) != read(captures[0], "image", 1, 0)).any()


def test_captures_are_resumed_and_depend_on_the_seed_only(captures, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(captures[0].parent, out)
    before = bytes_of(out / "s0001")
    kept = (out / "s0000" / "capture.json").stat().st_mtime_ns
    (out / "s0001" / "capture.json").unlink()
    (out / "s0001" / "image" / "00001" / "c03.png").write_bytes(b"cut")
    calls = []
    synthesize(out, **SETTINGS, progress=lambda done, total: calls.append((done, total)))
    assert bytes_of(out / "s0001") == before
    assert (out / "s0000" / "capture.json").stat().st_mtime_ns == kept
    assert calls == [(18, 24), (24, 24)]


def test_other_settings_do_not_mix(captures):
    with pytest.raises(UserError, match="other settings"):
        synthesize(captures[0].parent, **{**SETTINGS, "views": 5}, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subjects": 0}, "subjects is 0"),
        ({"subjects": [1, 1]}, "different numbers"),
        ({"size": 4}, "size is 4"),
        ({"rig_name": "sphere"}, "unknown camera rig 'sphere'"),
        ({"rig_name": "nersemble", "views": 17}, "16 cameras, not 17"),
        ({"motion": "wild"}, "unknown motion 'wild'"),
        ({"quality": "raster"}, "unknown quality 'raster'"),
    ],
)
def test_bad_settings_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        synthesize(tmp_path, **{**SETTINGS, **change}, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write captures"):
        synthesize(tmp_path / "file", **SETTINGS, progress=False)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root"
)
def test_a_full_disk_is_reported_and_what_is_complete_stays(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    one = synthesize(tmp_path / "one", subjects=1, timesteps=1, views=4, size=64, progress=False)[0]
    room = sum(path.stat().st_size + 4096 for path in one.rglob("*") if path.is_file())
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * room)}", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    settings = {"timesteps": 1, "views": 4, "size": 64, "progress": False}
    try:
        with pytest.raises(
            UserError, match=r"cannot write captures into .*No space left on device.*what is complete"
        ):
            synthesize(disk, subjects=3, **settings)
        assert bytes_of(disk / "s0000") == bytes_of(one)
        assert not (disk / "s0001" / "capture.json").exists()
        subprocess.run(["mount", "-o", "remount,size=16M", str(disk)], check=True, capture_output=True)
        assert (
            len([f for f in synthesize(disk, subjects=3, **settings) if (f / "capture.json").is_file()]) == 3
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_dome_cameras_look_at_the_head():
    cameras = rig("dome", 80, 128)
    centres = np.stack([-pose[:3, :3].T @ pose[:3, 3] for pose in cameras.world_to_camera])
    assert len(set(cameras.ids)) == 80
    distance = np.linalg.norm(centres, axis=1)
    assert 0.95 < distance.min() < distance.max() < 1.25
    assert (centres[:, 2] > 0).mean() > 0.55  # most in front
    assert (centres[:, 2] < -0.3).sum() >= 8  # some behind
    assert (centres[:, 1] > 0.5).sum() >= 5
    assert (centres[:, 1] < -0.2).sum() >= 5
    assert centres[0, 2] > 0.95  # the first looks straight at the face
    for K, view in zip(cameras.K, cameras.world_to_camera, strict=True):
        rotation = view[:3, :3]
        assert np.allclose(rotation @ rotation.T, np.eye(3))
        assert np.linalg.det(rotation) > 0
        middle = K @ (view[:3, :3] @ [0, -0.01, 0] + view[:3, 3])
        assert np.abs(middle[:2] / middle[2] - 64).max() < 1.5
        above = K @ (view[:3, :3] @ [0, 0.09, 0] + view[:3, 3])
        assert above[1] / above[2] < middle[1] / middle[2]  # upright: y runs down in the picture
    directions = centres / distance[:, None]
    cosine = directions @ directions.T - 2 * np.eye(80)
    assert cosine.max() < np.cos(np.radians(2))  # no two cameras at one place
    half = rig("dome", 40, 128)
    assert np.allclose(half.world_to_camera, cameras.world_to_camera[:40])
    assert np.allclose(look_at(np.array([0.0, 0, 1]), np.zeros(3))[0], [1, 0, 0, 0])
    assert len(rig("nersemble", 16, 64).ids) == 16


def test_one_camera_of_the_dome_is_the_one_that_ava_256_published():
    K, pose = golden_camera(667)  # the 4TB release's width
    rotation = pose[:3, :3]
    assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-5)
    # In the release's world (y down, z backwards, millimetres), as its calibration file has it.
    published = np.eye(4)
    published[:3, :3] = rotation @ np.diag([1.0, -1.0, -1.0])
    published[:3, 3] = (
        pose[:3, 3] * 1000 + rotation @ TARGET * 1000 - published[:3, :3] @ [-60.4, 29.5, 993.3]
    )
    assert np.allclose(published[2, :3], [-0.481672, 0.870695, 0.099408], atol=1e-6)
    assert np.allclose(published[:3, 3], [-854.7404, 576.3865, 988.4146], atol=0.05)
    assert np.allclose(-published[:3, :3].T @ published[:3, 3], [493.3398, -968.1090, 926.9017], atol=0.05)
    # The sheet's pixel of the head's centre, (260.218, 499.528) at 667 x 1024, is the middle of the crop.
    corner = np.array([260.218, 499.528]) - 667 / 2
    assert np.allclose(
        [K[0, 2] + corner[0], K[1, 2] + corner[1]], np.array([1413.0679, 1783.6005]) / 4, atol=0.01
    )
    assert np.allclose([K[0, 0], K[1, 1]], np.array([10355.0888, 10348.6305]) / 4, rtol=1e-6)
    cameras = rig("dome", 80, 667)
    same = [
        np.allclose(k, K) and np.allclose(p, pose)
        for k, p in zip(cameras.K, cameras.world_to_camera, strict=True)
    ]
    assert sum(same) == 1
    assert np.abs(cameras.K[:, 0, 0] / K[0, 0] - 1).max() < 0.011


def test_expression_names_and_weights_are_checked():
    assert code({"jawOpen": 0.5})[ARKIT_NAMES.index("jawOpen")] == 0.5
    with pytest.raises(UserError, match="unknown expression 'jawOpenWide'"):
        code({"jawOpenWide": 0.5})
    with pytest.raises(UserError, match="must lie in"):
        code({"jawOpen": 1.5})
    assert all(code(weights).shape == (52,) for weights in POSES.values())


def test_random_expressions_are_valid_and_sequences_smooth():
    rng = np.random.default_rng(0)
    many = np.stack([random_expression(rng) for _ in range(200)])
    assert many.min() >= 0
    assert many.max() <= 1
    assert (many.max(axis=0) > 0.2).mean() > 0.8  # nearly every unit gets used
    sequence = smooth_sequence(rng, 60)
    assert sequence.shape == (60, 52)
    assert np.abs(np.diff(sequence, axis=0)).max() < 0.25
    assert sequence.max() > 0.4


def test_seeds_give_different_people():
    seeds = [subject_seed(0, k) for k in range(300)] + [subject_seed(1, k) for k in range(300)]
    assert len(set(seeds)) == 600
    head = ParametricHead.load()
    a, b, c = draw_subject(head, 5), draw_subject(head, 5), draw_subject(head, 6)
    assert (a.texture == b.texture).all()
    assert (a.identity == b.identity).all()
    assert np.abs(a.identity - c.identity).max() > 1


def test_thousand_seeds_give_people_a_millimetre_apart(capsys):
    head = ParametricHead.load()
    codes = [draw_identity(np.random.default_rng([subject_seed(0, k), 4711]), 100) for k in range(1000)]
    assert (codes[5] == draw_subject(head, subject_seed(0, 5)).identity).all()
    with torch.no_grad():
        people = head.vertices(torch.from_numpy(np.stack(codes)), torch.zeros(1000, 52))
    # A mean of distances is at least the distance of means, in every group of neighbouring vertices: a lower bound for
    # all pairs at once, so that only the pairs below the best found so far have to be measured.
    groups = torch.arange(head.n_vertices) // 32
    means = torch.zeros(1000, int(groups.max()) + 1, 3).index_add_(1, groups, people)
    bound = sum(torch.cdist(means[:, g], means[:, g]) for g in range(means.shape[1])) / head.n_vertices
    first, second = torch.triu_indices(1000, 1000, 1).unbind(0)
    bounds, order = bound[first, second].sort()
    least = torch.inf
    for start in range(0, len(order), 256):
        if bounds[start] >= least:
            break
        i, j = first[order[start : start + 256]], second[order[start : start + 256]]
        least = min(least, (people[i] - people[j]).norm(dim=-1).mean(-1).min().item())
    with capsys.disabled():
        print(
            f"\nclosest two of 1,000 people: {1000 * least:.2f} mm mean vertex distance ({start} pairs measured)"
        )
    assert 1e-3 < least < 1e-2


def test_depth_buffer_agrees_with_a_ray_for_every_pixel():
    rng = np.random.default_rng(0)
    points = rng.uniform(-2, 34, (60, 3)).astype(np.float32)
    faces = rng.integers(0, 60, (40, 3)).astype(np.int32)
    buffer, triangle = np.full((32, 32), -1e9, np.float32), np.full((32, 32), -1, np.int32)
    depth_buffer(
        points[:, 0].copy(),
        points[:, 1].copy(),
        points[:, 2].copy(),
        faces,
        len(faces),
        0.0,
        buffer,
        triangle,
    )
    expected = np.full((32, 32), -1e9)
    y, x = np.mgrid[:32, :32] + 0.5
    for a, b, c in points[faces].astype(float):
        matrix = np.array([[a[0], b[0], c[0]], [a[1], b[1], c[1]], [1, 1, 1]])
        if np.linalg.det(matrix) > -1e-9:  # seen from behind
            continue
        w = np.linalg.solve(matrix, np.stack([x.ravel(), y.ravel(), np.ones(1024)]))
        near = (w * np.array([a[2], b[2], c[2]])[:, None]).sum(0)
        expected = np.maximum(expected, np.where((w >= 0).all(0), near, -1e9).reshape(32, 32))
    assert (
        np.abs(buffer - expected) < 1e-3
    ).mean() > 0.995  # single precision decides a few pixels on an edge
    assert ((triangle >= 0) == (buffer > -1e8)).all()


def test_light_is_even_in_the_open_and_blocked_by_what_stands_before_it():
    directions = sphere()
    assert np.abs(directions.mean(axis=0)).max() < 0.02
    light = Light(
        np.ones((len(directions), 3), np.float32),
        np.array([[0, 0, 1.0]], np.float32),
        np.ones((1, 3), np.float32),
    )
    # A point alone sees the whole uniform sky: irradiance / π is the sky's radiance.
    point, normal = np.zeros((1, 3), np.float32), np.array([[0, 0, 1.0]], np.float32)
    far = np.array([[0.1, 0.1, -0.15], [0.11, 0.1, -0.15], [0.1, 0.11, -0.15]], np.float32)
    points = np.concatenate([point, far])
    normals = np.repeat(normal, 4, axis=0)
    faces = np.array([[1, 2, 3]], np.int32)
    opened = bake(light, np.eye(3, dtype=np.float32), points, normals, faces, 4)
    assert np.allclose(opened.diffuse[0], 1, atol=0.08)
    assert opened.gloss[0, 0] == pytest.approx(1)
    # A plate before it takes the lamp and most of the sky away.
    plate = np.array([[-0.2, -0.2, 0.03], [0.2, -0.2, 0.03], [0.2, 0.2, 0.03], [-0.2, 0.2, 0.03]], np.float32)
    points = np.concatenate([point, plate])
    normals = np.repeat(normal, 5, axis=0)
    faces = np.array([[1, 2, 3], [1, 3, 4]], np.int32)
    closed = bake(light, np.eye(3, dtype=np.float32), points, normals, faces, 5)
    assert closed.gloss[0, 0] < 0.05
    assert closed.diffuse[0].max() < 0.55


def test_an_open_mouth_shows_what_is_in_it_and_a_cornea_mirrors_the_lamp():
    head = ParametricHead.load()
    subject = draw_subject(head, 3)
    posed = pose(head, subject, code({"jawOpen": 1.0}), np.eye(4))
    cameras = rig("dome", 1, 256)

    def seen(K, world_to_camera):
        camera = posed.points @ world_to_camera[:3, :3].T.astype(np.float32) + world_to_camera[:3, 3].astype(
            np.float32
        )
        inverse = (1 / camera[:, 2]).astype(np.float32)
        x, y = ((camera[:, k] * inverse * K[k, k] + K[k, 2]).astype(np.float32) for k in (0, 1))
        buffer, triangle = np.zeros((256, 256), np.float32), np.full((256, 256), -1, np.int32)
        depth_buffer(x, y, inverse, posed.faces, posed.n_head_faces, 0.0, buffer, triangle)
        return np.where(triangle >= 0, posed.material[triangle], 255)

    frontal = seen(cameras.K[0], cameras.world_to_camera[0])
    assert (frontal == raster.TEETH).sum() > 15
    assert (frontal == raster.WET).sum() > 60  # tongue and the inside of the mouth
    # From where a mirror at the front of the eyes would show the lamp.
    lamp = posed.lamp_directions[0]
    toward = np.array([-lamp[0], -lamp[1], lamp[2]])
    pupils = np.array([0.0, 0.013, 0.07])
    view = look_at(pupils + 1.1 * toward, pupils)
    K = cameras.K[0] * [[3, 1, 1], [1, 3, 1], [1, 1, 1]]  # closer
    lit = render(posed, K, view, 256).image.astype(int)
    unlit = render(replace(posed, lamp_colors=np.zeros_like(posed.lamp_colors)), K, view, 256).image
    gain = (lit - unlit).min(axis=-1)
    eye = seen(K, view) == raster.EYE
    assert gain[eye].max() > 60
    assert (gain[eye] > 60).mean() < 0.2  # a glint, not a sheet


def test_path_traced_pictures_depend_on_the_seed_only(tmp_path):
    import drjit

    from shards.synth.traced import TracedPerson

    head = ParametricHead.load()
    subject = draw_subject(head, 3)
    posed = pose(head, subject, code({}), np.eye(4))
    cameras = rig("dome", 1, 24)

    def picture(seed):
        return TracedPerson(posed, subject.light, np.eye(4)).render(
            cameras.K[0], cameras.world_to_camera[0], 24, samples=4, seed=seed
        )

    before = drjit.thread_count()
    first = picture(1)
    try:
        drjit.set_thread_count(1)
        assert (picture(1) == first).all()
    finally:
        drjit.set_thread_count(before)
    assert (picture(2) != first).any()


def test_path_traced_pictures_show_the_same_person(tmp_path):
    settings = {
        "subjects": [4],
        "timesteps": 1,
        "views": 2,
        "size": 32,
        "seed": 3,
        "progress": False,
    }
    fast = synthesize(tmp_path / "fast", **settings)[0]
    path = synthesize(tmp_path / "path", **settings, quality="path")[0]
    for v in range(2):
        mask = read(fast, "mask", 0, v)
        assert (mask == read(path, "mask", 0, v)).all()
        assert (read(fast, "depth", 0, v) == read(path, "depth", 0, v)).all()
        ours, theirs = read(fast, "image", 0, v).astype(float), read(path, "image", 0, v).astype(float)
        # The same silhouette, up to strands too thin for the fast renderer's samples.
        assert (np.abs(ours - theirs)[mask == 0] > 30).mean() < 0.01
        inside = mask == 255
        assert np.corrcoef(ours[inside].ravel(), theirs[inside].ravel())[0, 1] > 0.8
        assert abs(ours[inside].mean() - theirs[inside].mean()) < 30
