"""Recipes of Avat3r: at the paper's scale, for one GPU, for two processor cores, for tests, and what the paper leaves
out in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from avatars.avat3r.config import Avat3rConfig
from launch.data import DemoCaptures
from train.config import (
    CheckpointConfig,
    DataConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from train.task import of_kind

__all__ = [
    "ABLATIONS",
    "Ablation",
    "ablated",
    "avat3r",
    "avat3r_captures",
    "avat3r_cpu",
    "avat3r_cpu_driven",
    "avat3r_cpu_full",
    "avat3r_small",
    "avat3r_tiny",
]


def avat3r() -> TrainConfig:
    """Avat3r at the paper's scale: 512 px, 8 + 8 layers, 8 GPUs with one example each."""
    return TrainConfig(
        recipe="avat3r",
        steps=3_500_000,
        model=Avat3rConfig(feature_dim=1920, checkpoint_activations=True),
        loss=LossConfig(lpips=0.01),
        optimizer=OptimizerConfig(lr=5e-5, warmup_steps=2000),
        checkpoint=CheckpointConfig(every=5000, keep=3, keep_every=250_000),
        validation=ValidationConfig(every=5000, subjects=4, timesteps=4, views=8),
        log_every=50,
    )


def avat3r_small() -> TrainConfig:
    """Avat3r for one GPU or a workstation: 256 px, 6 + 6 layers, 43 M parameters.

    The codes are those of our synthetic captures; `--model.expression-dim 256` takes Ava-256's.
    """
    return TrainConfig(
        recipe="avat3r-small",
        steps=200_000,
        model=Avat3rConfig(
            size=256,
            width=512,
            self_layers=6,
            cross_layers=6,
            expression_dim=52,
            upsample_min_width=128,
        ),
        optimizer=OptimizerConfig(lr=1e-4, warmup_steps=1000, schedule="cosine", final_lr_fraction=0.05),
        data=DataConfig(micro_batch=2),
        checkpoint=CheckpointConfig(every=2000, keep=3),
        validation=ValidationConfig(every=10_000, subjects=2, timesteps=4, views=8),
        ema=0.999,
        log_every=50,
    )


def avat3r_cpu() -> TrainConfig:
    """Avat3r for two processor cores: 128 px, a few minutes on demo captures.

    bf16 measured 1.3 times as fast as fp32 on a processor with AVX-512 bf16, with the same losses to 1e-4.
    """
    return TrainConfig(
        recipe="avat3r-cpu",
        steps=300,
        model=Avat3rConfig(
            size=128,
            patch=8,
            width=192,
            head_width=32,
            self_layers=3,
            cross_layers=3,
            expression_dim=52,
            expression_hidden=128,
            upsample_stages=1,
            upsample_blocks=2,
            upsample_min_width=96,
        ),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=10, schedule="cosine", final_lr_fraction=0.05),
        data=DataConfig(micro_batch=1, views=8),
        checkpoint=CheckpointConfig(every=50, keep=2),
        precision="bf16",
        zero_stage=1,
        log_every=10,
    )


def avat3r_cpu_driven() -> TrainConfig:
    """avat3r-cpu trained until expressions move the face: an hour of two processor cores.

    Without their expression pictures are still right to 40 dB, and a network of 30 dB hardly sees what is missing. So
    a step compares four expressions of one input set in the same views, which cancels what is wrong with the person;
    SSIM, which sees lips and lids, counts more; and the layers that bring the expression in learn faster.
    """
    base = avat3r_cpu()
    return replace(
        base,
        recipe="avat3r-cpu-driven",
        steps=2_200,
        model=replace(of_kind(base.model, Avat3rConfig), expression_rate=2.0, deviation_weight=2.0),
        loss=LossConfig(ssim=1.0),
        data=DataConfig(micro_batch=1, views=3, expressions=4),
        checkpoint=CheckpointConfig(every=250, keep=2),
        log_every=50,
    )


def avat3r_captures() -> dict[str, DemoCaptures]:
    """What `make train` makes for these recipes where no data are given, where that is not the demo's."""
    faces = DemoCaptures(subjects=42, timesteps=16, views=16, rig="nersemble", input_sets=8)
    return {"avat3r-cpu-driven": faces}


def avat3r_tiny() -> TrainConfig:
    """Avat3r small enough for a test: 48 px, seconds."""
    base = avat3r_cpu()
    return replace(
        base,
        recipe="avat3r-tiny",
        steps=20,
        precision="fp32",
        model=replace(
            of_kind(base.model, Avat3rConfig),
            size=48,
            width=64,
            self_layers=1,
            cross_layers=1,
            upsample_min_width=32,
        ),
        data=DataConfig(micro_batch=1, views=4),
        checkpoint=CheckpointConfig(every=10, keep=2),
        log_every=5,
    )


def avat3r_cpu_full() -> TrainConfig:
    """avat3r-cpu with a feature prior: the whole that its ablations leave parts out of.

    The features are places on the tracked head (`headsplat priors --features surface`), as no feature network runs on
    a laptop in the time that this recipe takes.
    """
    base = avat3r_cpu()
    return replace(
        base, recipe="avat3r-cpu-full", model=replace(of_kind(base.model, Avat3rConfig), feature_dim=32)
    )


@dataclass(frozen=True)
class Ablation:
    """What one row of the paper's tables leaves out.

    Attributes:
        without: in words.
        model: fields of the model's configuration that it changes.
        input_timesteps: of which timesteps its input sets are made.
    """

    without: str
    model: dict[str, Any]
    input_timesteps: Literal["different", "same"] = "different"


NO_POSITIONS = {"position_prior": False, "position_skip": False}
NO_FEATURES = {"feature_dim": 0}

ABLATIONS = {
    "no-positions": Ablation("position maps (DUSt3R)", NO_POSITIONS),
    "no-features": Ablation("semantic features (Sapiens)", NO_FEATURES),
    "no-priors": Ablation("position maps and semantic features", NO_POSITIONS | NO_FEATURES),
    "no-random-timesteps": Ablation("random timesteps: all input pictures of one", {}, "same"),
    "no-position-skip": Ablation(
        "the position map added to the predicted positions", {"position_skip": False}
    ),
    "no-color-skip": Ablation("the input picture added to the predicted colours", {"color_skip": False}),
}
"""The rows of the poster's table (the first four) and of the paper's table of skip connections."""


def ablated(full: Callable[[], TrainConfig], prefix: str, row: str) -> Callable[[], TrainConfig]:
    """The recipe that leaves a part out.

    Args:
        full: the recipe with everything.
        prefix: of the new recipe's name.
        row: key in `ABLATIONS`.
    """
    change = ABLATIONS[row]

    def recipe() -> TrainConfig:
        whole = full()
        return replace(
            whole,
            recipe=f"{prefix}-{row}",
            model=replace(of_kind(whole.model, Avat3rConfig), **change.model),
            data=replace(whole.data, input_timesteps=change.input_timesteps),
        )

    recipe.__doc__ = f"{full().recipe} without {change.without}."
    return recipe
