"""Shards that somebody made to do harm, and disks that are full."""

import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tiny_captures import pack_tiny, write_tiny_captures

from avatars.errors import UserError
from shards import BatchLoader, Manifest, check, open_shards, pack, read_capture, write_with_priors
from shards.codecs import encode_picture
from shards.manifest import PriorSettings
from shards.priors import PriorMaps
from shards.stores import RemoteFolder, StreamReader
from shards.tarfiles import ShardReader, ShardWriter


@pytest.fixture
def shards(tmp_path):
    return pack_tiny(tmp_path, subjects=1, heldout=0, timesteps=5, views=3, size=24, n_inputs=2, input_sets=1)


def header(name, size=0, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def harmful(path: Path) -> bytes:
    """Members before the shard's own that lead elsewhere, are devices, or run code when unpickled."""
    payload = pickle.dumps(Harm())
    members = [
        header("../../escaped.json", 0),
        header("/tmp/escaped.json", 0),
        header("disk", kind=tarfile.BLKTYPE),
        header("terminal", kind=tarfile.CHRTYPE),
        header("target-00000.pkl", len(payload)) + payload.ljust(512, b"\0"),
        header("target-00000.pyd", len(payload)) + payload.ljust(512, b"\0"),
    ]
    return b"".join(members) + path.read_bytes()


def test_hostile_members_are_never_unpacked_or_run(shards, tmp_path, monkeypatch):
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    path = shards / "s00-0000.tar"
    path.write_bytes(harmful(path))
    told = "\n".join(map(str, check(shards)))
    assert "name leads elsewhere: '../../escaped.json'" in told
    stream = StreamReader(RemoteFolder(f"file://{shards}"), path.name)
    assert set(stream.read("inputs-000", ["json"])) == {"json"}
    assert "target-00000" in stream.keys
    stream.close()
    with pytest.raises(UserError, match="bytes where the manifest says"):
        Manifest.load(shards)
    with pytest.raises(UserError, match=r"no index.json where its index says|cannot be read"):
        ShardReader(path, Manifest.read(shards).shards[0].index)
    assert list(away.iterdir()) == []
    assert not (tmp_path.parent / "escaped.json").exists()
    assert not Path("/tmp/escaped.json").exists()


def test_a_header_of_ten_gigabytes_costs_nothing(shards):
    path = shards / "s00-0000.tar"
    path.write_bytes(header("target-00000.json", 10 * 2**30) + bytes(4096))
    told = "\n".join(map(str, check(shards)))
    assert "has a member target-00000.json of 10737418240 bytes, which goes past the end of the file" in told
    stream = StreamReader(RemoteFolder(f"file://{shards}"), path.name)
    with pytest.raises(UserError, match=r"cannot be read to its end|cut short"):
        stream.read("target-00000", ["json"])


def test_a_picture_bomb_is_refused_before_it_is_inflated(shards):
    shard = Manifest.load(shards).shards[0]
    path = shards / shard.path
    reader = ShardReader(path, shard.index)
    samples = {key: reader.read(key, list(reader.extensions(key))) for key in reader.keys if key != "index"}
    bomb = encode_picture(np.zeros((8000, 8000, 3), np.uint8), "jpeg", 10, "420")
    with ShardWriter(path) as writer:
        for key, members in samples.items():
            writer.write(key, members | ({"00.jpg": bomb} if key == "inputs-000" else {}))
    text = (shards / "manifest.json").read_text()
    text = text.replace(shard.sha256, writer.sha256).replace(
        f'"bytes": {shard.bytes}', f'"bytes": {writer.size}'
    )
    for old, new in zip(shard.index, writer.index, strict=True):
        text = text.replace(f" {old}", f" {new}")
    (shards / "manifest.json").write_text(text)
    with (
        BatchLoader(shards, "train", seed=0, micro_batch=1, views=2) as loader,
        pytest.raises(UserError, match="8000 x 8000 pixels where 24 x 24 are declared"),
    ):
        next(loader)
    with pytest.raises(UserError, match="8000 x 8000"):
        _ = open_shards(shards, "train").read("s00").input_sets[0]


@pytest.mark.parametrize("location", ["pipe:cat manifest.json", "nothing://bucket/people"])
def test_what_is_neither_folder_nor_known_url_is_a_sentence(location):
    with pytest.raises(UserError, match=r"is not there|cannot be opened"):
        BatchLoader(location, "train", seed=0, micro_batch=1)


def test_zero_views_are_a_sentence(shards):
    text = (shards / "manifest.json").read_text()
    assert '"each": 3' in text
    (shards / "manifest.json").write_text(text.replace('"each": 3', '"each": 0'))
    with pytest.raises(UserError, match="has a timestep with 0 views where 2 are asked for"):
        BatchLoader(shards, "train", seed=0, micro_batch=1, views=2)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_is_a_sentence_and_leaves_no_half_shard(small_disk, tmp_path):
    captures = [
        read_capture(c) for c in write_tiny_captures(tmp_path / "c", 2, timesteps=6, views=8, size=40)
    ]
    options = {"size": 40, "heldout": 0, "input_sets": 1, "timesteps_per_shard": 3}
    with pytest.raises(UserError, match=r"No space left on device.*finished shards are kept"):
        pack(captures, small_disk / "shards", **options)
    left = [path.name for path in (small_disk / "shards").iterdir()]
    assert len([name for name in left if name.endswith(".tar")]) in (1, 2, 3)
    assert not [name for name in left if name.endswith((".partial", "manifest.json"))]
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    made = pack(captures, small_disk / "shards", **options)
    again = pack(captures, tmp_path / "again", **options)
    assert made.fingerprint == again.fingerprint
    subprocess.run(["mount", "-o", "remount,size=900k", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"No space left on device.*finished shards are kept"):
        write_with_priors(tmp_path / "again", small_disk / "more", lambda s: PriorMaps(), PriorSettings())
    assert not [path for path in (small_disk / "more").iterdir() if path.name.endswith(".partial")]
