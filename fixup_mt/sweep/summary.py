"""What a sweep shows: the best rate at every depth, what the shallow rate gives, what diverged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fixup_core.measure.figures import Curve, Panel, draw
from fixup_mt.sweep.points import Results

COLUMNS = 4
"""Panels side by side in the figure."""


@dataclass(frozen=True)
class Line:
    """A method at a depth and a length of warm-up.

    Attributes:
        best_lr: The rate with the lowest loss, the mean over seeds.
        best_loss: Validation loss at that rate, in bits.
        shallow_loss: At the rate that is best at the smallest depth; ``None``: not run at it.
        diverged: Trainings whose loss was no number, or above the highest at the smallest depth.
        trainings: In all.
    """

    method: str
    warmup: int
    depth: int
    best_lr: float
    best_loss: float
    shallow_loss: float | None
    diverged: int
    trainings: int


def summarise(results: Results, chance: float) -> list[Line]:
    """A line for every method, warm-up and depth.

    Args:
        results: Of a sweep.
        chance: Loss of the uniform guess, in bits: a training that ends above it has diverged.
    """
    lines = []
    for method, warmup in _groups(results):
        shallow = math.nan
        for depth, by_rate in _losses(results, method, warmup).items():
            means = _means(by_rate)
            best = min(means, key=lambda lr: _finite(means[lr]))
            shallow = best if math.isnan(shallow) else shallow
            losses = [loss for found in by_rate.values() for loss in found]
            diverged = sum(not loss < chance for loss in losses)
            at_shallow = means.get(shallow)
            numbers = (best, means[best], at_shallow, diverged, len(losses))
            lines.append(Line(method, warmup, depth, *numbers))
    return lines


def markdown(lines: Iterable[Line]) -> str:
    """The table."""
    rows = [
        "| method | warm-up | layers | best rate | loss | at the shallow rate | diverged |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {line.method} | {line.warmup} | {line.depth} | {line.best_lr:g} | "
        f"{line.best_loss:.3f} | {_number(line.shallow_loss)} | "
        f"{line.diverged} of {line.trainings} |"
        for line in lines
    ]
    return "\n".join(rows) + "\n"


def _number(loss: float | None) -> str:
    return "not run" if loss is None else f"{loss:.3f}"


def figure(results: Results, file: Path) -> None:
    """Validation loss against learning rate: a panel for a method and warm-up, a line for a depth.

    Raises:
        UserError: matplotlib is missing.
    """
    panels = []
    rates = sorted({point.lr for point in results.rows})
    for method, warmup in _groups(results):
        curves = [
            Curve(f"{depth} layers", sorted(_means(by_rate).items()))
            for depth, by_rate in _losses(results, method, warmup).items()
        ]
        title = f"{method}, warm-up {warmup}"
        axes = ("learning rate", "validation loss, bits")
        panels.append(Panel(curves, *axes, title, log_x=True, ticks=rates))
    draw(panels, file, columns=COLUMNS, share_y=True)


def _groups(results: Results) -> list[tuple[str, int]]:
    return list(dict.fromkeys((point.method, point.warmup) for point in results.rows))


def _losses(results: Results, method: str, warmup: int) -> dict[int, dict[float, list[float]]]:
    """Depth, from the shallowest on -> learning rate -> the loss of every seed."""
    found: dict[int, dict[float, list[float]]] = {}
    for point, result in results.rows.items():
        if (point.method, point.warmup) == (method, warmup):
            by_rate = found.setdefault(point.depth, {})
            by_rate.setdefault(point.lr, []).append(result.valid_loss)
    return dict(sorted(found.items()))


def _means(by_rate: dict[float, list[float]]) -> dict[float, float]:
    """Learning rate -> mean loss over seeds."""
    return {lr: statistics.fmean(losses) for lr, losses in by_rate.items()}


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
