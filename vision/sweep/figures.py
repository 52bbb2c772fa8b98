"""Figures of many short trainings: test accuracy or training loss against depth or learning rate.

The figure is drawn anew from the table of points at the end.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

from fixup_core.errors import UserError
from fixup_core.measure.figures import Curve, Panel, draw
from vision import RUNS
from vision.sweep.points import Point, Recipe, run_points

PAPER_METHODS = ("fixup", "batchnorm", "xavier", "lsuv")


def depth(
    recipe: Recipe,
    output: Path = RUNS / "sweep_depth",
    depths: Sequence[int] = (20, 56, 110, 218, 434, 1202),
    methods: Sequence[str] = PAPER_METHODS,
    lr: float = 0.1,
    seeds: Sequence[int] = (1,),
) -> None:
    """Test accuracy after the first epochs against depth (the paper's figure 3).

    Args:
        recipe: How every point is trained.
        output: Folder of ``points.csv`` and ``depth.png``.
        depths: 6n+2 each.
        methods: The networks' initialisations.
        lr: Learning rate.
        seeds: One training each.
    """
    points = [
        Point(f"cifar_resnet{d}", method, {}, d, lr, recipe.epochs, seed)
        for d, method, seed in product(sorted(depths), methods, seeds)
    ]
    curves = _trained(points, recipe, output, "depth", "test_accuracy", _method)
    title = f"ResNets, {_length(recipe)}, learning rate {lr:g}"
    panel = Panel(curves, "layers", "test accuracy", title, log_x=True, ticks=depths)
    show(panel, output / "depth.png")


def lr(
    recipe: Recipe,
    output: Path = RUNS / "sweep_lr",
    net: str = "cifar_resnet56",
    rates: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    methods: Sequence[str] = PAPER_METHODS,
    seeds: Sequence[int] = (1,),
) -> None:
    """Training loss after the first epochs against the learning rate.

    Args:
        recipe: How every point is trained.
        output: Folder of ``points.csv`` and ``lr.png``.
        net: Name of the network.
        rates: Learning rates.
        methods: The networks' initialisations.
        seeds: One training each.
    """
    points = [
        Point(net, method, {}, _depth_of(net), rate, recipe.epochs, seed)
        for rate, method, seed in product(sorted(rates), methods, seeds)
    ]
    curves = _trained(points, recipe, output, "lr", "train_loss", _method)
    title = f"{net}, {_length(recipe)}"
    panel = Panel(curves, "learning rate", "train loss", title, log_x=True, ticks=rates)
    show(panel, output / "lr.png")


def degradation(
    recipe: Recipe,
    output: Path = RUNS / "sweep_degradation",
    depths: Sequence[int] = (20, 32, 44, 56),
    method: str = "batchnorm",
    lr: float = 0.1,
    seeds: Sequence[int] = (1,),
) -> None:
    """Plain networks get worse with depth, residual ones do not (He et al. 2015, figure 6).

    Args:
        recipe: How every point is trained.
        output: Folder of ``points.csv`` and ``degradation.png``.
        depths: 6n+2 each.
        method: Of both kinds of network.
        lr: Learning rate.
        seeds: One training each.
    """
    points = [
        Point(f"cifar_resnet{d}", method, {"shortcut": shortcut}, d, lr, recipe.epochs, seed)
        for d, shortcut, seed in product(sorted(depths), ("none", "A"), seeds)
    ]
    names = {"none": "plain", "A": "residual"}

    def kind(point: Point) -> str:
        return names[point.options["shortcut"]]

    curves = _trained(points, recipe, output, "depth", "train_loss", kind)
    title = f"{method}, {_length(recipe)}"
    panel = Panel(curves, "layers", "train loss", title, ticks=depths)
    show(panel, output / "degradation.png")


def show(panel: Panel, file: Path) -> None:
    """Draw the figure and say where it lies."""
    draw([panel], file)
    print(f"figure: {file}")


def _method(point: Point) -> str:
    return point.method


def _depth_of(net: str) -> int:
    number = re.search(r"\d+", net)
    if number is None:
        raise UserError(f"there is no network {net!r}: names are like cifar_resnet56")
    return int(number[0])


def _length(recipe: Recipe) -> str:
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    part = f" of {recipe.limit} batches" if recipe.limit else ""
    return f"{epochs}{part} of {type(recipe.data).__name__}"


def _trained(
    points: Sequence[Point],
    recipe: Recipe,
    output: Path,
    x: str,
    y: str,
    name: Callable[[Point], str],
) -> list[Curve]:
    """Train the points; a curve for each ``name``, means over the seeds."""
    table = run_points(points, recipe, output)
    grouped: dict[str, dict[float, list[float]]] = {}
    for point in points:
        value = getattr(table.rows[point], y)
        grouped.setdefault(name(point), {}).setdefault(getattr(point, x), []).append(value)
    return [
        Curve(key, [(at, statistics.fmean(values)) for at, values in sorted(line.items())])
        for key, line in grouped.items()
    ]
