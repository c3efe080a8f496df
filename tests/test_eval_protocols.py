"""Protocols by name, the benchmark's zip, and evaluating a checkpoint under any of them."""

import io
import json
import shutil
import zipfile
from dataclasses import replace
from fractions import Fraction

import av
import pytest
import torch

from avatars.errors import UserError
from cluster.evaluate import evaluate_all
from eval.baselines import nearest_input
from eval.checkpoints import find_checkpoint, load_maker
from eval.evaluate import evaluate
from eval.metrics import PSNR, SSIM, Pictures
from eval.protocol import synthetic_heldout, write_protocol
from eval.protocols import (
    STANDARDS,
    SUBMISSIONS,
    Submission,
    Video,
    find_protocol,
    named_protocol,
    write_submission,
)
from eval.rows import check_one_protocol, read_rows
from launch.cli import main
from shards import open_shards


@pytest.fixture(scope="module")
def heldout(tiny_shards):
    return open_shards(tiny_shards, "heldout")


def test_every_named_protocol_is_data_and_says_where_it_comes_from():
    assert set(STANDARDS) >= {
        "ava256-fewshot",
        "nersemble-fewshot",
        "nersemble-benchmark",
        "flashavatar-video",
        "synthetic-heldout",
    }
    for standard in STANDARDS.values():
        assert standard.text
        assert {PSNR, SSIM} <= set(standard.metrics)
    assert STANDARDS["flashavatar-video"].last == 500


def test_the_named_protocol_of_synthetic_people_is_the_one_that_trainings_use(heldout):
    assert named_protocol("synthetic-heldout", heldout) == synthetic_heldout(heldout)
    assert find_protocol("synthetic-heldout", heldout).id == synthetic_heldout(heldout).id


def test_shards_that_a_named_protocol_does_not_mean_are_refused(heldout, monkeypatch):
    with pytest.raises(
        UserError, match="ava256-fewshot measures at 512 × 512; these shards hold pictures of 48 × 48"
    ):
        named_protocol("ava256-fewshot", heldout)
    benchmark = replace(STANDARDS["nersemble-benchmark"], size=(48, 48))
    monkeypatch.setitem(STANDARDS, "nersemble-benchmark", benchmark)
    with pytest.raises(UserError, match=r"is measured on 393, 404, 461, 477, 486; the split 'heldout' holds"):
        named_protocol("nersemble-benchmark", heldout)
    with pytest.raises(UserError, match=r"no protocol 'ava'.*ava256-fewshot.*or a JSON file"):
        find_protocol("ava", heldout)


def test_an_empty_split_is_refused(heldout):
    nobody = type("Nobody", (), {"subjects": [], "split": "heldout", "manifest": heldout.manifest})()
    with pytest.raises(UserError, match="has no subjects: the split 'heldout' is empty"):
        named_protocol("synthetic-heldout", nobody)


def test_a_users_own_protocol_is_a_file_and_an_edited_one_is_refused(heldout, tmp_path):
    mine = replace(synthetic_heldout(heldout, views=2, metrics=(PSNR,)), name="mine")
    path = tmp_path / "mine.json"
    write_protocol(mine, path)
    assert find_protocol(str(path), heldout) == mine
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "views": 3}))
    with pytest.raises(UserError, match="was edited after its id was written"):
        find_protocol(str(path), heldout)


def test_fixed_cameras_and_the_last_timesteps_are_what_is_measured(heldout, tmp_path):
    data = heldout.read(heldout.subjects[0])
    used = data.input_sets[0].provenance
    free = [name for name in data.targets[0].camera_ids if name not in used["camera_ids"]]
    mine = replace(synthetic_heldout(heldout, metrics=(PSNR,)), cameras=(free[3], free[0]), last=4)

    def run(protocol):
        return evaluate("n", nearest_input, heldout, protocol, checkpoint="none", out=tmp_path)

    (row,) = run(mine)
    assert {entry["camera"] for entry in row.pictures} == {free[0], free[3]}
    last = [target.timestep for target in data.targets][-4:]
    assert {entry["timestep"] for entry in row.pictures} == set(last) - set(used["timesteps"])
    taken = replace(mine, cameras=(used["camera_ids"][0],))
    with pytest.raises(UserError, match=f"measures camera {used['camera_ids'][0]}, which was an input of"):
        run(taken)
    (row,) = run(replace(taken, input_cameras=True))
    assert {entry["camera"] for entry in row.pictures} == {used["camera_ids"][0]}
    with pytest.raises(UserError, match="camera nowhere, which is not among the cameras of"):
        run(replace(mine, cameras=("nowhere",)))
    with pytest.raises(UserError, match=r"have 4 pictures; the protocol .* makes avatars from 9"):
        run(replace(mine, inputs=9))


@pytest.fixture
def task(monkeypatch):
    """A small task of two people and two cameras."""
    small = Submission((48, 64), Fraction(243, 10), (("388", "FREE"), ("7", "HAIR")), ("1", "2"))
    monkeypatch.setitem(SUBMISSIONS, "small", small)
    return "small"


def videos(frames=5, size=(48, 64)):
    shade = torch.linspace(0.2, 0.8, frames)[:, None, None, None].expand(frames, 3, *size)
    for person, sequence in (("388", "FREE"), ("7", "HAIR")):
        for camera in ("2", "1"):
            yield Video(person, sequence, camera, [Pictures(shade[:2]), Pictures(shade[2:])])


def test_the_submission_is_a_zip_of_videos_in_the_benchmarks_layout(task, tmp_path):
    path = tmp_path / "new" / "submission.zip"
    write_submission(path, task, videos())
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == sorted(
            ["388/FREE/cam_1.mp4", "388/FREE/cam_2.mp4", "007/HAIR/cam_1.mp4", "007/HAIR/cam_2.mp4"]
        )
        with av.open(io.BytesIO(archive.read("007/HAIR/cam_2.mp4"))) as video:
            assert video.streams.video[0].average_rate == Fraction(243, 10)
            shown = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert [frame.shape for frame in shown] == [(48, 64, 3)] * 5
    for frame, shade in zip(shown, torch.linspace(0.2, 0.8, 5).tolist(), strict=True):
        assert frame.mean() / 255 == pytest.approx(shade, abs=0.02)
    assert len(SUBMISSIONS["mono-flame-avatar"].files) == 5 * 4 * 4
    assert "388/GLASSES/cam_222200046.mp4" in SUBMISSIONS["nvs"].files


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: list(videos())[:3], r"lacks 1 of 4 videos, 007/HAIR/cam_1\.mp4 first"),
        (lambda: [*videos(), *videos()], "was given twice"),
        (lambda: [Video("1", "FREE", "1", [])], "asks for no video 001/FREE/cam_1"),
        (lambda: videos(size=(64, 64)), r"is \(64, 64\) pixels; the task asks for \(48, 64\)"),
        (lambda: [Video("388", "FREE", "1", [])], "has no frames"),
    ],
)
def test_a_submission_that_is_not_whole_is_not_written(task, tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        write_submission(tmp_path / "s.zip", task, given())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no video task 'svfr'"):
        write_submission(tmp_path / "s.zip", "svfr", [])


@pytest.mark.e2e
def test_the_numbers_are_the_same_for_any_batch(tiny_shards, tmp_path):
    train = open_shards(tiny_shards, "train")
    protocol = synthetic_heldout(train, views=3, timesteps=1, metrics=(PSNR, SSIM))
    baseline = [find_checkpoint("nearest-input")]
    found = []
    for batch in (1, 0):
        out = tmp_path / str(batch)
        rows = evaluate_all(baseline, [protocol], tiny_shards, out, split="train", batch=batch).rows
        assert [row.subject for row in rows] == list(train.subjects)
        assert check_one_protocol(rows) == protocol.id
        assert len(read_rows(out)) == len(train.subjects) == 3
        found.append([(row.values, row.pictures) for row in rows])
    assert found[0] == found[1]


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(UserError, match="Name a checkpoint of avat3r"):
        find_checkpoint("avat3r")
    with pytest.raises(UserError, match="is no folder"):
        find_checkpoint("avat3r", tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds neither a model\.json nor fitted avatars"):
        find_checkpoint("avat3r", tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.json").write_text('{"method": "avat3r"}')
    with pytest.raises(UserError, match="is not a whole model"):
        find_checkpoint("avat3r", tmp_path)
    (tmp_path / "export" / "model.json").write_text('{"method": "avat3r", "provenance": {}}')
    with pytest.raises(UserError, match=r"holds a model\.json and no weights"):
        find_checkpoint("avat3r", tmp_path)
    (tmp_path / "export" / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="holds avat3r, not flashavatar"):
        find_checkpoint("flashavatar", tmp_path)
    found = find_checkpoint("any", tmp_path)
    assert (found.method, found.name, found.step) == ("avat3r", tmp_path.name, None)
    with pytest.raises(UserError, match="is not a whole model"):
        load_maker(found)
    (tmp_path / "export" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(UserError, match="was changed during the evaluation"):
        load_maker(found)
    shutil.rmtree(tmp_path / "export")
    with pytest.raises(UserError, match="export is gone"):
        load_maker(found)


def test_fits_that_are_not_whole_are_refused(tmp_path):
    (tmp_path / "s01").mkdir()
    (tmp_path / "s01" / "result.json").write_text('{"seconds": 1}')
    with pytest.raises(UserError, match="lacks the recipe or the seconds of its fit"):
        find_checkpoint("flashavatar", tmp_path)
    (tmp_path / "s01" / "result.json").write_text('{"method": "flashavatar", "seconds": 1, "config": {}}')
    fits = find_checkpoint("flashavatar", tmp_path)
    assert fits.hash_for("s01") == fits.hash_for("s02") == ""  # neither avatar is there
    with pytest.raises(UserError, match="holds no avatar of s02"):
        load_maker(fits)(type("Inputs", (), {"subject": "s02"})())
    (tmp_path / "s02").mkdir()
    other = '{"method": "flashavatar", "seconds": 1, "config": {"steps": 2}}'
    (tmp_path / "s02" / "result.json").write_text(other)
    with pytest.raises(UserError, match="holds fits of 2 configurations"):
        find_checkpoint("flashavatar", tmp_path)


def test_an_evaluation_of_what_is_not_there_is_refused(tiny_shards, tmp_path, capsys):
    words = ["eval", "avat3r", "--data", str(tiny_shards), "--out", str(tmp_path)]
    assert main(words) == 1
    assert "holds neither fits of avat3r nor a finished training avat3r-cpu" in capsys.readouterr().err
    assert main(["eval", "nearest-input", *words[2:], "--workers", "0"]) == 1
    assert "--workers is 0; give 1 or more" in capsys.readouterr().err
    assert main(["eval", "avat3r", str(tmp_path / "gone"), *words[2:]]) == 1
    assert "gone is no folder" in capsys.readouterr().err
