"""How sure a mean over subjects is, and whether one method is better than another on the same subjects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST", "Difference", "differences", "interval", "intervals", "paired"]

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
    return intervals([values])[0]


def intervals(columns: Sequence[Sequence[float]]) -> list[tuple[float, float] | None]:
    """`interval` of each of several columns of numbers of the same n subjects, which share their resamples."""
    if not columns or len(columns[0]) < FEWEST:
        return [None] * len(columns)
    numbers = np.asarray(columns, np.float64).T  # (n, K)
    low, high = np.percentile(_resampled_means(numbers), (2.5, 97.5), axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def paired(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Compares two methods on the same subjects.

    Args:
        values: one number a subject.
        reference: the other method's number of the same subjects, in the same order.
    """
    return differences([values], [reference])[0]


def differences(
    columns: Sequence[Sequence[float]], references: Sequence[Sequence[float]]
) -> list[Difference]:
    """`paired` of each column with its reference, all of the same n subjects."""
    if not columns:
        return []
    found = np.asarray(columns, np.float64) - np.asarray(references, np.float64)  # (K, n)
    limits = intervals(found.tolist())
    return [
        Difference(
            mean=float(one.mean()),
            low=None if limit is None else limit[0],
            high=None if limit is None else limit[1],
            p=p,
            subjects=len(one),
        )
        for one, limit, p in zip(found, limits, _sign_flip(found.T), strict=True)
    ]


def _blocks(rows: int, subjects: int) -> Iterator[int]:
    """Rows to work on at a time, so that thousands of subjects fit into memory."""
    block = max(1, 2**22 // subjects)
    for start in range(0, rows, block):
        yield min(block, rows - start)


def _resampled_means(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R, K) means over `RESAMPLES` draws of n subjects with replacement of (n, K) numbers.

    How often a draw takes each subject is counted once and multiplied with all columns at a time.
    """
    rng = np.random.default_rng(SEED)
    n = len(numbers)
    parts = []
    for rows in _blocks(RESAMPLES, n):
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        parts.append(counts.astype(np.float64) @ numbers / n)
    return np.concatenate(parts)


def _sign_flip(found: NDArray[np.float64]) -> list[float]:
    """Two-sided p of each column's mean of (n, K) differences under random signs.

    All sign vectors where they are at most `RESAMPLES`; as many draws otherwise, counted together with what was
    seen, so that no p is 0 (Phipson and Smyth 2010).
    """
    n = len(found)
    exact = 2**n <= RESAMPLES
    rng = np.random.default_rng(SEED)
    # What rounding makes of an equal mean still counts as at least as large.
    seen = np.abs(found.sum(0)) * (1 - 1e-9)
    larger = np.zeros(found.shape[1], np.int64)
    if exact:
        signs = 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        larger += (np.abs(signs @ found) >= seen).sum(0)
        return (larger / 2**n).tolist()
    for rows in _blocks(RESAMPLES, n):
        signs = 1.0 - 2.0 * rng.integers(2, size=(rows, n), dtype=np.int8)
        larger += (np.abs(signs @ found) >= seen).sum(0)
    return ((larger + 1) / (RESAMPLES + 1)).tolist()
