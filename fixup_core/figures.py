"""Line figures with one look; the one file of the core that knows matplotlib, if it is there."""

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
DPI = 100
FEW = 20
"""Points of a curve that are marked."""


@dataclass(frozen=True)
class Curve:
    """A named line of (x, y) points; it breaks where y is not finite, or has no logarithm.

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
    title: str
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[float] = ()


def draw(panels: Sequence[Panel], file: Path) -> None:
    """Write the panels side by side into a file; its ending says in which format.

    Raises:
        UserError: matplotlib is missing.
    """
    figure = _figure(figsize=(WIDTH * len(panels), HEIGHT), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for panel, place in zip(panels, axes[0], strict=True):
        _fill(place, panel)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI)


def _figure(**options: Any) -> Any:
    try:
        return importlib.import_module("matplotlib.figure").Figure(**options)
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install matplotlib") from error


def _fill(axes: Any, panel: Panel) -> None:
    colour = None
    for curve in panel.curves:
        heights = [y if y > 0 or not panel.log_y else math.nan for _, y in curve.points]
        look: dict[str, Any] = {"ls": "--", "color": colour} if curve.dashed else {}
        look["marker"] = "o" if len(heights) <= FEW else ""
        (line,) = axes.plot([x for x, _ in curve.points], heights, ms=3.5, label=curve.name, **look)
        colour = line.get_color()
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    if panel.ticks:
        axes.set_xticks(panel.ticks, labels=[f"{tick:g}" for tick in panel.ticks])
        axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
    axes.grid(alpha=0.3)
    if any(curve.name for curve in panel.curves):
        axes.legend(fontsize="small")
