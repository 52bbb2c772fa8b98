"""A run that goes on from any checkpoint it wrote ends as the uninterrupted one, bit for bit."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fixup_core.errors import UserError
from tests.conftest import ROOT
from vision import cli
from vision.compare import read_run

TINY = (
    *("--config", str(ROOT / "recipes/vision/digits_fixup_resnet20.yaml")),
    *("--model.net", "cifar_resnet8", "--trainer.max_epochs", "3", "--data.train_size", "160"),
    *("--data.batch_size", "32", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
)


class Snapshots(Callback):
    """Keeps every ``last.ckpt`` that a kill could leave behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def _keep(self, trainer, moment: str) -> None:
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if last.exists():
            shutil.copy(last, self.folder / f"{moment}{trainer.global_step}.ckpt")

    def on_train_batch_start(self, trainer, *rest) -> None:
        self._keep(trainer, "batch")

    def on_train_epoch_end(self, trainer, *rest) -> None:
        self._keep(trainer, "epoch")


def _fit(folder: Path, *more: str) -> dict[str, torch.Tensor]:
    cli.VisionCLI(["fit", *TINY, "--trainer.default_root_dir", str(folder), *more])
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    numbers = {"step": torch.tensor(saved["global_step"]), **_last_metrics(folder)}
    best = [state.get("best_model_score") for state in saved["callbacks"].values()]
    numbers |= {f"best{i}": score for i, score in enumerate(best) if score is not None}
    return saved["state_dict"] | saved.get("current_model_state", {}) | numbers


def _last_metrics(folder: Path) -> dict[str, torch.Tensor]:
    try:
        run = read_run(folder)
    except UserError:  # it had come to its end
        return {}
    return {name: torch.tensor(run.last(name)) for name in ("train/loss", "train/accuracy")}


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")  # ends in an epoch
@pytest.mark.parametrize(
    "options",
    [
        ("--checkpoint_every", "3"),
        ("--checkpoint_every", "1", "--trainer.accumulate_grad_batches", "3"),
        (
            *("--checkpoint_every", "2", "--trainer.limit_train_batches", "3"),
            *("--data.balanced", "true"),
        ),
        ("--checkpoint_every", "3", "--trainer.max_epochs", "-1", "--trainer.max_steps", "12"),
        ("--checkpoint_every", "3", "--model.options.dropout", "0.3", "--model.cutmix", "1"),
        (
            *("--checkpoint_every", "3", "--trainer.callbacks+=EMAWeightAveraging"),
            *("--trainer.callbacks.decay=0.5", "--model.mixup", "0.2"),
        ),
        (
            *("--checkpoint_every", "2", "--model.method", "batchnorm"),
            *("--model.remove_norms", "taper", "--model.removal_steps", "12"),
        ),
    ],
    ids=["plain", "accumulation", "balance", "max_steps", "dropout", "moving_average", "removal"],
)
def test_going_on_from_any_checkpoint(
    options: tuple[str, ...], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vision"])
    usual, snapshots = cli._callbacks, Snapshots(tmp_path / "kept")
    monkeypatch.setattr(cli, "_callbacks", lambda *given: [snapshots, *usual(*given)])
    folder = tmp_path / "run"
    whole = _fit(folder, *options)
    monkeypatch.setattr(cli, "_callbacks", usual)
    kept = {file.read_bytes(): file for file in sorted((tmp_path / "kept").iterdir())}
    assert len(kept) >= 4
    for file in kept.values():
        shutil.rmtree(folder)
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(file, folder / "checkpoints" / "last.ckpt")
        resumed = _fit(folder, "--ckpt_path", "last", *options)
        differing = [name for name in resumed if not torch.equal(whole[name], resumed[name])]
        assert resumed.keys() >= whole.keys() - {"train/loss", "train/accuracy"}
        assert not differing, f"{file.stem}: {differing[:3]}"
