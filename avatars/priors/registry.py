"""Priors by name, with the weights that the user has put where they are looked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from avatars.errors import UserError
from avatars.priors.dust3r import DUSt3R, Precision
from avatars.priors.features import DINOV2, SAPIENS, SAPIENS2, Features, Sapiens, load_dinov2, load_sapiens2
from avatars.priors.position import DUSt3RPrior
from avatars.weights import WEIGHTS, MissingWeights, find

__all__ = [
    "FEATURE_PRIORS",
    "POSITION_PRIORS",
    "NetworkFile",
    "find_network",
    "load_feature_prior",
    "load_position_prior",
]

POSITION_PRIORS = ("dust3r", "mast3r")
FEATURE_PRIORS = (
    "sapiens",
    *(f"sapiens-{size}" for size in SAPIENS),
    *(f"dinov2-{size}" for size in DINOV2),
    *(f"sapiens2-{size}" for size in SAPIENS2),
)
"""Names; "sapiens" is Sapiens v1 of whatever size an explicit file has."""


@dataclass(frozen=True)
class NetworkFile:
    """A prior's weights on this machine.

    Attributes:
        kind: the prior's name.
        path: the file.
        sha256: of the file.
        licence: terms in short.
    """

    kind: str
    path: Path
    sha256: str
    licence: str


def find_network(kind: str, weights: str | Path | None = None) -> NetworkFile:
    """Where a prior's weights are. Nothing is downloaded.

    Args:
        kind: one of `POSITION_PRIORS` or `FEATURE_PRIORS`.
        weights: a file, or a folder to look in instead of the one that HEADSPLAT_WEIGHTS names.

    Raises:
        MissingWeights: they are not here; the sentence says where they come from.
        UserError: there is no such prior.
    """
    if kind not in POSITION_PRIORS + FEATURE_PRIORS:
        raise UserError(
            f"There is no prior {kind!r}; positions come from depth, {' or '.join(POSITION_PRIORS)}, features from "
            f"{', '.join(FEATURE_PRIORS)}."
        )
    if kind == "sapiens":
        if weights is None or not Path(weights).is_file():
            raise MissingWeights(
                "The prior sapiens takes whatever size a file has: name the file, or ask for sapiens-0.3b to "
                "sapiens-2b."
            )
        found_path, licence = Path(weights), WEIGHTS["sapiens-2b"].licence
    else:
        hub = Path(weights) if weights is not None else None
        if hub is not None and (hub / "model.safetensors").is_file():
            hub = hub / "model.safetensors"
        found_path, licence = find(kind, hub).path, WEIGHTS[kind].licence
    from avatars.weights import file_sha256

    return NetworkFile(kind, found_path, file_sha256(found_path), licence)


def load_position_prior(
    network: NetworkFile, *, precision: Precision = "fp32", device: str = "cpu", batch: int = 1
) -> DUSt3RPrior:
    """DUSt3R or MASt3R with alignment.

    Args:
        network: from `find_network`.
        precision: of the trunk.
        device: where it works.
        batch: pictures, or pairs, at a time.

    Raises:
        UserError: the file is not the network's.
    """
    return DUSt3RPrior(
        DUSt3R.load(network.path, precision=precision, device=device), kind=network.kind, batch=batch
    )


def load_feature_prior(
    network: NetworkFile, *, precision: Precision = "fp32", device: str = "cpu"
) -> Features:
    """A feature network.

    Args:
        network: from `find_network`.
        precision: of weights and products.
        device: where it works.

    Raises:
        UserError: the file is another network's, or another size's.
    """
    kind, _, size = network.kind.partition("-")
    if kind == "dinov2":
        return load_dinov2(network.path, size, precision=precision, device=device)
    if kind == "sapiens2":
        return load_sapiens2(network.path, size, precision=precision, device=device)
    model = Sapiens.load(network.path, precision=precision, device=device)
    if size and model.kind != network.kind:
        raise UserError(f"{network.path} holds {model.kind} where {network.kind} was asked for.")
    return model
