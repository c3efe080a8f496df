"""How sure a mean over subjects is, and whether one method is better than another on the same subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST", "Difference", "interval", "paired"]

FEWEST = 3
"""Subjects below which no interval is told: resampling two numbers says nothing."""
RESAMPLES = 9999
SEED = 0


@dataclass(frozen=True)
class Difference:
    """A method minus a reference, subject by subject.

    Attributes:
        mean: mean difference.
        low: lower end of its 95 % bootstrap interval over subjects, None with fewer than `FEWEST` subjects.
        high: upper end.
        p: two-sided p of the paired sign-flip test: how often a difference at least as large comes about when each
            subject's sign is drawn by coin. All 2^n signs where that many are at most 9,999, as many draws otherwise.
        subjects: n.
    """

    mean: float
    low: float | None
    high: float | None
    p: float
    subjects: int


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean: percentiles of 9,999 means of resampled subjects; the same each time.

    Args:
        values: one number a subject.

    Returns:
        Low and high, or None with fewer than `FEWEST` subjects.
    """
    numbers = np.asarray(values, np.float64)
    if len(numbers) < FEWEST:
        return None
    low, high = np.percentile(_resampled_means(numbers), (2.5, 97.5))
    return float(low), float(high)


def paired(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Compares two methods on the same subjects.

    Args:
        values: one number a subject.
        reference: the other method's number of the same subjects, in the same order.
    """
    difference = np.asarray(values, np.float64) - np.asarray(reference, np.float64)
    limits = interval(difference.tolist())
    return Difference(
        mean=float(difference.mean()),
        low=None if limits is None else limits[0],
        high=None if limits is None else limits[1],
        p=_sign_flip(difference),
        subjects=len(difference),
    )


def _resampled_means(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of `RESAMPLES` draws with replacement; in blocks, so that thousands of subjects fit into memory."""
    rng = np.random.default_rng(SEED)
    block = max(1, 2**22 // len(numbers))
    parts = []
    for start in range(0, RESAMPLES, block):
        rows = min(block, RESAMPLES - start)
        parts.append(numbers[rng.integers(len(numbers), size=(rows, len(numbers)))].mean(1))
    return np.concatenate(parts)


def _sign_flip(difference: NDArray[np.float64]) -> float:
    """P of the mean of `difference` under random signs (`scipy.stats.permutation_test`)."""
    from scipy.stats import permutation_test

    if len(difference) < 2 or not difference.any():
        return 1.0  # of one subject both signs have the same mean but for the sign
    result = permutation_test(
        (difference,),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // len(difference)),
        rng=np.random.default_rng(SEED),
    )
    return float(result.pvalue)
