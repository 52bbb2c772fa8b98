"""Random choices, the same on every Python: only methods whose results do not change are used."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Random choices from one generator."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, items: Sequence[T]) -> T:
        return items[self._rng.randrange(len(items))]

    def chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return self._rng.randrange(low, high + 1)

    def two(self, items: Sequence[T]) -> tuple[T, T]:
        """Two different items, in random order."""
        first = self.between(0, len(items) - 1)
        second = (first + self.between(1, len(items) - 1)) % len(items)
        return items[first], items[second]
