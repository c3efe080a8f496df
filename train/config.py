"""What a training run is: one typed tree, which a recipe fills in and the command line may change field by field."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from avatars.avat3r.config import Avat3rConfig
from avatars.errors import UserError
from avatars.fastavatar.config import FastAvatarDecoderConfig, FastAvatarEncoderConfig
from avatars.gasp.config import GaspConfig

__all__ = [
    "MODELS",
    "CheckpointConfig",
    "DataConfig",
    "GuardConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Precision",
    "TrainConfig",
    "ValidationConfig",
    "accumulation",
    "learning_rate",
]

Precision = Literal["fp32", "bf16"]

ModelConfig = Avat3rConfig | GaspConfig | FastAvatarDecoderConfig | FastAvatarEncoderConfig
"""What a recipe may train: a frozen dataclass whose class attribute `method` names its entry in `MODELS`."""
MODELS: dict[str, type[ModelConfig]] = {
    kind.method: kind for kind in (Avat3rConfig, GaspConfig, FastAvatarDecoderConfig, FastAvatarEncoderConfig)
}
"""The configurations by method, which tells them apart in JSON."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the picture losses (Avat3r section 4.1)."""

    l1: float = 0.8
    """Mean absolute error."""
    ssim: float = 0.2
    """One minus SSIM."""
    lpips: float = 0.0
    """LPIPS over VGG-16, from `lpips_start` on; 0 for never. Needs weights that a user brings."""
    lpips_start: float = 3.0 / 3.5
    """Where LPIPS sets in, as a fraction of all steps (Avat3r: 3.0 of 3.5 M steps)."""

    def __post_init__(self) -> None:
        if min(self.l1, self.ssim, self.lpips) < 0 or not 0 <= self.lpips_start <= 1:
            raise UserError("The --loss weights must not be negative, and --loss.lpips-start is from 0 to 1.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a constant or cosine rate."""

    lr: float = 5e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay; 0 makes it Adam."""
    warmup_steps: int = 0
    """Steps from zero to the peak rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What the rate does after the warm-up."""
    final_lr_fraction: float = 0.0
    """Cosine only: the last step's rate as a fraction of the peak."""
    clip: float = 1.0
    """Gradient norm limit, 0 for none."""


@dataclass(frozen=True)
class DataConfig:
    """What a training example is and how many a rank takes at once."""

    micro_batch: int = 1
    """Examples a rank computes at once."""
    views: int = 8
    """Target views of an example."""
    expressions: int = 1
    """Target timesteps of an example, drawn from one input set in one step, each with `views` views of the same
    cameras. With several of one face the gradient of what an expression changes is not drowned by what is still wrong
    with the face (ours)."""
    input_timesteps: Literal["different", "same"] = "different"
    """What the shards' input sets must be made of: pictures of different timesteps, or all of the same."""
    color_jitter: float = 0.0
    """Brightness, gamma and saturation of an example's pictures change by factors up to 1 plus this; 0 for none."""
    seed: int = 0
    """Seed of the plan."""
    threads: int = 2
    """Decoding threads of a rank; they change nothing in what comes out."""
    cache: str = ""
    """Folder of each host for copies of shards behind a URL; streamed front to back without one."""
    cache_gb: float = 100.0
    """Gigabytes of copies in that folder; the least recently used make room."""
    tolerate: int = 0
    """Shards of a rank that cannot be read and are put aside, with a word, before one more ends the run."""

    def __post_init__(self) -> None:
        if not 0 <= self.color_jitter <= 3:
            raise UserError(f"--data.color-jitter is {self.color_jitter}; give 0 for none, or up to 3.")

    @property
    def target_pictures(self) -> int:
        """Pictures that an example is compared with."""
        return self.views * self.expressions


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep: int = 2
    """How many of the newest are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of so many steps are kept for good; 0 for none."""
    best: Literal["psnr", "ssim", "lpips"] = "psnr"
    """The checkpoint that is best by this metric of the validation is kept, too."""


@dataclass(frozen=True)
class ValidationConfig:
    """Evaluation of held-out people inside the training, under the evaluation's own protocol."""

    every: int = 0
    """Steps between validations; the last step always is one. 0 for none."""
    subjects: int = 2
    """How many held-out people, 0 for all."""
    timesteps: int = 2
    """Expressions of each, 0 for all."""
    views: int = 4
    """Cameras of each expression, 0 for all."""

    def __post_init__(self) -> None:
        if min(self.every, self.subjects, self.timesteps, self.views) < 0:
            raise UserError("The numbers of --validation must not be negative.")


@dataclass(frozen=True)
class GuardConfig:
    """What ends a run, and after how long. Every limit is in seconds of wall time."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss does: stop the run, or leave the examples out of the step."""
    max_skips: int = 10
    """Steps with examples left out after which the run stops anyway."""
    spike_factor: float = 5.0
    """A loss above this many times the median of the last 100 steps is recorded with its examples; 0 for never."""
    data_seconds: float = 300.0
    """Longest wait for a micro-batch."""
    step_seconds: float = 600.0
    """Longest computation of a step, longest wait in a collective; longer than --guard.data-seconds."""
    first_step_seconds: float = 1800.0
    """The same up to the end of the first step, while kernels are built."""
    checkpoint_seconds: float = 1800.0
    """Longest checkpoint or validation."""
    silence_seconds: float = 25.0
    """A rank without a sign of life for so long counts as gone: its host is down or the network is cut."""

    def __post_init__(self) -> None:
        for name in ("data_seconds", "silence_seconds"):
            if getattr(self, name) <= 0:
                raise UserError(f"--guard.{name.replace('_', '-')} must be more than 0 seconds.")
        if not self.data_seconds < self.step_seconds <= self.first_step_seconds:
            raise UserError(
                "--guard.data-seconds must be less than --guard.step-seconds and that not more than "
                "--guard.first-step-seconds, as otherwise a wait for data looks like a hung collective."
            )


@dataclass(frozen=True)
class TrainConfig:
    """A complete training configuration. Recipes in `launch/recipes/` return one."""

    recipe: str
    """Name of the recipe that this configuration started from."""
    steps: int
    """Optimiser steps."""
    model: ModelConfig = field(default_factory=Avat3rConfig)
    """The network."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimiser."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """The checkpoints."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The evaluation inside the training."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What ends a run."""
    precision: Precision = "bf16"
    """Arithmetic of the network; the rasterizer and the loss are always float32."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    accumulate: int = 1
    """Micro-batches of an optimiser step."""
    batch: int = 0
    """Examples of an optimiser step over all ranks; `accumulate` follows from it. 0 for what the others give."""
    ema: float = 0.0
    """Decay of the running mean of the weights, which is what is exported and evaluated; 0 for none."""
    seed: int = 0
    """Seed of the network's initial weights."""
    log_every: int = 10
    """Steps between lines on the terminal."""
    ranks_without_gpu: int = 2
    """Processes that `make train` starts on a machine without a GPU."""
    profile: bool = False
    """Write a trace of a few steps and, on a GPU, a memory snapshot to `profile/` in the run's folder."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema < 1:
            raise UserError(
                f"Recipe {self.recipe}: --ema is {self.ema}; a decay is from 0 (none) to below 1."
            )
        if self.data.expressions > 1 and self.model.method != "avat3r":
            raise UserError(
                f"Recipe {self.recipe}: --data.expressions is {self.data.expressions}, and {self.model.method} is "
                "trained on one; only Avat3r takes several of an input set."
            )
        deviation = getattr(self.model, "deviation_weight", 0)
        if deviation and self.data.expressions == 1:
            raise UserError(
                f"Recipe {self.recipe}: --model.deviation-weight is {deviation} and compares expressions, of which "
                "--data.expressions gives one; give more, or no weight."
            )
        if self.batch < 0:
            raise UserError(f"Recipe {self.recipe}: --batch is {self.batch}; give 0 or a number of examples.")
        positive = {
            "steps": self.steps,
            "accumulate": self.accumulate,
            "log_every": self.log_every,
            "ranks_without_gpu": self.ranks_without_gpu,
            "data.micro_batch": self.data.micro_batch,
            "data.views": self.data.views,
            "data.expressions": self.data.expressions,
            "data.threads": self.data.threads,
            "checkpoint.every": self.checkpoint.every,
            "checkpoint.keep": self.checkpoint.keep,
        }
        for name, value in positive.items():
            if value < 1:
                raise UserError(
                    f"Recipe {self.recipe}: --{name.replace('_', '-')} is {value} and must be at least 1."
                )

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary, for meta.json and MLflow."""
        return json.loads(json.dumps({"method": self.model.method, **asdict(self)}))

    def same_model_as(self, other: dict[str, Any]) -> bool:
        """Whether a checkpoint with the configuration `other` fits this one's network. A field that the version which
        wrote it did not know counts as today's default.
        """
        own, defaults = self.to_json(), replace(self, model=type(self.model)()).to_json()["model"]
        return own["method"] == other.get("method") and own["model"] == defaults | other.get("model", {})


def accumulation(config: TrainConfig, world_size: int, inherited: int = 0) -> int:
    """Micro-batches of an optimiser step on so many ranks.

    Args:
        config: the resolved recipe.
        world_size: number of ranks.
        inherited: batch of the checkpoint that another number of ranks wrote, to be kept where the recipe names none.

    Raises:
        UserError: the batch is no multiple of what the ranks compute at once; the sentence does the arithmetic.
    """
    micro = config.data.micro_batch
    at_once = micro * world_size
    batch = config.batch or inherited
    if not batch:
        return config.accumulate
    if batch % at_once:
        whose = "--batch" if config.batch else "The checkpoint's batch, which a resumed run keeps,"
        below = max(batch // at_once, 1) * at_once
        raise UserError(
            f"{whose} is {batch} examples, but {world_size} ranks of --data.micro-batch {micro} compute "
            f"{at_once} at once, and {batch} / {at_once} = {batch / at_once:.2f} is no whole number of micro-batches. "
            f"Take --batch {below} or {below + at_once}, another --data.micro-batch or another number of ranks."
        )
    if config.batch and config.accumulate not in (1, batch // at_once):
        raise UserError(
            f"--batch {batch} on {world_size} ranks of {micro} takes --accumulate {batch // at_once}, and it is "
            f"{config.accumulate}; leave one of them out."
        )
    return batch // at_once


def learning_rate(step: int, config: OptimizerConfig, steps: int) -> float:
    """The rate of step number `step` (from 0), a pure function, so that resuming needs no scheduler state.

    Args:
        step: the step about to be taken.
        config: peak, warm-up and schedule.
        steps: length of the whole training.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    floor = config.final_lr_fraction
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
