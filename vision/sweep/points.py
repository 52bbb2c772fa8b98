"""The points of a sweep: short trainings, each scored once on the test set."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from fixup_core.errors import UserError
from fixup_core.files import hold_folder
from fixup_core.results import TABLE, Table, keep_to
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


Results = Table[Point, Result]


def options_text(options: Mapping[str, Any]) -> str:
    """Options as one text."""
    return json.dumps(dict(options), sort_keys=True) if options else ""


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


def run_points(points: Sequence[Point], recipe: Recipe, output: Path) -> Results:
    """Compute the points that the table in ``output`` lacks."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # once a point is too often
    if not points:
        raise UserError("there is nothing to train: give depths, methods and seeds")
    for point in {(p.net, p.method, options_text(p.options)): p for p in points}.values():
        check_net(point.net, method=point.method, **point.options)
    hold_folder(output)
    keep_to(recipe.description(), output)
    table = Table(output / TABLE, Point, Result)
    for number, point in enumerate(points, 1):
        if point in table.rows:
            continue
        print(f"[{number}/{len(points)}] {point.net} {point.method} lr {point.lr:g}", flush=True)
        result = run_point(point, recipe)
        table.add(point, result)
        print(f"    test accuracy {result.test_accuracy:.4f}, train loss {result.train_loss:.4f}")
    return table
