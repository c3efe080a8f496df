import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from avatars.errors import UserError
from shards import BatchLoader, check, open_shards, pack, read_capture


def write_video(root, frames=7, size=(48, 40), arrays=True):
    """`dataset/<id>` and the tracker's output, as FlashAvatar wants them; a head that turns before one
    camera.
    """
    folder, output = root / "dataset" / "anna", root / "metrical-tracker" / "output" / "anna" / "checkpoint"
    output.mkdir(parents=True)
    for name in ("imgs", "alpha", "parsing"):
        (folder / name).mkdir(parents=True)
    y, x = np.mgrid[: size[0], : size[1]]
    alpha = np.where(((x - 20) / 12) ** 2 + ((y - 24) / 16) ** 2 < 1, 255, 0).astype(np.uint8)
    kind = (
        (lambda a: np.asarray(a, np.float32))
        if arrays
        else (lambda a: torch.tensor(np.asarray(a, np.float32)))
    )
    for t in range(frames):
        angle = 0.2 * (t - frames / 2)
        R = np.array([[np.cos(angle), 0, np.sin(angle)], [0, -1, 0], [np.sin(angle), 0, -np.cos(angle)]])
        rng = np.random.default_rng(t)
        content = {
            "flame": {
                "exp": kind(rng.normal(size=(1, 100))),
                "shape": kind(np.ones((1, 300))),
                "eyes": kind(np.arange(12)[None]),
                "eyelids": kind([[0.25, 0.75]]),
                "jaw": kind([[1, 0, 0, 0, 1, 0]]),
            },
            "opencv": {
                "R": kind(R[None]),
                "t": kind([[0.0, 0.0, 1.0]]),
                "K": kind([[[150, 0, 20], [0, 150, 24], [0, 0, 1]]]),
            },
            "img_size": np.array(size),
            "frame_id": t,
            "global_step": 10 * t,
        }
        torch.save(content, output / f"{t:05d}.frame")
        image = np.stack([100 + x, 80 + y, 90 + 8 * t + 0 * x], -1).astype(np.uint8)
        Image.fromarray(image).save(folder / "imgs" / f"{t + 1:05d}.jpg", quality=98)
        Image.fromarray(alpha).save(folder / "alpha" / f"{t + 1:05d}.jpg", quality=98)
    Image.fromarray(np.where(y < 30, 255, 0).astype(np.uint8)).save(folder / "parsing" / "00001_neckhead.png")
    (folder / "imgs" / f"{frames:05d}.jpg").unlink()  # the video's last picture is missing
    return folder


@pytest.mark.parametrize("arrays", [True, False])
def test_the_layout_is_read(tmp_path, arrays):
    capture = read_capture(write_video(tmp_path, arrays=arrays))
    assert (capture.subject, capture.layout, capture.expression_kind) == (
        "anna",
        "metrical-tracker",
        "flame-135",
    )
    assert capture.timestep_ids == [f"{t:05d}" for t in range(6)]
    assert capture.size == (48, 40)
    assert capture.identity.shape == (300,)
    code = capture.expressions[3]
    np.testing.assert_allclose(code[:100], np.random.default_rng(3).normal(size=100), rtol=1e-6)
    np.testing.assert_allclose(code[100:112], np.arange(12))
    np.testing.assert_allclose(code[112:126], [0.25, 0.75, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0])
    K, pose = capture.camera_matrices(3)
    np.testing.assert_allclose(K[0, 0], [150, 0, 20])
    np.testing.assert_allclose(pose[0, :3, 3], [0, 0, 1])


def test_axis_angles_become_the_rows_of_rotations(tmp_path):
    folder = write_video(tmp_path)
    for frame in (tmp_path / "metrical-tracker/output/anna/checkpoint").iterdir():
        content = torch.load(frame, weights_only=False)
        content["flame"] |= {"jaw": np.array([[0.3, 0, 0]]), "eyes": np.array([[0, 0.2, 0, 0, 0, 0.1]])}
        torch.save(content, frame)
    code = read_capture(folder).expressions[2]
    c, s = np.cos([0.3, 0.2, 0.1]), np.sin([0.3, 0.2, 0.1])
    np.testing.assert_allclose(code[114:120], [1, 0, 0, 0, c[0], -s[0]], atol=1e-6)
    np.testing.assert_allclose(code[100:106], [c[1], 0, s[1], 0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(code[106:112], [c[2], -s[2], 0, s[2], c[2], 0], atol=1e-6)


def test_the_picture_of_a_frame_is_the_one_after(tmp_path):
    capture = read_capture(write_video(tmp_path))
    for t in (1, 4):
        view = capture.view(t, 0)
        inside = view.mask == 255
        assert abs(np.median(view.image[..., 2][inside]) - (90 + 8 * t)) <= 2
        assert (view.image[view.mask == 0] == 0).all()
        uncut = capture.uncut(t, 0)
        assert uncut[view.mask == 0].any()
        np.testing.assert_array_equal(uncut[inside], view.image[inside])
    assert (capture.view(0, 0).mask[31:] == 0).all()  # parsed
    assert (capture.view(1, 0).mask[31:36] == 255).any()  # not parsed


def test_a_video_packs_although_it_has_one_camera(tmp_path):
    capture = read_capture(write_video(tmp_path))
    manifest = pack([capture], tmp_path / "x", size=32, heldout=0, input_sets=3, prior="none")
    assert manifest.shards[0].views == (1,) * 6
    assert not [f for f in check(tmp_path / "x") if f.severity == "error"]
    inputs = open_shards(tmp_path / "x", "train").read("anna").input_sets[0]
    assert inputs.provenance["camera_ids"] == ["video"] * 4
    assert len(set(inputs.provenance["timesteps"])) == 4
    with BatchLoader(tmp_path / "x", "train", seed=0, micro_batch=2, views=1) as loader:
        assert next(loader)["target_images"].shape == (2, 1, 3, 32, 32)


class Hostile:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def test_files_that_are_no_frames_are_sentences(tmp_path, capsys):
    folder = write_video(tmp_path)
    frame = tmp_path / "metrical-tracker/output/anna/checkpoint/00002.frame"
    torch.save({"flame": Hostile()}, frame)
    with pytest.raises(UserError, match=r"00002.frame is no frame of metrical-tracker"):
        read_capture(folder)
    frame.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match=r"00002.frame is no frame"):
        read_capture(folder)
    torch.save({"flame": {}}, frame)
    with pytest.raises(UserError, match="opencv"):
        read_capture(folder)
    assert capsys.readouterr().out == ""
    for file in frame.parent.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="Run metrical-tracker"):
        read_capture(folder)
