"""Line figures with one look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt


@dataclass(frozen=True)
class Curve:
    """A named line of (x, y) points; y that is not a number is a training that diverged."""

    name: str
    points: Sequence[tuple[float, float]]


def draw(
    curves: Sequence[Curve], file: Path, *, x: str, y: str, title: str, log_x: bool = False
) -> None:
    """Write the figure as a PNG and say where it is.

    Diverged points are marked by a cross at the foot of the figure.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for curve in curves:
        good = [(a, b) for a, b in curve.points if math.isfinite(b)]
        lost = [a for a, b in curve.points if not math.isfinite(b)]
        (line,) = (
            axes.plot(*zip(*good, strict=True), "o-", label=curve.name)
            if good
            else (axes.plot([], [], "o-", label=curve.name))
        )
        axes.plot(
            lost,
            [0.02] * len(lost),
            "x",
            color=line.get_color(),
            clip_on=False,
            transform=axes.get_xaxis_transform(),
        )
    if log_x:
        axes.set_xscale("log")
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)
    print(f"figure: {file}")
