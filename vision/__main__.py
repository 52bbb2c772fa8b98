"""Fixup ResNets and their rivals: trainings, the paper's figures, and tools around them.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's: ``python -m vision fit --config
recipes/vision/digits_fixup_resnet20.yaml``. Each command has a --help of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fixup_core.command_line import Command, run_chosen, run_command
from vision.errors import KNOWN

COMMANDS = {
    "fit": Command("vision.cli", "train a network; its run leaves one folder"),
    "validate": Command("vision.cli", "score a run's checkpoint on the validation set"),
    "test": Command("vision.cli", "score a run's checkpoint on the test set"),
    "predict": Command("vision.cli", "write a table of a run's predictions"),
    "sweep": Command(
        "vision.sweep.sweeps", "draw the paper's figures: depth, lr, degradation, lesion"
    ),
    "compare": Command("vision.compare", "set finished runs side by side: a table and curves"),
    "describe": Command(
        "vision.describe",
        "size up networks side by side: layers, parameters, multiply-adds",
    ),
    "export": Command("vision.export", "write a trained network as ONNX"),
    "demo": Command("vision.demo", "train Fixup and BatchNorm on the built-in digits"),
}


LIGHTNING = ("fit", "validate", "test", "predict")
"""Parsed by LightningCLI; ``sweep`` is parsed by jsonargparse, the others by argparse."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    line = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(line), KNOWN)


def _run(line: list[str]) -> int | None:
    name = line[0] if line else ""
    # Lightning takes options before its command, too.
    if name in LIGHTNING or (name.startswith("-") and name not in ("-h", "--help")):
        from vision.cli import run_lightning

        run_lightning(line)
        return None
    if name == "sweep":
        from vision.sweep.sweeps import run_sweep

        run_sweep(line[1:])
        return None
    return run_chosen("python -m vision", __doc__, COMMANDS, line)


if __name__ == "__main__":
    sys.exit(main())
