"""FastAvatar (Liang et al., arXiv 2508.18389 v1): one picture of any pose to a Gaussian head in one forward pass."""

from avatars.fastavatar.avatar import FastAvatar, average, shared_head
from avatars.fastavatar.config import FastAvatarConfig, FastAvatarDecoderConfig, FastAvatarEncoderConfig
from avatars.fastavatar.surface import LocalGaussians, Seats, place, seats_of

__all__ = [
    "FastAvatar",
    "FastAvatarConfig",
    "FastAvatarDecoderConfig",
    "FastAvatarEncoderConfig",
    "LocalGaussians",
    "Seats",
    "average",
    "place",
    "seats_of",
    "shared_head",
]
