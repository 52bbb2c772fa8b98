"""The paper's figures as commands: ``python -m vision sweep depth|lr|degradation|lesion``.

Every point is one short training, scored once on the test set. Points are appended to a CSV as they
come; a point that is there is not computed again, so that a sweep goes on where it was stopped. The
figure is drawn anew from the CSV at the end. ``recipe.json`` beside the CSV holds what its points
share; a sweep of another recipe does not go on there.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from fixup_core.errors import UserError
from fixup_core.measure.figures import Curve, Panel, draw
from vision.cli import RUNS
from vision.data import VisionData
from vision.nets import check_net, net_options
from vision.training.lit_classifier import DivergedError, LitClassifier, load_classifier

PAPER_METHODS = ("fixup", "batchnorm", "xavier", "lsuv")


@dataclass(frozen=True)
class Point:
    """One training.

    Attributes:
        net: Name of the network.
        method: Of its initialisation.
        options: More options of the network, as "name=value" pairs with spaces between.
        depth: Weight layers, as the name says.
        lr: Learning rate.
        epochs: Length of the training.
        seed: Of weights, order and augmentation.
    """

    net: str
    method: str
    options: str
    depth: int
    lr: float
    epochs: int
    seed: int

    def net_options(self) -> dict[str, Any]:
        """``options`` as ``build_net`` takes them."""
        return dict(pair.split("=") for pair in self.options.split())


@dataclass(frozen=True)
class Result:
    """What a point gave.

    Attributes:
        test_accuracy: In 0..1; not a number where the training diverged.
        train_loss: Mean over the last epoch.
    """

    test_accuracy: float
    train_loss: float


class Table:
    """Results in a CSV file, one row a point."""

    columns = (*(f.name for f in fields(Point)), *(f.name for f in fields(Result)))

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[Point, Result] = {}
        if file.exists():
            with file.open(newline="") as lines:
                for row in csv.DictReader(lines):
                    self.rows[_typed(Point, row)] = _typed(Result, row)

    def add(self, point: Point, result: Result) -> None:
        """Append a row at once, so that a kill loses no finished point."""
        new = not self.file.exists()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", newline="") as lines:
            writer = csv.DictWriter(lines, self.columns)
            if new:
                writer.writeheader()
            writer.writerow(asdict(point) | asdict(result))
        self.rows[point] = result


def _typed(kind: Any, row: dict[str, str]) -> Any:
    casts = {"str": str, "int": int, "float": float}
    return kind(**{f.name: casts[str(f.type)](row[f.name]) for f in fields(kind)})


@dataclass(frozen=True)
class Recipe:
    """How every point of a sweep is trained.

    Attributes:
        data: The images.
        epochs: Of each training.
        mixup: Alpha of mixup.
        weight_decay: Of the weights.
        precision: Of the trainer; ``bf16-mixed`` is several times faster on recent CPUs.
        checkpointing: Recompute activations from this many layers on, so that memory stays small.
        accelerator: cpu, gpu or auto.
        limit: Train on so many batches an epoch only; 0: on all.
    """

    data: VisionData
    epochs: int = 1
    mixup: float = 0.0
    weight_decay: float = 1e-4
    precision: Any = "32-true"
    checkpointing: int = 500
    accelerator: str = "auto"
    limit: int = 0

    def description(self) -> dict[str, Any]:
        """What decides a point's numbers and is not in its row."""
        names = ("mixup", "weight_decay", "precision", "limit")
        return self.data.description() | {name: getattr(self, name) for name in names}


def run_point(point: Point, recipe: Recipe) -> Result:
    """Train one network and score it on the test set."""
    L.seed_everything(point.seed, verbose=False)
    options = point.net_options()
    if point.depth >= recipe.checkpointing:
        options["checkpointing"] = True
    model = LitClassifier(
        net=point.net,
        method=point.method,
        num_classes=num_classes(recipe.data),
        options=options | image_options(point.net, recipe.data),
        lr=point.lr,
        weight_decay=recipe.weight_decay,
        mixup=recipe.mixup,
        schedule="constant",
    )
    trainer = L.Trainer(
        max_epochs=point.epochs,
        accelerator=recipe.accelerator,
        devices=1,
        precision=recipe.precision,
        limit_train_batches=recipe.limit or 1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[TQDMProgressBar(leave=True)],
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(model, datamodule=recipe.data)
    except DivergedError:
        return Result(math.nan, math.nan)
    loss = trainer.callback_metrics["train/loss"].item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = trainer.test(model, datamodule=recipe.data, verbose=False)[0]
    return Result(scores["test/accuracy"], loss)


def num_classes(data: VisionData) -> int:
    """The number of classes of the images."""
    data.prepare_data()
    data.setup("test")
    return data.num_classes


def image_options(net: str, data: VisionData) -> dict[str, Any]:
    """The network's options that depend on the images."""
    images = getattr(data.parts["test"], "images", None)
    if images is None:
        return {}
    options = {"in_channels": images.size(1), "image_size": images.size(2)}
    return {name: value for name, value in options.items() if name in net_options(net)}


def run_points(points: Sequence[Point], recipe: Recipe, output: Path) -> Table:
    """Compute the points that the table in ``output`` lacks."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # once a point is too often
    if not points:
        raise UserError("there is nothing to train: give depths, methods and seeds")
    for point in {(p.net, p.method, p.options): p for p in points}.values():
        check_net(point.net, method=point.method, **point.net_options())
    _keep_to(recipe, output)
    table = Table(output / "points.csv")
    for number, point in enumerate(points, 1):
        if point in table.rows:
            continue
        print(f"[{number}/{len(points)}] {point.net} {point.method} lr {point.lr:g}", flush=True)
        result = run_point(point, recipe)
        table.add(point, result)
        print(f"    test accuracy {result.test_accuracy:.4f}, train loss {result.train_loss:.4f}")
    return table


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
        Point(f"cifar_resnet{d}", method, "", d, lr, recipe.epochs, seed)
        for d, method, seed in product(sorted(depths), methods, seeds)
    ]
    curves = _trained(points, recipe, output, "depth", "test_accuracy", "method")
    title = f"ResNets, {_length(recipe)}, learning rate {lr:g}"
    panel = Panel(curves, "layers", "test accuracy", title, log_x=True, ticks=depths)
    _show(panel, output / "depth.png")


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
        Point(net, method, "", _depth_of(net), rate, recipe.epochs, seed)
        for rate, method, seed in product(sorted(rates), methods, seeds)
    ]
    curves = _trained(points, recipe, output, "lr", "train_loss", "method")
    title = f"{net}, {_length(recipe)}"
    panel = Panel(curves, "learning rate", "train loss", title, log_x=True, ticks=rates)
    _show(panel, output / "lr.png")


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
        Point(f"cifar_resnet{d}", method, f"shortcut={shortcut}", d, lr, recipe.epochs, seed)
        for d, shortcut, seed in product(sorted(depths), ("none", "A"), seeds)
    ]
    curves = _trained(points, recipe, output, "depth", "train_loss", "options")
    names = {"shortcut=none": "plain", "shortcut=A": "residual"}
    curves = [Curve(names[curve.name], curve.points) for curve in curves]
    title = f"{method}, {_length(recipe)}"
    panel = Panel(curves, "layers", "train loss", title, ticks=depths)
    _show(panel, output / "degradation.png")


def lesion(
    checkpoint: Path,
    data: VisionData,
    output: Path = RUNS / "lesion",
    accelerator: str = "auto",
) -> None:
    """Test accuracy of a trained network with one block left out (Veit et al. 2016, section 4.1).

    A residual block is left out by passing its shortcut alone. A plain one by passing its input
    on, and blocks that change the shape of their input are kept.

    Args:
        checkpoint: Of ``python -m vision fit``.
        data: The images.
        output: Folder of ``lesion.csv`` and ``lesion.png``.
        accelerator: cpu, gpu or auto.
    """
    model = load_classifier(checkpoint)
    blocks = getattr(model.net, "blocks", None)
    if blocks is None:
        raise UserError(f"{model.args.net} is not made of blocks that could be left out")
    trainer = L.Trainer(
        accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False
    )

    def accuracy() -> float:
        return trainer.test(model, datamodule=data, verbose=False)[0]["test/accuracy"]

    rows = [(-1, accuracy())]
    for number, block in enumerate(blocks()):
        if block.left_out_is_defined():
            with block.left_out():
                rows.append((number, accuracy()))
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lesion.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("block left out (-1: none)", "test accuracy"))
        writer.writerows(rows)
    whole = [(float(number), rows[0][1]) for number, _ in rows[1:]]
    curves = [Curve("whole network", whole), Curve("without the block", rows[1:])]
    title = f"{model.args.net}, {model.args.method}"
    panel = Panel(curves, "block left out", "test accuracy", title)
    _show(panel, output / "lesion.png")


COMMANDS: dict[str, Any] = {"depth": depth, "lr": lr, "degradation": degradation, "lesion": lesion}


def _show(panel: Panel, file: Path) -> None:
    draw([panel], file)
    print(f"figure: {file}")


def _depth_of(net: str) -> int:
    number = re.search(r"\d+", net)
    if number is None:
        raise UserError(f"there is no network {net!r}: names are like cifar_resnet56")
    return int(number[0])


def _length(recipe: Recipe) -> str:
    epochs = "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"
    part = f" of {recipe.limit} batches" if recipe.limit else ""
    return f"{epochs}{part} of {type(recipe.data).__name__}"


def _keep_to(recipe: Recipe, output: Path) -> None:
    """Let all points of a table be trained alike.

    Raises:
        UserError: Those that are there were trained otherwise.
    """
    file, own = output / "recipe.json", json.dumps(recipe.description(), default=str, indent=1)
    if not file.exists() and (output / "points.csv").exists():
        raise UserError(f"{output} has points but no {file.name}: give another --output")
    if not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(own + "\n")
        temporary.replace(file)
        return
    there, here = json.loads(file.read_text()), json.loads(own)
    for name in sorted(there | here):
        if there.get(name) != here.get(name):
            raise UserError(
                f"the points in {output} were trained with {name} {there.get(name)}, not "
                f"{here.get(name)}: give another --output"
            )


def _trained(
    points: Sequence[Point], recipe: Recipe, output: Path, x: str, y: str, name: str
) -> list[Curve]:
    """Train the points; a curve for each value of ``name``, means over the seeds."""
    table = run_points(points, recipe, output)
    grouped: dict[str, dict[float, list[float]]] = {}
    for point in points:
        value = getattr(table.rows[point], y)
        grouped.setdefault(getattr(point, name), {}).setdefault(getattr(point, x), []).append(value)
    return [
        Curve(key, [(at, statistics.fmean(values)) for at, values in sorted(line.items())])
        for key, line in grouped.items()
    ]
