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

    @property
    def first(self) -> nn.Linear:
        """The layer that sees the position and the expression."""
        layer = self.hidden[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, encoded: Tensor, expression: Tensor) -> Tensor:
        """One row a Gaussian.

        Args:
            encoded: (N, encoding) positions on the neutral face, encoded.
            expression: (E,).

        Returns:
            (N, 10) in (-1, 1).
        """
        # The first layer's product with the expression is the same in all rows: it is added as the layer's bias.
        first, places = self.first, encoded.shape[1]
        condition = nn.functional.linear(expression, first.weight[:, places:], first.bias)
        inner = nn.functional.linear(encoded, first.weight[:, :places], condition)
        return torch.tanh(self.output(self.hidden[1:](inner)))
