"""Every choice that shapes a FlashAvatar, the authors' and ours side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from avatars.configs import config_from

__all__ = ["FlashAvatarConfig", "paper_model"]


@dataclass(frozen=True)
class FlashAvatarConfig:
    """Shape of an avatar. Sizes are the paper's; where its code makes fits unstable the default is ours,
    marked.

    Source: FlashAvatar (arXiv 2312.02214) sections 4.1 and 4.4 and the behaviour of the authors' program;
    `paper_model()` is the configuration that follows both to the letter.
    """

    head: str = "makehuman"
    """Name of the parametric head that carries the Gaussians, as `avatars.head.tracked.load_head` knows it."""
    uv_resolution: int = 128
    """Side of the UV map in pixels; every covered pixel is a Gaussian."""
    sh_degree: int = 3
    """Degree of the spherical harmonics of the colour: 0 (no dependence on the view) to 3."""
    mlp_width: int = 256
    """Width of the offset network's hidden layers."""
    mlp_layers: int = 6
    """Hidden layers of the offset network. The paper says 5, its program has 6."""
    octaves: int = 8
    """Octaves of the positional encoding, on raw metric positions."""
    offset_scale: float = 0.05
    """Largest offset from the surface in metres. The authors' program has 1; ours keeps Gaussians near the
    head."""
    log_scale_multiply: bool = False
    """True: the network's factor multiplies the log-scale, as in the authors' program. False (ours): it is
    added."""
    zero_offset: bool = True
    """Start from no offset at all (ours). False: the last layer starts as any other, as in the authors'
    program."""

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FlashAvatarConfig:
        """Reads `to_json`'s output.

        Raises:
            UserError: a field is not known to this version.
        """
        return config_from(cls, values, "a FlashAvatar")


def paper_model(uv_resolution: int = 128) -> FlashAvatarConfig:
    """The authors' program to the letter, with its offsets of up to a metre and its scaling of log-scales."""
    return FlashAvatarConfig(
        uv_resolution=uv_resolution, offset_scale=1.0, log_scale_multiply=True, zero_offset=False
    )
