"""Line figures with one look; the one file of the core that reaches matplotlib, when it draws."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixup_core.errors import UserError
from fixup_core.files import whole_file

WIDTH, HEIGHT = 6.4, 4.2
"""Of one panel, in inches."""
DPI = 100
FEW = 20
"""Points of a curve that are marked; of more, a line is seen."""


@dataclass(frozen=True)
class Curve:
    """A named line of (x, y) points.

    It breaks where y is infinite or no number, which a cross at the upper edge shows, and where y
    has no logarithm on an axis that wants one.

    Attributes:
        name: As the legend has it; "" keeps the line out of it.
        points: In the order they are joined.
        dashed: What a curve is compared with; it takes the colour of the curve before it.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes; ``x`` and ``y`` are what is written along them, ``ticks`` the places that
    are marked on the former.
    """

    curves: Sequence[Curve]
    x: str
    y: str
    title: str = ""
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[float] = ()


def check_figure_file(file: Path | str) -> None:
    """Refuse what no figure can be written to; to be called before minutes of work.

    Raises:
        UserError: A folder, or an ending that no format has; matplotlib is missing.
    """
    formats = sorted(_figure().canvas.get_supported_filetypes())
    if Path(file).suffix.removeprefix(".").lower() not in formats:
        raise UserError(f"{file} has no ending of a figure: take one of {', '.join(formats)}")
    if Path(file).is_dir():
        raise UserError(f"{file} is a folder: give a file")
    Path(file).parent.mkdir(parents=True, exist_ok=True)


def draw(
    panels: Sequence[Panel], file: Path | str, *, columns: int = 0, share_y: bool = False
) -> None:
    """Write the panels side by side into a file; its ending says in which format.

    Args:
        panels: In reading order.
        file: What to write.
        columns: Panels in a row; 0: all in one.
        share_y: Whether all panels have one scale of y.

    Raises:
        UserError: matplotlib is missing, or does not know the format.
    """
    columns = max(1, min(columns or len(panels), len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).flat)
    for panel, axes in zip(panels, places, strict=False):
        _fill(axes, panel)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    check_figure_file(file)
    with whole_file(file) as temporary:
        figure.savefig(temporary, dpi=DPI)


def _figure(**options: Any) -> Any:
    try:
        return importlib.import_module("matplotlib.figure").Figure(**options)
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install matplotlib") from error


def _fill(axes: Any, panel: Panel) -> None:
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    colour, rows = None, 0
    for curve in panel.curves:
        colour = _line(axes, curve, panel.log_y, colour if curve.dashed else None)
        lost = [x for x, y in curve.points if not math.isfinite(y)]
        if lost:
            _crosses(axes, lost, colour, rows)
            rows += 1
    if panel.ticks:
        axes.set_xticks(panel.ticks, labels=[f"{tick:g}" for tick in panel.ticks])
        axes.set_xticks([], minor=True)
    axes.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
    axes.grid(alpha=0.3)
    if any(curve.name for curve in panel.curves):
        axes.legend(fontsize="small")


def _line(axes: Any, curve: Curve, log: bool, colour: Any) -> Any:
    """Draw it and return its colour; ``colour`` None takes the next one."""
    heights = [y if math.isfinite(y) and (y > 0 or not log) else math.nan for _, y in curve.points]
    drawn = sum(not math.isnan(height) for height in heights)
    look = {"ls": "--" if curve.dashed else "-", "marker": "o" if drawn <= FEW else ""}
    xs, name = [x for x, _ in curve.points], curve.name
    if name and not drawn and all(y == 0 for _, y in curve.points):
        name += " (0 everywhere)"
    (line,) = axes.plot(xs, heights, ms=3.5, color=colour, label=name, **look)
    return line.get_color()


def _crosses(axes: Any, xs: Sequence[float], colour: Any, row: int) -> None:
    """A row of crosses below the upper edge, whatever the axis of y."""
    heights, edge = [0.98 - 0.04 * row] * len(xs), axes.get_xaxis_transform()
    axes.plot(xs, heights, "x", color=colour, transform=edge)
