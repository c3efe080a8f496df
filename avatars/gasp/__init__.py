"""GASP (Saunders et al., CVPR 2025): a prior of Gaussian heads, learned from synthetic people, and its avatars."""

from avatars.gasp.avatar import GaspAvatar
from avatars.gasp.config import GaspConfig
from avatars.gasp.prior import GaspPrior
from avatars.gasp.surface import ATTRIBUTES, Surface

__all__ = ["ATTRIBUTES", "GaspAvatar", "GaspConfig", "GaspPrior", "Surface"]
