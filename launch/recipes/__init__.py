"""Recipes: functions that return a complete training configuration; a variant calls another and changes fields."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from avatars.errors import UserError
from launch.data import DemoCaptures
from launch.recipes.avat3r import (
    ABLATIONS,
    ablated,
    avat3r,
    avat3r_captures,
    avat3r_cpu,
    avat3r_cpu_driven,
    avat3r_cpu_full,
    avat3r_small,
    avat3r_tiny,
)
from launch.recipes.fastavatar import (
    fastavatar_captures,
    fastavatar_decoder,
    fastavatar_decoder_cpu,
    fastavatar_decoder_tiny,
    fastavatar_encoder,
    fastavatar_encoder_cpu,
    fastavatar_encoder_tiny,
)
from launch.recipes.gasp import (
    gasp_prior,
    gasp_prior_captures,
    gasp_prior_cpu,
    gasp_prior_one,
    gasp_prior_tiny,
)
from train.config import TrainConfig

__all__ = ["CAPTURES", "RECIPES", "find_recipe"]

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "avat3r": avat3r,
    "avat3r-small": avat3r_small,
    "avat3r-cpu": avat3r_cpu,
    "avat3r-tiny": avat3r_tiny,
    "avat3r-cpu-full": avat3r_cpu_full,
    "avat3r-cpu-driven": avat3r_cpu_driven,
    **{f"avat3r-{row}": ablated(avat3r, "avat3r", row) for row in ABLATIONS},
    **{f"avat3r-cpu-{row}": ablated(avat3r_cpu_full, "avat3r-cpu", row) for row in ABLATIONS},
    "fastavatar-decoder": fastavatar_decoder,
    "fastavatar-decoder-cpu": fastavatar_decoder_cpu,
    "fastavatar-decoder-tiny": fastavatar_decoder_tiny,
    "fastavatar-encoder": fastavatar_encoder,
    "fastavatar-encoder-cpu": fastavatar_encoder_cpu,
    "fastavatar-encoder-tiny": fastavatar_encoder_tiny,
    "gasp-prior": gasp_prior,
    "gasp-prior-cpu": gasp_prior_cpu,
    "gasp-prior-one": gasp_prior_one,
    "gasp-prior-tiny": gasp_prior_tiny,
}

CAPTURES: dict[str, DemoCaptures] = avat3r_captures() | gasp_prior_captures() | fastavatar_captures()
"""What is made for a recipe where no data are given, other than the demo's captures."""


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
