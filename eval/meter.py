"""Measures pictures with all metrics of a protocol, averages, and says what could not be measured and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eval.metrics import PSNR_CAP, Definition, Pictures
from eval.networks import Judge, NotAvailable, load_judge
from eval.similarity import similarity

__all__ = ["Meter", "Score"]

FORMULAS = ("psnr", "ssim", "psnr_masked", "ssim_masked")


@dataclass(frozen=True)
class Score:
    """Means over pictures.

    Attributes:
        values: metric key to its mean.
        missing: metric key to the reason why there is no number.
        left_out: metric key to the number of pictures that it could not judge, where there were any.
    """

    values: dict[str, float]
    missing: dict[str, str]
    left_out: dict[str, int]


@dataclass
class Meter:
    """All metrics of a protocol, with their networks loaded once.

    Attributes:
        metrics: definitions, from the protocol.
        device: where networks and formulas run.
        missing: metric key to the reason why it cannot be measured here.
        weights: metric key to {weight file: sha256}.
    """

    metrics: tuple[Definition, ...]
    device: str = "cpu"
    missing: dict[str, str] = field(default_factory=dict)
    weights: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._judges: dict[str, Judge] = {}
        for metric in self.metrics:
            if metric.network is None:
                if metric.key not in FORMULAS:
                    self.missing[metric.key] = (
                        f"not available: this version knows no metric called {metric.key!r}"
                    )
                continue
            try:
                judge = load_judge(metric, self.device)
            except NotAvailable as reason:
                self.missing[metric.key] = f"not available: {reason}"
                continue
            self._judges[metric.key] = judge
            self.weights[metric.key] = judge.weights

    @torch.no_grad()
    def measure(self, prediction: Pictures, target: Pictures, mask: Tensor) -> list[dict[str, float | None]]:
        """Every metric of every picture; None where a metric cannot judge the pair.

        Args:
            prediction: C pictures.
            target: C pictures of the same size.
            mask: (C, 1, H, W) coverage of the target.
        """
        found: dict[str, list[float | None]] = {}
        for metric in self.metrics:
            if metric.network is not None and metric.key not in self.missing:
                try:
                    found[metric.key] = self._judges[metric.key].measure(prediction, target)
                except NotAvailable as reason:
                    self.missing[metric.key] = f"not available: {reason}"
        if self.device != "cpu":
            prediction, target = prediction.to(self.device), target.to(self.device)
        formulas = similarity(prediction, target, mask.to(self.device))
        measured = []
        for index in range(prediction.tensor.shape[0]):
            everything = {
                key: _number(getattr(formulas, key)[index], PSNR_CAP if key.startswith("psnr") else math.inf)
                for key in FORMULAS
            } | {key: values[index] for key, values in found.items()}
            measured.append({m.key: everything[m.key] for m in self.metrics if m.key in everything})
        return measured

    def score(self, measured: list[dict[str, float | None]]) -> Score:
        """Means over the pictures that `measure` returned."""
        score = Score({}, dict(self.missing), {})
        for metric in self.metrics:
            if metric.key in self.missing:
                continue
            numbers = [value for value in (one.get(metric.key) for one in measured) if value is not None]
            if len(numbers) < len(measured):
                score.left_out[metric.key] = len(measured) - len(numbers)
            if numbers:
                score.values[metric.key] = sum(numbers) / len(numbers)
            else:
                what = "a face was found in" if metric.network else "the mask covers anything in"
                score.missing[metric.key] = f"not available: {what} none of the {len(measured)} pictures"
        return score


def _number(result: Tensor, cap: float = math.inf) -> float | None:
    """A number that JSON can hold: nan (nothing to measure) is None, and what is above the cap is the cap."""
    value = result.item()
    return None if math.isnan(value) else min(value, cap)
