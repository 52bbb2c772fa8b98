"""Figures of many short trainings: test accuracy or training loss against depth or learning rate.

The figure is drawn anew from the table of points at the end.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from operator import attrgetter
from pathlib import Path

from fixup_core.errors import UserError
from fixup_core.measure.figures import Curve, Panel, check_figure_file, draw
from vision import RUNS
from vision.nets import is_class_path
from vision.sweep.points import Point, Recipe, run_points

PAPER_METHODS = ("fixup", "batchnorm", "xavier", "lsuv")
LABELS = {
    "depth": "layers",
    "lr": "learning rate",
    "test_accuracy": "test accuracy",
    "train_loss": "train loss",
}
"""What is written along the axes."""


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
    title = f"ResNets, {_length(recipe)}, learning rate {lr:g}"
    _sweep(points, recipe, output / "depth.png", title, x="depth", y="test_accuracy")


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
    title = f"{net}, {_length(recipe)}"
    _sweep(points, recipe, output / "lr.png", title, x="lr", y="train_loss")


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
    title = f"{method}, {_length(recipe)}"
    _sweep(
        points,
        recipe,
        output / "degradation.png",
        title,
        x="depth",
        y="train_loss",
        curve=lambda point: "plain" if point.options["shortcut"] == "none" else "residual",
    )


def show(panel: Panel, file: Path) -> None:
    """Draw the figure and say where it lies."""
    draw([panel], file)
    print(f"figure: {file}")


def _depth_of(net: str) -> int:
    number = re.search(r"\d+", net)
    if number is None or is_class_path(net):
        raise UserError(f"a sweep has no network {net!r}: names are like cifar_resnet56")
    return int(number[0])


def _length(recipe: Recipe) -> str:
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    part = f" of {recipe.limit} batches" if recipe.limit else ""
    return f"{epochs}{part} of {type(recipe.data).__name__}"


def _sweep(
    points: Sequence[Point],
    recipe: Recipe,
    file: Path,
    title: str,
    *,
    x: str,
    y: str,
    curve: Callable[[Point], str] = attrgetter("method"),
) -> None:
    """Train the points and draw ``y`` of their results against their ``x``, means over the seeds.

    Args:
        points: What is to be trained.
        recipe: How.
        file: The figure, in the folder of the table.
        title: Of the figure.
        x: Attribute of ``Point``.
        y: Attribute of ``Result``.
        curve: Name of the curve that a point lies on.
    """
    check_figure_file(file)
    results = run_points(points, recipe, file.parent).rows
    lines: dict[str, dict[float, list[float]]] = {}
    for point in points:
        line = lines.setdefault(curve(point), {})
        line.setdefault(getattr(point, x), []).append(getattr(results[point], y))
    curves = [
        Curve(name, [(at, statistics.fmean(values)) for at, values in sorted(line.items())])
        for name, line in lines.items()
    ]
    ticks = sorted({getattr(point, x) for point in points})
    show(Panel(curves, LABELS[x], LABELS[y], title, log_x=True, ticks=ticks), file)
