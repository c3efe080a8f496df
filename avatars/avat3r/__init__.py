"""Avat3r (arXiv 2502.20220): a few pictures to an animatable Gaussian head in one forward pass."""

from avatars.avat3r.avatar import Avat3rAvatar, Avat3rMethod, views_of
from avatars.avat3r.config import Avat3rConfig
from avatars.avat3r.model import Avat3r, GaussianMaps, Views, confident

__all__ = [
    "Avat3r",
    "Avat3rAvatar",
    "Avat3rConfig",
    "Avat3rMethod",
    "GaussianMaps",
    "Views",
    "confident",
    "views_of",
]
