"""The network's whole weights, however ZeRO has spread them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["whole_weights"]


@contextmanager
def whole_weights(engine: Any, zero_stage: int) -> Iterator[None]:
    """Within this, every rank sees the whole parameters, also where ZeRO 3 has spread them."""
    if zero_stage < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        yield
