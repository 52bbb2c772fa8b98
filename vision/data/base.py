"""What all data modules share: splits, batches, and that nothing random is left to chance.

The validation set is cut out of the training set, by a seed; the test set is read by ``test`` and
``predict`` alone.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fixup_core.errors import UserError
from vision.data import trees
from vision.data.augment import Pixels
from vision.data.batches import Batch, BatchOrder, Loader, TensorSource
from vision.data.sources import Images

CACHE = Path("runs/data")
"""Where images that were decoded or unpacked once are kept."""


class VisionData(L.LightningDataModule):
    """What all data modules share: splits, batches, and that nothing random is left to chance.

    Attributes:
        classes: The names that every split's labels are counted by: those of the training images,
            known once ``setup`` has read them, or a checkpoint's, set before.
        names: Of the images that ``predict`` reads, in their order.
    """

    def __init__(
        self, batch_size: int, val_size: int, seed: int, *, balanced: bool = False
    ) -> None:
        super().__init__()
        self.batch_size, self.val_size, self.seed = batch_size, val_size, seed
        self.balanced = balanced
        self.parts: dict[str, Any] = {}
        self.classes: tuple[str, ...] = ()
        self._num_classes = 0
        self.names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Known once ``setup`` has run; a module that cannot name its classes sets their number."""
        return len(self.classes) or self._num_classes

    @num_classes.setter
    def num_classes(self, number: int) -> None:
        self._num_classes = number

    @property
    def overfits(self) -> bool:
        """Whether --trainer.overfit_batches asks for the same batches, unaltered, every epoch."""
        trainer: Any = self.trainer
        return trainer is not None and trainer.overfit_batches > 0

    def description(self) -> dict[str, Any]:
        """What decides the training batches."""
        names = ("batch_size", "val_size", "seed", "balanced")
        return {"data": type(self).__name__} | {name: getattr(self, name) for name in names}

    def order(self, data: Any, *, train: bool, alone: bool = False) -> BatchOrder:
        """The batches of this process; ``alone``: as if it were the only one."""
        size, trainer = len(data), None if alone else self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        return BatchOrder(
            size,
            self.batch_size,
            seed=self.seed,
            shuffle=train and not self.overfits,
            labels=self.labels(data) if train and self.balanced else None,
            drop_last=train and (size >= self.batch_size or world > 1),
            rank=rank,
            world_size=world,
        )

    def split(self, size: int, train_size: int = 0) -> tuple[Tensor, Tensor]:
        """Indices of the training and validation images; of the former ``train_size``, if not 0.

        Raises:
            UserError: ``val_size`` leaves no image to train on.
        """
        if not 0 < self.val_size < size:
            raise UserError(
                f"--data.val_size is {self.val_size}; take a number from 1 to {size - 1}, the "
                "images that are cut out of the training set for validation"
            )
        order = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))
        val, train = order[: self.val_size], order[self.val_size :]
        return train[: train_size or None].sort().values, val

    def chosen(self, size: int, train_size: int) -> Tensor:
        """Indices of ``train_size`` training images, or of all, where none is cut out."""
        order = torch.randperm(size, generator=torch.Generator().manual_seed(self.seed))
        return order[: train_size or None].sort().values

    def loader(self, part: str, *, alone: bool = False) -> Loader:
        """The batches of "train", "val", "test" or "predict"."""
        data = self.parts[part]
        order = self.order(data, train=part == "train", alone=alone)
        limit = self.batches_per_epoch(len(order)) if part == "train" else None
        return Loader(order, self.source(data, order), limit)

    def batches_per_epoch(self, batches: int) -> int:
        """The training batches that --trainer.limit_train_batches leaves."""
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def source(self, data: Any, order: BatchOrder) -> Any:
        """What yields (images, labels) of ``data`` in that order."""
        raise NotImplementedError

    def labels(self, data: Any) -> Tensor:
        """The labels of ``data``, int64 [N]."""
        raise NotImplementedError

    def train_dataloader(self) -> Loader:
        return self.loader("train")

    def val_dataloader(self) -> Loader:
        return self.loader("val")

    def test_dataloader(self) -> Loader:
        return self.loader("test")

    def predict_dataloader(self) -> Loader:
        """Each image's label is its number in ``names``."""
        return self.loader("predict")


class TensorData(VisionData):
    """A data set that lies in memory and is augmented a batch at a time, on the training device.

    Args:
        batch_size: Of all processes together.
        val_size: Images cut out of the training set for validation.
        seed: Of the split, the order and the augmentation.
        pixels: Normalisation and augmentation.
        train_size: Number of images to train on; 0: all.
        balanced: Train on as many images of each class.
    """

    def __init__(
        self,
        batch_size: int,
        val_size: int,
        seed: int,
        pixels: Pixels,
        train_size: int = 0,
        balanced: bool = False,
    ) -> None:
        super().__init__(batch_size, val_size, seed, balanced=balanced)
        if train_size < 0:
            raise UserError(f"--data.train_size is {train_size}: take a number from 0 upwards")
        self.pixels, self.train_size = pixels, train_size

    def description(self) -> dict[str, Any]:
        return super().description() | {"train_size": self.train_size} | asdict(self.pixels)

    def load(self, train: bool) -> Images:
        """The official training or test set."""
        raise NotImplementedError

    def load_val(self) -> Images | None:
        """Validation images that are a split of their own; ``None``: they are cut out."""
        return None

    def load_loose(self) -> Images | None:
        """Images without labels, which only ``predict`` reads; ``None``: there is a test set."""
        return None

    def split_classes(self, split: str) -> tuple[str, ...]:
        """The names of the classes of "train" or "test", where no image need be read for them."""
        return ()

    def setup(self, stage: str) -> None:
        """Read what ``stage`` ("fit", "validate", "test" or "predict") needs.

        Raises:
            UserError: A split has a class that the training set does not have.
        """
        if stage in ("fit", "validate") and "train" not in self.parts:
            self._set_up_training()
            trees.places_in(self.classes, self.split_classes("test"), "the test images")
        self.classes = self.classes or self.split_classes("train")
        if stage == "test" and "test" not in self.parts:
            self.parts["test"] = self._numbered(self.load(train=False))
        if stage == "predict":
            images = self.load_loose() or self.load(train=False)
            self.names = images.names or tuple(map(str, range(len(images))))
            self.parts["predict"] = images.numbered()
            if images.classes and not self.classes:
                self.classes = images.classes

    def _set_up_training(self) -> None:
        whole, val = self._numbered(self.load(train=True)), self.load_val()
        if val is None:
            chosen, cut_out = self.split(len(whole), self.train_size)
            val = whole.take(cut_out)
        else:
            chosen, val = self.chosen(len(whole), self.train_size), self._numbered(val)
        self.parts |= {"train": whole.take(chosen), "val": val}

    def _numbered(self, images: Images) -> Images:
        self.classes = self.classes or images.classes
        return images.numbered_by(self.classes)

    def source(self, data: Images, order: BatchOrder) -> TensorSource:
        return TensorSource(data.images, data.labels, order)

    def labels(self, data: Images) -> Tensor:
        return data.labels

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment and normalise where the batch is now."""
        training = self.trainer is not None and self.trainer.training
        alters = training and not self.overfits
        images = self.pixels.train(batch) if alters else self.pixels.normalise(batch.images)
        return batch._replace(images=images)
