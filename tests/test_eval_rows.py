"""Result rows on disk: whole or not at all, and never compared across protocols."""

import json
from dataclasses import replace

import pytest

from avatars.errors import UserError
from eval.rows import Row, check_one_protocol, mean_values, read_row, read_rows, row_folder, write_row

ROW = Row(
    method="avat3r",
    checkpoint="step-100",
    subject="s01",
    protocol="synthetic-heldout",
    protocol_id="0123456789ab",
    values={"psnr": 25.5, "ssim": 0.9},
    missing={"lpips": "not available: it needs a file"},
    counts={"pictures": 2, "timesteps": 1, "views": 2, "akd/mtcnn-5_left_out": 1},
    create_seconds=1.5,
    drive_fps=40.0,
    pictures=[{"timestep": "t0", "camera": "c0", "psnr": 25.0, "akd": None, "file": "00"}],
    weights={"akd": {"pnet.pt": "00"}},
    hardware="a machine",
    versions={"commit": "abc", "torch": "2"},
    threads=2,
)


def test_a_row_comes_back_as_it_was(tmp_path):
    path = write_row(ROW, tmp_path)
    assert path == tmp_path / "synthetic-heldout-0123456789ab" / "avat3r@step-100" / "s01" / "row.json"
    assert read_row(path) == ROW
    assert read_rows(tmp_path) == [ROW]
    assert [entry.name for entry in path.parent.iterdir()] == ["row.json"]


def test_writing_again_replaces_the_row(tmp_path):
    write_row(ROW, tmp_path)
    better = replace(ROW, values={"psnr": 30.0})
    write_row(better, tmp_path)
    assert read_rows(tmp_path) == [better]


def test_a_write_that_fails_keeps_the_older_row(tmp_path, monkeypatch):
    path = write_row(ROW, tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_row(replace(ROW, values={"psnr": 1.0}), tmp_path)
    assert read_row(path) == ROW
    assert [entry.name for entry in path.parent.iterdir()] == ["row.json"]


@pytest.mark.parametrize("change", [{"values": {"psnr": float("inf")}}, {"drive_fps": float("nan")}])
def test_a_row_holds_finite_numbers(tmp_path, change):
    with pytest.raises(UserError, match="finite numbers"):
        write_row(replace(ROW, **change), tmp_path)
    assert not list(tmp_path.rglob("row.json"))


def test_the_key_names_the_row_and_nothing_else():
    assert replace(ROW, values={}, drive_fps=1.0).key == ROW.key
    for name in ("method", "checkpoint", "subject", "protocol_id"):
        assert replace(ROW, **{name: "other"}).key != ROW.key


def test_names_that_are_no_file_names_stay_apart_and_inside(tmp_path):
    names = ["a/b", "a-b", "a b", "../a", "", "ä" * 300]
    folders = [row_folder(tmp_path, name, "c", "s", "p", "0") for name in names]
    assert len(set(folders)) == len(folders)
    for folder in folders:
        assert folder.resolve().parent.parent == tmp_path / "p-0"
        folder.mkdir(parents=True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "not a whole result row"),
        (lambda text: "[1]", "schema None"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "schema 2; this version reads 1"),
        (lambda text: text.replace('"subject"', '"person"'), "fields of a result row"),
    ],
)
def test_a_damaged_row_is_refused_by_name(tmp_path, damage, said):
    path = write_row(ROW, tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=said) as refused:
        read_rows(tmp_path)
    assert str(path) in str(refused.value)


def test_no_rows_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no result rows"):
        read_rows(tmp_path)
    with pytest.raises(UserError, match="not a folder of results"):
        read_rows(tmp_path / "absent")
    with pytest.raises(UserError, match="no result rows to compare"):
        check_one_protocol([])


def test_rows_of_two_protocols_or_networks_do_not_compare():
    assert check_one_protocol([ROW, replace(ROW, subject="s02")]) == ROW.protocol_id
    with pytest.raises(UserError, match=r"2 protocols .*0123456789ab, synthetic-heldout ffff"):
        check_one_protocol([ROW, replace(ROW, protocol_id="ffff")])
    with pytest.raises(UserError, match="2 different networks for akd"):
        check_one_protocol([ROW, replace(ROW, weights={"akd": {"pnet.pt": "11"}})])


def test_a_mean_stands_only_where_every_subject_has_a_number():
    other = replace(ROW, subject="s02", values={"psnr": 20.5})
    assert mean_values([ROW, other], "psnr") == 23.0
    assert mean_values([ROW, other], "ssim") is None
    assert mean_values([ROW, other], "lpips") is None


def test_the_file_is_plain_json_that_others_can_read(tmp_path):
    values = json.loads(write_row(ROW, tmp_path).read_text())
    assert values["schema"] == 1
    assert values["values"]["psnr"] == 25.5
    assert values["missing"]["lpips"].startswith("not available")
