"""A network that works on images of another size than it has learned from is noticed."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from vision.data.batches import as_batch

Size = tuple[int, int]


class ImageSize(Callback):
    """Keeps the size of the training images in the checkpoint, and compares those that are tested
    or predicted with it: a network without fully connected layers would take any size, and give
    poor answers.
    """

    size: Size | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.size = _size_of(batch) or self.size

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["image_size"] = self.size

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.size = checkpoint.get("image_size")

    def on_test_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        _, batch, number, *_ = rest
        self._compare(batch, number)

    def on_predict_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        _, batch, number, *_ = rest
        self._compare(batch, number)

    def _compare(self, batch: Any, number: int) -> None:
        found = _size_of(batch)
        if number or not self.size or not found or found == self.size:
            return
        (height, width), (found_height, found_width) = self.size, found
        print(
            f"warning: the network was trained on images of {height} x {width} pixels; these "
            f"have {found_height} x {found_width}: resize them, unless that is meant",
            file=sys.stderr,
        )


def _size_of(batch: Any) -> Size | None:
    """Height and width of the images [B, C, H, W], if there are any."""
    images = as_batch(batch).images
    return (images.size(2), images.size(3)) if images.dim() == 4 else None
