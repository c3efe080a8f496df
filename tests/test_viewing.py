"""The avatar in the browser: what is sent to the page, and what its controls do."""

import urllib.request

import pytest
import torch

from avatars.gaussians import Gaussians
from avatars.head.makehuman import ARKIT_NAMES
from launch.preflight import free_port
from launch.viewing import Viewer, splat_arrays

pytest.importorskip("viser")


class Dot:
    """An avatar of one Gaussian that the first number of the code moves and `jawOpen` fades."""

    method = "dot"
    expression_kind = "arkit-52"
    expression_length = 52

    def gaussians(self, expression):
        return Gaussians(
            means=expression[:1, None].expand(1, 3),
            quats=torch.tensor([[0.5**0.5, 0, 0, 0.5**0.5]]),  # a quarter turn about z
            scales=torch.tensor([[0.1, 0.2, 0.3]]),
            opacities=1 - expression[ARKIT_NAMES.index("jawOpen")][None],
            colors=torch.tensor([[1.5, 0.5, 0.0]]),
        )


@pytest.fixture
def viewer():
    shown = Viewer(Dot(), None, "127.0.0.1", free_port(None))
    yield shown
    shown.close()


def test_the_page_is_served_and_controls_drive_the_avatar(viewer):
    with urllib.request.urlopen(f"http://127.0.0.1:{viewer.port}/") as answer:
        assert b"<html" in answer.read()
    assert len(viewer._sliders) == 52
    assert viewer.shown == 1
    viewer._faces.value = "jaw drop"
    assert viewer.code[ARKIT_NAMES.index("jawOpen")] == pytest.approx(0.85)
    place = {p: slider for slider, p in viewer._sliders}
    assert place[ARKIT_NAMES.index("jawOpen")].value == pytest.approx(0.85)
    assert viewer.shown == 2  # the sliders followed without driving once each
    viewer._frame.value = 7
    assert torch.equal(viewer.code, viewer.sequence[7])


def test_splats_are_what_the_gaussians_are():
    arrays = splat_arrays(Dot().gaussians(torch.full((52,), 0.25)))
    assert arrays["centers"].tolist() == [[0.25] * 3]
    assert arrays["covariances"][0].diagonal() == pytest.approx(
        [0.04, 0.01, 0.09]
    )  # x and y have changed places
    assert arrays["rgbs"].tolist() == [[1.0, 0.5, 0.0]]
    assert arrays["opacities"].tolist() == [[0.75]]
