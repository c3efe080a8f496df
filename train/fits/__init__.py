"""Fits of one person: what is optimised per subject instead of trained once."""

from collections.abc import Callable

from train.fits.fastavatar import fastavatar_template_cpu, fastavatar_template_gpu
from train.fits.fit import Fit, FitConfig, fit_key, run_fit
from train.fits.flashavatar import (
    flashavatar_cpu,
    flashavatar_cpu_many,
    flashavatar_gpu,
    flashavatar_gpu_many,
    flashavatar_paper,
)
from train.fits.gasp import ABLATIONS as GASP_ABLATIONS
from train.fits.gasp import ablated as ablated_gasp
from train.fits.gasp import gasp_cpu, gasp_gpu
from train.fits.pictures import FitPictures, FitSource

__all__ = ["RECIPES", "Fit", "FitConfig", "FitPictures", "FitSource", "fit_key", "run_fit"]

RECIPES: dict[str, Callable[[], FitConfig]] = {
    "fastavatar-template-cpu": fastavatar_template_cpu,
    "fastavatar-template-gpu": fastavatar_template_gpu,
    "flashavatar-cpu": flashavatar_cpu,
    "flashavatar-cpu-many": flashavatar_cpu_many,
    "flashavatar-gpu": flashavatar_gpu,
    "flashavatar-gpu-many": flashavatar_gpu_many,
    "flashavatar-paper": flashavatar_paper,
    "gasp-cpu": gasp_cpu,
    "gasp-gpu": gasp_gpu,
    **{f"gasp-{row}-cpu": ablated_gasp(gasp_cpu, row) for row in GASP_ABLATIONS},
    **{f"gasp-{row}-gpu": ablated_gasp(gasp_gpu, row) for row in GASP_ABLATIONS},
}
"""Complete configurations by name."""
