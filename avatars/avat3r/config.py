"""Every choice that shapes an Avat3r network, the disputed ones included."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

from avatars.configs import config_from
from avatars.errors import UserError
from avatars.inputs import Background

__all__ = ["Avat3rConfig", "ConfidenceSpace"]

ConfidenceSpace = Literal["log", "minus-one", "raw", "min-max"]


@dataclass(frozen=True)
class Avat3rConfig:
    """Shape of the network. The defaults are the paper's where it says, and ours (marked) where it does not.

    Source: Avat3r (arXiv 2502.20220) sections 3.2 and 4.1; GRM (arXiv 2403.14621) for what Avat3r takes from it.
    """

    method: ClassVar[str] = "avat3r"

    size: int = 512
    """Side of the square input pictures in pixels."""
    patch: int = 16
    """Side of a patch in pixels. The paper does not say; ours."""
    width: int = 768
    """Token width. The paper does not say; ours."""
    head_width: int = 64
    """Width of one attention head."""
    self_layers: int = 8
    """Self-attention layers that match the views."""
    cross_layers: int = 8
    """Cross-attention layers that bring the expression in."""
    interleave: bool = False
    """Alternate self and cross layers. False allows to cache all that does not depend on the expression."""
    expression_dim: int = 256
    """Length of the expression code."""
    expression_tokens: int = 4
    """Number of tokens that the code becomes (S in the paper)."""
    expression_hidden: int = 256
    """Hidden width of the expression MLP. Ours."""
    position_prior: bool = True
    """Feed position maps to the encoder and gate Gaussians by their confidence."""
    feature_dim: int = 0
    """Channels of the semantic feature map (1920 for Sapiens 2B), 0 for none."""
    feature_prior: str = ""
    """Name of the prior that made the features, with a hash of its weights; filled in from the shards."""
    input_background: Background = "masked"
    """Whether input pictures are cut out of what is behind the head; filled in from the shards."""
    position_skip: bool = True
    """Add the position map to the predicted positions."""
    color_skip: bool = True
    """Add the input picture to the predicted colours."""
    confidence_threshold: float = 0.5
    """Gaussians at or below this confidence are dropped (tau in the paper)."""
    confidence_space: ConfidenceSpace = "log"
    """Where the threshold acts: log of DUSt3R's confidence, confidence minus one, raw, or scaled per picture."""
    upsample_stages: int = 2
    """Doublings of the token grid before the Gaussian heads; the heads expand the rest by pixel shuffle. Ours."""
    upsample_blocks: int = 2
    """Windowed attention blocks after each doubling."""
    upsample_window: int = 8
    """Side of the attention window in the upsampler, in grid cells. Ours."""
    upsample_min_width: int = 64
    """The width halves with each doubling but not below this."""
    position_unit: float = 0.02
    """Metres that one unit of the position head's output means. Ours."""
    expression_rate: float = 1.0
    """Learning rate of the cross-attention layers and the expression MLP as a share of the recipe's. Ours."""
    deviation_weight: float = 0.0
    """Weight of the mean absolute deviation of errors from their mean over an example's expressions, pixel by pixel in
    the same view: what is wrong with the person cancels, what an expression changes remains. Ours."""
    checkpoint_activations: bool = False
    """Recompute the layers' activations in the backward pass to save memory."""

    def __post_init__(self) -> None:
        def refuse(problem: str) -> None:
            raise UserError(f"Avat3r: {problem}")

        if self.size % self.patch:
            refuse(f"size {self.size} is no multiple of patch {self.patch}; change one of them.")
        if self.patch % 2**self.upsample_stages:
            refuse(
                f"patch {self.patch} cannot be halved {self.upsample_stages} times; lower upsample_stages."
            )
        if self.width % self.head_width:
            refuse(f"width {self.width} is no multiple of head_width {self.head_width}.")
        for stage in range(1, self.upsample_stages + 1):
            if self.stage_width(stage) % self.head_width:
                refuse(
                    f"upsampler width {self.stage_width(stage)} is no multiple of head_width {self.head_width}."
                )
        if self.confidence_space not in get_args(ConfidenceSpace):
            refuse(
                f"confidence_space {self.confidence_space!r} is none of {', '.join(get_args(ConfidenceSpace))}."
            )
        if self.expression_rate <= 0:
            refuse(f"expression_rate is {self.expression_rate} and must be more than 0.")
        if self.deviation_weight < 0:
            refuse(f"deviation_weight is {self.deviation_weight} and must not be negative.")
        if self.position_skip and not self.position_prior:
            refuse("position_skip needs position_prior; switch both off or both on.")

    @property
    def grid(self) -> int:
        """Tokens along one side of a picture."""
        return self.size // self.patch

    @property
    def input_channels(self) -> int:
        """Picture 3, Plücker rays 6, and the position map 3 when there is one."""
        return 12 if self.position_prior else 9

    def stage_width(self, stage: int) -> int:
        """Channels after `stage` doublings of the upsampler."""
        return max(self.width >> stage, self.upsample_min_width)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary for model.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Avat3rConfig:
        """Inverse of `to_json`.

        Raises:
            UserError: a field that this version does not know.
        """
        return config_from(cls, values, "an Avat3r")
