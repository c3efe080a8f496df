"""FlashAvatar (Xiang et al., CVPR 2024): Gaussians on the UV map of a parametric head."""

from avatars.flashavatar.avatar import FlashAvatar
from avatars.flashavatar.config import FlashAvatarConfig, paper_model

__all__ = ["FlashAvatar", "FlashAvatarConfig", "paper_model"]
