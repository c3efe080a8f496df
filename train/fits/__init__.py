"""Fits of one person: what is optimised per subject instead of trained once."""

from collections.abc import Callable

from train.fits.fit import Fit, FitConfig, fit_key, run_fit
from train.fits.flashavatar import (
    flashavatar_cpu,
    flashavatar_cpu_many,
    flashavatar_gpu,
    flashavatar_gpu_many,
    flashavatar_paper,
)
from train.fits.pictures import FitPictures, FitSource

__all__ = ["RECIPES", "Fit", "FitConfig", "FitPictures", "FitSource", "fit_key", "run_fit"]

RECIPES: dict[str, Callable[[], FitConfig]] = {
    "flashavatar-cpu": flashavatar_cpu,
    "flashavatar-cpu-many": flashavatar_cpu_many,
    "flashavatar-gpu": flashavatar_gpu,
    "flashavatar-gpu-many": flashavatar_gpu_many,
    "flashavatar-paper": flashavatar_paper,
}
"""Complete configurations by name."""
