"""What a fit is made from, and what is kept from it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from egg_head import cameras_around
from PIL import Image
from tiny_captures import write_tiny_capture

from avatars.errors import UserError
from avatars.flashavatar import FlashAvatarConfig
from avatars.method import load_avatar
from eval.evaluate import evaluate
from eval.metrics import PSNR
from eval.protocol import synthetic_heldout
from shards import open_shards, pack, read_capture
from shards.synth.tracking import export_tracking
from train.fits import FitSource, run_fit
from train.fits.flashavatar import FlashAvatarFitConfig
from train.fits.heldout import measure_held_out, off_axis_degrees
from train.fits.pictures import from_capture, from_shards, select

SMALL = FlashAvatarFitConfig(
    model=FlashAvatarConfig(uv_resolution=24, sh_degree=0, mlp_width=8, mlp_layers=1),
    steps=6,
    checkpoint_every=3,
    look="pictures",
    background="random",
    opacity=0.9,
    lpips_weight=0.0,
)


@pytest.fixture(scope="module")
def capture_folder(tmp_path_factory):
    """A tiny capture whose identity code has the built-in head's length."""
    path = write_tiny_capture(tmp_path_factory.mktemp("capture"), "s00", timesteps=6, views=12)
    description = json.loads((path / "capture.json").read_text())
    description["head"]["identity"] = [0.0] * 100
    (path / "capture.json").write_text(json.dumps(description))
    return path


@pytest.fixture
def video_folder(capture_folder, tmp_path):
    return export_tracking(capture_folder, "metrical", tmp_path)


def test_held_out_views_and_expressions_are_never_fitted():
    cameras = cameras_around([float(degree) for degree in range(-80, 81, 10)], 32)
    views = select(FitSource("views", views=6, held_views=4, held_timesteps=0.25), 8, cameras)
    assert {t for t, _ in views.fitted} == set(range(6))
    assert {t for t, _ in views.held} == {6, 7}
    assert not {v for _, v in views.fitted} & {v for _, v in views.held}
    assert (len(views.fitted), len(views.held)) == (6 * 6, 2 * 4)
    everything = select(FitSource("views", views=0, held_views=4), 10, cameras)
    assert len(everything.fitted) == 8 * 13

    video = select(FitSource("video", held_timesteps=0.2), 10, cameras)
    assert video.fitted == [(t, 8) for t in range(8)]  # the camera straight before the face
    assert video.held == [(8, 8), (9, 8)]
    for source in (FitSource("views", held_views=17), FitSource("video", held_timesteps=0.6)):
        with pytest.raises(UserError, match="leave nothing to fit to"):
            select(source, 1 if source.pictures == "video" else 8, cameras)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"views": -1}, "views is -1"),
        ({"held_timesteps": 1.0}, "held_timesteps is 1.0"),
        ({"size": 8}, "size is 8"),
    ],
)
def test_settings_that_cannot_be_are_a_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        FitSource(**settings)


def test_pictures_of_a_capture_are_its_own(capture_folder):
    capture = read_capture(capture_folder)
    fitted, held = from_capture(capture, FitSource("views", views=5, held_views=3, held_timesteps=0.3))
    assert held is not None
    assert (len(fitted), len(held)) == (4 * 5, 2 * 3)
    assert fitted.images.dtype == torch.uint8
    t, v = 2, capture.camera_ids.index(fitted.provenance["camera_ids"][11])
    assert fitted.provenance["timesteps"][11] == capture.timestep_ids[t]
    image, mask = fitted.take([11])
    wanted = capture.view(t, v)
    np.testing.assert_array_equal(np.round(image[0].permute(1, 2, 0).numpy() * 255), wanted.image)
    np.testing.assert_array_equal(np.round(mask[0, 0].numpy() * 255), wanted.mask)
    torch.testing.assert_close(fitted.cameras.world_to_camera[11], capture.cameras(t).world_to_camera[v])
    torch.testing.assert_close(fitted.expressions[11], torch.from_numpy(capture.expressions[t]))


def test_a_smaller_size_moves_the_intrinsics(capture_folder):
    small, _ = from_capture(read_capture(capture_folder), FitSource("views", views=2, size=24))
    large, _ = from_capture(read_capture(capture_folder), FitSource("views", views=2))
    assert (small.size, large.size) == ((24, 24), (48, 48))
    torch.testing.assert_close(small.cameras.K[:, :2], large.cameras.K[:, :2] / 2)


def test_a_tracked_video_is_fitted_and_measured(video_folder, tmp_path):
    fitted, held = from_capture(read_capture(video_folder), FitSource("video", held_timesteps=0.3))
    assert held is not None
    assert (len(fitted), len(held)) == (4, 2)
    assert fitted.head == "makehuman"
    start = SMALL.build(fitted).avatar()
    before, _ = measure_held_out(start, held)
    result = run_fit(SMALL, fitted, tmp_path / "fit")
    after, each = measure_held_out(result.avatar, held)
    assert len(each) == after["pictures"] == 2
    assert after["psnr"] > before["psnr"]
    assert "lpips" in {*after, *after["missing"]}
    result.avatar.save(tmp_path / "fit")
    avatar = load_avatar(tmp_path / "fit")  # what evaluation, viewer and export do
    assert avatar.gaussians(held.expressions[0]).means.isfinite().all()
    assert max(off_axis_degrees(fitted)) < 30


def test_tracking_and_pictures_of_different_lengths_are_a_sentence(video_folder):
    last = sorted((video_folder / "imgs").glob("*.jpg"))[-1]
    shutil.copy(last, last.with_name("00007.jpg"))
    with pytest.raises(UserError, match=r"has 6 tracked frames and .*imgs has 7 pictures; track the video"):
        from_capture(read_capture(video_folder), FitSource("video"))
    last.with_name("00007.jpg").unlink()
    last.unlink()
    with pytest.raises(UserError, match=r"has 6 tracked frames and .*imgs has 5 pictures"):
        from_capture(read_capture(video_folder), FitSource("video"))


def test_a_video_without_a_visible_face_is_a_sentence(video_folder):
    for file in (video_folder / "alpha").glob("*.jpg"):
        Image.new("L", (48, 48)).save(file)
    fitted, _ = from_capture(read_capture(video_folder), FitSource("video"))
    with pytest.raises(UserError, match="No picture of s00 shows the tracked head"):
        SMALL.build(fitted)


def test_codes_of_another_kind_are_a_sentence(video_folder):
    (video_folder / "headsplat.json").unlink()  # what is left says that it is FLAME's
    fitted, _ = from_capture(read_capture(video_folder), FitSource("video"))
    with pytest.raises(UserError, match=r"tracked with the head 'flame2020'.*give --head"):
        SMALL.build(fitted)
    fitted.head = "makehuman"
    with pytest.raises(UserError, match="have flame-135 codes of 135 numbers"):
        SMALL.build(fitted)
    fitted.expressions = fitted.expressions[:, :52]
    with pytest.raises(UserError, match=r"flame-135 codes .* is driven by arkit-52"):
        SMALL.build(fitted)


def test_more_pictures_than_memory_are_a_sentence(capture_folder, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    with pytest.raises(
        UserError, match=r"pictures of s00 with 48 pixels take 0\.0 GiB and 0\.0 GiB are free"
    ):
        from_capture(read_capture(capture_folder), FitSource("views"))


def test_a_capture_has_no_input_sets_and_shards_no_video(capture_folder, tiny_shards):
    with pytest.raises(UserError, match="holds no input sets"):
        from_capture(read_capture(capture_folder), FitSource())
    subject = open_shards(tiny_shards, "heldout").read("s03")
    with pytest.raises(UserError, match="give --captures"):
        from_shards(subject, FitSource("video"))


def test_only_the_first_pictures_of_an_input_set_are_fitted_when_asked(tiny_shards):
    subject = open_shards(tiny_shards, "heldout").read("s03")
    whole, one = from_shards(subject, FitSource()), from_shards(subject, FitSource(inputs=1))
    assert (len(whole), len(one)) == (4, 1)
    torch.testing.assert_close(one.images[0], whole.images[0])
    torch.testing.assert_close(one.cameras.K[0], whole.cameras.K[0])
    assert one.provenance["timesteps"] == whole.provenance["timesteps"][:1]
    assert one.provenance["camera_ids"] == whole.provenance["camera_ids"][:1]
    with pytest.raises(UserError, match="input sets of 4 pictures and 5 were asked for"):
        from_shards(subject, FitSource(inputs=5))


def test_evaluation_measures_nothing_that_a_fit_to_views_of_shards_saw(capture_folder, tmp_path):
    pack([read_capture(capture_folder)], tmp_path / "shards", size=48, heldout=["s00"], input_sets=1)
    shards = open_shards(tmp_path / "shards", "heldout")
    fitted = from_shards(shards.read("s00"), FitSource("views", views=3))
    fit = SMALL.build(fitted)
    fit.advance()
    seen = set(zip(fitted.provenance["timesteps"], fitted.provenance["camera_ids"], strict=True))
    assert len(seen) == len(fitted) == 4 * 3

    protocol = synthetic_heldout(shards, metrics=(PSNR,))
    rows = evaluate(
        "flashavatar-views",
        lambda _: fit.avatar(),
        shards,
        protocol,
        checkpoint="x",
        out=tmp_path / "results",
    )
    measured = {(picture["timestep"], picture["camera"]) for picture in rows[0].pictures}
    assert not {t for t, _ in seen} & {t for t, _ in measured}
    assert not {c for _, c in seen} & {c for _, c in measured}
