"""Random numbers that depend only on what they are for: the same key gives the same numbers everywhere.

Numbers come from BLAKE2b over the key and a counter, so they do not depend on a library's version, on what
was drawn before, or on the process that draws. This is what lets the order of training examples be computed
anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["Draws"]

T = TypeVar("T")


class Draws:
    """A stream of random numbers for one purpose, named by a seed and any integers and names."""

    def __init__(self, *key: int | str) -> None:
        self._key = "\x1f".join(f"{type(part).__name__}:{part}" for part in key).encode()
        self._block = 0
        self._words: list[int] = []

    def word(self) -> int:
        """The next 64 random bits."""
        if not self._words:
            digest = hashlib.blake2b(self._key, salt=self._block.to_bytes(16, "little")).digest()
            self._words = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 64, 8)]
            self._block += 1
        return self._words.pop()

    def below(self, n: int) -> int:
        """A uniform integer in [0, n); the bias is below n / 2^64."""
        return (self.word() * n) >> 64

    def choice(self, items: Sequence[T]) -> T:
        """One of `items`, all equally likely."""
        return items[self.below(len(items))]

    def sample(self, n: int, count: int) -> list[int]:
        """`count` different integers of [0, n) in random order (a Fisher-Yates shuffle that stops early)."""
        if not 0 <= count <= n:
            raise ValueError(f"cannot draw {count} different numbers below {n}")
        moved: dict[int, int] = {}
        drawn = []
        for i in range(count):
            j = i + self.below(n - i)
            drawn.append(moved.get(j, j))
            moved[j] = moved.get(i, i)
        return drawn

    def permutation(self, n: int) -> list[int]:
        """The integers of [0, n) in random order."""
        return self.sample(n, n)
