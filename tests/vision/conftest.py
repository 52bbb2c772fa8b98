"""A tiny tree of images, and commands on it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision.cli import VisionCLI

QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
TINY = (
    *("--model.net", "cifar_resnet8", "--trainer.accelerator", "cpu", *QUIET),
    *("--trainer.log_every_n_steps", "1", "--trainer.max_epochs", "1", "--threads", "1"),
)
Tree = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch) -> None:
    """LightningCLI warns where it is given arguments and pytest has some too."""
    monkeypatch.setattr(sys, "argv", ["vision"])


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Makes ``tmp_path/NAME/<split>/<class>/<n>.png``, 8x8; a class has its brightness."""

    def make(name: str = "tree", **splits: str) -> Path:
        rng = np.random.default_rng(0)
        for split, classes in splits.items():
            for label in classes:
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for i in range(12):
                    low = 60 * (ord(label) - 97)
                    pixels = rng.integers(low, low + 40, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        return tmp_path / name

    return make


def run(command: str, folder: Path, *more: str) -> VisionCLI:
    """A command with a run's folder."""
    return VisionCLI([command, *more, "--trainer.default_root_dir", str(folder)])


def on_tree(tree: Path, classes: int = 3) -> tuple[str, ...]:
    """Options of a tiny training on an image tree."""
    data = ("--data", "CIFAR10", "--data.root", str(tree), "--data.cache", str(tree / "../cache"))
    sizes = ("--data.batch_size", "8", "--data.val_size", "4", "--data.crop", "0")
    return (*TINY, "--model.num_classes", str(classes), *data, *sizes)


def on_digits(*more: str) -> tuple[str, ...]:
    """Options of a tiny training on the digits."""
    data = ("--data", "Digits", "--data.train_size", "128", "--data.batch_size", "32")
    return (*TINY, "--model.options.in_channels", "1", *data, *more)


def rows(file: Path) -> list[dict[str, str]]:
    """Of a table."""
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))
