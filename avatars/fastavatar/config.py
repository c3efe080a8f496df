"""Every choice that shapes a FastAvatar: the layout of its Gaussians, the decoder and the encoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from avatars.configs import config_from
from avatars.errors import UserError

__all__ = ["FastAvatarConfig", "FastAvatarDecoderConfig", "FastAvatarEncoderConfig"]


@dataclass(frozen=True)
class FastAvatarConfig:
    """Shape of the networks. Defaults are the paper's sizes (arXiv 2508.18389 v1 and the authors' program)."""

    size: int = 512
    """Side in pixels of the pictures that it is trained on and made from."""
    head: str = "makehuman"
    """Name of the parametric head that carries the Gaussians."""
    uv_resolution: int = 0
    """0: a Gaussian at the centre of every triangle (the paper's). Otherwise one for each covered pixel of a UV map of
    this side (ours, for fewer)."""
    identity_dim: int = 100
    """Length of the head's identity code, which the decoder predicts from w (ours)."""
    expression_dim: int = 52
    """Length of the head's expression code."""
    sh_degree: int = 3
    """Degree of the spherical harmonics of the colours."""
    latent: int = 512
    """Length of w."""
    embedding: int = 32
    """Numbers of a Gaussian's embedding; the first three are its template's position."""
    width: int = 256
    """Width of the decoder's layers."""
    layers: int = 6
    """Layers of its trunk."""
    gain: float = 0.02
    """Gain of the Xavier initialisation: small, so that the untrained decoder gives the template."""
    offset: float = 0.1
    """Metres that a Gaussian may leave its triangle by, along each axis."""
    backbone: str = "resnet18"
    """What looks at the picture: "dlib" or "arcface" (face recognition, frozen), or a network of timm, trained with
    us."""
    backbone_size: int = 128
    """Side in pixels of the crop that a timm backbone sees."""
    hidden: tuple[int, ...] = (1024, 768, 512)
    """Widths of the layers between the backbone and w."""
    dropout: float = 0.2
    """Dropout after the first two of them."""

    def __post_init__(self) -> None:
        for name in ("size", "identity_dim", "expression_dim", "latent", "width", "layers", "backbone_size"):
            if getattr(self, name) < 1:
                raise UserError(f"FastAvatar: {name} is {getattr(self, name)} and must be at least 1.")
        if self.embedding < 4 or self.uv_resolution < 0 or not self.hidden:
            raise UserError(
                "FastAvatar: embedding must be at least 4, uv_resolution not negative, and hidden not empty."
            )
        if not 0 <= self.sh_degree <= 3 or not 0 <= self.dropout < 1 or self.offset <= 0:
            raise UserError(
                "FastAvatar: sh_degree is from 0 to 3, dropout from 0 to below 1, and offset more than 0 metres."
            )

    def network(self) -> FastAvatarConfig:
        """Only what shapes the networks, without what a training adds."""
        names = {field.name for field in fields(FastAvatarConfig)}
        return FastAvatarConfig(**{name: value for name, value in vars(self).items() if name in names})

    def same_decoder_as(self, other: FastAvatarConfig) -> bool:
        """Whether a decoder of `other` fits."""
        names = ("head", "uv_resolution", "identity_dim", "expression_dim", "sh_degree", "latent", "embedding",
                 "width", "layers", "offset")  # fmt: skip
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def to_json(self) -> dict[str, Any]:
        """The network's shape as plain values."""
        return asdict(self.network())

    @staticmethod
    def from_json(values: dict[str, Any]) -> FastAvatarConfig:
        """Reads `to_json`'s output.

        Raises:
            UserError: a field that this version does not know.
        """
        return config_from(FastAvatarConfig, values | {"hidden": tuple(values["hidden"])}, "a FastAvatar")


@dataclass(frozen=True)
class FastAvatarDecoderConfig(FastAvatarConfig):
    """The decoder's training: one w a training person, learned with the decoder."""

    method: ClassVar[str] = "fastavatar-decoder"
    people: int = 0
    """Rows of the table of w; 0 for one for each training person of the shards."""
    template: str = ""
    """Folder of a template that `headsplat template` made, kept as it is (the paper's). Without one the template starts
    as a grey head and is learned with the decoder (ours)."""
    latent_std: float = 1.0
    """Standard deviation of the first w. The authors' is 1; a smaller one (ours) leaves likeness to order them."""
    latent_rate: float = 1.0
    """Learning rate of w as a share of the recipe's."""
    latent_decay: float = 0.0
    """Weight of the mean square of w (ours): keeps people that are alike close."""
    shape_weight: float = 0.0
    """Weight of the squared error, in cm², of the head that w predicts against the tracked one (ours)."""
    matte_weight: float = 0.0
    """Weight of the mean absolute difference between what is covered and the true matte (ours)."""


@dataclass(frozen=True)
class FastAvatarEncoderConfig(FastAvatarConfig):
    """The encoder's training: w from one picture, whatever its pose and expression."""

    method: ClassVar[str] = "fastavatar-encoder"
    decoder: str = ""
    """Folder that the decoder's training exported. Without one the decoder is learned with the encoder, from pictures
    alone (ours)."""
    people: int = 0
    """Training people; 0 for those of the shards."""
    cosine_weight: float = 1.0
    """Weight of one minus the cosine to the learned w."""
    mse_weight: float = 0.1
    """Weight of the squared error to the learned w."""
    nce_weight: float = 0.0
    """Weight of InfoNCE between pictures of the batch's people. With it those of the input sets are looked at as well,
    which show other moments (ours): pictures of one moment could be told to be of one person by their expression."""
    temperature: float = 0.07
    """Temperature of InfoNCE."""
    degrees: float = 180.0
    """How far from straight before the face a camera may stand for the encoder to learn from its picture (ours)."""
    picture_weight: float = 0.0
    """Weight of the picture losses of what the encoder's w is decoded to (ours)."""
    picture_people: int = 0
    """People of a batch that are drawn for them; 0 for all."""
    picture_views: int = 0
    """Views of each person that are drawn for them; 0 for all of the batch's."""
    decoder_rate: float = 0.0
    """Learning rate of a given decoder as a share of the recipe's; 0 keeps it as it is, as the authors do."""
    shape_weight: float = 0.0
    """As the decoder's, for the w of every picture."""
    matte_weight: float = 0.0
    """As the decoder's, where pictures are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.degrees <= 180 or min(self.picture_people, self.picture_views) < 0:
            raise UserError(
                "FastAvatar: degrees is more than 0 and at most 180; picture_people and picture_views are not negative."
            )
