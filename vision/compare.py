"""Runs side by side: ``python -m vision compare RUN RUN ...``, a table and curves.

A run is the folder that ``python -m vision fit`` leaves; the numbers are those of its log.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fixup_core.errors import UserError
from fixup_core.measure.figures import Curve, Panel, check_figure_file, draw
from vision import RUNS

TABLE = "{:40} {:>7} {:>11} {:>14} {:>14}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; its figure is drawn anew."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    default = RUNS / "compare.png"
    parser.add_argument("--output", type=Path, default=default, help=f"figure; {default}")


def run(args: argparse.Namespace) -> None:
    """Print the table and draw the curves."""
    compare(args.runs, args.output)


@dataclass
class Run:
    """What a run's log holds.

    Attributes:
        name: Of its folder, with those above it as far as the runs compared need.
        metrics: Name of the metric, epoch, value; a run that went on overwrites what it repeated.
    """

    name: str
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)

    def last(self, metric: str) -> float:
        """The newest value; not a number where there is none."""
        values = self.metrics.get(metric, {})
        return values[max(values)] if values else float("nan")

    def curve(self, metric: str, name: str) -> Curve:
        points = sorted(self.metrics.get(metric, {}).items())
        return Curve(name, [(epoch + 1, value) for epoch, value in points])


def read_run(folder: Path, name: str = "") -> Run:
    """The metrics of a run, by epoch, under ``name`` or that of its folder.

    Raises:
        UserError: The folder holds none.
    """
    run = Run(name or folder.name)
    files = [file for kind in ("metrics", "test") for file in _logs(folder / kind)]
    for file in files:
        try:
            _read_log(file, run)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged: it is not a log of fit's runs") from error
    if "train/loss" not in run.metrics:
        raise UserError(f"{folder} holds no metrics of a training: give folders of fit's runs")
    return run


def _read_log(file: Path, run: Run) -> None:
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            for name, value in row.items():
                # The learning rate's rows have no epoch.
                if value and row["epoch"] and name not in ("epoch", "step"):
                    run.metrics.setdefault(name, {})[int(row["epoch"])] = float(value)


def compare(runs: Sequence[Path], output: Path) -> None:
    """Print a table of finished runs and draw their curves.

    Args:
        runs: Folders of ``python -m vision fit``; test accuracy is shown where ``test`` was run.
        output: The figure.
    """
    check_figure_file(output)
    found = [read_run(*one) for one in zip(runs, distinct_names(runs), strict=True)]
    print(TABLE.format("run", "epochs", "train loss", "val accuracy", "test accuracy"))
    for run in found:
        best = max(run.metrics.get("val/accuracy", {0: float("nan")}).values())
        test, loss = run.last("test/accuracy"), run.last("train/loss")
        epochs = len(run.metrics["train/loss"])
        cells = (f"{loss:.4f}", f"{best:.2%}", "-" if test != test else f"{test:.2%}")
        print(TABLE.format(run.name, epochs, *cells))
    draw(
        [
            Panel([run.curve(metric, run.name) for run in found], "epoch", metric)
            for metric in ("train/loss", "val/accuracy")
        ],
        output,
    )
    print(f"figure: {output}")


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different; a folder given twice stays."""
    paths = [folder.resolve() for folder in folders]
    longest = max(len(path.parts) for path in paths)
    for length in range(1, longest + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def _logs(folder: Path) -> list[Path]:
    """Oldest first: every start of a command writes one."""
    versions = {int(file.parent.name[8:]): file for file in folder.glob("version_*/metrics.csv")}
    return [versions[number] for number in sorted(versions)]
