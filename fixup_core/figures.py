"""Line figures with one look; the one file of the core that reaches matplotlib, when it draws."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixup_core.errors import UserError

WIDTH, HEIGHT = 6.4, 4.2
"""Of one panel, in inches."""


@dataclass(frozen=True)
class Curve:
    """A named line of (x, y) points; an infinite y, or one that is no number, is an overflow."""

    name: str
    points: Sequence[tuple[float, float]]


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


def draw(panels: Sequence[Panel], file: Path | str) -> None:
    """Write the panels side by side, in the format of the file's ending.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        figure_class = importlib.import_module("matplotlib.figure").Figure
    except ModuleNotFoundError as error:
        raise UserError("a figure needs matplotlib: pip install matplotlib") from error
    size = WIDTH * len(panels), HEIGHT
    figure = figure_class(figsize=size, layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        _fill(axes, panel)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _fill(axes: Any, panel: Panel) -> None:
    for curve in panel.curves:
        good = [point for point in curve.points if math.isfinite(point[1])]
        lost = [x for x, y in curve.points if not math.isfinite(y)]
        xs, ys = [x for x, _ in good], [y for _, y in good]
        (line,) = axes.plot(xs, ys, "o-", ms=4, label=curve.name)
        # Crosses along the upper edge.
        top = axes.get_xaxis_transform()
        axes.plot(lost, [0.98] * len(lost), "x", color=line.get_color(), transform=top)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    if panel.ticks:
        axes.set_xticks(panel.ticks, labels=[f"{tick:g}" for tick in panel.ticks])
        axes.set_xticks([], minor=True)
    axes.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
