"""What a run may have besides what every run has: pictures, measurements, adaptive clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw
from torch import Tensor
from torch.optim import Optimizer
from torchvision.utils import make_grid, save_image

from fixup_core.clipping import SHARE, check_share, clip_adaptively_
from fixup_core.errors import UserError
from fixup_core.measure.bounds import BoundTable, gradient_bounds
from fixup_core.measure.flow import GradientFlow, gradient_flow, plot_flows
from vision.data.batches import Batch, as_batch

SHARDING = ("FSDP", "DeepSpeed", "ModelParallel")
"""Parts of the names of Lightning's strategies that share out the weights of a layer."""
LEGIBLE, CAPTION = 96, 14
"""Pixels: smaller images are enlarged to about this size; the height of the class below each."""


class AugmentedImages(Callback):
    """Writes the first training batch as the network sees it: ``augmented.png``, and TensorBoard.

    Args:
        count: Images of it.
    """

    def __init__(self, count: int = 64) -> None:
        self.count = count

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        dry = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.global_step > 0 or not trainer.is_global_zero or dry:
            return
        first = as_batch(batch)
        names: Any = getattr(pl_module, "classes", ())
        labels = first.labels[: self.count].tolist()
        captions = [names[label] if names else str(label) for label in labels]
        grid = captioned_grid(first.images[: self.count].float().cpu(), captions)
        save_image(grid, Path(trainer.default_root_dir) / "augmented.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("augmented", grid, 0)


def captioned_grid(images: Tensor, captions: Sequence[str]) -> Tensor:
    """A picture [3, H, W] in 0..1 of images [B, C, H, W], eight in a row, a word below each."""
    times = max(1, LEGIBLE // images.size(2))
    large = images.repeat_interleave(times, 2).repeat_interleave(times, 3)
    if large.size(1) != 3:
        large = large[:, :1].expand(-1, 3, -1, -1)
    low, high = large.min(), large.max()
    large = (large - low) / (high - low).clamp(min=1e-6)
    strips = torch.stack([_written(text, large.size(3)) for text in captions])
    return make_grid(torch.cat([large, strips], dim=2), nrow=8, padding=2, pad_value=1.0)


def _written(text: str, width: int) -> Tensor:
    """Black on white, [3, CAPTION, width]."""
    strip = Image.new("RGB", (width, CAPTION), "white")
    ImageDraw.Draw(strip).text((2, 1), text, fill="black")
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1) / 255


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
        step, batch = trainer.global_step, as_batch(batch)
        if step % self.every_n_steps or step in self.flows or not len(batch.labels):
            return
        net: Any = pl_module.net
        images = batch.images.to(pl_module.dtype)
        with trainer.precision_plugin.forward_context():
            self.flows[step] = flow = gradient_flow(net, images, batch.labels)
            table = gradient_bounds(net, images, batch.labels) if self.bounds else None
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


class AdaptiveClipping(Callback):
    """Clips the gradient of every output unit to a share of the norm of its weights, before every
    step of the optimiser (Brock et al. 2021; ``fixup_core.clipping``).

    Args:
        share: Largest norm of a unit's gradient over that of its weights.
    """

    def __init__(self, share: float = SHARE) -> None:
        check_share(share)
        self.share = share

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look at how the parameters are held.

        Raises:
            UserError: In parts, by several processes: a unit's norm is not known then.
        """
        strategy = type(trainer.strategy).__name__
        if any(kind in strategy for kind in SHARDING):
            raise UserError(
                f"AdaptiveClipping needs whole weights, which {strategy} shares out: take "
                "--trainer.strategy ddp"
            )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        # Lightning takes the scaler of half precision off before, but from an optimiser that does
        # so itself, such as a fused Adam.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        clip_adaptively_(
            pl_module, self.share, scale=1 / scaler.get_scale() if scaler and scaled else 1.0
        )


def _bound_values(table: BoundTable | None) -> dict[str, float]:
    values = {}
    for row in table.rows if table else ():
        values[f"bounds/{row.name}/measured"] = row.measured
        values[f"bounds/{row.name}/bound"] = row.bound
    return {name: value for name, value in values.items() if math.isfinite(value)}
