"""Foundation priors: DUSt3R's positions aligned to known cameras, and the features of Sapiens and DINOv2."""

from avatars.priors.alignment import Aligned, PairMaps, align
from avatars.priors.dust3r import DUSt3R, Encoded, Pair
from avatars.priors.features import Features, Sapiens, load_dinov2, load_sapiens2
from avatars.priors.interfaces import FeaturePrior, PositionPrior
from avatars.priors.position import DUSt3RPrior, pair_maps
from avatars.priors.surface import SurfacePrior

__all__ = [
    "Aligned",
    "DUSt3R",
    "DUSt3RPrior",
    "Encoded",
    "FeaturePrior",
    "Features",
    "Pair",
    "PairMaps",
    "PositionPrior",
    "Sapiens",
    "SurfacePrior",
    "align",
    "load_dinov2",
    "load_sapiens2",
    "pair_maps",
]
