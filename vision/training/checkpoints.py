"""The checkpoints of a run: when they are saved, and that a kill leaves whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fixup_core.files import whole_file


def checkpoint_callbacks(folder: Path, every: int) -> list[ModelCheckpoint]:
    """``best.ckpt``, by the accuracy on validation, and ``last.ckpt``.

    Args:
        folder: Of both.
        every: Save the last one after every this many steps too; 0: after every epoch alone.
    """

    def last(kind: type[ModelCheckpoint], **when: Any) -> ModelCheckpoint:
        return kind(folder, "last", enable_version_counter=False, **when)

    best = ModelCheckpoint(
        folder, "best", monitor="val/accuracy", mode="max", enable_version_counter=False
    )
    # Never when a validation ends, which may be in the midst of accumulated gradients.
    epochs = last(ModelCheckpoint, every_n_epochs=1, save_on_train_epoch_end=True)
    return [best, epochs, *([last(MidEpochCheckpoint, every_n_train_steps=every)] if every else [])]


class MidEpochCheckpoint(ModelCheckpoint):
    """Saves behind the optimiser's steps, but not where a validation follows: a run that went on
    from there would go without it.
    """

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        *_, number = rest
        validates = trainer.is_last_batch or (number + 1) % trainer.val_check_batch == 0
        if trainer.global_step > self.step and not validates:
            super().on_train_batch_end(trainer, *rest)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replaces a checkpoint once its successor is written, in the same folder.

    Differs from Lightning's own: that one writes into the system's temporary folder, and where it
    is another file system, a kill in the midst of the copy leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):  # a store that knows no renaming
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(path) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)


def save_whole_files(trainer: L.Trainer) -> None:
    """Let ``trainer`` save whole files, where its strategy saves as Lightning does."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
