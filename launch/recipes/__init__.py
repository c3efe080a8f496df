"""Recipes: functions that return a complete training configuration; a variant calls another and changes fields."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from avatars.errors import UserError
from launch.recipes.avat3r import (
    ABLATIONS,
    ablated,
    avat3r,
    avat3r_cpu,
    avat3r_cpu_full,
    avat3r_small,
    avat3r_tiny,
)
from train.config import TrainConfig

__all__ = ["RECIPES", "find_recipe"]

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "avat3r": avat3r,
    "avat3r-small": avat3r_small,
    "avat3r-cpu": avat3r_cpu,
    "avat3r-tiny": avat3r_tiny,
    "avat3r-cpu-full": avat3r_cpu_full,
    **{f"avat3r-{row}": ablated(avat3r, "avat3r", row) for row in ABLATIONS},
    **{f"avat3r-cpu-{row}": ablated(avat3r_cpu_full, "avat3r-cpu", row) for row in ABLATIONS},
}


def find_recipe(name: str) -> TrainConfig:
    """The recipe of that name.

    Raises:
        UserError: there is none; the nearest is named.
    """
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"There is no recipe {name!r}. The nearest is {nearest!r}; there are {', '.join(RECIPES)}."
        )
    return RECIPES[name]()
