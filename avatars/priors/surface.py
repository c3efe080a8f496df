"""A feature prior that needs no network: which place of the tracked head's surface every patch shows.

Every pixel whose true place is known is given to the nearest vertex of the person's tracked head in the picture's
expression, and described by where that vertex lies on the mean person's neutral head, in Fourier features (Tancik et
al. 2020, arXiv 2006.10739). So the corner of a mouth has the same features in all pictures of all people, which is
what a transformer needs from Sapiens to match views; what Sapiens knows of hair, cloth and look is not in it.
It needs true depth and a tracked head, which synthetic captures have and photographs do not: a stand-in for
experiments, and no rival of a feature network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from avatars.errors import UserError

if TYPE_CHECKING:
    from avatars.head import ParametricHead
    from avatars.inputs import InputSet

__all__ = ["SURFACE_CELL", "SURFACE_CHANNELS", "SurfacePrior"]

SURFACE_CHANNELS = 32
SURFACE_CELL = 8
"""Pixels along the side of a cell of the map."""
WAVES_PER_METRE = (
    8.0  # standard deviation of the frequencies: most waves are 5 to 20 cm long on a head of 25 cm
)
REACH = 0.02  # metres from the skin at which a feature has faded to 1/e: hair and shoulders have no place on a face


class SurfacePrior:
    """Feature maps out of true depth and a tracked head.

    Args:
        head: the one that the captures were tracked with.
    """

    dim = SURFACE_CHANNELS

    def __init__(self, head: ParametricHead) -> None:
        self.head = head
        self.name = f"surface:{head.name}"
        frequencies = torch.randn(SURFACE_CHANNELS // 2, 3, generator=torch.Generator().manual_seed(0))
        phase = 2 * torch.pi * WAVES_PER_METRE * head.template[: head.n_vertices] @ frequencies.T
        self._code = torch.cat([phase.sin(), phase.cos()], 1).numpy()  # (V, 32) of each vertex

    def __call__(self, inputs: InputSet) -> Tensor:
        """Features (N, 32, h, w) of the pictures of an input set, means over cells of 8 x 8 pixels.

        Raises:
            UserError: the set has no position maps or no tracked head, or its size is no multiple of 8.
        """
        from scipy.spatial import KDTree

        if inputs.positions is None or inputs.confidence is None:
            raise UserError(
                f"The features {self.name} need position maps, and the input set of {inputs.subject} has none; pack "
                "captures that carry depth with `headsplat shards pack --prior depth`."
            )
        if inputs.head != self.head.name or inputs.identity is None:
            raise UserError(
                f"The features {self.name} need captures tracked with the head {self.head.name!r}, and that of "
                f"{inputs.subject} has {inputs.head or 'no tracked head'}."
            )
        if inputs.size[0] % SURFACE_CELL or inputs.size[1] % SURFACE_CELL:
            raise UserError(
                f"The features {self.name} take pictures whose sides are multiples of {SURFACE_CELL} pixels, not "
                f"{inputs.size[0]}x{inputs.size[1]}."
            )
        identity = inputs.identity[None].expand(len(inputs), -1)
        heads = self.head.vertices(identity, inputs.expressions).numpy()  # (N, V, 3)
        maps = np.zeros((len(inputs), self.dim, *inputs.size), np.float32)
        for made, vertices, positions, confidence in zip(
            maps, heads, inputs.positions.numpy(), inputs.confidence.numpy(), strict=True
        ):
            known = confidence[0] > 1
            distance, nearest = KDTree(vertices).query(positions[:, known].T)
            fade = np.exp(-((distance / REACH) ** 2)).astype(np.float32)
            made[:, known] = (self._code[nearest] * fade[:, None]).T
        return F.avg_pool2d(torch.from_numpy(maps), SURFACE_CELL)
