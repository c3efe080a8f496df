"""Packing on a real Ray, and packing that is killed."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_captures import write_tiny_captures

from avatars.errors import UserError
from cluster.packing import pack_folders
from shards import Manifest, check

pytestmark = pytest.mark.e2e

OPTIONS = {"size": 40, "heldout": ["s02"], "input_sets": 2, "timesteps_per_shard": 2, "n_inputs": 3}


@pytest.fixture(scope="module")
def captures(tmp_path_factory):
    return write_tiny_captures(tmp_path_factory.mktemp("captures"), 3, timesteps=6, views=8, size=40)


@pytest.fixture(scope="module")
def packed(captures, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack_folders(captures, out, **OPTIONS)
    return out


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.slow
def test_two_workers_on_ray_give_the_bytes_of_one_process(captures, packed, tmp_path):
    lines: list[str] = []
    made = pack_folders(captures, tmp_path / "x", workers=2, progress=lines.append, **OPTIONS)
    assert contents(tmp_path / "x") == contents(packed)
    assert len(made.shards) == 9
    assert lines[-1].startswith("9/9 s0")
    assert lines[-1].endswith(" done")
    broken = captures[1] / "image" / "00003" / "c02.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"of 9 shards could not be packed, s01-000\d because: .*c02.png"):
        pack_folders(captures, tmp_path / "y", workers=2, **OPTIONS)
    left = contents(tmp_path / "y")
    assert not [name for name in left if name.endswith((".partial", "manifest.json"))]
    assert sum(name.endswith(".tar") for name in left) >= 6  # nobody else was stopped
    broken.write_bytes(whole)
    pack_folders(captures, tmp_path / "y", workers=2, **OPTIONS)
    assert contents(tmp_path / "y") == contents(packed)
    with pytest.raises(UserError, match="0 workers"):
        pack_folders(captures, tmp_path / "z", workers=0, **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_pack_leaves_no_half_shard_and_goes_on(captures, packed, tmp_path, workers):
    out = tmp_path / "x"
    command = [sys.executable, "-m", "launch.cli", "shards", "pack", str(captures[0].parent), str(out)]
    command += ["--size", "40", "--heldout-subjects", "s02", "--input-sets", "2", "--input-views", "3"]
    command += ["--timesteps-per-shard", "2", "--workers", str(workers)]
    running = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not list(out.glob("*.packed.json")) and running.poll() is None:
        time.sleep(0.002)
    os.killpg(running.pid, signal.SIGKILL)
    said = running.communicate()[0]
    assert running.returncode == -signal.SIGKILL, said
    receipts = [p.name.removesuffix(".packed.json") for p in out.glob("*.packed.json")]
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="no finished set of shards"):
        Manifest.load(out)
    before = contents(out)
    whole = contents(packed)
    assert receipts
    assert all(before[name] == whole[name] for name in before if name.endswith(".tar"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    after = contents(out)
    assert {name: after[name] for name in whole} == whole
    assert not [name for name in after if name not in whole]
    assert check(out) == []


def test_the_command_records_its_options(captures, tmp_path):
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "shards",
        "pack",
        str(captures[0].parent),
        str(tmp_path / "x"),
    ]
    options = {"size": "24", "k": "2", "max-input-degrees": "70", "prior": "none", "quality": "80"}
    options |= {"subsampling": "420", "timesteps-per-shard": "4", "seed": "9", "input-sets": "1"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run([*command, *words, "--heldout", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = Manifest.load(tmp_path / "x")
    settings = vars(manifest.settings)
    for name, value in options.items():
        assert settings[name.replace("-", "_")] == type(settings[name.replace("-", "_")])(value), name
    assert manifest.heldout == ("s01", "s02")
    assert (settings["crop"], settings["codec"], settings["background"]) == ("head", "jpeg", "black")
