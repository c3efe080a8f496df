import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_captures import write_tiny_capture

from avatars.errors import UserError
from shards import find_captures, read_capture


@pytest.fixture
def folder(tmp_path):
    return write_tiny_capture(tmp_path, "s00", timesteps=2, views=4, size=24)


def edited(folder, change):
    file = folder / "capture.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


def test_the_synthetic_layout_is_read(folder):
    capture = read_capture(folder)
    assert (capture.subject, capture.capture_id, capture.layout) == ("s00", "s00", "headsplat-synthetic")
    assert capture.expression_kind == "arkit-52"
    assert capture.expressions.shape == (2, 52)
    assert capture.expressions.dtype == np.float32
    assert capture.timestep_ids == ["00000", "00001"]
    assert capture.camera_ids == ["c00", "c01", "c02", "c03"]
    assert capture.size == (24, 24)
    assert capture.head == "makehuman"
    assert capture.has_depth


def test_cameras_are_in_the_head_frame(folder):
    capture = read_capture(folder)
    content = json.loads((folder / "capture.json").read_text())
    for t in range(2):
        cameras = capture.cameras(t)
        pose = torch.tensor(content["timesteps"][t]["head_to_world"])
        studio = torch.tensor([c["world_to_camera"] for c in content["cameras"]])
        head_point = torch.tensor([0.01, 0.05, 0.09, 1.0])
        torch.testing.assert_close(cameras.world_to_camera @ head_point, studio @ (pose @ head_point))


def test_depth_and_pictures_agree_with_the_geometry(folder):
    capture = read_capture(folder)
    for v in range(4):
        view = capture.view(1, v)
        assert view.image.shape == (24, 24, 3)
        assert ((view.depth > 0) <= (view.mask > 0)).all()
        points = capture.cameras(1)[v].unproject(torch.from_numpy(view.depth)[None, None])
        on_head = points[0][:, torch.from_numpy(view.depth > 0)]
        assert on_head.abs().amax(1).lt(torch.tensor([0.085, 0.131, 0.1])).all()
    assert capture.view(0, 0, depth=False).depth is None


def test_a_known_background_is_taken_out_of_the_outline(folder):
    background = np.array([0.010, 0.012, 0.050])  # linear
    before = read_capture(folder).view(0, 0)
    coverage = before.mask[..., None] / 255
    linear = np.where(
        before.image <= 10, before.image / 255 / 12.92, ((before.image / 255 + 0.055) / 1.055) ** 2.4
    )
    shot = linear + (1 - coverage) * background
    encoded = np.where(shot <= 0.0031308, shot * 12.92, 1.055 * shot ** (1 / 2.4) - 0.055)
    Image.fromarray(np.round(encoded * 255).astype(np.uint8)).save(folder / "image/00000/c00.png")
    capture = read_capture(edited(folder, lambda c: c.__setitem__("background_linear", background.tolist())))
    after = capture.view(0, 0).image
    assert ((before.mask > 0) & (before.mask < 255)).sum() > 20
    assert np.abs(after.astype(int) - before.image).max() <= 2
    assert (after[before.mask == 0] == 0).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["cameras"][0]["K"][0].__setitem__(0, float("nan")), "numbers that are not finite"),
        (lambda c: c["cameras"].clear(), "has no cameras"),
        (lambda c: c["timesteps"].clear(), "has no timesteps"),
        (lambda c: c["cameras"][1]["world_to_camera"][0].__setitem__(0, 9.0), "is no rotation"),
        (lambda c: c["cameras"][1]["K"][0].__setitem__(0, 0.0), "focal length is not positive"),
        (lambda c: c["timesteps"][0]["expression"].pop(), "wrong shape"),
        (lambda c: c["timesteps"][1].__setitem__("id", "00000"), "names one of its timesteps twice"),
        (lambda c: c.pop("size"), "lacks a field.*size"),
        (lambda c: c.__setitem__("schema", 2), "schema 2, this version reads up to 1"),
        (lambda c: c.__setitem__("layout", "other"), "layout 'other'"),
    ],
)
def test_a_wrong_description_is_a_sentence(folder, change, sentence):
    with pytest.raises(UserError, match=sentence):
        read_capture(edited(folder, change))


def test_what_is_no_capture_is_a_sentence(tmp_path, folder):
    with pytest.raises(UserError, match="not a folder"):
        read_capture(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a capture"):
        read_capture(tmp_path)
    (folder / "capture.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        read_capture(folder)


def test_pictures_that_are_missing_or_wrong_are_sentences(folder):
    capture = read_capture(folder)
    (folder / "image/00000/c00.png").unlink()
    with pytest.raises(UserError, match=r"image/00000/c00.png is not there: the capture is incomplete"):
        capture.view(0, 0)
    (folder / "image/00000/c01.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not a readable picture"):
        capture.view(0, 1)
    (folder / "mask/00000/c02.png").write_bytes((folder / "mask/00000/c02.png").read_bytes()[:60])
    with pytest.raises(UserError, match="not a readable picture"):
        capture.view(0, 2)
    capture.size = (24, 25)
    with pytest.raises(UserError, match="24 x 24 pixels where the capture declares 24 x 25"):
        capture.view(0, 3)


def test_captures_of_a_folder_and_sequences_of_participants_are_found(tmp_path):
    for name in ("b", "a", ".hidden", "044/sequences/EMO-1", "017/sequences/EMO-1", "017/sequences/EXP-2"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"017 has the sequences EMO-1, EXP-2; name one .* --sequence"):
        find_captures(tmp_path)
    found = find_captures(tmp_path, "EMO-1")
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "017/sequences/EMO-1",
        "044/sequences/EMO-1",
        "a",
        "b",
    ]
    with pytest.raises(UserError, match="044 has the sequences EMO-1; name one"):
        find_captures(tmp_path, "EXP-2")
    with pytest.raises(UserError, match="holds no captures"):
        find_captures(tmp_path / "a")
    with pytest.raises(UserError, match="nowhere is not there"):
        find_captures(tmp_path / "nowhere")
