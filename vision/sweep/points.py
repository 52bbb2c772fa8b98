"""The points of a sweep: short trainings, and the table that holds their results.

Every point is one short training, scored once on the test set. A point that is in the table is not
computed again, so that a sweep goes on where it was stopped. ``recipe.json`` beside the table holds
what its points share; a sweep of another recipe does not go on there.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from fixup_core.errors import UserError
from fixup_core.files import hold_folder, write_text
from vision.data import VisionData
from vision.nets import check_net, net_options
from vision.training.lit_classifier import DivergedError, LitClassifier


@dataclass(frozen=True)
class Point:
    """One training.

    Attributes:
        net: Name of the network.
        method: Of its initialisation.
        options: More options of the network, as ``build_net`` takes them.
        depth: Weight layers, as the name says.
        lr: Learning rate.
        epochs: Length of the training.
        seed: Of weights, order and augmentation.
    """

    net: str
    method: str
    options: Mapping[str, Any] = field(hash=False)
    depth: int
    lr: float
    epochs: int
    seed: int


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
    """Results in a CSV file, one row a point.

    Raises:
        UserError: The file is not such a table, or is damaged.
    """

    columns = (*(f.name for f in fields(Point)), *(f.name for f in fields(Result)))

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[Point, Result] = {}
        if file.exists():
            self._read()

    def add(self, point: Point, result: Result) -> None:
        """Write the table with one more row at once, so that a kill loses no finished point."""
        rows = self.rows | {point: result}
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        for each, numbers in rows.items():
            written = asdict(each) | {"options": options_text(each.options)}
            writer.writerow(written | asdict(numbers))
        write_text(self.file, text.getvalue())
        self.rows = rows

    def _read(self) -> None:
        text = self.file.read_text(encoding="utf-8")
        lines = csv.DictReader(io.StringIO(text))
        if tuple(lines.fieldnames or ()) != self.columns or not text.endswith("\n"):
            raise UserError(f"{self.file} is damaged or no table of points: remove it")
        for row in lines:
            try:
                self.rows[_typed(Point, row)] = _typed(Result, row)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{self.file}, line {lines.line_num}, is damaged: remove the line"
                ) from error


def options_text(options: Mapping[str, Any]) -> str:
    """Options as a cell of the table: JSON, or nothing."""
    return json.dumps(dict(options), sort_keys=True) if options else ""


def parse_options(text: str) -> dict[str, Any]:
    """Options of a cell; older tables have "name=value" pairs with spaces between."""
    if text.startswith("{"):
        return dict(json.loads(text))
    pairs = (pair.split("=") for pair in text.split())
    return dict(pairs)


CASTS: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "Mapping[str, Any]": parse_options,
}


def _typed(kind: Any, row: dict[str, str]) -> Any:
    return kind(**{f.name: CASTS[str(f.type)](row[f.name]) for f in fields(kind)})


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
        limit: Batches of an epoch to train on; 0: all.
    """

    data: VisionData
    epochs: int = 1
    mixup: float = 0.0
    weight_decay: float = 1e-4
    precision: Any = "32-true"
    checkpointing: int = 500
    accelerator: str = "auto"
    limit: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.limit < 0:
            raise UserError("a recipe's epochs are 1 or more, its limit is 0 or more")

    def description(self) -> dict[str, Any]:
        """What decides a point's numbers and is not in its row."""
        names = ("mixup", "weight_decay", "precision", "limit")
        return self.data.description() | {name: getattr(self, name) for name in names}


def run_point(point: Point, recipe: Recipe) -> Result:
    """Train one network and score it on the test set."""
    L.seed_everything(point.seed, verbose=False)
    options = dict(point.options)
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
    trainer = _trainer(point, recipe)
    try:
        trainer.fit(model, datamodule=recipe.data)
    except DivergedError:
        return Result(math.nan, math.nan)
    loss = trainer.callback_metrics["train/loss"].item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = trainer.test(model, datamodule=recipe.data, verbose=False)[0]
    return Result(scores["test/accuracy"], loss)


def _trainer(point: Point, recipe: Recipe) -> L.Trainer:
    return L.Trainer(
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


def num_classes(data: VisionData) -> int:
    """The number of classes of the images."""
    data.prepare_data()
    data.setup("fit")  # the training images number the classes
    return data.num_classes


def image_options(net: str, data: VisionData) -> dict[str, Any]:
    """The network's options that depend on the images."""
    images = getattr(data.parts["train"], "images", None)
    if images is None:
        return {}
    options = {"in_channels": images.size(1), "image_size": images.size(2)}
    return {name: value for name, value in options.items() if name in net_options(net)}


def run_points(points: Sequence[Point], recipe: Recipe, output: Path) -> Table:
    """Compute the points that the table in ``output`` lacks."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # once a point is too often
    if not points:
        raise UserError("there is nothing to train: give depths, methods and seeds")
    for point in {(p.net, p.method, options_text(p.options)): p for p in points}.values():
        check_net(point.net, method=point.method, **point.options)
    hold_folder(output)
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


def _keep_to(recipe: Recipe, output: Path) -> None:
    """Let all points of a table be trained alike.

    Raises:
        UserError: Those that are there were trained otherwise.
    """
    file, own = output / "recipe.json", json.dumps(recipe.description(), default=str, indent=1)
    if not file.exists():
        if (output / "points.csv").exists():
            raise UserError(f"{output} has points but no {file.name}: give another --output")
        write_text(file, own + "\n")
        return
    try:
        there, here = json.loads(file.read_text(encoding="utf-8")), json.loads(own)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is damaged: give another --output") from error
    for name, value in sorted(there.items()):  # older ones have fewer
        if value != here.get(name):
            raise UserError(
                f"the points in {output} were trained with {name} {value}, not {here.get(name)}: "
                "give another --output"
            )
