"""Weight files: how they are found, hashed once, and what is said when they are missing."""

import hashlib
import json
import os

import pytest

from avatars import weights
from avatars.weights import WEIGHTS, MissingWeights, file_sha256, find, find_file, missing, report


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of weights, no hub folder and no cache of this machine's user."""
    monkeypatch.setenv("HEADSPLAT_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HEADSPLAT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def test_every_entry_says_all_that_a_user_needs():
    for name, entry in WEIGHTS.items():
        assert name == entry.name
        assert entry.files
        assert entry.used_by
        assert entry.licence
        assert entry.source.startswith("https://")
        assert "HEADSPLAT_WEIGHTS" in entry.fetch or entry.fetch.startswith('python -c "from torchvision')
        assert set(entry.sha256) <= set("0123456789abcdef")
    files = [file for entry in WEIGHTS.values() for file in entry.files]
    assert len(files) == len(set(files))


def test_a_file_is_found_in_the_folder_by_any_of_its_names(folder):
    other = folder / WEIGHTS["dust3r"].files[1]
    other.parent.mkdir()
    other.write_bytes(b"two")
    assert find("dust3r").path == other
    first = folder / WEIGHTS["dust3r"].files[0]
    first.write_bytes(b"one")
    assert find("dust3r").path == first
    assert find("dust3r").sha256 == hashlib.sha256(b"one").hexdigest()


def test_an_explicit_path_is_a_file_or_a_folder(folder, tmp_path):
    mine = tmp_path / "mine.pth"
    mine.write_bytes(b"x")
    assert find("dust3r", mine).path == mine
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(MissingWeights, match=f"is not in {elsewhere}"):
        find("dust3r", elsewhere)
    (elsewhere / WEIGHTS["dust3r"].files[0]).write_bytes(b"y")
    assert find("dust3r", elsewhere).path.parent == elsewhere
    with pytest.raises(MissingWeights, match=r"absent\.pth is no file"):
        find("dust3r", tmp_path / "absent.pth")


def test_what_is_missing_is_told_with_the_command_and_the_terms(folder, monkeypatch):
    with pytest.raises(MissingWeights) as told:
        find("sapiens-2b")
    for part in ("sapiens_2b_epoch_660_clean.pth is not in", str(folder), "curl", "CC BY-NC 4.0"):
        assert part in str(told.value)
    assert str(told.value) == missing("sapiens-2b")
    monkeypatch.delenv("HEADSPLAT_WEIGHTS")
    with pytest.raises(MissingWeights, match=r"it needs own\.pth in a folder that HEADSPLAT_WEIGHTS names"):
        find_file("own.pth")


def test_another_file_under_the_name_is_refused(folder):
    (folder / WEIGHTS["lpips-alex"].files[0]).write_bytes(b"not it")
    with pytest.raises(MissingWeights, match="the published file starts with 7be5be79"):
        find("lpips-alex")


def test_a_hash_is_remembered_until_the_file_changes(folder, monkeypatch):
    path = folder / "big.pth"
    path.write_bytes(b"before")
    first = file_sha256(path)
    assert first == hashlib.sha256(b"before").hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr(weights.hashlib, "file_digest", None)  # would fail if the file were read again
        assert file_sha256(path) == first
    times = path.stat()
    path.write_bytes(b"after!")  # as long as before, and with the same time of change
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_sha256(path) == hashlib.sha256(b"after!").hexdigest()


@pytest.mark.parametrize("content", ["", "[1]", '{"x": 1'])
def test_a_damaged_memory_of_hashes_is_made_anew(folder, tmp_path, content):
    (tmp_path / "cache").mkdir()
    memory = tmp_path / "cache" / weights.HASHES_FILE
    memory.write_text(content)
    path = folder / "a.pth"
    path.write_bytes(b"a")
    assert file_sha256(path) == hashlib.sha256(b"a").hexdigest()
    assert str(path) in json.loads(memory.read_text())


def test_the_report_tells_of_every_file(folder):
    (folder / "w600k_r50.onnx").write_bytes(b"arc")
    told = {entry.name: (found, reason) for entry, found, reason in report()}
    assert set(told) == set(WEIGHTS)
    assert told["arcface"][0].path == folder / "w600k_r50.onnx"
    assert told["dust3r"] == (None, missing("dust3r"))
