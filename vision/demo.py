"""``python -m vision demo``: Fixup and BatchNorm side by side on the built-in digits."""

from __future__ import annotations

import argparse
from pathlib import Path

from fixup_core.files import once
from vision import RUNS
from vision.cli import VisionCLI, silence_needless
from vision.compare import compare

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "vision"
CONTENDERS = ("digits_fixup_resnet20", "digits_batchnorm_resnet20")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    default = RUNS / "demo"
    parser.add_argument(
        "--output", type=Path, default=default, help=f"folder of both runs; {default}"
    )


def run(args: argparse.Namespace) -> None:
    """Train both, test both, and compare them."""
    silence_needless()
    demo(args.output)


def demo(output: Path) -> None:
    """Train Fixup and BatchNorm on the built-in digits, test both, and compare them.

    Args:
        output: Folder of both runs and of ``curves.png``. A run that was cut off goes on, one that
            is finished is not done again.
    """
    for name in CONTENDERS:
        _train_and_test(RECIPES / f"{name}.yaml", output / name)
    compare([output / name for name in CONTENDERS], output / "curves.png")


def _train_and_test(recipe: Path, folder: Path) -> None:
    line = ["--config", str(recipe), "--trainer.default_root_dir", str(folder)]

    def build(marker: Path) -> None:
        last = folder / "checkpoints" / "last.ckpt"
        VisionCLI(["fit", *line, *(["--ckpt_path", "last"] if last.exists() else [])])
        VisionCLI(["test", *line])
        marker.touch()

    once(folder / "tested", build)
