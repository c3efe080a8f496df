"""`headsplat doctor` tells what is there, what is not, and what to do."""

import hashlib
import json
from pathlib import Path

import pytest

from launch import agent
from launch import doctor as room
from launch.cli import main
from launch.doctor import OPTIONAL, pinned


@pytest.fixture
def told(monkeypatch, tmp_path, capsys):
    """All findings on a machine with one weight file."""
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "pipnet-wflw-meanface.txt").write_text("0.1 0.2\n")
    monkeypatch.setenv("HEADSPLAT_WEIGHTS", str(weights))
    assert main(["doctor", "--json", "--out", str(tmp_path / "work")]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def test_everything_of_a_training_is_looked_at(told):
    names = {"headsplat", "versions", "rasterizer on cpu", "compiler", "launcher", "collectives", "tracking"}
    assert names | {"build locks", "disk for results", "shared memory"} <= set(told)
    assert any(name.startswith(("device", "host")) for name in told)
    assert "gloo" in told["collectives"]["detail"]
    assert told["rasterizer on cpu"]["detail"].startswith(("cpu: ", "reference: "))


def test_weights_are_told_with_hash_terms_and_source(told):
    missing = told["weights dust3r"]
    assert not missing["works"]
    assert "HEADSPLAT_WEIGHTS" in missing["detail"]
    assert "http" in missing["detail"]
    from avatars.weights import WEIGHTS

    assert {f"weights {name}" for name in WEIGHTS} <= set(told)


def test_weights_that_are_there_have_a_hash(monkeypatch, tmp_path):
    from avatars.weights import Found, Weights

    file = tmp_path / "net.pth"
    file.write_bytes(b"weights")
    entry = Weights("net", ("net.pth",), "a test", "CC0-1.0", "page", "fetch")
    monkeypatch.setattr("avatars.weights.report", lambda: iter([(entry, Found(file), "")]))
    (finding,) = room.weights()
    assert finding.works
    assert f"sha256 {hashlib.sha256(b'weights').hexdigest()[:16]}" in finding.detail
    assert "CC0-1.0" in finding.detail


def test_versions_are_compared_with_the_constraints(monkeypatch, tmp_path):
    (tmp_path / "constraints.txt").write_text("# tested\ntorch==0.0.1\nnot-installed-here==1.0\n")
    monkeypatch.setattr(room, "ROOT", tmp_path)
    rows = {row.name: row for row in room.versions()}
    assert not rows["versions"].works
    assert "(tested with 0.0.1); run `make setup`" in rows["versions"].detail
    assert "not-installed-here" not in rows["versions"].detail


def test_pinned_lines():
    assert pinned("a==1.0\n# b==2\nc>=3\nd[x]==4.0+cu1  # why\n") == {"a": "1.0", "d[x]": "4.0+cu1"}


def test_an_optional_package_that_is_missing_says_what_needs_it(monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    rows = list(room.packages())
    assert len(rows) == len(OPTIONAL)
    assert all(not row.works and "pip install" in row.detail for row in rows)


def test_locks_of_killed_builds_where_torch_waits_for_files(monkeypatch, tmp_path):
    import os

    build = tmp_path / "op"
    build.mkdir()
    for name in ("op", "held", "fresh"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (1, 1) if name != "fresh" else None)
    monkeypatch.setattr(agent, "torch_locks_by_file", lambda: True)
    with (tmp_path / "held" / "lock").open():
        assert agent.stale_locks(tmp_path) == [build / "lock"]
    # Where torch locks through the operating system, a file that is left means nothing.
    monkeypatch.setattr(agent, "torch_locks_by_file", lambda: False)
    assert agent.stale_locks(tmp_path) == []


def test_the_installed_torch_is_read_for_how_it_locks():
    source = Path(__import__("torch").__file__).parent / "utils" / "cpp_extension.py"
    assert agent.torch_locks_by_file() == ("FileBaton(" in source.read_text())
