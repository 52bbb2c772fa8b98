"""The table that ``predict`` writes."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from fixup_core.errors import UserError
from fixup_core.files import write_text

MOST = 5
"""Classes of an image, the most likely first."""


class PredictionTable(Callback):
    """Writes ``predictions.csv``: an image's file, or its number, and its most likely classes with
    their probabilities, for each image.
    """

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            raise UserError("predict writes one table: give it --trainer.devices 1")
        self.numbers: list[int] = []
        self.batches: list[Tensor] = []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        first = len(self.numbers)
        named = _names(trainer)
        self.numbers += batch.labels.tolist() if named else range(first, first + len(outputs))
        self.batches.append(outputs.cpu())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        probabilities = torch.cat(self.batches)
        classes = getattr(pl_module, "classes", ()) or range(probabilities.size(1))
        most = probabilities.topk(min(MOST, probabilities.size(1)))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("image", *_header(most.values.size(1))))
        names = _names(trainer)
        rows = zip(self.numbers, most.indices.tolist(), most.values.tolist(), strict=True)
        for number, labels, values in rows:
            pairs = zip(labels, values, strict=True)
            cells = [cell for label, p in pairs for cell in (classes[label], f"{p:.6f}")]
            writer.writerow((names[number] if names else number, *cells))
        file = Path(trainer.default_root_dir) / "predictions.csv"
        write_text(file, text.getvalue())
        print(f"predictions of {len(self.numbers)} images: {file}")


def _header(count: int) -> list[str]:
    ranks = ["", *(f"_{rank}" for rank in range(2, count + 1))]
    return [name + rank for rank in ranks for name in ("class", "probability")]


def _names(trainer: L.Trainer) -> tuple[str, ...]:
    """Of the files; a data module of the user's own has none."""
    return getattr(trainer.datamodule, "names", ())  # type: ignore[attr-defined]
