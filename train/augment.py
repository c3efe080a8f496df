"""Changes of a training example's colours, off by default.

Avat3r's text does not speak of augmentation; its author's later code jitters brightness, contrast, saturation and hue.
A change here is one for all pictures of an example, inputs and targets alike, so that it is another camera's colour
rendering and no contradiction between them. It depends on the example's place in the plan and on nothing else: equal at
any number of ranks, and after a resume.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from train.task import Batch

__all__ = ["jittered"]

LUMA = (0.299, 0.587, 0.114)
PICTURES = ("input_images", "target_images")


def jittered(batch: Batch, strength: float) -> Batch:
    """The batch with brightness, gamma and saturation of every example changed by factors from 1 / (1 + s) to 1 + s.

    Gamma takes the place of contrast about a grey: what is black behind the head stays black.

    Args:
        batch: what `shards.BatchLoader` yields; pictures are (…, n, 3, H, W) in [0, 1].
        strength: s, 0 for no change.
    """
    if not strength:
        return batch
    made = dict(batch)
    # An example's targets have its place in the plan in common, and change as the first of them does.
    places = [name.rpartition("@")[2] for name in batch["ids"]]
    factors = torch.stack(
        [_factors(batch["ids"][places.index(place)], strength) for place in places]
    )  # (R, 3)
    for name in PICTURES:
        if name in batch:
            rows = factors[:: len(factors) // len(batch[name])]
            made[name] = _changed(batch[name], rows.to(batch[name]))
    return made


def _factors(name: str, strength: float) -> Tensor:
    """Brightness, gamma and saturation of the example with that name."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
    drawn = torch.rand(3, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (1 + strength) ** drawn


def _changed(pictures: Tensor, factors: Tensor) -> Tensor:
    """Pictures (B, n, 3, H, W) under factors (B, 3)."""
    brightness, gamma, saturation = factors[:, :, None, None, None, None].unbind(1)
    grey = (pictures * pictures.new_tensor(LUMA)[:, None, None]).sum(-3, keepdim=True)
    colored = (grey + (pictures - grey) * saturation).clamp(0, 1)
    return (colored**gamma * brightness).clamp(0, 1)
