"""The thing itself: cameras, Gaussians, rasterizers, parametric heads, priors, and one room a method."""

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gaussians import Gaussians
from avatars.head import ParametricHead
from avatars.inputs import InputSet
from avatars.method import Avatar, Method, load_avatar, load_method, render
from avatars.rasterize import Rendering, rasterize

__all__ = [
    "Avatar",
    "Cameras",
    "Gaussians",
    "InputSet",
    "Method",
    "ParametricHead",
    "Rendering",
    "UserError",
    "load_avatar",
    "load_method",
    "rasterize",
    "render",
]
