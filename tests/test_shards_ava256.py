import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from avatars.errors import UserError
from shards import check, open_shards, pack, read_capture
from shards.pictures import crop_window, fit_intrinsics
from shards.readers.ava256 import linear_to_srgb, read_codes

SIZE = (64, 42)  # a 64th of 4096 x 2668, rounded as the release rounds
CAMERAS = ["400940", "401168", "401875"]


def golden_camera():
    """K and world-to-camera of camera 400940 of the sample calibration, from the numbers noted about it.

    Known are t, the centre and R's third row, which leave one angle of R and two equations for it.
    """
    K = np.array([[10355.0888, 0, 1413.0679], [0, 10348.6305, 1783.6005], [0, 0, 1]])
    t = np.array([-854.7404, 576.3865, 988.4146])
    centre = np.array([493.3398, -968.1090, 926.9017])
    forward = np.array([-0.481672, 0.870695, 0.099408])
    across = np.cross(forward, [0.0, 0.0, 1.0])
    across /= np.linalg.norm(across)
    along = np.cross(forward, across)
    a, b = across @ centre, along @ centre
    cosine, sine = np.linalg.solve([[a, b], [b, -a]], [-t[0], -t[1]])
    assert abs(np.hypot(cosine, sine) - 1) < 1e-5
    T = np.eye(4)
    right = (cosine * across + sine * along) / np.hypot(cosine, sine)
    T[:3, :3], T[:3, 3] = np.stack([right, np.cross(forward, right), forward]), t
    return K, T


def avif(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "avif", quality=100, subsampling="4:4:4")
    return buffer.getvalue()


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def write_zip(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def stored(frame, camera):
    """A smooth linear picture, and the head's mask."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    mask = (((x - 20) / 14) ** 2 + ((y - 30) / 18) ** 2 < 1).astype(np.uint8) * 255
    image = np.stack([60 + x + frame % 61, 40 + y, 50 + x // 2 + 20 * camera], -1).astype(np.uint8)
    return image, mask


def write_ava_capture(root, *, frames=6, masks=True, codes=True, seed=0):
    """The 4TB layout with its peculiarities: a missing picture, an empty zip, a calibrated camera without a
    zip.
    """
    folder = root / "20230405--1635--AAN112"
    decoder = folder / "decoder"
    rng = np.random.default_rng(seed)
    ids = [int(f) for f in rng.choice(100_000, frames, replace=False)]
    K, T = golden_camera()
    krt = []
    for i, name in enumerate([*CAMERAS, "409998", "409999"]):
        turned = T.copy()
        angle = 0.25 * i
        turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
        centre = np.array([-60.4, 29.5, 993.3])
        turned[:3, :3] = T[:3, :3] @ turn
        turned[:3, 3] = (
            T[:3, :3] @ centre + T[:3, 3] - turned[:3, :3] @ centre
        )  # the head stays where it is seen
        krt.append(
            {
                "cameraId": name,
                "projectionModel": "Pinhole",
                "distortionModel": "RadialAndTangential",
                "K": K.T.tolist(),
                "distortion": [9.0, 9.0, 9.0, 9.0],
                "T": turned.T.tolist(),
            }
        )
    decoder.mkdir(parents=True)
    (decoder / "camera_calibration.json").write_text(json.dumps({"KRT": krt}))
    lines = [f"EXP_{'neutral_peak' if i == 0 else 'free_face'},{frame}" for i, frame in enumerate(ids)]
    (decoder / "frame_list.csv").write_text("\n".join(["seg_id,frame_id", *lines]) + "\n")
    poses = {}
    for i, frame in enumerate(ids):
        angle = 0.05 * i
        turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
        pose = np.concatenate([turn @ np.diag([1.0, -1.0, -1.0]), [[-60.4], [29.5], [993.3 + i]]], 1)
        poses[f"{frame:06d}.txt"] = "\n".join(" ".join(str(x) for x in row) for row in pose).encode()
    write_zip(decoder / "head_pose/head_pose.zip", poses)
    background = np.full((*SIZE, 3), 30, np.uint8)
    for c, name in enumerate(CAMERAS):
        images, cuts, parts = {}, {}, {}
        for i, frame in enumerate(ids):
            image, mask = stored(frame, c)
            image = np.where(mask[..., None] > 0, image, background)
            if (i, c) != (2, 1):  # a dropped frame
                images[f"cam{name}/{frame:06d}.avif"] = avif(image)
            cuts[f"{frame:06d}.avif"] = avif(mask)
            parts[f"cam{name}/{frame:06d}.png"] = png(
                np.where(mask > 0, 2, 3).astype(np.uint8)
            )  # body, chair
        write_zip(decoder / f"image/cam{name}.zip", images)
        write_zip(decoder / f"segmentation_parts/cam{name}.zip", parts)
        if masks:
            write_zip(decoder / f"foreground_masks/cam{name}.zip", cuts)
    write_zip(decoder / "image/cam409998.zip", {})
    write_zip(
        decoder / "background_image/background_image.zip",
        {f"{name}.avif": avif(background) for name in CAMERAS},
    )
    if codes:
        path = decoder / "expression_codes/aeparams_1440000.pkl"
        path.parent.mkdir()
        table = {f"{frame:06d}": rng.normal(0, 0.1, 256).astype(np.float32) for frame in ids}
        path.write_bytes(pickle.dumps(table))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_ava_capture(tmp_path_factory.mktemp("ava"))


def test_the_layout_is_read(folder):
    capture = read_capture(folder)
    assert (capture.subject, capture.capture_id) == ("AAN112", "20230405--1635--AAN112")
    assert (capture.layout, capture.expression_kind, capture.head) == ("ava-256", "ava-256", None)
    assert capture.camera_ids == CAMERAS  # not the empty zip's, not the one without a zip
    assert capture.size == SIZE
    assert capture.expressions.shape == (6, 256)
    assert capture.segments == ["EXP_neutral_peak"] + ["EXP_free_face"] * 5
    assert all(len(step) == 6 for step in capture.timestep_ids)
    assert not capture.has_depth


def test_the_sample_camera_has_its_golden_values(folder):
    capture = read_capture(folder)
    K, _ = capture.camera_matrices(0)
    np.testing.assert_allclose(K[0, 0, 0], 10355.0888 / 64)
    np.testing.assert_allclose(K[0, :2, 2], [1413.0679 / 64, 1783.6005 / 64])
    world_to_camera = capture._world_to_camera[0]
    centre = -world_to_camera[:3, :3].T @ world_to_camera[:3, 3]
    np.testing.assert_allclose(centre, [493.3398, -968.1090, 926.9017], atol=0.02)
    np.testing.assert_allclose(world_to_camera[2, :3], [-0.481672, 0.870695, 0.099408], atol=1e-5)
    seen = world_to_camera @ [-60.4, 29.5, 993.3, 1]
    np.testing.assert_allclose(seen[:3], [-41.0451, 23.6707, 1141.9349], atol=0.02)
    point = K[0] @ (world_to_camera @ [-60.4, 29.5, 993.3, 1])[:3]
    np.testing.assert_allclose(point[:2] / point[2] * 64, [1040.870, 1998.113], atol=0.05)
    np.testing.assert_allclose(point[:2] / point[2] * 16, [260.218, 499.528], atol=0.02)


def test_cameras_are_in_the_head_frame_in_metres(folder):
    capture = read_capture(folder)
    for t in (0, 3):
        _, pose = capture.camera_matrices(t)
        angle = 0.05 * t
        turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
        head = np.array([0.02, -0.05, 0.07])  # metres
        world = turn @ np.diag([1.0, -1.0, -1.0]) @ (1000 * head) + [-60.4, 29.5, 993.3 + t]
        expected = capture._world_to_camera @ [*world, 1]
        np.testing.assert_allclose(pose @ [*head, 1], np.c_[expected[:, :3] / 1000, np.ones(3)], atol=1e-9)
        assert 1.0 < pose[0, 2, 3] < 1.3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, (0.00012, 0.00012, 0.00012)),
        (8 / 255, (0.07960, 0.07853, 0.10258)),
        (0.10, (0.22370, 0.20642, 0.26509)),
        (0.25, (0.43252, 0.39445, 0.50492)),
        (0.50, (0.69398, 0.63068, 0.80652)),
        (0.75, (0.91077, 0.82675, 1.0)),
        (1.0, (1, 1, 1)),
    ],
)
def test_the_colour_transform_has_its_golden_values(value, expected):
    color = linear_to_srgb(np.full((2, 3), value, np.float32))
    np.testing.assert_allclose(color, [expected] * 2, atol=2e-5)


def test_colours_saturate_where_they_should():
    np.testing.assert_allclose(linear_to_srgb(np.array([[0.8629, 0.9988, 0.6901]], np.float32)), 1, atol=1e-4)


@pytest.mark.parametrize("masks", [True, False])
def test_views_lose_the_studio(tmp_path, masks):
    capture = read_capture(write_ava_capture(tmp_path, frames=3, masks=masks))
    view = capture.view(1, 0)
    linear, mask = stored(int(capture.timestep_ids[1]), 0)
    inside = mask > 0
    expected = linear_to_srgb(linear.astype(np.float32) / 255) * 255
    assert np.abs(view.image.astype(float) - expected)[inside].mean() < 3  # AVIF is not lossless
    assert (
        view.image[~inside & (view.mask == 0)].max() <= 40
    )  # a step of lossy AVIF in the dark is many of gamma's
    assert np.mean((view.mask > 127) == inside) > 0.99
    assert view.depth is None
    uncut = capture.uncut(1, 0).astype(float)
    studio = linear_to_srgb(np.full(3, 30 / 255, np.float32)) * 255
    assert np.abs(uncut - expected)[inside].mean() < 3
    assert np.abs(uncut - studio)[~inside].mean() < 12
    assert capture.has_background


def test_a_dropped_frame_is_none_and_not_another_one(folder):
    capture = read_capture(folder)
    assert capture.view(2, 1) is None
    assert capture.uncut(2, 1) is None
    assert capture.view(2, 0) is not None
    assert capture.view(3, 1) is not None


def test_it_packs_into_shards_without_findings(folder, tmp_path):
    capture = read_capture(folder)
    out = tmp_path / "shards"
    manifest = pack(
        [capture], out, size=48, heldout=0, input_sets=2, n_inputs=3, prior="none", max_input_degrees=180
    )
    assert sorted(manifest.shards[0].views) == [2, 3, 3, 3, 3, 3]
    findings = [f for f in check(out) if "split is empty" not in f.what]
    assert findings == []
    data = open_shards(out, "train").read("AAN112")
    target = data.targets[0]
    assert target.expression.shape == (256,)
    t = capture.timestep_ids.index(target.timestep)
    K, pose = capture.camera_matrices(t)
    window = crop_window(K[0], pose[0], SIZE)
    assert window[2] == 42
    torch.testing.assert_close(
        target.cameras.K[0].double(), torch.from_numpy(fit_intrinsics(K[0], window, 48)), atol=1e-3, rtol=0
    )
    pixels, _ = target.cameras.project(torch.zeros(1, 3))
    assert ((pixels > 0) & (pixels < 48)).all()


def test_missing_parts_are_sentences(tmp_path):
    folder = write_ava_capture(tmp_path, frames=2, codes=False)
    with pytest.raises(UserError, match="training, fitting and driving need expression codes"):
        read_capture(folder)
    (folder / "decoder/frame_list.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no list of seg_id,frame_id"):
        read_capture(folder)
    calibration = folder / "decoder/camera_calibration.json"
    content = json.loads(calibration.read_text())
    content["KRT"][0]["T"][0][0] = float("nan")
    calibration.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not finite"):
        read_capture(folder)
    content["KRT"] = []
    calibration.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no zip with pictures"):
        read_capture(folder)
    calibration.unlink()
    with pytest.raises(UserError, match=r"camera_calibration.json is not there"):
        read_capture(folder)


@pytest.mark.parametrize(
    "table",
    [
        {7: np.ones(256, np.float32)},
        {"000007": np.ones((16, 4, 4))},
        {"7": list(range(256))},
        {7: torch.ones(256)},
        {7: np.ones(256, np.float64).reshape(1, 256)},
    ],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_codes_of_many_kinds_are_read(tmp_path, table, protocol):
    file = tmp_path / "codes.pkl"
    file.write_bytes(pickle.dumps(table, protocol))
    codes = read_codes(file)
    assert list(codes) == [7]
    assert codes[7].shape == (256,)
    assert codes[7].dtype == np.float32


class Hostile:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    file = tmp_path / "codes.pkl"
    for content in ({7: Hostile()}, Hostile()):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"it wants to call builtins.print"):
            read_codes(file)
    file.write_bytes(b"\x80\x04no pickle")
    with pytest.raises(UserError, match="no table of expression codes"):
        read_codes(file)
    file.write_bytes(pickle.dumps({7: np.ones(255)}))
    with pytest.raises(UserError, match="256 finite numbers"):
        read_codes(file)
    assert capsys.readouterr().out == ""
