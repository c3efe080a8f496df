"""`headsplat view`: an avatar in the browser, with a slider for every expression."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from avatars.errors import UserError
from launch.options import parse

if TYPE_CHECKING:
    from torch import Tensor

    from avatars.gaussians import Gaussians
    from avatars.method import Avatar

__all__ = ["Viewer", "view"]

FPS = 24
CAMERA = (0.0, -0.01, 1.1)  # metres before the head, as a capture dome's cameras stand
FIELD_OF_VIEW = 0.32  # radians: the head fills the page


@dataclass(frozen=True)
class ViewOptions:
    """Shows an avatar in the browser: turn it, move its face, play a sequence."""

    avatar: Annotated[Path, tyro.conf.Positional]
    """Folder of an avatar of any method."""
    expressions: Path | None = None
    """A sequence to play: .npy, .json or .csv (Live Link Face); a made-up one by default where names are known."""
    port: int = 8080
    """Port on the loopback interface."""
    host: str = "127.0.0.1"
    """Interface to listen on; only this machine by default."""


def view(words: list[str]) -> None:
    """`headsplat view AVATAR`: serves until it is interrupted."""
    from avatars.expressions import read_expressions
    from avatars.method import load_avatar
    from launch.preflight import free_port

    options = parse(ViewOptions, words, "view")
    avatar = load_avatar(options.avatar)
    sequence = None
    if options.expressions is not None:
        sequence = read_expressions(options.expressions, avatar.expression_kind, avatar.expression_length)
    viewer = Viewer(avatar, sequence, options.host, free_port(options.port))
    print(f"http://{options.host}:{viewer.port}  (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(1)
    finally:
        viewer.close()


class Viewer:
    """A page with the avatar's Gaussians and controls; every change of a control drives the avatar anew.

    Attributes:
        port: where it listens.
        shown: number of times that Gaussians were sent to the page.
    """

    def __init__(self, avatar: Avatar, sequence: Tensor | None, host: str, port: int) -> None:
        """Starts serving.

        Args:
            avatar: whom to show.
            sequence: (T, E) codes to play, or None.
            host: interface to listen on.
            port: port to listen on.

        Raises:
            UserError: the viewer's package is not installed.
        """
        import torch

        try:
            import viser
        except ModuleNotFoundError:
            raise UserError("The viewer needs viser: pip install 'headsplat[view]'.") from None
        self.avatar = avatar
        self.code = torch.zeros(avatar.expression_length)
        self.sequence = sequence
        self.shown = 0
        self.port = port
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._server = viser.ViserServer(host=host, port=port, label="headsplat", verbose=False)
        self._server.scene.set_up_direction("+y")
        self._server.initial_camera.position = CAMERA
        self._server.initial_camera.look_at = (0.0, -0.01, 0.0)
        self._server.initial_camera.fov = FIELD_OF_VIEW
        self._splats: Any = None
        self._sliders: list[Any] = []
        self._controls()
        self.show(self.code)
        self._player = threading.Thread(target=self._play, daemon=True)
        self._player.start()

    def show(self, code: Tensor) -> None:
        """Drives the avatar with `code` (E,) and sends its Gaussians to the page."""
        with self._lock:
            self.code = code
            arrays = splat_arrays(self.avatar.gaussians(code))
            if self._splats is None:
                self._splats = self._server.scene.add_gaussian_splats("/avatar", **arrays)
            else:
                self._splats.set_gaussians(**arrays)
            self.shown += 1

    def close(self) -> None:
        """Stops playing and serving."""
        self._stop.set()
        self._player.join()
        self._server.stop()

    def _controls(self) -> None:
        """A list of whole faces, sliders by name where codes have names, and the sequence's player."""
        import torch

        gui = self._server.gui
        gui.add_markdown(f"**{self.avatar.method}**, driven by {self.avatar.expression_kind} codes")
        if self.avatar.expression_kind == "arkit-52":
            from avatars.head.makehuman import ARKIT_NAMES
            from shards.synth.expressions import POSES, code, smooth_sequence

            if self.sequence is None:
                self.sequence = torch.from_numpy(smooth_sequence(np.random.default_rng(0), 240))
            self._faces = gui.add_dropdown("face", tuple(POSES))
            self._faces.on_update(lambda _: self._set(torch.from_numpy(code(POSES[self._faces.value]))))
            for part in ("brow", "eye", "cheek", "nose", "jaw", "mouth", "tongue"):
                with gui.add_folder(part, expand_by_default=False):
                    for place, name in enumerate(ARKIT_NAMES):
                        if name.startswith(part):
                            self._slider(name, place)
        self._playing = gui.add_checkbox("play", False, disabled=self.sequence is None)
        frames = 1 if self.sequence is None else len(self.sequence)
        self._frame = gui.add_slider("frame", 0, max(frames - 1, 1), 1, 0, disabled=self.sequence is None)
        self._frame.on_update(lambda _: self._show_frame())

    def _slider(self, name: str, place: int) -> None:
        """A slider for one number of the code."""
        slider = self._server.gui.add_slider(name, 0.0, 1.0, 0.01, 0.0)

        def moved(event: Any) -> None:
            if event.client is None:  # set by `_set`, which shows the whole code itself
                return
            code = self.code.clone()
            code[place] = slider.value
            self.show(code)

        slider.on_update(moved)
        self._sliders.append((slider, place))

    def _set(self, code: Tensor) -> None:
        """Shows a whole face and moves the sliders to it."""
        for slider, place in self._sliders:
            slider.value = float(code[place])
        self.show(code)

    def _show_frame(self) -> None:
        if self.sequence is not None:
            self.show(self.sequence[min(int(self._frame.value), len(self.sequence) - 1)])

    def _play(self) -> None:
        """Moves the frame slider on while `play` is ticked; slower than real time where driving is."""
        while not self._stop.wait(1 / FPS):
            if self._playing.value and self.sequence is not None:
                self._frame.value = (int(self._frame.value) + 1) % len(self.sequence)  # its callback shows it


def splat_arrays(gaussians: Gaussians) -> dict[str, np.ndarray]:
    """Gaussians as the page takes them: centers (N, 3), covariances (N, 3, 3), rgbs (N, 3), opacities (N, 1).

    Colours are those of the zeroth harmonic: the page knows no view dependence.
    """
    from avatars.gaussians import quaternion_to_matrix, sh_to_rgb

    rgb = gaussians.colors if gaussians.colors.ndim == 2 else sh_to_rgb(gaussians.colors[:, 0])
    axes = quaternion_to_matrix(gaussians.quats) * gaussians.scales[:, None, :]  # (N, 3, 3)
    return {
        "centers": gaussians.means.cpu().numpy(),
        "covariances": (axes @ axes.transpose(1, 2)).cpu().numpy(),
        "rgbs": rgb.clamp(0, 1).cpu().numpy(),
        "opacities": gaussians.opacities[:, None].cpu().numpy(),
    }
