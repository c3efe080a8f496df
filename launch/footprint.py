"""How many bytes of tensors are alive while a network runs: the same meter on the meta device and on real tensors."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """Within this, every tensor that an operation makes is counted while its storage is alive.

    What was there before is not counted, nor what C++ code holds inside an operation. On the meta device nothing is
    computed or allocated, so that the paper's scale can be metered on a laptop.

    Attributes:
        alive: bytes at this moment.
        peak: the most there have been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and looks at what came out."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        known = self._storages.get(key)
        if known is not None and known() is not None:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.alive -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)
