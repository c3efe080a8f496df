"""The network's whole float32 weights, however ZeRO has spread them, and their running mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from avatars.errors import UserError
from train.config import TrainConfig

__all__ = ["Ema", "check_ema", "whole_weights"]

# Where DeepSpeed's optimisers keep this rank's part of the float32 weights: ZeRO 1 and 2, ZeRO 3, bf16 with fp32 sums.
MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")


def masters(engine: Any) -> list[Tensor]:
    """This rank's part of the float32 weights that the optimiser acts on; all of them without ZeRO."""
    for name in MASTERS:
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return [p for p in engine.module.parameters() if p.requires_grad]


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """Float32 weights and buffers by name; every rank must call it, and every rank gets them, on the host."""
    from deepspeed.utils import safe_get_full_fp32_param

    state = {name: value.detach().cpu() for name, value in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)
        state[name] = (parameter if whole is None else whole).detach().float().cpu().clone()
    # In the module's own order, without buffers that it does not save.
    return {name: state[name] for name in engine.module.state_dict()}


class Ema:
    """An exponential running mean of the float32 weights, spread over the ranks as they are.

    Costs one multiply-add a weight and step, 4 bytes a weight over all ranks, and no communication.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.values = [value.detach().clone() for value in masters(engine)]

    def restart(self) -> None:
        """Starts from the weights as they are now."""
        for mean, weight in zip(self.values, masters(self.engine), strict=True):
            mean.copy_(weight.detach())

    def update(self) -> None:
        """After every optimiser step."""
        current = [value.detach() for value in masters(self.engine)]
        torch._foreach_lerp_(self.values, current, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this, the mean stands where the weights are: what gathers weights gathers the mean."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mean, weight in zip(self.values, masters(self.engine), strict=True):
            kept = weight.detach().clone()
            weight.copy_(mean)
            mean.copy_(kept)

    def whole(self) -> dict[str, Tensor]:
        """The mean by name, as `whole_weights`."""
        with self.in_place():
            return whole_weights(self.engine)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over the mean that `whole` gave, on any number of ranks."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        with self.in_place():
            for name, parameter in self.engine.module.named_parameters():
                value = state[name].to(self.engine.device)
                if safe_get_full_fp32_param(parameter) is None:
                    parameter.copy_(value)
                else:
                    safe_set_full_fp32_param(parameter, value)


def check_ema(config: TrainConfig) -> None:
    """Refuses the one combination whose float32 weights DeepSpeed does not let one gather.

    Raises:
        UserError: ZeRO 0 in bf16.
    """
    if config.ema and config.zero_stage == 0 and config.precision == "bf16":
        raise UserError(
            "--ema needs float32 weights, which DeepSpeed hides at --zero-stage 0 with --precision bf16; take "
            "--zero-stage 1, which costs nothing on one rank."
        )
