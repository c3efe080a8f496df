"""Recipes of the GASP prior: at the paper's scale, for two processor cores, of one person, for tests.

Rates, weights and sizes that the paper does not give are ours; `GaspConfig` marks each.
"""

from __future__ import annotations

from dataclasses import replace

from avatars.gasp.config import GaspConfig, small_model
from launch.data import DemoCaptures
from train.config import CheckpointConfig, DataConfig, LossConfig, OptimizerConfig, TrainConfig

__all__ = ["gasp_prior", "gasp_prior_captures", "gasp_prior_cpu", "gasp_prior_one", "gasp_prior_tiny"]


def gasp_prior() -> TrainConfig:
    """The GASP prior at the paper's scale: UV 512, 186,839 Gaussians, 1,000 people x 50 pictures, batch 8.

    The batch is 8 pictures, each of another person, and an epoch all 50,000 pictures: 250 epochs are 1,562,500 steps.
    """
    return TrainConfig(
        recipe="gasp-prior",
        steps=1_562_500,
        model=GaspConfig(),
        loss=LossConfig(lpips=0.1, lpips_start=0.0),
        optimizer=OptimizerConfig(lr=5e-4, warmup_steps=1000, schedule="cosine", final_lr_fraction=0.05),
        data=DataConfig(micro_batch=1, views=1, threads=4),
        checkpoint=CheckpointConfig(every=10_000, keep=2),
        precision="fp32",
        batch=8,
        log_every=50,
    )


def gasp_prior_cpu() -> TrainConfig:
    """The GASP prior for two processor cores: UV 64, 32 people, minutes on captures that it makes itself."""
    return TrainConfig(
        recipe="gasp-prior-cpu",
        steps=1_200,
        model=small_model(),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=20, schedule="cosine", final_lr_fraction=0.05),
        data=DataConfig(micro_batch=1, views=4),
        checkpoint=CheckpointConfig(every=400, keep=1),
        precision="fp32",
        zero_stage=1,
        log_every=100,
    )


def gasp_prior_one() -> TrainConfig:
    """`gasp-prior-cpu` of a single person, which is an ablation of the paper's."""
    base = gasp_prior_cpu()
    return replace(base, recipe="gasp-prior-one", model=replace(small_model(), people=1))


def gasp_prior_tiny() -> TrainConfig:
    """The GASP prior small enough for a test: UV 24, seconds."""
    base = gasp_prior_cpu()
    return replace(
        base,
        recipe="gasp-prior-tiny",
        steps=20,
        model=GaspConfig(size=48, uv_resolution=24, code=8, width=48, layers=3),
        data=DataConfig(micro_batch=1, views=2),
        checkpoint=CheckpointConfig(every=10, keep=2),
        log_every=5,
    )


def gasp_prior_captures() -> dict[str, DemoCaptures]:
    """What `make train` makes for each of these recipes where no data are given.

    `gasp-prior` makes the paper's number of people and pictures, which takes a cluster (`headsplat synth` runs on Ray).
    """
    few = DemoCaptures(timesteps=5, views=16, size=64, input_sets=1, heldout=2, seed=100)
    return {
        "gasp-prior": DemoCaptures(
            subjects=1_008, timesteps=5, views=10, size=512, input_sets=1, heldout=8, seed=100
        ),
        "gasp-prior-cpu": replace(few, subjects=34),
        "gasp-prior-one": replace(few, subjects=3),
        "gasp-prior-tiny": replace(few, subjects=4, views=8, size=48),
    }
