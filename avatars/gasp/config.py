"""Every choice that shapes a GASP prior, the paper's and ours side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from avatars.configs import config_from
from avatars.errors import UserError

__all__ = ["GaspConfig", "small_model"]


@dataclass(frozen=True)
class GaspConfig:
    """Shape of a prior and what holds it together in training.

    Source: GASP (arXiv 2412.07739). The paper gives the number of Gaussians, the lengths of feature and code, that the
    displacement is penalised 100 times less on the scalp, and which losses there are. There is no public code: what is
    marked "ours" is in no source that we have.
    """

    method: ClassVar[str] = "gasp"

    head: str = "makehuman"
    """Parametric head that carries the Gaussians. Ours: the paper's is not public."""
    size: int = 512
    """Side in pixels of the pictures that the prior is trained on. Ours."""
    people: int = 0
    """Rows of the table of identity codes; 0 for as many as the shards have people to train on."""
    uv_resolution: int = 512
    """Side of the UV map in pixels; every covered pixel is a Gaussian: 186,839 at 512 on the built-in head."""
    feature: int = 8
    """Length of a Gaussian's learned feature."""
    code: int = 512
    """Length of a person's identity code."""
    width: int = 256
    """Width of the shared network's hidden layers. Ours."""
    layers: int = 4
    """Hidden layers of the shared network. Ours."""
    position_unit: float = 0.01
    """Metres on the mean head that a one in the position attribute is. Ours."""
    start_opacity: float = 0.9
    """Opacity of the template before training. Ours."""
    start_size: float = 0.7
    """Size of the template's Gaussians before training, as a share of a UV pixel's ellipse. Ours."""
    feature_noise: float = 0.01
    """Standard deviation of the features before training. Ours."""
    code_noise: float = 0.01
    """Standard deviation of the codes before training. Ours."""

    alpha: float = 0.1
    """Weight of the mean absolute difference between alpha and mask. Ours."""
    displacement: float = 1e-2
    """Weight of the mean square of the position attribute. Ours."""
    scalp_share: float = 0.01
    """Share of that weight on the scalp, where hair grows off the surface."""
    scale: float = 1.0
    """Weight of the mean square of how far a Gaussian's size is above `largest`, in position units. Ours."""
    largest: float = 0.02
    """Standard deviation in metres up to which a Gaussian's size costs nothing. Ours."""
    code_penalty: float = 1e-4
    """Weight of the squared length of the identity code. Ours."""

    rate_code: float = 2.0
    """Learning rate of the codes, as a share of the recipe's, which is that of the network. Ours."""
    rate_feature: float = 2.0
    """The same of the features. Ours."""
    rate_position: float = 20.0
    """The same of the template's positions. Ours."""
    rate_rotation: float = 2.0
    """The same of its rotations. Ours."""
    rate_scale: float = 10.0
    """The same of its sizes. Ours."""
    rate_opacity: float = 20.0
    """The same of its opacities. Ours."""
    rate_color: float = 5.0
    """The same of its colours. Ours."""

    def __post_init__(self) -> None:
        for name in ("size", "uv_resolution", "feature", "code", "width", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"GASP: {name} is {getattr(self, name)} and must be at least 1.")
        if self.people < 0:
            raise UserError(
                f"GASP: people is {self.people}; give 0 (as many as the shards have) or a number."
            )
        for name in ("position_unit", "start_size", "largest"):
            if getattr(self, name) <= 0:
                raise UserError(f"GASP: {name} is {getattr(self, name)} and must be more than 0.")
        if not 0 < self.start_opacity < 1:
            raise UserError(f"GASP: start_opacity is {self.start_opacity} and must be above 0 and below 1.")

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GaspConfig:
        """Reads `to_json`'s output.

        Raises:
            UserError: a field is not known to this version.
        """
        return config_from(cls, values, "a GASP")


def small_model() -> GaspConfig:
    """A prior that two processor cores train in minutes: 2,926 Gaussians on the built-in head. Ours."""
    return GaspConfig(size=64, uv_resolution=64, code=64, width=128, layers=3)
