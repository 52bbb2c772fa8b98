"""Images in folders, read through worker processes: ``ImageFolderData`` and ``ImageNet``."""

from __future__ import annotations

import copy
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from fixup_core.errors import UserError
from vision.data import trees
from vision.data.base import CACHE, VisionData
from vision.data.batches import BatchOrder, workers_source
from vision.data.pictures import CorruptImageError, read_image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolderData(VisionData):
    """A tree of images of any size, read by worker processes.

    Args:
        root: Folder, or tar or zip archive of one (unpacked once into ``cache``), that holds
            ``train/<class>/<file>`` and the test images in ``test`` or ``val`` likewise. With all
            three, ``val`` holds the validation images, and ``val_size`` is not used. ``predict``
            takes any folder of images, or one image, too.
        batch_size: Of all processes together.
        val_size: Images cut out of the training set for validation.
        seed: Of the split, the order and the augmentation.
        image_size: Side of the square that the network sees.
        resize: Shorter side before the central square is cut out for evaluation, ``image_size`` or
            more; 0: 8/7 of it, as 256 for 224.
        mean: Of each channel, in 0..1.
        std: Of each channel, in 0..1.
        workers: Processes that read.
        skip_corrupt: Leave out files that are not images.
        cache: Where an archive is unpacked.
        balanced: Train on as many images of each class: those of small classes come several times
            in an epoch.
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
        balanced: bool = False,
    ) -> None:
        super().__init__(batch_size, val_size, seed, balanced=balanced)
        _check_least("image_size", image_size, 1)
        _check_least("resize", resize or image_size, image_size)
        _check_least("workers", workers, 0)
        if min(std) <= 0:
            raise UserError(f"--data.std is {list(std)}: take numbers above 0")
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
        if not _is_image(str(self.root)):
            self._tree()

    def setup(self, stage: str) -> None:
        """Find the files that ``stage`` ("fit", "validate", "test" or "predict") needs.

        Raises:
            UserError: A split has a class that the training set does not have.
        """
        if stage == "predict" and self.root.is_file() and _is_image(str(self.root)):
            self._set_up_prediction(self.root.parent, [Path(self.root.name)])
            return
        tree = self._tree()
        self.classes = self.classes or trees.class_names(tree / "train")
        if stage in ("fit", "validate"):
            self._set_up_training(tree)
            trees.places_in(self.classes, trees.class_names(_test_folder(tree)), "the test images")
        if stage == "test":
            self.parts["test"] = self._folder(_test_folder(tree), self.test_transform)
        if stage == "predict":
            self._set_up_prediction(*_to_predict(tree))

    def _set_up_prediction(self, folder: Path, paths: list[Path]) -> None:
        self.names = tuple(map(str, paths))
        files = [folder / path for path in paths]
        self.parts["predict"] = NumberedFiles(files, self.test_transform)

    def _set_up_training(self, tree: Path) -> None:
        alters = self.test_transform if self.overfits else self.train_transform
        whole = self._folder(tree / "train", alters)
        if trees.has_own_val(tree):
            val = self._folder(tree / "val", self.test_transform)
            self.parts |= {"train": whole, "val": val}
            return
        train, cut_out = self.split(len(whole))
        plain = copy.copy(whole)  # the same files, found once
        plain.transform = self.test_transform
        self.parts |= {
            "train": Subset(whole, train.tolist()),
            "val": Subset(plain, cut_out.tolist()),
        }

    def labels(self, data: Any) -> torch.Tensor:
        if isinstance(data, Subset):
            return self.labels(data.dataset)[data.indices]
        return torch.tensor(data.targets)

    def _tree(self) -> Path:
        if self.root.is_dir():
            return trees.top(self.root)
        if not self.root.exists():
            raise UserError(f"--data.root {self.root} does not exist")
        return trees.top(trees.unpacked(self.root, self.cache))

    def _folder(self, folder: Path, transform: Any) -> ClassFolders:
        try:
            found = ClassFolders(folder, transform, self.classes)
        except FileNotFoundError as error:
            hint = ": sort the images into a folder for each class" if _is_flat(folder) else ""
            raise UserError(
                f"{folder} is no tree of <class>/<image>{hint or f': {error}'}"
            ) from error
        self.classes = tuple(found.classes)
        return found

    def source(self, data: Any, order: BatchOrder) -> Any:
        pinned = torch.cuda.is_available()
        skip = CorruptImageError if self.skip_corrupt else None
        return workers_source(data, order, skip=skip, num_workers=self.workers, pin_memory=pinned)


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"--data.{name} is {value}: take a number from {least} upwards")


class ClassFolders(ImageFolder):
    """torchvision's ``<class>/<file>``, without hidden files, counted by a given list of classes.

    Args:
        root: The folder of the classes.
        transform: Of each image.
        known: The classes, in their order; those of the folder by default.
    """

    def __init__(self, root: Path, transform: Any, known: tuple[str, ...]) -> None:
        self.known = known
        super().__init__(str(root), transform, loader=_read, is_valid_file=_is_image)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Class names, and the label of each that the folder has."""
        if not Path(directory).is_dir():
            raise FileNotFoundError("there is no such folder")
        found = trees.class_names(Path(directory))
        if not found:
            raise FileNotFoundError("there is no folder of a class")
        classes = self.known or found
        return list(classes), dict(zip(found, trees.places_in(classes, found), strict=True))


class NumberedFiles(Dataset[tuple[Any, int]]):
    """Images without labels: each with its own number."""

    def __init__(self, files: list[Path], transform: Any) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(_read(str(self.files[index]))), index


def _is_image(path: str) -> bool:
    name = PurePath(path)
    return trees.visible(PurePath(*name.parts[-2:])) and name.suffix.lower() in IMG_EXTENSIONS


def _is_flat(folder: Path) -> bool:
    return folder.is_dir() and any(_is_image(path.name) for path in folder.iterdir())


def _test_folder(tree: Path) -> Path:
    return tree / "test" if trees.has_split(tree, "test") else tree / "val"


def _to_predict(tree: Path) -> tuple[Path, list[Path]]:
    """The folder of images to predict, and their paths in it.

    Raises:
        UserError: There are none.
    """
    labelled = any(trees.has_split(tree, split) for split in ("test", "val"))
    folder = _test_folder(tree) if labelled else tree
    paths = trees.images_below(folder)
    if not paths:
        raise UserError(f"{folder} has no images to predict")
    return folder, paths


def _read(path: str) -> Any:
    return read_image(path, trees.read_bytes(Path(path)))


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
