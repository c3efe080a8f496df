"""Recipes of FastAvatar's two trainings: at the paper's scale, for two processor cores, for tests.

The authors step on one picture at a time for 400 epochs and lower rates on plateaus, which a pure function of the step
cannot do; ours fall along a cosine instead.
"""

from __future__ import annotations

from dataclasses import replace

from avatars.fastavatar.config import FastAvatarConfig, FastAvatarDecoderConfig, FastAvatarEncoderConfig
from launch.data import DemoCaptures
from train.config import CheckpointConfig, DataConfig, LossConfig, OptimizerConfig, TrainConfig

__all__ = [
    "fastavatar_captures",
    "fastavatar_decoder",
    "fastavatar_decoder_cpu",
    "fastavatar_decoder_tiny",
    "fastavatar_encoder",
    "fastavatar_encoder_cpu",
    "fastavatar_encoder_tiny",
]

SMALL = FastAvatarConfig(
    size=128,
    uv_resolution=64,
    sh_degree=0,
    latent=64,
    width=64,
    layers=3,
    gain=0.3,
    backbone="test_resnet",
    backbone_size=64,
    hidden=(256,),
    dropout=0.0,
)
TINY = replace(SMALL, size=48, uv_resolution=32, latent=16, width=32, backbone_size=32, hidden=(32,))
COSINE = OptimizerConfig(schedule="cosine", final_lr_fraction=0.05, warmup_steps=20, clip=1.0)


def fastavatar_decoder() -> TrainConfig:
    """FastAvatar's decoder at the paper's scale: a Gaussian a triangle, w of 512, 812 k parameters.

    400 epochs of 411 people with 16 pictures, a rank takes one picture a step (paper section 4).
    """
    return TrainConfig(
        recipe="fastavatar-decoder",
        steps=2_630_000,
        model=FastAvatarDecoderConfig(shape_weight=0.1),
        loss=LossConfig(l1=0.6, ssim=0.3, lpips=0.1, lpips_start=0.0),
        optimizer=replace(COSINE, lr=1e-4, warmup_steps=0),
        data=DataConfig(micro_batch=1, views=1, threads=4),
        checkpoint=CheckpointConfig(every=20_000, keep=2),
        precision="fp32",
        zero_stage=0,  # a few megabytes of weights: nothing to spread
        ranks_without_gpu=1,
        log_every=100,
    )


def fastavatar_decoder_cpu() -> TrainConfig:
    """FastAvatar's decoder for two processor cores: 2,915 Gaussians, w of 64; minutes."""
    return TrainConfig(
        recipe="fastavatar-decoder-cpu",
        steps=3_000,
        model=FastAvatarDecoderConfig(
            **vars(SMALL),
            latent_std=0.02,
            latent_rate=3.0,
            latent_decay=1e-3,
            shape_weight=0.1,
            matte_weight=2.0,
        ),
        optimizer=replace(COSINE, lr=2e-3),
        data=DataConfig(micro_batch=4, views=1),
        checkpoint=CheckpointConfig(every=500, keep=1),
        precision="fp32",
        zero_stage=1,
        log_every=100,
    )


def fastavatar_decoder_tiny() -> TrainConfig:
    """FastAvatar's decoder small enough for a test: seconds."""
    base = fastavatar_decoder_cpu()
    return replace(
        base,
        recipe="fastavatar-decoder-tiny",
        steps=20,
        model=replace(base.model, **vars(TINY)),
        checkpoint=CheckpointConfig(every=10, keep=2),
        log_every=5,
    )


def fastavatar_encoder() -> TrainConfig:
    """FastAvatar's encoder at the paper's scale: ArcFace, frozen, and an MLP to w; 64 pictures a rank and step.

    400 epochs of 411 people with 16 pictures. The decoder is given with --model.decoder.
    """
    return TrainConfig(
        recipe="fastavatar-encoder",
        steps=41_100,
        model=FastAvatarEncoderConfig(backbone="arcface"),
        optimizer=replace(COSINE, lr=1e-4, warmup_steps=0),
        data=DataConfig(micro_batch=4, views=16, threads=4),
        checkpoint=CheckpointConfig(every=5_000, keep=2),
        precision="fp32",
        zero_stage=0,  # a few megabytes of weights: nothing to spread
        ranks_without_gpu=1,
        log_every=100,
    )


def fastavatar_encoder_cpu() -> TrainConfig:
    """FastAvatar's encoder for two processor cores: timm's smallest ResNet on crops of 64 pixels; minutes."""
    return TrainConfig(
        recipe="fastavatar-encoder-cpu",
        steps=800,
        model=FastAvatarEncoderConfig(
            **vars(SMALL),
            nce_weight=1.0,
            temperature=0.1,
            degrees=90.0,
            picture_weight=2.0,
            picture_people=6,
            picture_views=1,
            decoder_rate=0.3,
            shape_weight=1.0,
            matte_weight=2.0,
        ),
        optimizer=replace(COSINE, lr=1e-3),
        data=DataConfig(micro_batch=12, views=4),
        checkpoint=CheckpointConfig(every=200, keep=1),
        precision="fp32",
        zero_stage=1,
        log_every=100,
    )


def fastavatar_encoder_tiny() -> TrainConfig:
    """FastAvatar's encoder small enough for a test: seconds."""
    base = fastavatar_encoder_cpu()
    return replace(
        base,
        recipe="fastavatar-encoder-tiny",
        steps=20,
        model=replace(base.model, **vars(TINY)),
        data=DataConfig(micro_batch=2, views=2),
        checkpoint=CheckpointConfig(every=10, keep=2),
        log_every=5,
    )


def fastavatar_captures() -> dict[str, DemoCaptures]:
    """What `make train` makes for each of these recipes where no data are given."""
    paper = DemoCaptures(subjects=417, timesteps=5, views=16, size=512, input_sets=1, heldout=6, seed=100)
    few = DemoCaptures(subjects=66, timesteps=5, views=12, size=128, input_sets=5, heldout=2, seed=100)
    tiny = replace(few, subjects=4, views=8, size=48, heldout=1)
    return {
        f"fastavatar-{part}{scale}": captures
        for part in ("decoder", "encoder")
        for scale, captures in (("", paper), ("-cpu", few), ("-tiny", tiny))
    }
