"""Lightning's moving average of the weights, right from the first step on."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from fixup_core.removal.leaving import Statistics

WARM_UP = 10
"""After n updates the decay is (1 + n) / (10 + n) at the most, as in TensorFlow and timm."""


class MovingAverage(EMAWeightAveraging):
    """What the commands put in the place of Lightning's ``EMAWeightAveraging``.

    Differs: until the average starts it is the weights themselves, where Lightning validates and
    saves the untrained ones; its decay rises to the given one, where Lightning's average of a short
    run is still the weights of its beginning; whole numbers, and what is left of norms on their way
    out, are those of the network.
    """

    @classmethod
    def of(cls, given: EMAWeightAveraging) -> MovingAverage:
        """The same average, mended."""
        mended = cls.__new__(cls)
        mended.__dict__ |= given.__dict__
        plain = given._kwargs["avg_fn"]
        decay = plain(torch.tensor(1.0), torch.tensor(0.0), 1).item()

        def average(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
            if not averaged.is_floating_point():  # a BatchNorm's count of batches
                return current
            risen = min(decay, (1 + int(updates)) / (WARM_UP + int(updates)))
            return (
                averaged.lerp(current, 1 - risen)
                if risen < decay
                else plain(averaged, current, updates)
            )

        mended._kwargs = given._kwargs | {"avg_fn": average}
        return mended

    @property
    def state_key(self) -> str:
        """As Lightning's, whose checkpoints fit."""
        return EMAWeightAveraging.__qualname__

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(pl_module)
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._start(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def _start(self, pl_module: L.LightningModule) -> None:
        average = self._average_model
        if average is None:
            return
        if not average.n_averaged:
            average.module.load_state_dict(pl_module.state_dict())
        for own, kept in zip(pl_module.modules(), average.module.modules(), strict=True):
            if isinstance(own, Statistics):  # an average of shares would never come to 0
                kept.load_state_dict(own.state_dict())
