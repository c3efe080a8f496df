"""The build of the compiled rasterizer: found again, made once by many, harmed by nobody's death."""

import importlib
import os
import signal
import stat
import subprocess
import sys
import time
import warnings

import pytest
import torch

from avatars.rasterize import build, rasterize
from avatars.rasterize.cpu import rasterize_cpu
from avatars.rasterize.reference import rasterize_reference
from tests.rasterize_scenes import assert_gradients_close, assert_pictures_close, draw, orbit, shell

dispatch = importlib.import_module(
    "avatars.rasterize"
)  # the package's attribute of that name is the function

DRAW = """
import torch
from avatars.cameras import Cameras
from avatars.gaussians import Gaussians
from avatars.rasterize import backend_report, rasterize
g = Gaussians(torch.zeros(1, 3), torch.eye(4)[:1], torch.full((1, 3), 0.1), torch.ones(1), torch.ones(1, 3))
K = torch.tensor([[[20.0, 0, 8], [0, 20, 8], [0, 0, 1]]])
camera = Cameras.look_at(K, torch.tensor([[0.0, 0, 1]]), torch.zeros(3), torch.tensor([0.0, 1, 0]))
print(backend_report().backend, round(rasterize(g, camera, (16, 16)).alpha.max().item(), 3))
"""


def start(cache, pipe=subprocess.PIPE, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", DRAW],
        env={**os.environ, "HEADSPLAT_CACHE": str(cache), "OMP_NUM_THREADS": "1", **environment},
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.split()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_processes_that_start_together_build_once_and_later_ones_need_no_compiler(tmp_path):
    log = tmp_path / "log"
    counting = script(tmp_path / "compiler", f'echo run >> {log}\nexec g++ "$@"')
    together = [start(tmp_path, CXX=counting) for _ in range(3)]
    assert [finish(process) for process in together] == [["cpu", "0.944"]] * 3
    assert log.read_text() == "run\n"
    assert finish(start(tmp_path, CXX="/bin/false")) == ["cpu", "0.944"]
    assert not list((tmp_path / "kernels").glob("build-*"))


def test_a_killed_build_blocks_nobody(tmp_path):
    started = tmp_path / "started"
    stuck = script(
        tmp_path / "compiler", f"echo $$ > {started}.part && mv {started}.part {started}\nexec sleep 600"
    )
    builder = start(tmp_path, subprocess.DEVNULL, CXX=stuck)
    while not started.exists():
        assert builder.poll() is None
        time.sleep(0.05)
    compiler = int(started.read_text())  # outlives its parent
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    try:
        assert list((tmp_path / "kernels").glob("build-*"))
        assert finish(start(tmp_path)) == ["cpu", "0.944"]
        assert not list((tmp_path / "kernels").glob("build-*"))
    finally:
        os.kill(compiler, signal.SIGKILL)


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """A process that has no build yet; everything that was remembered is forgotten before and after."""
    remembered = (build.load_library, dispatch.backend_report, dispatch._warn_slow)
    for function in remembered:
        function.cache_clear()
    monkeypatch.setenv("HEADSPLAT_CACHE", str(tmp_path))
    yield monkeypatch
    for function in remembered:
        function.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [
        ("/bin/false", "could not compile"),
        ("/no/such/compiler", "cannot be run"),
        ("", "no C\\+\\+ compiler"),
    ],
)
def test_without_a_compiler_the_reference_draws_and_says_so(no_library, compiler, sentence):
    no_library.setenv("CXX", compiler)
    no_library.setattr(build.shutil, "which", lambda name: None)
    with pytest.warns(RuntimeWarning, match=sentence):
        rendering = rasterize(shell(20), orbit(1, (20, 20)), (20, 20))
    assert rendering.alpha.max() > 0
    report = dispatch.backend_report()
    assert report.backend == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, not at every step
        rasterize(shell(20), orbit(1, (20, 20)), (20, 20))


def test_a_cache_that_cannot_be_written_is_a_sentence(no_library, tmp_path):
    (tmp_path / "file").write_text("")
    no_library.setenv("HEADSPLAT_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="HEADSPLAT_CACHE"):
        build.build()


def test_a_damaged_library_is_a_sentence(no_library):
    library = build.cache_folder() / f"rasterize-{build._fingerprint()}.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"not a library")
    with pytest.raises(build.BuildError, match="delete it"):
        build.load_library()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("HEADSPLAT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "headsplat" / "kernels"


def test_kernels_for_any_processor_agree_with_the_reference(no_library):
    no_library.setattr(build, "FLAGS", [*build.FLAGS, "-DHEADSPLAT_GENERIC"])
    assert build.load_library().headsplat_vector_width() == 8
    g, cameras, size, background = (
        shell(500, sh=4),
        orbit(2, (53, 70)),
        (53, 70),
        torch.tensor([0.9, 0.2, 0.5]),
    )
    actual, v_actual = draw(rasterize_cpu, g, cameras, size, background)
    expected, v_expected = draw(rasterize_reference, g, cameras, size, background, dtype=torch.float64)
    assert_pictures_close(actual, expected)
    assert_gradients_close(v_actual, v_expected)


def test_a_forked_process_can_draw():
    g, cameras = shell(500), orbit(1, (40, 40))
    expected = rasterize(g, cameras, (40, 40)).image
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.write(writer, b"1" if torch.equal(rasterize(g, cameras, (40, 40)).image, expected) else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
    os.close(reader)
    os.close(writer)
