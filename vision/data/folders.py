"""Images in folders, read through worker processes: ``ImageFolderData`` and ``ImageNet``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fixup_core.errors import UserError
from vision.data import sources
from vision.data.base import CACHE, VisionData
from vision.data.batches import BatchOrder, workers_source

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
