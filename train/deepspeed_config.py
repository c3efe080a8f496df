"""DeepSpeed's JSON, derived from the typed configuration and checked, as DeepSpeed ignores unknown top-level keys."""

from __future__ import annotations

from typing import Any

from avatars.errors import UserError
from train.config import TrainConfig, accumulation

__all__ = ["check_top_level", "deepspeed_json"]

KNOWN_KEYS = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "bf16",
        "checkpoint",
        "zero_optimization",
        "steps_per_print",
        "wall_clock_breakdown",
    }
)


def deepspeed_json(
    config: TrainConfig, world_size: int, accumulate: int | None = None, *, universal: bool = False
) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes.

    Args:
        config: the resolved recipe.
        world_size: number of ranks.
        accumulate: micro-batches of a step, from `accumulation`; that of the recipe by default.
        universal: read a checkpoint in the universal format, which fits any number of ranks.

    Raises:
        UserError: the batch does not divide.
    """
    optimizer = config.optimizer
    if accumulate is None:
        accumulate = accumulation(config, world_size)
    values: dict[str, Any] = {
        "train_batch_size": config.data.micro_batch * accumulate * world_size,
        "train_micro_batch_size_per_gpu": config.data.micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": optimizer.clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                # DeepSpeed's own CPU Adam compiles for minutes at first use; torch's needs nothing.
                "torch_adam": True,
            },
        },
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": {"stage": config.zero_stage},
        "steps_per_print": 10**9,  # our own line says more
        "wall_clock_breakdown": False,
    }
    if universal:
        values["checkpoint"] = {"load_universal": True}
    check_top_level(values)
    return values


def check_top_level(values: dict[str, Any]) -> None:
    """Refuses a key that DeepSpeed would silently ignore (`zero_optimisation` would train without ZeRO).

    Raises:
        UserError: naming the key.
    """
    unknown = sorted(set(values) - KNOWN_KEYS)
    if unknown:
        raise UserError(f"The DeepSpeed configuration has the unknown top-level keys {', '.join(unknown)}.")
