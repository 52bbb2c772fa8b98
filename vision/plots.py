"""Line figures with one look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

WIDTH, HEIGHT = 6.4, 4.2
"""Of one panel, in inches."""


@dataclass(frozen=True)
class Curve:
    """A named line of (x, y) points; y that is not a number is a training that diverged."""

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
    title: str
    log_x: bool = False
    ticks: Sequence[float] = ()


def draw(panels: Sequence[Panel], file: Path) -> None:
    """Write the panels side by side as a PNG and say where it is.

    Diverged points are marked by a cross at the foot of the figure.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(WIDTH * len(panels), HEIGHT), squeeze=False
    )
    for panel, place in zip(panels, axes[0], strict=True):
        _fill(place, panel)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)
    print(f"figure: {file}")


def _fill(axes: Axes, panel: Panel) -> None:
    marked = 0
    for curve in panel.curves:
        good = [(x, y) for x, y in curve.points if math.isfinite(y)]
        lost = [x for x, y in curve.points if not math.isfinite(y)]
        (line,) = axes.plot(
            [x for x, _ in good], [y for _, y in good], "o-", ms=4, label=curve.name
        )
        if lost:
            _mark(axes, lost, line.get_color(), marked)
            marked += 1
    if panel.log_x:
        axes.set_xscale("log")
    if panel.ticks:
        axes.set_xticks(panel.ticks, labels=[f"{tick:g}" for tick in panel.ticks])
        axes.minorticks_off()
    axes.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
    axes.grid(alpha=0.3)
    axes.legend()


def _mark(axes: Axes, xs: Sequence[float], colour: Any, row: int) -> None:
    """A row of crosses at the foot of the figure, which would confuse its layout."""
    foot, heights = axes.get_xaxis_transform(), [0.02 + 0.04 * row] * len(xs)
    (crosses,) = axes.plot(xs, heights, "x", color=colour, clip_on=False, transform=foot)
    crosses.set_in_layout(False)
