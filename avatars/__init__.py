"""The thing itself: cameras, Gaussians, rasterizers, parametric heads, priors, and one room a method.

The public names load their modules when they are first used, so that a command that needs no tensors loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avatars.cameras import Cameras
    from avatars.errors import UserError
    from avatars.gaussians import Gaussians
    from avatars.head import ParametricHead
    from avatars.inputs import InputSet
    from avatars.method import Avatar, Method, load_avatar, render
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
    "rasterize",
    "render",
]

_HOME = {
    "Avatar": "method",
    "Cameras": "cameras",
    "Gaussians": "gaussians",
    "InputSet": "inputs",
    "Method": "method",
    "ParametricHead": "head",
    "Rendering": "rasterize",
    "UserError": "errors",
    "load_avatar": "method",
    "rasterize": "rasterize",
    "render": "method",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'avatars' has no attribute {name!r}")
    return getattr(import_module(f"avatars.{_HOME[name]}"), name)
