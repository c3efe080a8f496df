"""Shards of every codec and crop: what comes back, what is refused, and that decoding leaves other threads alone."""

import io
import json
import struct
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_captures import pack_tiny, write_tiny_capture

from avatars.errors import UserError
from shards import (
    BatchLoader,
    Capture,
    Manifest,
    PriorMaps,
    PriorSettings,
    check,
    info,
    open_shards,
    pack,
    read_capture,
    write_with_priors,
)
from shards.capture import View
from shards.codecs import CODECS, decode_picture, encode_picture, extension
from shards.pictures import crop_and_resize, crop_window, resample_depth

LOSSLESS = ("png", "webp-lossless")


def smooth_picture(size=64):
    y, x = np.mgrid[:size, :size] / size
    return np.round(127 + 120 * np.stack([np.sin(5 * x), np.cos(4 * y), np.sin(3 * x * y)], -1)).astype(
        np.uint8
    )


def decoded(data, codec, size=64):
    out = np.empty((size, size, 3), np.uint8)
    decode_picture(data, out, "here", codec)
    return out


@pytest.mark.parametrize("codec", CODECS)
def test_pictures_come_back(codec):
    picture = smooth_picture()
    data = encode_picture(picture, codec)
    again = decoded(memoryview(data), codec)
    if codec in LOSSLESS:
        np.testing.assert_array_equal(again, picture)
    else:
        assert 0 < np.abs(again.astype(int) - picture).mean() < 2
    assert len(encode_picture(picture, "webp", 30)) < len(encode_picture(picture, "webp", 95))
    with Image.open(io.BytesIO(data)) as opened:  # what other tools see
        assert opened.format.lower() == codec.split("-")[0]


@pytest.mark.parametrize("codec", CODECS)
def test_shards_of_every_codec_work_everywhere(codec, tmp_path):
    folder = pack_tiny(tmp_path, size=24, views=4, codec=codec)
    capture = read_capture(tmp_path / "captures" / "s00")
    manifest = Manifest.load(folder)
    assert json.loads((folder / "manifest.json").read_text())["settings"]["codec"] == codec
    assert manifest.settings.codec == codec
    assert f"24 x 24 {codec}" in str(info(folder))
    assert check(folder) == []
    subject = open_shards(folder, "train").read("s00")
    images = subject.targets[2].images([3, 1])
    truth = torch.from_numpy(np.stack([capture.view(2, v).image for v in (3, 1)])).permute(0, 3, 1, 2) / 255
    difference = (images - truth).abs()
    assert difference.max() < 1e-6 if codec in LOSSLESS else 1e-6 < difference.mean() < 0.03
    batches = []
    for place in (folder, f"file://{folder}"):  # by the index, and streamed by WebDataset
        with BatchLoader(place, "train", seed=0, micro_batch=2, views=3, threads=2) as loader:
            batches.append(next(loader))
    assert batches[0]["ids"] == batches[1]["ids"]
    for name in ("input_images", "target_images", "target_masks"):
        assert torch.equal(batches[0][name], batches[1][name])
    with_priors = write_with_priors(
        folder, tmp_path / "more", lambda inputs: PriorMaps(), PriorSettings(position="depth")
    )
    assert with_priors.settings.codec == codec
    again = open_shards(tmp_path / "more", "train").read("s00").input_sets[0]
    assert torch.equal(again.images, subject.input_sets[0].images)


def test_the_same_captures_give_the_same_bytes_in_every_codec(tmp_path):
    capture = read_capture(write_tiny_capture(tmp_path, "s00", size=24, views=4, timesteps=6))
    for codec in CODECS:
        made = [
            pack(
                [capture],
                tmp_path / f"{codec}{k}",
                size=24,
                heldout=0,
                input_sets=1,
                codec=codec,
                threads=1 + k,
            )
            for k in range(2)
        ]
        assert made[0].fingerprint == made[1].fingerprint
    assert (
        pack([capture], tmp_path / "other", size=24, heldout=0, input_sets=1).fingerprint
        != made[0].fingerprint
    )


def png(width, height, kind=(8, 2, 0, 0, 0), rows=b"", more=()):
    """A PNG by hand, with `more` chunks before its pixels."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, *kind)),
        *more,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def saved(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


SMALL = Image.new("RGB", (64, 64), (9, 8, 7))


@pytest.mark.parametrize(
    ("codec", "data", "sentence"),
    [
        ("png", png(60_000, 60_000), "is a picture of 60000 x 60000 pixels where 64 x 64 are declared"),
        ("png", png(64, 63), "is a picture of 63 x 64 pixels"),
        ("png", png(64, 64, rows=bytes(100)), "is not a readable PNG"),
        ("png", png(64, 64, more=[(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0))]),
         "it becomes RGB of 9000 x 9000 pixels"),
        ("png", png(64, 64, more=[(b"iCCP", b"profile\0\0" + zlib.compress(bytes(200_000_000)))]),
         "is not a readable PNG"),
        ("png", png(64, 64, (16, 2, 0, 0, 0)), "not an 8-bit RGB picture"),
        ("png", png(64, 64, (8, 6, 0, 0, 0)), "not an 8-bit RGB picture"),
        ("png", png(64, 64, (8, 2, 0, 0, 1)), "without interlacing"),
        ("png", encode_picture(smooth_picture(), "png")[:-400], "is not a readable PNG"),
        ("png", encode_picture(smooth_picture(), "jpeg"), "no PNG header"),
        ("png", b"", "no PNG header"),
        ("jpeg", encode_picture(smooth_picture(), "png"), "is not a readable JPEG"),
        ("jpeg", encode_picture(smooth_picture(), "jpeg")[:-900], "is not a readable JPEG"),
        ("webp", encode_picture(np.zeros((3000, 3000, 3), np.uint8), "webp"), "is a picture of 3000 x 3000 pixels"),
        ("webp", encode_picture(smooth_picture(32), "webp"), "is a picture of 32 x 32 pixels where 64 x 64"),
        ("webp", encode_picture(smooth_picture(), "webp")[:-200], "is not a readable WebP"),
        ("webp", encode_picture(smooth_picture(), "webp")[:27], "is not a readable WebP"),
        ("webp", encode_picture(smooth_picture(), "png"), "no WebP header"),
        ("webp", saved(SMALL, format="WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64))]),
         "not a plain picture"),
        ("webp-lossless", saved(Image.new("RGBA", (64, 64), (9, 8, 7, 99)), format="WEBP", lossless=True),
         r"alpha|not a plain picture"),
        ("webp-lossless", encode_picture(smooth_picture(), "webp-lossless")[:-300], "is not a readable WebP"),
    ],
)  # fmt: skip
def test_broken_and_hostile_pictures_are_refused(codec, data, sentence):
    with pytest.raises(UserError, match=f"^here.*{sentence}"):
        decoded(data, codec)


def test_a_png_is_inflated_only_as_far_as_it_has_pixels():
    rows = b"".join(b"\0" + bytes([row]) * 192 for row in range(64))
    assert decoded(png(64, 64, rows=rows + bytes(30_000_000)), "png")[63, 0].tolist() == [63, 63, 63]


def test_a_bomb_in_a_shard_ends_neither_loader_nor_check(tmp_path):
    from shards.tarfiles import ShardReader, ShardWriter

    folder = pack_tiny(tmp_path, size=24, views=4, codec="webp", subjects=2)
    shard = Manifest.load(folder).shards[0]
    reader = ShardReader(folder / shard.path, shard.index)
    samples = {key: reader.read(key, list(reader.extensions(key))) for key in reader.keys}
    bomb = encode_picture(np.zeros((3000, 3000, 3), np.uint8), "webp")
    with ShardWriter(folder / shard.path) as writer:
        for key, members in samples.items():
            writer.write(key, members | ({"00.webp": bomb} if key.startswith("inputs") else {}))
    content = json.loads((folder / "manifest.json").read_text())
    content["shards"][0] |= {"bytes": writer.size, "sha256": writer.sha256, "index": writer.index}
    (folder / "manifest.json").write_text(json.dumps(content))
    assert any("3000 x 3000 pixels where 24 x 24" in str(finding) for finding in check(folder))
    with (
        BatchLoader(folder, "train", seed=0, micro_batch=1, views=2) as loader,
        pytest.raises(UserError, match=r"inputs-00\d\.00\.webp is a picture of 3000 x 3000"),
    ):
        next(loader)


@pytest.mark.parametrize("codec", CODECS)
def test_decoding_releases_the_interpreter_lock(codec):
    """While one thread decodes another one computes; a lock that were kept would leave it a few switches' time."""
    size = 1024
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8)
    data, decoding, done = encode_picture(picture, codec), [0.0], threading.Event()
    out = np.empty_like(picture)

    def work():
        started = time.thread_time()
        for _ in range(8):
            decode_picture(data, out, "here", codec)
        decoding[0] = time.thread_time() - started
        done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        started = time.thread_time()
        while not done.is_set():
            sum(range(50))
        beside = time.thread_time() - started
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert beside > 0.3 * decoding[0]


def test_unknown_codecs_and_crops_are_sentences(tmp_path):
    capture = read_capture(write_tiny_capture(tmp_path, "s00", size=24, views=4, timesteps=6))
    options = {"size": 24, "heldout": 0, "input_sets": 1}
    with pytest.raises(UserError, match="no codec 'avif'; the codecs are jpeg, png, webp, webp-lossless"):
        pack([capture], tmp_path / "x", codec="avif", **options)
    with pytest.raises(UserError, match="no crop 'face'; the crops are head and full"):
        pack([capture], tmp_path / "x", crop="face", **options)
    assert not (tmp_path / "x").exists()
    pack([capture], tmp_path / "x", **options)
    text = (tmp_path / "x" / "manifest.json").read_text()
    (tmp_path / "x" / "manifest.json").write_text(text.replace('"jpeg"', '"jxl"'))
    with pytest.raises(UserError, match=r"manifest\.json cannot be read .*no codec 'jxl'"):
        Manifest.load(tmp_path / "x")


# --------------------------------------------------------------------------------------------- crops


class Cut(Capture):
    """A capture as a camera with a narrower sensor would have made it: `rows` and `columns` of its pictures."""

    def __init__(self, capture, rows, columns):
        self.__dict__ |= capture.__dict__
        self._whole, self._rows, self._columns = capture, rows, columns
        self.has_depth = capture.has_depth
        self.layout = capture.layout
        self.size = (rows.stop - rows.start, columns.stop - columns.start)

    def camera_matrices(self, t):
        K, poses = self._whole.camera_matrices(t)
        K = np.array(K)
        K[:, 0, 2] -= self._columns.start
        K[:, 1, 2] -= self._rows.start
        return K, poses

    def view(self, t, v, depth=True):
        view = self._whole.view(t, v, depth)
        part = (self._rows, self._columns)
        return View(view.image[part], view.mask[part], None if view.depth is None else view.depth[part])


@pytest.mark.parametrize(
    "part", [(slice(2, 48), slice(8, 40)), (slice(6, 38), slice(0, 46))], ids=["high", "wide"]
)
@pytest.mark.parametrize("crop", ["head", "full"])
def test_points_of_the_head_land_on_their_own_colours_in_every_crop(part, crop, tmp_path):
    """Points from the source's depth and cameras, projected by the packed cameras, meet the pixels they came from."""
    capture = Cut(read_capture(write_tiny_capture(tmp_path, "s00", size=48, timesteps=6, views=6)), *part)
    side = max(capture.size) if crop == "full" else min(capture.size)
    made = pack(
        [capture],
        tmp_path / "x",
        size=side,
        heldout=0,
        input_sets=1,
        crop=crop,
        codec="png",
        max_input_degrees=90,
    )
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["settings"]["crop"] == crop
    assert made.settings.crop == crop
    assert [finding.what for finding in check(tmp_path / "x")] == ["the heldout split is empty."]
    data = open_shards(tmp_path / "x", "train").read("s00")
    seen = 0
    for t in range(6):
        target = data.targets[t]
        K, poses = capture.camera_matrices(t)
        images, masks = target.images(range(6)), target.masks(range(6))
        for v in range(6):
            view = capture.view(t, v)
            rows, columns = np.nonzero((view.depth > 0) & (view.mask > 0))
            rays = np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))], -1) @ np.linalg.inv(K[v]).T
            points = (rays * view.depth[rows, columns, None] - poses[v, :3, 3]) @ poses[v, :3, :3]
            pixels, _ = target.cameras[v].project(torch.from_numpy(points).float())
            x, y = np.floor(pixels[0].numpy()).astype(int).T
            inside = (x >= 0) & (y >= 0) & (x < side) & (y < side)
            assert inside.all() if crop == "full" else inside.mean() > 0.8
            packed = (images[v].permute(1, 2, 0).numpy() * 255).round()[y[inside], x[inside]]
            np.testing.assert_array_equal(packed, view.image[rows[inside], columns[inside]])
            seen += int(inside.sum())
            if crop == "full":  # nothing of the picture is lost, and what is beside it is black
                assert (masks[v].numpy() > 0).sum() == (view.mask > 0).sum()
    assert seen > 2000
    inputs = data.input_sets[0]
    known = inputs.confidence[0, 0] > 1
    pixels, _ = inputs.cameras[0].project(inputs.positions[0][:, known].T)
    rows, columns = torch.nonzero(known, as_tuple=True)
    torch.testing.assert_close(pixels[0], torch.stack([columns, rows], 1) + 0.5, atol=0.02, rtol=0)


def test_the_whole_picture_is_in_the_full_crop():
    K = np.array([[100.0, 0, 30], [0, 100.0, 60], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, 3] = [0.0, 0.1, 1.0]  # the head projects to (30, 70)
    assert crop_window(K, pose, (100, 60), "full") == (-20, 0, 100)
    assert crop_window(K, pose, (60, 100), "full") == (0, 0, 100)  # the head is low: room goes below
    pose[0, 3] = 0.2  # and now to (50, 70), where the middle cannot be
    assert crop_window(K, pose, (100, 60), "full") == (0, 0, 100)
    assert crop_window(K, pose, (60, 60), "full") == (0, 0, 60)
    picture = np.arange(1, 25, dtype=np.uint8).reshape(6, 4)
    whole = crop_and_resize(picture, (-1, 0, 6), 6)
    np.testing.assert_array_equal(whole[:, 1:5], picture)
    assert whole[:, [0, 5]].max() == 0
    np.testing.assert_array_equal(resample_depth(picture.astype(np.float32), (-1, 0, 6), 6), whole)


def test_members_are_called_by_their_codec():
    assert [extension(codec) for codec in CODECS] == ["jpg", "png", "webp", "webp"]
