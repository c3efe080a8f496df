"""Fits of one person: what is optimised per subject instead of trained once."""

from collections.abc import Callable

from train.fits.fit import Fit, FitConfig, fit_key, run_fit
from train.fits.flashavatar import flashavatar_cpu, flashavatar_gpu, flashavatar_paper

__all__ = ["RECIPES", "Fit", "FitConfig", "fit_key", "run_fit"]

RECIPES: dict[str, Callable[[], FitConfig]] = {
    "flashavatar-cpu": flashavatar_cpu,
    "flashavatar-gpu": flashavatar_gpu,
    "flashavatar-paper": flashavatar_paper,
}
"""Complete configurations by name."""
