"""A straight line through points, with the interval of its slope; the standard library alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fixup_core.errors import UserError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Slope:
    """Of a line fitted by least squares.

    Attributes:
        value: Rise of y for one unit of x.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def fit_slope(points: Sequence[tuple[float, float]]) -> Slope:
    """Slope of y over x and its 95 % interval, from the points' distances to the line.

    Args:
        points: (x, y), three at the least, not all at one x.

    Raises:
        UserError: Fewer points, or all at one x.
    """
    freedom = len(points) - 2
    centre_x = sum(x for x, _ in points) / len(points)
    centre_y = sum(y for _, y in points) / len(points)
    spread = sum((x - centre_x) ** 2 for x, _ in points)
    if freedom < 1 or spread == 0:
        raise UserError("a slope with an interval needs three points, not all at one x")
    slope = sum((x - centre_x) * (y - centre_y) for x, y in points) / spread
    squares = sum((y - centre_y - slope * (x - centre_x)) ** 2 for x, y in points)
    half = student_quantile(freedom) * math.sqrt(squares / freedom / spread)
    return Slope(slope, slope - half, slope + half)


def student_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t between whose negative and itself Student's distribution has ``confidence``."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _between(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _between(angle: float, freedom: int) -> float:
    """Probability of |t| < sqrt(freedom) * tan(angle): a finite sum (Abramowitz and Stegun 1964,
    equations 26.7.3 and 26.7.4).
    """
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if not odd:
        return math.sin(angle) * total
    return (angle + (math.sin(angle) * total if freedom > 1 else 0.0)) * 2 / math.pi
