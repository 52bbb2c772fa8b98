"""Data modules: ``Digits``, ``CIFAR10``, ``CIFAR100`` and ``SVHN`` in memory, ``ImageFolderData``
and ``ImageNet`` through worker processes.

The validation set is cut out of the training set, by a seed; the test set is read by ``test`` and
``predict`` alone.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fixup_core.errors import UserError
from vision.data import sources
from vision.data.augment import Pixels
from vision.data.batches import Batch, BatchOrder, Loader, TensorSource, workers_source
from vision.data.sources import Images

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
SVHN_MEAN, SVHN_STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CACHE = Path("runs/data")


class VisionData(L.LightningDataModule):
    """What all data modules share: splits, batches, and that nothing random is left to chance.

    Attributes:
        num_classes: Known once ``setup`` has run.
    """

    num_classes: int

    def __init__(self, batch_size: int, val_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size, self.val_size, self.seed = batch_size, val_size, seed
        self.parts: dict[str, Any] = {}

    def description(self) -> dict[str, Any]:
        """What decides the training batches."""
        names = ("batch_size", "val_size", "seed")
        return {"data": type(self).__name__} | {name: getattr(self, name) for name in names}

    def order(self, size: int, *, train: bool, alone: bool = False) -> BatchOrder:
        """The batches of this process; ``alone``: as if it were the only one."""
        trainer = None if alone else self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        return BatchOrder(
            size,
            self.batch_size,
            seed=self.seed,
            shuffle=train,
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

    def loader(self, part: str, *, alone: bool = False) -> Loader:
        """The batches of "train", "val" or "test"."""
        data = self.parts[part]
        order = self.order(len(data), train=part == "train", alone=alone)
        limit = self.batches_per_epoch(len(order)) if part == "train" else None
        return Loader(order, self.source(data, order), limit)

    def batches_per_epoch(self, batches: int) -> int:
        """Of so many training batches those that --trainer.limit_train_batches leaves."""
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def source(self, data: Any, order: BatchOrder) -> Any:
        """What yields (images, labels) of ``data`` in that order."""
        raise NotImplementedError

    def train_dataloader(self) -> Loader:
        return self.loader("train")

    def val_dataloader(self) -> Loader:
        return self.loader("val")

    def test_dataloader(self) -> Loader:
        return self.loader("test")

    predict_dataloader = test_dataloader


class TensorData(VisionData):
    """A data set that lies in memory and is augmented a batch at a time, on the training device.

    Args:
        batch_size: Of all processes together.
        val_size: Images cut out of the training set for validation.
        seed: Of the split, the order and the augmentation.
        pixels: Normalisation and augmentation.
        train_size: Train on so many images only; 0: on all.
    """

    def __init__(
        self, batch_size: int, val_size: int, seed: int, pixels: Pixels, train_size: int = 0
    ) -> None:
        super().__init__(batch_size, val_size, seed)
        self.pixels, self.train_size = pixels, train_size

    def description(self) -> dict[str, Any]:
        return super().description() | {"train_size": self.train_size} | asdict(self.pixels)

    def load(self, train: bool) -> Images:
        """The official training or test set."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Read what ``stage`` ("fit", "validate", "test" or "predict") needs."""
        if stage in ("fit", "validate") and "train" not in self.parts:
            whole = self.load(train=True)
            train, val = self.split(len(whole), self.train_size)
            self.parts |= {"train": whole.take(train), "val": whole.take(val)}
        if stage in ("test", "predict") and "test" not in self.parts:
            self.parts["test"] = self.load(train=False)
        self.num_classes = len(next(iter(self.parts.values())).classes)

    def source(self, data: Images, order: BatchOrder) -> TensorSource:
        return TensorSource(data.images, data.labels, order)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment and normalise where the batch is now."""
        training = self.trainer is not None and self.trainer.training
        images = self.pixels.train(batch) if training else self.pixels.normalise(batch.images)
        return batch._replace(images=images)


class Digits(TensorData):
    """scikit-learn's handwritten digits, 8x8, no download.

    Args:
        batch_size: Of all processes together.
        val_size: Images cut out of the 1,348 training images for validation.
        seed: Of the split, the order and the augmentation.
        crop: Pixels of padding for a random crop.
        cutout: Side of the blacked-out square.
        train_size: Train on so many images only; 0: on all.
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_size: int = 200,
        seed: int = 0,
        crop: int = 1,
        cutout: int = 0,
        train_size: int = 0,
    ) -> None:
        pixels = Pixels((0.3053,), (0.3760,), crop=crop, cutout=cutout)
        super().__init__(batch_size, val_size, seed, pixels, train_size)

    def load(self, train: bool) -> Images:
        return sources.digits(train)


class CIFAR10(TensorData):
    """CIFAR-10: downloaded once by torchvision, or read from an image tree or an archive of one.

    Args:
        root: torchvision's folder; or a folder, or tar archive of one, that holds
            ``train/<class>/<file>`` and ``test/<class>/<file>``.
        batch_size: Of all processes together.
        val_size: Images cut out of the training set for validation.
        seed: Of the split, the order and the augmentation.
        crop: Pixels of padding for a random crop.
        flip: Mirror half of the images.
        cutout: Side of the blacked-out square (16 in the recipes that use it).
        train_size: Train on so many images only; 0: on all.
        download: Fetch what ``root`` lacks.
        cache: Where a packed image tree is kept.
        skip_corrupt: Leave out files that are not images.
    """

    kind = "cifar10"
    mean, std = CIFAR_MEAN, CIFAR_STD

    def __init__(
        self,
        root: Path = Path("data"),
        batch_size: int = 128,
        val_size: int = 5000,
        seed: int = 0,
        crop: int = 4,
        flip: bool = True,
        cutout: int = 0,
        train_size: int = 0,
        download: bool = True,
        cache: Path = CACHE,
        skip_corrupt: bool = False,
    ) -> None:
        pixels = Pixels(self.mean, self.std, crop=crop, flip=flip, cutout=cutout)
        super().__init__(batch_size, val_size, seed, pixels, train_size)
        self.root, self.download = Path(root), download
        self.cache, self.skip_corrupt = Path(cache), skip_corrupt

    def prepare_data(self) -> None:
        """Download or pack, on one process of each machine."""
        if not self._is_tree() and not self.download:
            return
        if not self.root.exists() and self.root.suffix:
            raise UserError(f"--data.root {self.root} does not exist")
        testing = self.trainer is not None and self.trainer.state.fn in ("test", "predict")
        self.load(train=not testing)

    def _is_tree(self) -> bool:
        return self.root.is_file() or (self.root / "train").is_dir()

    def load(self, train: bool) -> Images:
        if self._is_tree():
            split = "train" if train else "test"
            return sources.packed(self.root, split, self.cache, skip_corrupt=self.skip_corrupt)
        try:
            return sources.cifar(self.kind, self.root, train, self.download)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{self.root} holds neither torchvision's files nor train/<class>/ folders, and "
                f"they could not be fetched ({error}): check --data.root and --data.download"
            ) from error


class CIFAR100(CIFAR10):
    """CIFAR-100; as ``CIFAR10``."""

    kind = "cifar100"
    mean, std = CIFAR100_MEAN, CIFAR100_STD


class SVHN(CIFAR10):
    """Street view house numbers; as ``CIFAR10``, without flips.

    Args:
        extra: Train on the 531,131 extra images too, as the paper does.
        options: As ``CIFAR10``.
    """

    mean, std = SVHN_MEAN, SVHN_STD

    def __init__(self, extra: bool = True, flip: bool = False, **options: Any) -> None:
        super().__init__(flip=flip, **options)
        self.extra = extra

    def description(self) -> dict[str, Any]:
        return super().description() | {"extra": self.extra}

    def load(self, train: bool) -> Images:
        if self._is_tree():
            return super().load(train)
        return sources.svhn(self.root, train, self.download, self.extra)


class ImageFolderData(VisionData):
    """A tree of images of any size, read by worker processes.

    Args:
        root: Folder, or tar archive of one (unpacked once into ``cache``), that holds
            ``train/<class>/<file>`` and the test images in ``test`` or ``val`` likewise.
        batch_size: Of all processes together.
        val_size: Images cut out of the training set for validation.
        seed: Of the split, the order and the augmentation.
        image_size: Side of the square that the network sees.
        resize: Shorter side before the central square is cut out for evaluation; 0: 8/7 of
            ``image_size``, as 256 for 224.
        mean: Of each channel, in 0..1.
        std: Of each channel, in 0..1.
        workers: Processes that read.
        skip_corrupt: Leave out files that are not images.
        cache: Where an archive is unpacked.
    """

    def __init__(
        self,
        root: Path,
        batch_size: int = 128,
        val_size: int = 5000,
        seed: int = 0,
        image_size: int = 224,
        resize: int = 0,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        workers: int = 4,
        skip_corrupt: bool = False,
        cache: Path = CACHE,
    ) -> None:
        super().__init__(batch_size, val_size, seed)
        self.root, self.cache, self.workers = Path(root), Path(cache), workers
        self.skip_corrupt, self.image_size = skip_corrupt, image_size
        finish = [transforms.ToTensor(), transforms.Normalize(mean, std)]
        self.train_transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(image_size),
                transforms.RandomHorizontalFlip(),
                *finish,
            ]
        )
        self.test_transform = transforms.Compose(
            [
                transforms.Resize(resize or image_size * 8 // 7),
                transforms.CenterCrop(image_size),
                *finish,
            ]
        )

    def description(self) -> dict[str, Any]:
        return super().description() | {"image_size": self.image_size}

    def prepare_data(self) -> None:
        """Unpack an archive, on one process of each machine."""
        self._tree()

    def setup(self, stage: str) -> None:
        """Find the files that ``stage`` ("fit", "validate", "test" or "predict") needs."""
        tree = self._tree()
        if stage in ("fit", "validate"):
            whole = self._folder(tree / "train", self.train_transform)
            train, val = self.split(len(whole))
            plain = copy.copy(whole)  # the same files, found once
            plain.transform = self.test_transform
            self.parts |= {
                "train": Subset(whole, train.tolist()),
                "val": Subset(plain, val.tolist()),
            }
        if stage in ("test", "predict"):
            folder = tree / "test" if (tree / "test").is_dir() else tree / "val"
            self.parts["test"] = whole = self._folder(folder, self.test_transform)
        self.num_classes = len(whole.classes)

    def _tree(self) -> Path:
        if self.root.is_dir():
            return self.root
        if not self.root.exists():
            raise UserError(f"--data.root {self.root} does not exist")
        return sources.unpacked(self.root, self.cache)

    def _folder(self, folder: Path, transform: Any) -> ImageFolder:
        try:
            return ImageFolder(str(folder), transform, loader=_read)
        except FileNotFoundError as error:
            raise UserError(f"{folder} is no tree of <class>/<image>: {error}") from error

    def source(self, data: Any, order: BatchOrder) -> Any:
        pinned = torch.cuda.is_available()
        skip = sources.CorruptImageError if self.skip_corrupt else None
        return workers_source(data, order, skip=skip, num_workers=self.workers, pin_memory=pinned)


def _read(path: str) -> Any:
    return sources.read_image(path, Path(path).read_bytes())


class ImageNet(ImageFolderData):
    """ImageNet as its ImageFolder tree: ``root/train/<class>`` and ``root/val/<class>``.

    The official validation images are the test set here; 10,000 training images choose the model.

    Args:
        root: The tree.
        batch_size: Of all processes together.
        val_size: Images cut out of the training set for validation.
        workers: Processes that read.
        options: As ``ImageFolderData``.
    """

    def __init__(
        self,
        root: Path,
        batch_size: int = 256,
        val_size: int = 10_000,
        workers: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(root, batch_size, val_size, workers=workers, **options)
