"""Feature maps in fewer channels: principal components of the training subjects' features.

Of all linear maps to k channels these keep the most of the features' variance, and because they are orthonormal,
distances between features are kept as well as k channels can.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from avatars.errors import UserError
from avatars.files import write_whole
from avatars.priors.checkpoints import read_safetensors

__all__ = ["Reduction", "ReductionFit"]


@dataclass(frozen=True)
class Reduction:
    """A linear map of feature channels.

    Attributes:
        mean: (D,) subtracted first.
        components: (k, D) orthonormal rows, the strongest first.
        kept: the part of the variance that they keep, of the features they were fitted to.
    """

    mean: Tensor
    components: Tensor
    kept: float

    @property
    def name(self) -> str:
        """Channels and eight digits of a hash of the numbers, for example "pca64:1a2b3c4d"."""
        digest = hashlib.sha256(self.mean.numpy().tobytes() + self.components.numpy().tobytes())
        return f"pca{len(self.components)}:{digest.hexdigest()[:8]}"

    def __call__(self, features: Tensor) -> Tensor:
        """Feature maps (B, D, h, w) -> (B, k, h, w)."""
        centred = features - self.mean.to(features)[:, None, None]
        return torch.einsum("kd,bdhw->bkhw", self.components.to(features), centred)

    def save(self, path: Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        from safetensors.torch import save

        tensors = {"mean": self.mean, "components": self.components, "kept": torch.tensor(self.kept)}
        write_whole(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> Reduction:
        """Reads what `save` wrote.

        Raises:
            UserError: it is not there or something else.
        """
        tensors = read_safetensors(path)
        if tensors.keys() != {"mean", "components", "kept"}:
            raise UserError(f"{path} holds no reduction of feature channels.")
        return cls(tensors["mean"], tensors["components"], float(tensors["kept"]))


class ReductionFit:
    """Adds up mean and covariance of features, picture by picture.

    Args:
        dim: channels D.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Takes feature maps (B, D, h, w) into account."""
        vectors = features.transpose(0, 1).flatten(1)  # (D, B h w)
        self.count += vectors.shape[1]
        self.sum += vectors.double().sum(1).cpu()
        self.products += (vectors @ vectors.T).double().cpu()

    def result(self, channels: int) -> Reduction:
        """The strongest `channels` principal components.

        Raises:
            UserError: more channels than there are.
        """
        dim = len(self.sum)
        if not 1 <= channels < dim:
            raise UserError(f"{dim} channels cannot be reduced to {channels}; give 1 to {dim - 1}.")
        mean = self.sum / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        components = vectors.flip(1)[:, :channels].T
        # The sign of an eigenvector is arbitrary: the largest entry is made positive, for equal bytes.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        components = components * largest.sign()
        kept = float(values.flip(0)[:channels].sum() / values.clamp_min(0).sum().clamp_min(1e-30))
        return Reduction(mean.float(), components.float().contiguous(), kept)
