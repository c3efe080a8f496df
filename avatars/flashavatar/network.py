"""The network that moves Gaussians off the surface (paper section 4.2)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["OffsetNetwork", "encode_position"]


def encode_position(position: Tensor, octaves: int) -> Tensor:
    """Position with its sines and cosines at frequencies 2^0 … 2^(octaves - 1).

    Args:
        position: (..., 3) metres, neither rescaled nor multiplied by pi.
        octaves: number of frequencies.

    Returns:
        (..., 3 + 6 * octaves).
    """
    frequencies = 2.0 ** torch.arange(octaves, dtype=position.dtype, device=position.device)
    angles = (position[..., None, :] * frequencies[:, None]).flatten(-2)  # (..., 3 * octaves)
    return torch.cat([position, angles.sin(), angles.cos()], -1)


class OffsetNetwork(nn.Module):
    """From an encoded position and an expression to ten numbers in (-1, 1): 3 offset, 4 rotation, 3 scale."""

    def __init__(self, encoding: int, expression: int, width: int, layers: int, zero_output: bool) -> None:
        """Builds the network.

        Args:
            encoding: length of the positional encoding.
            expression: length of the expression code.
            width: width of the hidden layers.
            layers: number of hidden layers.
            zero_output: start with an output of zeros.
        """
        super().__init__()
        widths = [encoding + expression] + [width] * layers
        hidden: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            hidden += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.hidden = nn.Sequential(*hidden)
        self.output = nn.Linear(width, 10)
        if zero_output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, encoded: Tensor, expression: Tensor) -> Tensor:
        """One row a Gaussian.

        Args:
            encoded: (N, encoding) positions on the neutral face, encoded.
            expression: (E,).

        Returns:
            (N, 10) in (-1, 1).
        """
        condition = expression.expand(len(encoded), -1)
        return torch.tanh(self.output(self.hidden(torch.cat([encoded, condition], -1))))
