"""Our rasterizers against other people's: splax's recorded results, gsplat's projection, and gsplat on a GPU."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gaussians import Gaussians, quaternion_to_matrix
from avatars.rasterize import backend_report, rasterize
from avatars.rasterize.cpu import rasterize_cpu
from avatars.rasterize.gsplat_backend import _reason, gsplat_problem, rasterize_gsplat
from avatars.rasterize.reference import project, rasterize_reference
from tests.rasterize_scenes import assert_gradients_close, assert_pictures_close, draw, orbit, shell

GOLDEN = Path(__file__).parent / "golden" / "splax.npz"


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads only get into each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["classic", "antialiased"])
@pytest.mark.parametrize("rasterizer", [rasterize_cpu, rasterize_reference])
def test_agrees_with_splax(rasterizer, mode):
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN).items()}
    gaussians = Gaussians(*(golden[n] for n in ("means", "quats", "scales", "opacities", "harmonics")))
    camera = Cameras(golden["K"][None], golden["world_to_camera"][None])
    weights = golden["weights"].permute(2, 0, 1)[None]  # (1, 5, H, W): image, depth, alpha
    rendering, gradients = draw(
        rasterizer,
        gaussians,
        camera,
        tuple(golden["size"].tolist()),
        golden["background"],
        mode,
        weights=[weights[:, :3], weights[:, 4:], weights[:, 3:4]],
    )
    theirs = {name.removeprefix(f"{mode}_"): v for name, v in golden.items() if name.startswith(mode)}
    torch.testing.assert_close(rendering.image[0].permute(1, 2, 0), theirs["image"], atol=2e-5, rtol=0)
    torch.testing.assert_close(rendering.alpha[0, 0], theirs["alpha"], atol=2e-5, rtol=0)
    torch.testing.assert_close(rendering.depth[0, 0], theirs["depth"], atol=2e-5, rtol=0)
    for ours, name in (("colors", "harmonics"), *((f, f) for f in ("means", "quats", "scales", "opacities"))):
        error = (gradients[ours] - theirs[f"v_{name}"]).norm() / theirs[f"v_{name}"].norm()
        assert error < 2e-4, (ours, error)


@pytest.mark.parametrize("mode", ["classic", "antialiased"])
def test_projection_agrees_with_gsplats(mode):
    gsplat = pytest.importorskip("gsplat.cuda._torch_impl")
    size = (60, 80)
    g, cameras = shell(200).to(dtype=torch.float64), orbit(1, size).to(dtype=torch.float64)
    half = quaternion_to_matrix(g.quats) * g.scales[:, None]
    _, means, depths, conics, factors = gsplat._fully_fused_projection(
        g.means, half @ half.transpose(1, 2), cameras.world_to_camera, cameras.K, size[1], size[0],
        calc_compensations=mode == "antialiased",
    )  # fmt: skip
    ours = project(g, cameras.K[0], cameras.world_to_camera[0], size, mode)
    assert len(ours.index) > 150
    torch.testing.assert_close(ours.means, means[0, ours.index])
    torch.testing.assert_close(ours.depths, depths[0, ours.index])
    torch.testing.assert_close(ours.conics, conics[0, ours.index])
    if mode == "antialiased":
        torch.testing.assert_close(ours.opacities, (g.opacities * factors[0])[ours.index])


def test_gsplat_is_a_sentence_where_it_cannot_be_used():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert gsplat_problem() == "There is no CUDA device."
    report = backend_report("cuda")
    assert report.backend == "reference"
    assert "no CUDA device" in report.reason


def test_a_failed_gsplat_build_is_one_line():
    log = (
        "Error building extension 'gsplat_cuda': [1/30] /usr/local/cuda/bin/nvcc -c a.cu\nFAILED: a.cuda.o\n"
    )
    assert (
        _reason(RuntimeError(log + "a.cu(7): error: no such type\n2 errors."))
        == "a.cu(7): error: no such type"
    )
    assert _reason(RuntimeError("\nThe CUDA versions differ.\nUse another.")) == "The CUDA versions differ"
    assert _reason(OSError()) == "OSError"


def broken_build(monkeypatch, tmp_path, gsplat_backend):
    """A process with a CUDA device and a gsplat whose import does what `gsplat_backend` says."""
    package = tmp_path / "gsplat" / "cuda"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "_backend.py").write_text(gsplat_backend)
    for name in [name for name in sys.modules if name.split(".")[0] == "gsplat"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HEADSPLAT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("raise RuntimeError('[1/3] nvcc\\nx.cu(3): error: bad\\n')", "x.cu(3): error: bad"),
        ("_C = None", "no CUDA toolkit"),
        ("import warnings; warnings.warn('old'); _C = 1", "do not run here"),
    ],
)
def test_a_broken_gsplat_is_a_sentence(monkeypatch, tmp_path, module, sentence):
    broken_build(monkeypatch, tmp_path, module)
    gsplat_problem.cache_clear()
    try:
        problem = gsplat_problem()
    finally:
        gsplat_problem.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "gsplat"]:
            del sys.modules[name]
    assert sentence in problem
    assert "\n" not in problem


def on_gpu(rasterizer):
    def draw_there(gaussians, cameras, size, background, mode):
        rendering = rasterizer(gaussians.to("cuda"), cameras.to("cuda"), size, background.to("cuda"), mode)
        return type(rendering)(*(tensor.cpu() for tensor in vars(rendering).values()))

    return draw_there


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["classic", "antialiased"])
@pytest.mark.parametrize("sh", [0, 1, 4, 9, 16])
def test_gsplat_agrees_with_the_reference(mode, sh):
    assert gsplat_problem() is None
    g, cameras, background = shell(900, sh=sh), orbit(3, (53, 70)), torch.tensor([0.9, 0.2, 0.5])
    actual, v_actual = draw(on_gpu(rasterize_gsplat), g, cameras, (53, 70), background, mode)
    expected, v_expected = draw(
        rasterize_reference, g, cameras, (53, 70), background, mode, dtype=torch.float64
    )
    # gsplat is built with fast math: its exp and its logarithm in the radii are a little coarser
    assert_pictures_close(actual, expected, tolerance=1e-4, flips=2e-2)
    assert_gradients_close(v_actual, v_expected, tolerance=2e-3, norm=3e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gsplat_draws_cuda_tensors_and_refuses_bad_ones():
    assert backend_report("cuda").backend == "gsplat"
    g, cameras = shell(300).to("cuda"), orbit(2, (40, 40)).to("cuda")
    picture = rasterize(g, cameras, (40, 40))
    assert picture.image.is_cuda
    torch.testing.assert_close(
        picture.image.cpu(), rasterize(g.to("cpu"), cameras.to("cpu"), (40, 40)).image, atol=0.02, rtol=0
    )
    g.scales[4, 1] = float("nan")
    with pytest.raises(UserError, match="scales"):
        rasterize(g, cameras, (40, 40))
    nobody = rasterize(shell(0).to("cuda"), cameras, (40, 40), torch.ones(3, device="cuda"))
    assert torch.equal(nobody.image, torch.ones_like(nobody.image))
