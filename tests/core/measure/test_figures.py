"""What a figure shows of points that cannot be drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fixup_core.errors import UserError
from fixup_core.measure import figures
from fixup_core.measure.figures import Curve, Panel, draw


def _axes(*curves: Curve, log_y: bool = False) -> Any:
    axes = Figure().subplots()
    figures._fill(axes, Panel(curves, "x", "y", log_y=log_y))
    return axes


def _crosses(axes: Any) -> list[tuple[Any, list[float], float]]:
    """Colour, places and height of each row."""
    rows = [line for line in axes.lines if line.get_marker() == "x"]
    return [(row.get_color(), list(row.get_xdata()), row.get_ydata()[0]) for row in rows]


def test_what_is_infinite_or_no_number_is_a_cross_of_the_curves_colour() -> None:
    first = Curve("a", [(1, 1.0), (2, math.inf), (3, 2.0)])
    second = Curve("b", [(1, math.nan), (2, 1.0), (3, math.nan)])
    axes = _axes(first, second)
    (colour, places, high), (other, others, low) = _crosses(axes)
    assert (colour, places) == (axes.lines[0].get_color(), [2])
    assert other != colour and others == [1, 3] and low < high, "rows do not hide each other"
    assert math.isnan(axes.lines[0].get_ydata()[1]), "the line breaks"
    assert not _crosses(_axes(Curve("good", [(1, 1.0), (2, 2.0)])))


@pytest.mark.parametrize("log_y", [False, True])
def test_what_has_no_logarithm_is_left_out_where_one_is_wanted(log_y: bool) -> None:
    axes = _axes(Curve("a", [(1, -1.0), (2, 1.0)]), log_y=log_y)
    assert math.isnan(axes.lines[0].get_ydata()[0]) == log_y and not _crosses(axes)


def test_a_curve_in_the_legend_is_seen_or_said_to_be_zero() -> None:
    zero = [(i, 0.0) for i in range(30)]
    few, none = Curve("few", [*zero, (30, 1.0)]), Curve("none", zero)
    many = Curve("many", [(i, 1.0) for i in range(31)])
    axes = _axes(few, none, many, log_y=True)
    assert [line.get_marker() for line in axes.lines] == ["o", "o", ""]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["few", "none (0 everywhere)", "many"]
    assert _axes(none).get_legend().get_texts()[0].get_text() == "none", "it has a line"


def test_a_dashed_curve_has_the_colour_of_the_one_before() -> None:
    points = [(1, 1.0), (2, 2.0)]
    axes = _axes(Curve("a", points), Curve("its bound", points, dashed=True), Curve("b", points))
    colours = [line.get_color() for line in axes.lines]
    assert colours[0] == colours[1] != colours[2]


def test_nothing_but_overflow_can_be_drawn(tmp_path: Path) -> None:
    panel = Panel([Curve("a", [(1, math.inf), (10, math.nan)])], "x", "y", log_x=True, log_y=True)
    draw([panel, panel], tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_places_without_a_panel_are_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = Figure()
    monkeypatch.setattr(figures, "_figure", lambda **options: figure)
    draw([Panel([], "x", "y")] * 3, tmp_path / "figure.png", columns=2)
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(figures.importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install matplotlib"):
        draw([], tmp_path / "figure.png")
