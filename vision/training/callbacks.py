"""What a run leaves behind besides its weights: pictures and predictions."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid, save_image

from fixup_core.errors import UserError
from fixup_core.measure.bounds import BoundTable, gradient_bounds
from fixup_core.measure.flow import GradientFlow, gradient_flow, plot_flows
from vision.data.batches import Batch

LEGIBLE = 32
"""Pixels; smaller images are enlarged to about this size."""


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


class GradientFlowLogger(Callback):
    """Logs the gradient norm of every layer, and the theory's lower bounds, as training goes on.

    Measured on the training batch as it comes, without mixing and label smoothing, in a forward and
    a backward pass of their own, which leave the run as it is, bit for bit. At the end the layers'
    gradients are drawn: ``gradient_flow.png``, at the first, the middle and the last time.

    Args:
        every_n_steps: How often.
        bounds: Also log the bounds of ``fixup_core.gradient_bounds``; a bound that is
            not defined, the set being not p.h., is left out.
    """

    def __init__(self, every_n_steps: int = 50, bounds: bool = True) -> None:
        if every_n_steps < 1:
            raise UserError(f"every_n_steps is {every_n_steps}: take a number from 1 upwards")
        self.every_n_steps, self.bounds = every_n_steps, bounds
        self.flows: dict[int, GradientFlow] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps or step in self.flows or not len(batch.labels):
            return
        net: Any = pl_module.net
        with trainer.precision_plugin.forward_context():
            self.flows[step] = flow = gradient_flow(net, batch.images, batch.labels)
            table = gradient_bounds(net, batch.images, batch.labels) if self.bounds else None
        values = {f"gradient/{row.path}": row.gradient_norm for row in flow}
        values |= {f"weight_gradient/{row.path}": row.weight_gradient_norm for row in flow}
        for logger in trainer.loggers:
            logger.log_metrics(values | _bound_values(table), step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.flows or not trainer.is_global_zero:
            return
        steps = sorted(self.flows)
        chosen = {steps[0], steps[len(steps) // 2], steps[-1]}
        flows = {f"step {step}": self.flows[step] for step in sorted(chosen)}
        file = Path(trainer.default_root_dir) / "gradient_flow.png"
        plot_flows(flows, file, quantities=("gradient_norm", "weight_gradient_norm"))


def _bound_values(table: BoundTable | None) -> dict[str, float]:
    values = {}
    for row in table.rows if table else ():
        values[f"bounds/{row.name}/measured"] = row.measured
        values[f"bounds/{row.name}/bound"] = row.bound
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
