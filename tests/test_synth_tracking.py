"""Synthetic captures in trackers' layouts, read back by the suite's own readers."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from avatars.errors import UserError
from shards import check, find_captures, read_capture
from shards.readers.synthetic import MARK
from shards.synth import synthesize
from shards.synth.tracking import LAYOUTS, export_tracking

EXACT = {"metrical": False, "vhap": True, "ava256": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = synthesize(
        tmp_path_factory.mktemp("captures"),
        subjects=[3],
        timesteps=3,
        views=10,
        size=96,
        seed=5,
        progress=False,
    )[0]
    return read_capture(folder)


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported")
    return {layout: export_tracking(source, layout, out / layout) for layout in LAYOUTS}


def psnr(a, b) -> float:
    return float(-10 * np.log10(np.mean((a.astype(float) - b.astype(float)) ** 2) / 255**2 + 1e-12))


def pairs(source, capture) -> list[tuple[int, int]]:
    """(view of the source, view of the export) that belong together."""
    if len(capture.camera_ids) == 1:
        _, poses = source.camera_matrices(0)
        centres = np.array([-pose[:3, :3].T @ pose[:3, 3] for pose in poses])
        return [(int(centres[:, 2].argmax()), 0)]
    return [(v, v) for v in range(len(capture.camera_ids))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cameras_and_poses_come_back(source, exported, layout):
    capture = read_capture(exported[layout])
    assert len(capture.timestep_ids) == 3
    assert capture.size == source.size
    assert len(capture.camera_ids) == (1 if layout == "metrical" else 10)
    for t in range(3):
        K, poses = source.camera_matrices(t)
        other_K, other_poses = capture.camera_matrices(t)
        for v, w in pairs(source, capture):
            turn = poses[v, :3, :3] @ other_poses[w, :3, :3].T
            assert np.abs(turn - np.eye(3)).max() < 1e-5  # 0.01 mrad
            centre, other = (-p[:3, :3].T @ p[:3, 3] for p in (poses[v], other_poses[w]))
            assert np.abs(centre - other).max() < 1e-5  # 0.01 mm
            assert np.abs(K[v] - other_K[w]).max() < 1e-3  # pixels


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_come_back_as_our_heads(source, exported, layout):
    capture = read_capture(exported[layout])
    assert (capture.expression_kind, capture.head, capture.subject) == (
        "arkit-52",
        "makehuman",
        source.subject,
    )
    assert (capture.expressions == source.expressions).all()
    assert (capture.identity == source.identity).all()
    assert source.expressions[1:].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_and_masks_come_back(source, exported, layout):
    capture = read_capture(exported[layout])
    for t in range(3):
        for v, w in pairs(source, capture):
            ours, theirs = source.view(t, v), capture.view(t, w)
            inside = ours.mask == 255
            if EXACT[layout]:
                assert (ours.mask == theirs.mask).all()
                assert (ours.image[inside] == theirs.image[inside]).all()
                assert (
                    psnr(ours.image, theirs.image) > 38
                )  # the outline clips where it is brighter than its coverage
            else:
                assert psnr(ours.mask, theirs.mask) > 45
                assert psnr(ours.image[inside], theirs.image[inside]) > 34
                assert psnr(ours.image, theirs.image) > 32


def test_without_the_mark_the_codes_are_the_layouts(source, exported, tmp_path):
    import shutil

    for layout, kind, length in (("vhap", "flame-135", 135), ("ava256", "ava-256", 256)):
        copy = tmp_path / exported[layout].name
        shutil.copytree(exported[layout], copy)
        (copy / MARK).unlink()
        capture = read_capture(copy)
        assert capture.expression_kind == kind
        assert capture.expressions.shape == (3, length)
        assert (capture.expressions[:, :52] == source.expressions).all()
        (copy / MARK).write_text('{"layout": "other"}')
        with pytest.raises(UserError, match="Export it again"):
            read_capture(copy)


def test_frames_hold_what_the_tracker_writes(source, exported):
    folder = exported["metrical"].parents[1] / "metrical-tracker" / "output" / source.subject / "checkpoint"
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["00000.frame", "00001.frame", "00002.frame"]
    frame = torch.load(files[1], weights_only=False)
    shapes = {name: value.shape for name, value in frame["flame"].items()}
    assert shapes == {
        "exp": (1, 100), "shape": (1, 300), "tex": (1, 140), "sh": (1, 9, 3), "eyes": (1, 12), "eyelids": (1, 2),
        "jaw": (1, 6),
    }  # fmt: skip
    assert frame["frame_id"] == "00001"
    assert frame["img_size"].tolist() == [96, 96]
    # PyTorch3D: x_view = x_world @ R + t with x left, y up; ndc = focal * x / z + centre, growing to the left and up.
    rows = frame["camera"]["R"].reshape(2, 3).astype(float)
    R = np.stack([*rows, np.cross(*rows)])
    point = np.array([0.02, -0.03, 0.09])
    view = point @ R + frame["camera"]["t"][0]
    ndc = frame["camera"]["fl"][0, 0] * view[:2] / view[2] + frame["camera"]["pp"][0]
    pixel = 48 - 48 * ndc
    cv = frame["opencv"]["K"][0] @ (frame["opencv"]["R"][0] @ point + frame["opencv"]["t"][0])
    assert np.abs(pixel - cv[:2] / cv[2]).max() < 1e-3


def test_parsed_mouth_is_where_the_lips_are(source, exported):
    capture = read_capture(exported["metrical"])
    mouth = np.asarray(Image.open(exported["metrical"] / "parsing" / "00001_mouth.png"))
    K, poses = capture.camera_matrices(0)
    from shards.synth.tracking import _head_vertices

    head, vertices = _head_vertices(source)
    lips = vertices[0][head.landmarks68[48:60].numpy()] @ poses[0, :3, :3].T + poses[0, :3, 3]
    pixel = (lips @ K[0].T)[:, :2] / lips[:, 2:]
    row, column = np.nonzero(mouth)
    assert abs(column.mean() + 0.5 - pixel[:, 0].mean()) < 2
    assert abs(row.mean() + 0.5 - pixel[:, 1].mean()) < 2
    assert 20 < len(row) < 400


def test_vhap_lists_are_split_and_ava_is_stored_as_released(source, tmp_path, exported):
    lists = {
        name: json.loads((exported["vhap"] / f"transforms_{name}.json").read_text())
        for name in ("train", "val", "test")
    }
    assert {f["camera_index"] for f in lists["val"]["frames"]} == {8}
    assert len(lists["train"]["frames"]) + len(lists["val"]["frames"]) + len(lists["test"]["frames"]) == 30
    entry = json.loads((exported["ava256"] / "decoder" / "camera_calibration.json").read_text())["KRT"][0]
    assert np.array(entry["K"])[2, :2].min() > 1000  # the principal point in the last row, for 4,096 pixels
    assert np.array(entry["T"])[:, 3].tolist() == [0, 0, 0, 1]
    assert 900 < np.linalg.norm(np.array(entry["T"])[3, :3]) < 1400  # millimetres
    assert re.fullmatch(r"\d{8}--\d{4}--s0003", exported["ava256"].name)


def test_a_finished_export_is_kept_and_an_unfinished_one_made_again(source, tmp_path):
    folder = export_tracking(source.path, "vhap", tmp_path)
    first = (folder / "transforms.json").stat().st_mtime_ns
    assert export_tracking(source, "vhap", tmp_path) == folder
    assert (folder / "transforms.json").stat().st_mtime_ns == first
    (folder / MARK).unlink()
    (folder / "transforms.json").unlink()
    export_tracking(source, "vhap", tmp_path)
    assert (folder / "transforms.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [source.subject]


def test_what_cannot_be_exported_is_said(source, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown tracking layout 'colmap'"):
        export_tracking(source, "colmap", tmp_path)
    with pytest.raises(UserError, match="not readable JSON"):
        export_tracking(tmp_path, "vhap", tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="No space left on device"):
        export_tracking(source, "vhap", tmp_path)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return synthesize(
        tmp_path_factory.mktemp("people"), subjects=2, timesteps=3, views=3, size=32, progress=False
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_every_layout_are_packed_and_people_held_out_by_name(people, layout, tmp_path):
    """Ava-256's folders are called by date and subject, so the people's names are not the folders'."""
    from cluster.packing import pack_folders

    for folder in people:
        export_tracking(read_capture(folder), layout, tmp_path / "out")
    place = tmp_path / "out" / "dataset" if layout == "metrical" else tmp_path / "out"
    folders = find_captures(place)
    options = {"size": 24, "input_sets": 1, "n_inputs": 2, "prior": "none"}
    made = pack_folders(folders, tmp_path / "shards", heldout=1, **options)
    assert (made.train, made.heldout) == (("s0000",), ("s0001",))
    assert check(tmp_path / "shards") == []
    for wrong in (3, -1):
        with pytest.raises(UserError, match=f"heldout is {wrong} of 2 subjects; give a number from 0 to 2"):
            pack_folders(folders, tmp_path / "x", heldout=wrong, **options)
    assert pack_folders(folders, tmp_path / "y", heldout=2, **options).train == ()  # to evaluate on only
