"""What a run leaves behind besides its weights: pictures and predictions."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid, save_image

from fixup_core.errors import UserError
from vision.data.batches import Batch

LEGIBLE = 32
"""Pixels; smaller images are enlarged to about so many."""


class AugmentedImages(Callback):
    """Writes the first training batch as the network sees it: ``augmented.png``, and TensorBoard.

    Args:
        count: So many images of it.
    """

    def __init__(self, count: int = 64) -> None:
        self.count = count

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step > 0 or not trainer.is_global_zero:
            return
        images = batch.images[: self.count].float().cpu()
        times = max(1, LEGIBLE // images.size(2))
        images = images.repeat_interleave(times, 2).repeat_interleave(times, 3)
        grid = make_grid(images, nrow=8, normalize=True, padding=1)
        save_image(grid, Path(trainer.default_root_dir) / "augmented.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("augmented", grid, 0)


class SameOptions(Callback):
    """A run goes on with the options it was started with: Lightning restores its old rates."""

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hold the given options against the checkpoint's.

        Raises:
            UserError: One differs.
        """
        given = pl_module.hparams if trainer.state.fn == "fit" else {}
        for name, value in checkpoint["hyper_parameters"].items():
            if name in given and _plain(value) != _plain(given[name]):
                raise UserError(
                    f"the run was started with --model.{name} {value}: go on with the same, or "
                    "start another in another --trainer.default_root_dir"
                )


class PredictionTable(Callback):
    """Writes ``predictions.csv``: number, most likely class and its probability, for each image."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            raise UserError("predict writes one table: give it --trainer.devices 1")
        self.batches: list[Tensor] = []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.batches.append(outputs.cpu())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        probabilities, classes = torch.cat(self.batches).max(dim=1)
        file = Path(trainer.default_root_dir) / "predictions.csv"
        with file.open("w", newline="") as table:
            writer = csv.writer(table)
            writer.writerow(("image", "class", "probability"))
            rows = zip(classes.tolist(), probabilities.tolist(), strict=True)
            writer.writerows((n, label, f"{p:.6f}") for n, (label, p) in enumerate(rows))
        print(f"predictions of {len(classes)} images: {file}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
