"""Populations on a real Ray: the same bytes as one process, whoever is killed on the way."""

import os
import signal

import numpy as np
import pytest
from test_synth import bytes_of

from avatars.errors import UserError
from cluster.session import ray_session
from cluster.synth import synthesize_population
from launch.cli import main
from shards import read_capture
from shards.synth import synthesize

pytestmark = pytest.mark.e2e

# Many small pictures: a person takes longer than what lies between two looks at progress.
SETTINGS = {"subjects": 3, "timesteps": 6, "views": 8, "size": 32, "seed": 11}
PICTURES = 3 * 6 * 8


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    with ray_session(2):
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, one after another."""
    return [
        bytes_of(folder)
        for folder in synthesize(tmp_path_factory.mktemp("alone"), **SETTINGS, progress=False)
    ]


def test_a_killed_worker_is_replaced_and_the_bytes_are_those_of_one_process(alone, tmp_path):
    killed, counts = [], []

    def kill_once(event):
        if event.kind == "progress" and event.report.get("pictures") and not killed:
            killed.append(event.name)
            os.kill(event.report["pid"], signal.SIGKILL)
        elif event.kind == "retried":
            killed.append("retried")

    folders = synthesize_population(
        tmp_path,
        **SETTINGS,
        workers=2,
        on_event=kill_once,
        progress=lambda done, total: counts.append((done, total)),
    )
    assert killed[1:] == ["retried"]
    assert [bytes_of(folder) for folder in folders] == alone
    assert counts[-1] == (PICTURES, PICTURES)
    assert all(total == PICTURES for _, total in counts)
    before = [(folder / "capture.json").stat().st_mtime_ns for folder in folders]
    again = []
    synthesize_population(
        tmp_path, **SETTINGS, workers=2, progress=False, tracking=("vhap",), on_event=again.append
    )
    assert [(folder / "capture.json").stat().st_mtime_ns for folder in folders] == before
    assert sorted(path.name for path in (tmp_path.parent / f"{tmp_path.name}-vhap").iterdir()) == [
        "s0000", "s0001", "s0002"
    ]  # fmt: skip


def test_what_goes_wrong_in_a_worker_is_a_sentence(tmp_path):
    (tmp_path / "s0001").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot write captures into"):
        synthesize_population(tmp_path, **SETTINGS, workers=2, progress=False)
    with pytest.raises(UserError, match="workers is 0"):
        synthesize_population(tmp_path, **SETTINGS, workers=0, progress=False)


def test_the_command_makes_an_arc_of_16_cameras_a_smooth_sequence_and_tracking_files(tmp_path):
    words = [
        "synth",
        str(tmp_path / "arc"),
        "--subjects",
        "1",
        "--timesteps",
        "3",
        "--views",
        "16",
        "--size",
        "24",
    ]
    words += ["--rig", "nersemble", "--motion", "smooth", "--tracking", "metrical", "ava256"]
    assert main(words) == 0
    source = read_capture(tmp_path / "arc" / "s0000")
    assert len(source.camera_ids) == 16
    assert np.abs(np.diff(source.expressions, axis=0)).max() < 0.25
    for folder in ("arc-metrical/dataset/s0000", "arc-ava256/20000101--0000--s0000"):
        capture = read_capture(tmp_path / folder)
        assert (capture.expressions == source.expressions).all()
