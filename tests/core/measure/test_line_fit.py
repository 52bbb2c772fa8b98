"""The slope of a line and its interval."""

import math
import random

import pytest

from fixup_core.measure.line_fit import fit_slope, student_quantile


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (5, 2.571), (10, 2.228), (100, 1.984)]
)
def test_quantiles_are_those_of_the_tables(freedom: int, t: float) -> None:
    assert student_quantile(freedom) == pytest.approx(t, abs=5e-4)


def test_points_on_a_line_have_its_slope_and_no_interval() -> None:
    slope = fit_slope([(x, 3 - 0.5 * x) for x in range(5)])
    assert (slope.value, slope.low, slope.high) == pytest.approx((-0.5,) * 3)


def test_nineteen_of_twenty_intervals_hold_the_slope() -> None:
    draw, held = random.Random(0), 0
    for _ in range(1000):
        points = [(x, 0.3 * x + draw.gauss(0, 1)) for x in range(6)]
        slope = fit_slope(points)
        held += slope.low < 0.3 < slope.high
    assert abs(held - 950) < 4 * math.sqrt(1000 * 0.95 * 0.05)


@pytest.mark.parametrize("points", [[(1, 1), (2, 2)], [(1, 1), (1, 2), (1, 3)]])
def test_what_has_no_slope_is_refused(points: list) -> None:
    with pytest.raises(ValueError, match="three points"):
        fit_slope(points)
