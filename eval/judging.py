"""What all network metrics share: the loaded judge, and the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from avatars.weights import MissingWeights, file_sha256, find_file
from eval.metrics import Pictures

__all__ = ["Judge", "NotAvailable", "find_weights", "package_weights"]


class NotAvailable(Exception):
    """A metric cannot be measured here; the message says why and what would change that."""


@dataclass(frozen=True)
class Judge:
    """A loaded network metric.

    Attributes:
        measure: (prediction, target) to one value a picture, None where it cannot judge the pair.
        weights: weight file to its full sha256.
    """

    measure: Callable[[Pictures, Pictures], list[float | None]]
    weights: dict[str, str]


def find_weights(name: str, prefix: str) -> tuple[Path, str]:
    """A weight file by name (see `avatars.weights`) and its sha256.

    Args:
        name: file name as published.
        prefix: start of the published sha256; empty where none was published.

    Raises:
        NotAvailable: no such file, or one with another hash.
    """
    try:
        found = find_file(name, prefix)
    except MissingWeights as reason:
        raise NotAvailable(str(reason)) from reason
    return found.path, found.sha256


def package_weights(module: str, package: str, folder: str, name: str, prefix: str) -> tuple[Path, str]:
    """A weight file that ships inside an installed package, which is not imported, and its sha256.

    Args:
        module: import name of the package.
        package: name to install it by.
        folder: folder of the file inside the package.
        name: file name.
        prefix: start of the sha256 of the release that the metric was defined with.

    Raises:
        NotAvailable: the package or the file is not there, or the file is of another release.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise NotAvailable(f"it needs {name} out of the package {package}, which is not installed")
    path = Path(spec.submodule_search_locations[0]) / folder / name
    if not path.is_file():
        raise NotAvailable(f"the installed {package} has no {name}")
    digest = file_sha256(path)
    if not digest.startswith(prefix):
        raise NotAvailable(
            f"the installed {package} has another {name} ({digest[:12]}…) than this metric is defined with"
        )
    return path, digest
