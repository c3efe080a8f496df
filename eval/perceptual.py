"""LPIPS (Zhang et al. 2018, "The unreasonable effectiveness of deep features", equation 1) by its package's networks.

The package compares two pictures of which nothing is kept. Here the features of a target are computed once for all
predictions that share it, in one call or in later ones; every picture goes through the network alone, so that no
number depends on its neighbours.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avatars.weights import file_sha256
from eval.judging import Judge, NotAvailable, find_weights
from eval.metrics import Definition, Pictures

__all__ = ["Perceptual", "lpips_judge", "lpips_network"]

SMALLEST = 64
REMEMBERED_BYTES = 512 * 2**20
"""Features of targets that are kept: 48 pictures of 512 × 512 for alex, 3 for vgg."""


class Perceptual:
    """LPIPS distances; remembers the features of the targets that it saw last.

    Args:
        network: what `lpips_network` returned.
        remembered_bytes: how many bytes of targets' features are kept, the longest unused ones going first.
    """

    def __init__(self, network: Any, remembered_bytes: int = REMEMBERED_BYTES) -> None:
        self.trunk = network.net.to(memory_format=torch.channels_last)
        self.heads = [head.model[-1].weight.flatten() for head in network.lins]  # (channels,) each
        self.scale: Tensor = 2 / network.scaling_layer.scale  # [0, 1] to [-1, 1] to the trunk's own scale
        self.shift: Tensor = -(1 + network.scaling_layer.shift) / network.scaling_layer.scale
        self.remembered_bytes = remembered_bytes
        self._remembered: OrderedDict[bytes, list[Tensor]] = OrderedDict()
        self._bytes = 0

    @torch.no_grad()
    def distances(self, prediction: Pictures, target: Pictures) -> list[float]:
        """One distance a picture, 0 for equal ones.

        Args:
            prediction: C pictures of at least 64 pixels a side.
            target: C pictures of the same size, or one that all predictions share.
        """
        device = self.scale.device
        targets = target.tensor.expand(len(prediction.tensor), -1, -1, -1)
        found = []
        for x, y in zip(prediction.tensor, targets, strict=True):
            theirs = self._target_features(y, device)
            mine = self._features(x.to(device))
            layers = zip(mine, theirs, self.heads, strict=True)
            found.append(sum((a.sub_(b).square_().mean((0, 2, 3)) @ head).item() for a, b, head in layers))
        return [float(value) for value in found]

    def _features(self, picture: Tensor) -> list[Tensor]:
        """Unit vectors a pixel, (1, channels, h, w) a layer, of a (3, H, W) picture in [0, 1]."""
        scaled = torch.addcmul(self.shift, picture[None].float(), self.scale)
        layers = self.trunk(scaled.contiguous(memory_format=torch.channels_last))
        return [layer / layer.square().sum(1, keepdim=True).sqrt_().add_(1e-10) for layer in layers]

    def _target_features(self, picture: Tensor, device: torch.device) -> list[Tensor]:
        pixels = picture.detach().cpu().contiguous().numpy()
        key = hashlib.blake2b(pixels.data, digest_size=16).digest() + str(pixels.shape).encode()
        known = self._remembered.get(key)
        if known is not None:
            self._remembered.move_to_end(key)
            return known
        features = self._features(picture.to(device))
        self._remembered[key] = features
        self._bytes += _bytes(features)
        while self._bytes > self.remembered_bytes and len(self._remembered) > 1:
            self._bytes -= _bytes(self._remembered.popitem(last=False)[1])
        return features


def lpips_judge(definition: Definition, device: str | torch.device) -> Judge:
    """LPIPS with the trunk that the user brought.

    Raises:
        NotAvailable: the package or a weight file is missing, or is another one.
    """
    trunk_name, heads_name = definition.weights[0], definition.weights[1]
    path, digest = find_weights(*trunk_name)
    network, heads_digest = lpips_network(str(definition.network), path, heads_name[1])
    perceptual = Perceptual(network.to(device))

    def measure(prediction: Pictures, target: Pictures) -> list[float | None]:
        if min(prediction.tensor.shape[-2:]) < SMALLEST:
            raise NotAvailable(f"LPIPS needs pictures of at least {SMALLEST} pixels a side")
        return [*perceptual.distances(prediction, target)]

    return Judge(measure, {trunk_name[0]: digest, heads_name[0]: heads_digest})


def lpips_network(net: str, trunk: Path, heads_prefix: str) -> tuple[nn.Module, str]:
    """The package's network, frozen, with every trunk weight read from a file.

    Args:
        net: "alex", "vgg" or "squeeze".
        trunk: torchvision's weights of the whole network.
        heads_prefix: start of the sha256 that the package's linear heads must have.

    Returns:
        The network, which takes pictures in [-1, 1], and the sha256 of its linear heads.

    Raises:
        NotAvailable: the package or a weight is missing.
    """
    try:
        import lpips
    except ImportError as error:
        raise NotAvailable(f"the package lpips cannot be imported ({error})") from error
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    heads_digest = file_sha256(heads)
    if not heads_digest.startswith(heads_prefix):
        raise NotAvailable(
            f"the installed lpips has other linear heads ({heads_digest[:12]}…) than version 0.1"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by an argument that is deprecated
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    _fill_trunk(network.net, trunk)
    return network.eval().requires_grad_(False), heads_digest


def _fill_trunk(trunk: nn.Module, path: Path) -> None:
    """Copies torchvision's weights into lpips' slices, whose modules keep their index in `features`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
        raise NotAvailable(f"{path} cannot be read as weights ({type(error).__name__})") from error
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():  # slice2.3.weight is features.3.weight
            key = f"features.{name.split('.', 1)[1]}"
            if key not in state or state[key].shape != parameter.shape:
                raise NotAvailable(f"{path} lacks {key}, so it is not the trunk that this metric needs")
            parameter.copy_(state[key])


def _bytes(features: list[Tensor]) -> int:
    return sum(layer.numel() * layer.element_size() for layer in features)
