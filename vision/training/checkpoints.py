"""The checkpoints of a run: when they are saved, and that a kill leaves whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fixup_core.errors import UserError
from fixup_core.files import whole_file


def checkpoint_callbacks(
    folder: Path, every: int, *, validates: bool = True
) -> list[ModelCheckpoint]:
    """``best.ckpt``, by the accuracy on validation, and ``last.ckpt``.

    Args:
        folder: Of both.
        every: Save the last one after every this many steps too; 0: after every epoch alone.
        validates: Whether there is a validation; without one there is no best.
    """

    def last(kind: type[ModelCheckpoint], **when: Any) -> ModelCheckpoint:
        return kind(folder, "last", enable_version_counter=False, **when)

    best = BestCheckpoint(
        folder, "best", monitor="val/accuracy", mode="max", enable_version_counter=False
    )
    # Never when a validation ends, which may be in the midst of accumulated gradients.
    epochs = last(EpochCheckpoint, every_n_epochs=1, save_on_train_epoch_end=True)
    stopped = last(StopCheckpoint, every_n_train_steps=1)
    within = [last(MidEpochCheckpoint, every_n_train_steps=every)] if every else []
    return [*([best] if validates else []), stopped, epochs, *within]


class BestCheckpoint(ModelCheckpoint):
    """Saves the best so far; where norms are taken out, the best of those without any."""

    @property
    def state_key(self) -> str:
        """That of its parent, under which runs have saved the best score."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)

    def _should_skip_saving_checkpoint(self, trainer: L.Trainer) -> bool:
        removal = getattr(trainer.lightning_module, "removal", None)
        norms_left = removal is not None and not removal.done
        return norms_left or super()._should_skip_saving_checkpoint(trainer)


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


class StopCheckpoint(ModelCheckpoint):
    """Saves where --trainer.max_steps or max_time stop a run in the midst of an epoch: it goes on
    there. A stop in the midst of accumulated gradients, which no checkpoint holds, waits for their
    step.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.stops = False

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        self.stops = self.stops or trainer.should_stop
        stepped = trainer.global_step > self.step
        trainer.should_stop = self.stops and stepped
        ends = trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
        if ends and stepped and not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *rest)


class EpochCheckpoint(ModelCheckpoint):
    """Saves behind every epoch, but not behind the part of one: the rest of it would be left out
    when the run goes on.
    """

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        others: Any = trainer.checkpoint_callbacks
        stops = [each for each in others if isinstance(each, StopCheckpoint)]
        if all(each._last_global_step_saved != trainer.global_step for each in stops):
            super().on_train_epoch_end(trainer, pl_module)


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


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint of ``python -m vision fit``, its tensors on the CPU.

    Raises:
        UserError: There is no such file, or it is something else.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder: give a checkpoint in it, as checkpoints/best.ckpt")
    if not file.is_file():
        raise UserError(f"{file} does not exist: give a checkpoint of python -m vision fit")
    found = torch.load(file, map_location="cpu", weights_only=True)
    parts = ("state_dict", "hyper_parameters")
    if not isinstance(found, dict) or not all(isinstance(found.get(p), dict) for p in parts):
        raise UserError(f"{file} is not a checkpoint of python -m vision fit: check the path")
    return found


def save_whole_files(trainer: L.Trainer) -> None:
    """Let ``trainer`` save whole files, where its strategy saves as Lightning does."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
