"""Gradient norms and bounds in a run's logs."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixup_core.errors import UserError
from tests.vision.test_cli import TINY
from vision.cli import VisionCLI
from vision.training.callbacks import GradientFlowLogger

LOGGER = (
    *("--trainer.callbacks+", "GradientFlowLogger"),
    *("--trainer.callbacks.every_n_steps", "4", "--trainer.max_epochs", "1"),
)


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch) -> None:
    """LightningCLI warns where it is given arguments and pytest has some too."""
    monkeypatch.setattr(sys, "argv", ["vision"])


def _fit(folder: Path, *more: str) -> dict[str, torch.Tensor]:
    VisionCLI(["fit", *TINY, "--trainer.default_root_dir", str(folder), *more])
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def _rows(folder: Path, column: str) -> list[tuple[int, float]]:
    (file,) = folder.glob("metrics/*/metrics.csv")
    with file.open() as table:
        rows = [row for row in csv.DictReader(table) if row.get(column)]
    return [(int(row["step"]), float(row[column])) for row in rows]


@pytest.mark.parametrize("method", ["fixup", "batchnorm"])
def test_a_run_logs_gradients_and_bounds_and_is_the_same(method: str, tmp_path: Path) -> None:
    same = ("--model.method", method, "--model.options.dropout", "0.2", "--model.mixup", "0.2")
    watched, plain = tmp_path / "watched", tmp_path / "plain"
    first = _fit(watched, *same, *LOGGER)
    second = _fit(plain, *same, "--trainer.max_epochs", "1")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not _rows(plain, "gradient/stem.conv")
    norms = _rows(watched, "weight_gradient/stages.1.0.convs.0")
    assert [step for step, _ in norms] == [0, 4]
    assert norms[1][1] > 0 and (norms[0][1] == 0) == (method == "fixup")
    measured = dict(_rows(watched, "bounds/classifier/measured"))
    for step, bound in _rows(watched, "bounds/classifier/bound"):
        assert measured[step] >= bound
    normalised = _rows(watched, "bounds/first layer/bound")
    assert bool(normalised) == (method == "fixup"), "behind a norm the theorem says nothing"
    tags = EventAccumulator(str(watched / "tensorboard")).Reload().Tags()["scalars"]
    assert {"gradient/head.fc", "bounds/first layer/measured"} <= set(tags)
    assert (watched / "gradient_flow.png").stat().st_size > 5000


def test_without_bounds_it_logs_none(tmp_path: Path) -> None:
    _fit(tmp_path, *LOGGER, "--trainer.callbacks.bounds", "false")
    assert _rows(tmp_path, "gradient/head.fc")
    assert not _rows(tmp_path, "bounds/classifier/measured")


def test_a_wrong_interval_is_told() -> None:
    with pytest.raises(UserError, match="take a number from 1 upwards"):
        GradientFlowLogger(every_n_steps=0)
