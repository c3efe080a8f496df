import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from avatars.errors import UserError
from shards import check, open_shards, pack, read_capture
from shards.readers.nersemble import correct_colors, polynomial_terms
from shards.readers.vhap import flame_code, rotation_matrix
from shards.readers.video import Video

SERIALS = ["222200042", "222200037", "221501007", "222200036"]
SIZE = (40, 28)


def camera(i):
    """World-to-camera with OpenCV axes, in front of the head, a metre away."""
    angle = 0.3 * (i - 1)
    centre = np.array([np.sin(angle), 0.1, np.cos(angle)])
    forward = -centre / np.linalg.norm(centre)
    right = np.cross(forward, [0, 1.0, 0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = [right, np.cross(forward, right), forward]
    pose[:3, 3] = -pose[:3, :3] @ centre
    return pose


def intrinsics(height):
    f = 3.0 * height
    return np.array([[f, 0, 0.35 * height], [0, f, 0.52 * height], [0, 0, 1]])


def picture(t, v):
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.stack([90 + 2 * x, 60 + 3 * y, 80 + 10 * t + 5 * v + 0 * x], -1).astype(np.uint8)


def silhouette():
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.where(((x - 14) / 10) ** 2 + ((y - 20) / 14) ** 2 < 1, 255, 0).astype(np.uint8)


def save(path: Path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def save_video(path: Path, frames) -> None:
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=73)
        stream.height, stream.width = SIZE
        stream.pix_fmt, stream.bit_rate = "yuv420p", 20_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_calibration(file: Path, shared: bool) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    K = intrinsics(3208).tolist()
    content = {
        "world_2_cam": {s: camera(i).tolist() for i, s in enumerate(SERIALS)},
        "intrinsics": K if shared else dict.fromkeys(SERIALS, K),
    }
    file.write_text(json.dumps(content))


def write_v2(root: Path, benchmark: bool = False) -> Path:
    folder = root / "018" / "sequences" / "EXP-2-eyes"
    for v, serial in enumerate(SERIALS):
        save_video(folder / "images" / f"cam_{serial}.mp4", [picture(t, v) for t in range(5)])
        if benchmark:
            alpha = np.repeat(silhouette()[..., None], 3, 2)
            save_video(folder / "alpha_maps" / f"cam_{serial}.mp4", [alpha] * 5)
    (folder / "images" / ".DS_Store").write_text("stray")
    write_calibration(root / "018/calibration/camera_params.json", shared=not benchmark)
    matrix = np.zeros((3, 10))
    matrix[[0, 1, 2], [2, 1, 0]] = 1  # exchanges red and blue, so that it is seen to have been applied
    (root / "018/calibration/color_calibration.json").write_text(
        json.dumps(dict.fromkeys(SERIALS, matrix.tolist()))
    )
    return folder


def write_v1(root: Path) -> Path:
    folder = root / "030" / "sequences" / "EMO-1-shout+laugh"
    for t in (3, 4, 9):
        frame = folder / f"frame_{t:05d}"
        for v, serial in enumerate(SERIALS):
            save(frame / "images-2x-73fps" / f"cam_{serial}.png", picture(t, v))
            save(frame / "alpha_map-73fps" / f"cam_{serial}.png", silhouette())
            depth = np.where(silhouette() > 0, 1 + 32767, 0).astype(np.uint16)
            save(frame / "colmap-73fps/depth_maps_compressed" / f"cam_{serial}.png", depth)
    (folder / "frame_00005").mkdir()
    (folder / "frame_00009/images-2x-73fps/cam_222200037.png").unlink()
    write_calibration(root / "030/camera_params.json", shared=True)
    colors = root / "030/annotations/EMO-1-shout+laugh/color_correction"
    colors.mkdir(parents=True)
    np.save(colors / f"{SERIALS[0]}.npy", np.hstack([np.eye(3)[:, ::-1] * 0.5, [[0.1], [0.2], [0.3]]]))
    return folder


def flame(t):
    rng = np.random.default_rng(t)
    return {
        "translation": np.array([[0.01 * t, -0.02, 0.03]], np.float32),
        "rotation": np.array([[0.05, 0.1 * t, 0.0]], np.float32),
        "neck_pose": np.zeros((1, 3), np.float32),
        "jaw_pose": np.array([[0.3, 0, 0]], np.float32),
        "eyes_pose": np.zeros((1, 6), np.float32),
        "shape": np.linspace(-1, 1, 300).astype(np.float32),
        "expr": rng.normal(size=(1, 100)).astype(np.float32),
        "static_offset": np.zeros((1, 5143, 3), np.float32),
    }


def write_vhap(root: Path) -> Path:
    folder = root / "UNION10_306_EMO1234_v16_DS2-0.5x_whiteBg"
    sibling = root / "306_EMO-1_v16"
    lists = {"train": [], "val": [], "test": []}
    K = intrinsics(SIZE[0])
    for t in range(6):
        (sibling / "flame_param").mkdir(parents=True, exist_ok=True)
        np.savez(sibling / "flame_param" / f"{t:05d}.npz", **flame(t))
        for v, serial in enumerate(SERIALS):
            mask = silhouette()
            white = np.where(mask[..., None] > 0, picture(t, v), 255).astype(np.uint8)
            name = f"{t:05d}_{v:02d}.png"
            save(sibling / "images" / name, white)
            save(sibling / "fg_masks" / name, mask)
            to_world = np.linalg.inv(camera(v)) @ np.diag([1.0, -1, -1, 1])  # OpenGL axes
            frame = {
                "timestep_index": t,
                "camera_index": v,
                "camera_id": serial,
                "cx": K[0, 2],
                "cy": SIZE[0] - K[1, 2],  # counted from below
                "fl_x": K[0, 0],
                "fl_y": K[1, 1],
                "h": SIZE[0],
                "w": SIZE[1],
                "camera_angle_x": 0.5,
                "camera_angle_y": 0.5,
                "transform_matrix": to_world.tolist(),
                "file_path": f"../{sibling.name}/images/{name}",
                "fg_mask_path": f"../{sibling.name}/fg_masks/{name}",
                "flame_param_path": f"../{sibling.name}/flame_param/{t:05d}.npz",
            }
            lists["test" if t == 5 else "val" if v == 1 else "train"].append(frame)
    folder.mkdir()
    for name, frames in lists.items():
        (folder / f"transforms_{name}.json").write_text(json.dumps({"frames": frames}))
    (folder / "transforms_backup.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    return write_v2(tmp_path_factory.mktemp("v2"))


@pytest.fixture(scope="module")
def vhap(tmp_path_factory):
    return write_vhap(tmp_path_factory.mktemp("vhap"))


def test_the_v2_download_is_read(v2):
    capture = read_capture(v2)
    assert (capture.subject, capture.capture_id, capture.layout) == ("018", "018/EXP-2-eyes", "nersemble-v2")
    assert capture.camera_ids == SERIALS
    assert capture.size == SIZE
    assert capture.timestep_ids == [f"{t:05d}" for t in range(5)]
    K, poses = capture.camera_matrices(0)
    np.testing.assert_allclose(K[2], intrinsics(SIZE[0]))
    np.testing.assert_allclose(poses[3], camera(3))


def test_v2_frames_come_in_any_order_with_calibrated_colours(v2):
    capture = read_capture(v2)
    for t in (0, 3, 3, 1, 4):
        view = capture.view(t, 2)
        exchanged = picture(t, 2)[..., ::-1].astype(float)
        assert np.abs(view.image - exchanged).mean() < 4  # the video is lossy
        assert (view.mask == 255).all()


def test_a_recording_without_codes_says_so_when_packed(v2, tmp_path):
    with pytest.raises(
        UserError, match=r"018/EXP-2-eyes cannot be used for packing: it is not tracked.*VHAP"
    ):
        pack([read_capture(v2)], tmp_path / "x", size=28, heldout=0, prior="none")


def test_the_benchmark_has_masks_and_a_matrix_for_each_camera(tmp_path):
    capture = read_capture(write_v2(tmp_path, benchmark=True))
    assert capture.layout == "nersemble-benchmark"
    assert "masks" not in capture.lacks
    np.testing.assert_allclose(capture.camera_matrices(0)[0][1], intrinsics(SIZE[0]))
    view = capture.view(2, 1)
    assert np.mean((view.mask > 127) == (silhouette() > 127)) > 0.98
    assert np.abs(view.image - picture(2, 1).astype(float))[silhouette() > 0].mean() < 4  # not exchanged


def tracking(frames):
    """What the benchmark's package for avatars has in tracking/: three of the video's five frames."""
    rng = np.random.default_rng(1)
    count = len(frames)
    turns = rng.normal(0, 0.2, (count, 3))
    return {
        "shape": rng.normal(size=(1, 300)),
        "expression": rng.normal(size=(count, 100)),
        "rotation": turns,  # Euler angles, which the matrices make unnecessary
        "rotation_matrices": rotation_matrix(turns),
        "translation": rng.normal(0, 0.02, (count, 3)),
        "jaw": rng.normal(0, 0.1, (count, 3)),
        "frames": np.array(frames),
        "scale": np.ones((1, 1)),
        "neck": np.zeros((count, 3)),
        "eyes": rng.normal(0, 0.1, (count, 6)),
    }


def test_the_tracked_benchmark_is_in_the_head_frame_and_packs(tmp_path):
    folder = write_v2(tmp_path, benchmark=True)
    (folder / "tracking").mkdir()
    flame = tracking([0, 2, 4, 7])  # the video has no frame 7
    np.savez(folder / "tracking" / "flame2023_tracking.npz", **tracking([1]))  # the older one
    np.savez(folder / "tracking" / "flame2023_tracking_v2.npz", **flame)
    capture = read_capture(folder)
    assert capture.timestep_ids == ["00000", "00002", "00004"]
    assert (capture.expression_kind, capture.head, capture.lacks) == ("flame-135", "flame2023", {})
    np.testing.assert_allclose(capture.expressions[1, :100], flame["expression"][1], rtol=1e-6)
    np.testing.assert_allclose(
        capture.expressions[1, 114:120], rotation_matrix(flame["jaw"][1])[:2].ravel(), rtol=1e-5
    )
    nose = np.array([0.0, 0.0, 0.1])
    world = flame["rotation_matrices"][1] @ nose + flame["translation"][1]
    for v in range(len(SERIALS)):
        ours = capture.camera_matrices(1)[1][v] @ [*nose, 1]
        np.testing.assert_allclose(ours, camera(v) @ [*world, 1], atol=1e-12)
    assert np.abs(capture.view(1, 1).image - picture(2, 1).astype(float))[silhouette() > 0].mean() < 4
    pack([capture], tmp_path / "x", size=32, heldout=0, prior="none", n_inputs=2, input_sets=1)
    assert not [f for f in check(tmp_path / "x") if f.severity == "error"]
    del flame["frames"]
    np.savez(folder / "tracking" / "flame2023_tracking_v2.npz", **flame)
    with pytest.raises(UserError, match=r"is no FLAME tracking of the benchmark .*frames"):
        read_capture(folder)


def test_frames_of_a_video_come_in_any_order(tmp_path):
    av = pytest.importorskip("av")
    shades = [np.full((32, 48, 3), 4 * t + 20, np.uint8) for t in range(50)]
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.options = {"g": "12", "bf": "2", "crf": "4"}  # key frames, and frames out of order in the file
        for shade in shades:
            for packet in stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    video = Video(tmp_path / "x.mp4")
    assert len(video) == 50
    order = [0, 1, 2, 30, 31, 5, 49, 48, 12, 11, 13, 0, 49, 24]
    for t in order:
        assert abs(float(video.frame(t).mean()) - (4 * t + 20)) < 2, t
    decoded = []
    working = video._decode
    video._decode = lambda t: (decoded.append(n) or (n, f) for n, f in working(t))
    video.frame(40)
    assert decoded == list(range(decoded[0], 41))  # from a key frame at most twelve before, and no further
    assert decoded[0] >= 28


def test_v1_folders_may_lack_the_frame_rate(tmp_path):
    folder = write_v1(tmp_path)
    for path in sorted(folder.glob("frame_*/*-73fps")):
        path.rename(path.with_name(path.name.removesuffix("-73fps")))
    capture = read_capture(folder)
    assert capture.has_depth
    assert capture.view(1, 1).depth.max() == 1
    assert capture.view(1, 1).mask.max() == 255


def test_a_vhap_export_without_masks_says_so_when_packed(tmp_path):
    folder = write_vhap(tmp_path)
    for file in folder.glob("transforms_t*.json"):
        content = json.loads(file.read_text())
        for frame in content["frames"]:
            del frame["fg_mask_path"]
        file.write_text(json.dumps(content))
    capture = read_capture(folder)
    assert (capture.view(0, 0).mask == 255).all()
    with pytest.raises(UserError, match="cannot be used for packing: its frames name no fg_mask_path"):
        pack([capture], tmp_path / "x", size=32, heldout=0, prior="none")
    for file in folder.glob("transforms_t*.json"):
        content = json.loads(file.read_text())
        del content["frames"][0]["flame_param_path"]
        file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"no list of frames as VHAP writes it .*flame_param_path"):
        read_capture(folder)


def test_the_v1_layout_is_read(tmp_path):
    capture = read_capture(write_v1(tmp_path))
    assert capture.timestep_ids == ["00003", "00004", "00009"]
    assert capture.size == SIZE
    np.testing.assert_allclose(capture.camera_matrices(0)[0][0], intrinsics(SIZE[0]))
    assert capture.view(2, 1) is None
    inside = silhouette() > 0
    plain, corrected = capture.view(1, 1), capture.view(1, 0)
    np.testing.assert_array_equal(plain.image[inside], picture(4, 1)[inside])
    assert (plain.image[~inside] == 0).all()
    np.testing.assert_array_equal(capture.uncut(1, 1), picture(4, 1))
    np.testing.assert_array_equal(capture.uncut(1, 0)[inside], corrected.image[inside])
    assert capture.uncut(2, 1) is None
    expected = picture(4, 0) / 255 @ (np.eye(3)[:, ::-1] * 0.5) + [0.1, 0.2, 0.3]
    np.testing.assert_allclose(corrected.image[inside] / 255, expected[inside], atol=0.003)
    np.testing.assert_allclose(plain.depth[inside], 1.0)
    assert (plain.depth[~inside] == 0).all()


def test_colour_terms_are_those_of_cheung():
    # the example in the documentation of colour-science
    terms = polynomial_terms(np.array([0.17224810, 0.09170660, 0.06416938]), 5)
    np.testing.assert_allclose(terms, [0.1722481, 0.0917066, 0.0641694, 0.0010136, 1], atol=5e-8)
    R, G, B = 2.0, 3.0, 5.0
    twenty = polynomial_terms(np.array([R, G, B]), 20)
    np.testing.assert_array_equal(
        twenty, [2, 3, 5, 6, 10, 15, 4, 9, 25, 30, 12, 45, 50, 20, 18, 75, 8, 27, 125, 1]
    )
    for count in (3, 4, 5, 7, 8, 10, 11, 14, 16, 17, 19, 20, 22, 35):
        assert len(polynomial_terms(np.array([R, G, B]), count)) == count
    with pytest.raises(UserError, match="9 terms is unknown"):
        polynomial_terms(np.array([R, G, B]), 9)


def test_the_identity_calibration_changes_nothing():
    image = picture(0, 0)
    matrix = np.zeros((3, 20))
    matrix[:, :3] = np.eye(3)
    np.testing.assert_array_equal(correct_colors(image, matrix), image)


def test_the_vhap_export_is_read(vhap):
    capture = read_capture(vhap)
    assert (capture.subject, capture.layout, capture.expression_kind) == ("306", "vhap", "flame-135")
    assert capture.camera_ids == SERIALS
    assert len(capture.timestep_ids) == 6  # all lists
    assert capture.size == SIZE
    assert capture.expressions.shape == (6, 135)
    assert capture.identity.shape == (300,)
    K, poses = capture.camera_matrices(2)
    np.testing.assert_allclose(K[1], intrinsics(SIZE[0]))
    head = np.array([0.02, 0.05, 0.08])
    turned = rotation_matrix(np.array([0.05, 0.2, 0.0])) @ head + [0.02, -0.02, 0.03]
    for v in range(4):
        np.testing.assert_allclose((poses[v] @ [*head, 1])[:3], (camera(v) @ [*turned, 1])[:3], atol=1e-6)


def test_vhap_views_lose_their_white(vhap):
    view = read_capture(vhap).view(1, 1)
    np.testing.assert_array_equal(view.image, picture(1, 1) * (silhouette() > 0)[..., None])


def test_a_vhap_export_packs(vhap, tmp_path):
    manifest = pack([read_capture(vhap)], tmp_path / "x", size=24, heldout=0, input_sets=2, prior="none")
    assert (manifest.expression_kind, manifest.expression_length, manifest.head) == (
        "flame-135",
        135,
        "flame2023",
    )
    inputs = open_shards(tmp_path / "x", "train").read("306").input_sets[0]
    assert inputs.images.shape == (4, 3, 24, 24)
    pixels, depth = inputs.cameras.project(torch.zeros(1, 3))
    assert (depth > 0.8).all()
    assert ((pixels > 0) & (pixels < 24)).all()


def test_the_flame_code_has_its_parts_in_order():
    parameters = flame(1) | {"jaw_pose": np.array([[0.0, 0.0, np.pi / 2]])}
    code = flame_code(parameters)
    np.testing.assert_allclose(code[:100], parameters["expr"][0], rtol=1e-6)
    straight = [1, 0, 0, 0, 1, 0]
    np.testing.assert_allclose(code[100:112], straight * 2, atol=1e-6)
    np.testing.assert_allclose(code[112:114], 0)
    np.testing.assert_allclose(code[114:120], [0, -1, 0, 1, 0, 0], atol=1e-6)  # a quarter turn about z
    np.testing.assert_allclose(code[120:126], straight, atol=1e-6)
    np.testing.assert_allclose(code[126:], [*straight, 0, 0, 0], atol=1e-6)


def test_rodrigues_agrees_with_scipy():
    from scipy.spatial.transform import Rotation

    vectors = np.concatenate(
        [np.zeros((1, 3)), np.random.default_rng(0).normal(size=(20, 3)) * 2, [[1e-9, 0, 0]]]
    )
    np.testing.assert_allclose(
        rotation_matrix(vectors), Rotation.from_rotvec(vectors).as_matrix(), atol=1e-12
    )


@pytest.mark.parametrize("missing", ["shape", "expr", "rotation"])
def test_incomplete_flame_parameters_are_a_sentence(tmp_path, missing):
    folder = write_vhap(tmp_path)
    parameters = flame(0)
    del parameters[missing]
    np.savez(tmp_path / "306_EMO-1_v16/flame_param/00000.npz", **parameters)
    with pytest.raises(UserError, match="holds no FLAME parameters"):
        read_capture(folder)


def test_broken_recordings_are_sentences(tmp_path, v2):
    folder = write_v2(tmp_path)
    (folder / f"images/cam_{SERIALS[0]}.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="not a readable video"):
        read_capture(folder)
    for file in (folder / "images").glob("*.mp4"):
        file.unlink()
    with pytest.raises(UserError, match="holds no cam_<serial>"):
        read_capture(folder)
    (tmp_path / "018/calibration/camera_params.json").write_text("{}")
    with pytest.raises(UserError, match="holds no cam_"):
        read_capture(folder)
    v1 = write_v1(tmp_path)
    (tmp_path / "030/camera_params.json").write_text('{"world_2_cam": {}}')
    with pytest.raises(UserError, match="no calibration of NeRSemble"):
        read_capture(v1)
