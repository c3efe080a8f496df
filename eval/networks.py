"""The networks that judge pictures, by name: LPIPS, landmark detectors and face embeddings.

Weights come from the packages themselves or from files that the user brings (`avatars.weights`). Nothing is downloaded
and nothing runs on random weights: what is missing raises `NotAvailable` with the reason, which stands in rows,
tables and the tracker for a number.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from eval.faces import DETECTORS, EMBEDDERS, akd_judge, csim_judge
from eval.judging import Judge, NotAvailable, find_weights
from eval.metrics import DEFINITIONS, Definition
from eval.perceptual import lpips_judge, lpips_network

__all__ = ["Judge", "NotAvailable", "available_weights", "find_weights", "load_judge", "lpips_network"]


def available_weights(device: str | torch.device = "cpu") -> Iterator[tuple[str, bool, str]]:
    """Of each network: the metric, whether it can be measured here, and its weights or the reason why not."""
    for definition in DEFINITIONS.values():
        if definition.network is None:
            continue
        try:
            judge = load_judge(definition, device)
        except NotAvailable as reason:
            yield definition.label, False, str(reason)
        else:
            found = ", ".join(f"{name} {digest[:12]}" for name, digest in judge.weights.items())
            yield definition.label, True, found


def load_judge(definition: Definition, device: str | torch.device = "cpu") -> Judge:
    """The network behind a definition.

    Raises:
        NotAvailable: a package or a weight file is missing, or a file is not the published one.
    """
    if definition.network in ("alex", "vgg", "squeeze"):
        return lpips_judge(definition, device)
    if definition.network in DETECTORS:
        return akd_judge(definition, device)
    if definition.network in EMBEDDERS or definition.network == "facenet-vggface2":
        return csim_judge(definition, device)
    raise NotAvailable(f"this version knows no network called {definition.network!r}")
