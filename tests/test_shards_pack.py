import gc
import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_captures import pack_tiny, write_tiny_capture, write_tiny_captures

from avatars.errors import UserError
from shards import Manifest, open_shards, pack, plan, read_capture
from shards.checking import check
from shards.manifest import PackSettings
from shards.packing import pack_shard
from shards.pictures import crop_window, decode_mask, encode_mask, fit_intrinsics, resample_depth


@pytest.fixture(scope="module")
def captures(tmp_path_factory):
    return write_tiny_captures(tmp_path_factory.mktemp("captures"), 3, timesteps=6, views=8, size=40)


@pytest.fixture(scope="module")
def packed(captures, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack([read_capture(c) for c in captures], out, size=40, heldout=1, input_sets=3, timesteps_per_shard=4)
    return out


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_equal_captures_make_equal_bytes(captures, packed, tmp_path):
    again = tmp_path / "again"
    pack(
        [read_capture(c) for c in captures],
        again,
        size=40,
        heldout=1,
        input_sets=3,
        timesteps_per_shard=4,
        threads=1,
    )
    assert hashes(again) == hashes(packed)


def test_manifest_tells_the_truth_about_every_shard(packed):
    manifest = Manifest.load(packed)
    assert [s.path for s in manifest.shards] == sorted(p.name for p in packed.glob("*.tar"))
    assert len(manifest.train) == 2
    assert len(manifest.heldout) == 1
    for shard in manifest.shards:
        assert hashlib.sha256((packed / shard.path).read_bytes()).hexdigest() == shard.sha256
        with tarfile.open(packed / shard.path) as tar:
            names = tar.getnames()
            assert {(m.uid, m.gid, m.mtime, m.mode) for m in tar} == {(0, 0, 0, 0o644)}
        assert sum(name.startswith("target-") and name.endswith(".json") for name in names) == shard.targets
        assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pth", ".pyd"))]
        assert names[0] == "inputs-000.json"


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # WebDataset leaves its file open
def test_any_webdataset_tool_reads_a_shard(packed):
    wds = pytest.importorskip("webdataset")
    path = str(sorted(packed.glob("*.tar"))[0])
    samples = list(wds.WebDataset(path, shardshuffle=False).decode("rgb8"))
    assert [s["__key__"] for s in samples] == [f"inputs-{j:03d}" for j in range(3)] + [
        f"target-{i:05d}" for i in range(4)
    ] + ["index"]
    assert samples[0]["00.jpg"].shape == (40, 40, 3)
    assert samples[0]["00.position.npy"].shape == (3, 40, 40)
    assert samples[3]["json"]["kind"] == "target"
    gc.collect()  # the warning is this test's, not the next one's


def test_what_comes_back_is_what_was_captured(captures, packed):
    manifest = Manifest.load(packed)
    capture = read_capture(captures[0])
    split = "train" if capture.subject in manifest.train else "heldout"
    data = open_shards(packed, split).read(capture.subject)
    assert [target.timestep for target in data.targets] == capture.timestep_ids
    for t in (0, 5):
        target = data.targets[t]
        assert target.id == f"{capture.subject}/{capture.timestep_ids[t]}"
        assert target.camera_ids == capture.camera_ids
        torch.testing.assert_close(target.expression, torch.from_numpy(capture.expressions[t]))
        torch.testing.assert_close(target.cameras.K, capture.cameras(t).K)
        torch.testing.assert_close(target.cameras.world_to_camera, capture.cameras(t).world_to_camera)
        views = [7, 2]
        images, masks = target.images(views), target.masks(views)
        for i, v in enumerate(views):
            view = capture.view(t, v)
            np.testing.assert_array_equal((masks[i, 0] * 255).round().byte().numpy(), view.mask)
            error = (images[i].permute(1, 2, 0) * 255).numpy() - view.image
            assert np.abs(error).max() <= 24
            assert np.abs(error).mean() < 1
            assert (images[i][:, view.mask == 0] == 0).all()


def test_input_sets_are_four_moments_with_true_positions(captures, packed):
    manifest = Manifest.load(packed)
    subject = manifest.train[0]
    capture = read_capture(next(c for c in captures if c.name == subject))
    data = open_shards(packed, "train").read(subject)
    assert len(data.input_sets) == 3 * 2  # two shards of three
    for inputs in data.input_sets[:2]:
        assert inputs.size == (40, 40)
        assert inputs.subject == subject
        assert inputs.expression_kind == "arkit-52"
        assert inputs.head == "makehuman"
        assert inputs.identity.shape == (10,)
        assert len(set(inputs.provenance["timesteps"])) == 4
        assert len(set(inputs.provenance["camera_ids"])) == 4
        for i, (t, v) in enumerate(
            zip(inputs.provenance["timesteps"], inputs.provenance["camera_ids"], strict=True)
        ):
            t, v = capture.timestep_ids.index(t), capture.camera_ids.index(v)
            torch.testing.assert_close(inputs.expressions[i], torch.from_numpy(capture.expressions[t]))
            view = capture.view(t, v)
            known = torch.from_numpy((view.depth > 0) & (view.mask > 0))
            confidence = inputs.confidence[i, 0]
            assert (confidence[known] == np.float16(np.e)).all()
            assert (confidence[~known] == 1).all()
            points = inputs.positions[i][:, known].T  # (N, 3)
            pixels, depth = inputs.cameras[i].project(points)
            rows, columns = torch.nonzero(known, as_tuple=True)
            torch.testing.assert_close(pixels[0], torch.stack([columns, rows], 1) + 0.5, atol=0.02, rtol=0)
            torch.testing.assert_close(depth[0], torch.from_numpy(view.depth)[known], atol=2e-4, rtol=0)
    assert 0 < manifest.prior_error.position_rms < manifest.prior_error.position_max < 1e-4


def test_input_sets_know_which_targets_they_are_made_of(packed):
    manifest = Manifest.load(packed)
    for shard in manifest.shards:
        with tarfile.open(packed / shard.path) as tar:
            read = lambda name, tar=tar: json.load(tar.extractfile(name))
            timesteps = [read(f"target-{i:05d}.json")["timestep"] for i in range(shard.targets)]
            for j, own in enumerate(shard.inputs):
                used = [picture["timestep"] for picture in read(f"inputs-{j:03d}.json")["pictures"]]
                assert [timesteps[i] for i in own] == [t for t in used if t in timesteps]


def test_code_statistics_are_those_of_the_training_subjects(captures, packed):
    manifest = Manifest.load(packed)
    codes = np.concatenate([read_capture(c).expressions for c in captures if c.name in manifest.train])
    np.testing.assert_allclose(manifest.expression_mean, codes.mean(0), rtol=1e-5)
    np.testing.assert_allclose(manifest.expression_std, codes.std(0), rtol=1e-4)


def test_a_stopped_pack_goes_on(captures, packed, tmp_path, monkeypatch):
    out = tmp_path / "shards"
    options = {"size": 40, "heldout": 1, "input_sets": 3, "timesteps_per_shard": 4}
    opened = [read_capture(c) for c in captures]

    class Stop(BaseException):
        pass

    def dies(t, v, depth=True):
        raise Stop

    monkeypatch.setattr(opened[1], "view", dies)
    with pytest.raises(Stop):
        pack(opened, out, **options)
    made = [f"s00-000{i}.tar{end}" for i in (0, 1) for end in ("", ".packed.json")]
    assert sorted(p.name for p in out.iterdir()) == made
    with pytest.raises(UserError, match=r"holds no manifest.json.*goes on"):
        Manifest.load(out)

    opened = [read_capture(c) for c in captures]
    monkeypatch.setattr(opened[0], "view", dies)  # is not asked again
    pack(opened, out, **options)
    assert hashes(out) == hashes(packed)


def test_other_settings_do_not_go_on_from_a_receipt(captures, tmp_path):
    capture = read_capture(captures[0])
    first = pack_shard(capture, 0, tmp_path, PackSettings(size=40, input_sets=1))["shard"]
    second = pack_shard(capture, 0, tmp_path, PackSettings(size=40, input_sets=2))["shard"]
    assert len(second["inputs"]) == 2
    assert first["sha256"] != second["sha256"]


def test_a_full_disk_is_a_sentence_and_leaves_no_half_shard(captures, tmp_path, monkeypatch):
    out = tmp_path / "shards"
    import shards.tarfiles as tarfiles

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfiles.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*finished shards are kept"):
        pack([read_capture(captures[0])], out, size=40, heldout=0, input_sets=1)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"heldout": ["nobody"]}, "heldout names nobody"),
        ({"heldout": 3}, "at least one must be left"),
        ({"quality": 0}, "quality is 0"),
        ({"prior": "guess"}, "no prior 'guess'"),
        ({"subsampling": "411"}, "subsampling is '411'"),
        ({"n_inputs": 6}, "s00 has 6 timesteps; 6 input timesteps and a target need at least one more"),
        ({"n_inputs": 9, "input_timesteps": "same"}, "s00 has 8 cameras, too few for 9 pictures of the same"),
        ({"input_timesteps": "any"}, "input_timesteps is 'any'; it must be different or same"),
    ],
)
def test_wrong_options_are_sentences(captures, tmp_path, options, sentence):
    with pytest.raises(UserError, match=sentence):
        pack([read_capture(c) for c in captures], tmp_path / "x", **{"size": 40, "heldout": 1, **options})
    assert not (tmp_path / "x").exists()


def test_captures_that_do_not_fit_together(captures, tmp_path):
    write_tiny_capture(tmp_path, "t00")
    file = tmp_path / "t00" / "capture.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"expression_kind": "flame-135"}))
    with pytest.raises(UserError, match="t00 has the expression kind flame-135 where s00 has arkit-52"):
        pack([read_capture(captures[0]), read_capture(tmp_path / "t00")], tmp_path / "x", size=40, heldout=1)
    with pytest.raises(UserError, match="s00 is in two captures"):
        pack([read_capture(captures[0])] * 2, tmp_path / "x", size=40, heldout=1)
    with pytest.raises(UserError, match="no captures"):
        pack([], tmp_path / "x", size=40, heldout=1)


def test_packed_shards_are_not_overwritten(captures, packed):
    before = hashes(packed)
    with pytest.raises(UserError, match="already holds packed shards"):
        pack([read_capture(captures[0])], packed, size=40, heldout=0)
    assert hashes(packed) == before


def test_inputs_of_one_timestep(tmp_path):
    out = pack_tiny(tmp_path, subjects=2, timesteps=3, size=32, input_sets=3, input_timesteps="same")
    manifest = Manifest.load(out)
    assert manifest.settings.input_timesteps == "same"
    assert not [finding for finding in check(out) if finding.severity == "error"]
    for subject in manifest.train:
        sets = open_shards(out, "train").read(subject).input_sets
        for inputs, steps in zip(sets, manifest.split("train")[0].inputs, strict=True):
            assert len(set(inputs.provenance["timesteps"])) == len(steps) == 1
            assert len(set(inputs.provenance["camera_ids"])) == 4
            assert (inputs.expressions == inputs.expressions[0]).all()
    targets = {plan(manifest, "train", seed=0, step=step, micro_batch=1)[0].target for step in range(3)}
    assert targets == {0, 1, 2}  # every timestep is in one set and the target of others
    content = json.loads((out / "manifest.json").read_text())
    content["settings"]["input_timesteps"] = "different"
    (out / "manifest.json").write_text(json.dumps(content))
    assert any("has pictures of the timesteps" in finding.what for finding in check(out))


def test_without_a_prior_there_are_no_positions(tmp_path):
    out = pack_tiny(tmp_path, subjects=1, heldout=0, prior="none", size=32, input_sets=1)
    inputs = open_shards(out, "train").read("s00").input_sets[0]
    assert inputs.positions is None
    assert inputs.confidence is None
    assert Manifest.load(out).prior_error.position_max is None


def test_a_smaller_picture_keeps_its_geometry(tmp_path):
    capture = read_capture(write_tiny_capture(tmp_path, "s00", size=64, timesteps=6))
    pack([capture], tmp_path / "x", size=32, heldout=0, input_sets=1)
    data = open_shards(tmp_path / "x", "train").read("s00")
    torch.testing.assert_close(data.targets[0].cameras.K[0, :2], capture.cameras(0).K[0, :2] / 2)
    inputs = data.input_sets[0]
    known = inputs.confidence[0, 0] > 1
    pixels, _ = inputs.cameras[0].project(inputs.positions[0][:, known].T)
    rows, columns = torch.nonzero(known, as_tuple=True)
    torch.testing.assert_close(pixels[0], torch.stack([columns, rows], 1) + 0.5, atol=0.02, rtol=0)


def test_crop_is_the_largest_square_around_the_head():
    K = np.array([[100.0, 0, 30], [0, 100.0, 60], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, 3] = [0.0, 0.1, 1.0]  # the head projects to (30, 70)
    assert crop_window(K, pose, (100, 60)) == (0, 40, 60)
    assert crop_window(K, pose, (200, 60)) == (0, 40, 60)
    assert crop_window(K, pose, (80, 60)) == (0, 20, 60)  # shifted back inside
    assert crop_window(K, pose, (60, 60)) == (0, 0, 60)
    fitted = fit_intrinsics(K, (0, 40, 60), 30)
    np.testing.assert_allclose(fitted, [[50, 0, 15], [0, 50, 10], [0, 0, 1]])


def test_depth_is_never_averaged():
    depth = np.arange(64, dtype=np.float32).reshape(8, 8)
    assert set(resample_depth(depth, (0, 0, 8), 3).ravel().tolist()) <= set(range(64))
    np.testing.assert_array_equal(resample_depth(depth, (0, 0, 8), 8), depth)
    np.testing.assert_array_equal(resample_depth(depth, (2, 4, 4), 2), [[43, 45], [59, 61]])


def test_masks_survive_and_foreign_pngs_are_read(tmp_path):
    import io

    from PIL import Image

    mask = np.random.default_rng(0).integers(0, 256, (17, 17)).astype(np.uint8)
    out = np.empty_like(mask)
    decode_mask(encode_mask(mask), out, "here")
    np.testing.assert_array_equal(out, mask)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_mask(mask)))), mask)
    smooth = np.add.outer(np.arange(17), np.arange(17)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "png")  # Pillow filters its rows
    decode_mask(buffer.getvalue(), out, "here")
    np.testing.assert_array_equal(out, smooth)
