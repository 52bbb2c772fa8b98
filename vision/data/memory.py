"""Images in memory: ``Digits``, ``CIFAR10``, ``CIFAR100`` and ``SVHN``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fixup_core.errors import UserError
from vision.data import sources, trees
from vision.data.augment import Pixels
from vision.data.base import CACHE, TensorData
from vision.data.sources import Images

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
SVHN_MEAN, SVHN_STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)


class Digits(TensorData):
    """scikit-learn's handwritten digits, 8x8, no download.

    Args:
        batch_size: Of all processes together.
        val_size: Images cut out of the 1,348 training images for validation.
        seed: Of the split, the order and the augmentation.
        crop: Pixels of padding for a random crop.
        cutout: Side of the blacked-out square.
        train_size: Number of images to train on; 0: all.
        balanced: Train on as many images of each class: those of small classes come several times
            in an epoch.
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_size: int = 200,
        seed: int = 0,
        crop: int = 1,
        cutout: int = 0,
        train_size: int = 0,
        balanced: bool = False,
    ) -> None:
        pixels = Pixels((0.3053,), (0.3760,), crop=crop, cutout=cutout)
        super().__init__(batch_size, val_size, seed, pixels, train_size, balanced)

    def load(self, train: bool) -> Images:
        return sources.digits(train)


class CIFAR10(TensorData):
    """CIFAR-10: downloaded once by torchvision, or read from an image tree or an archive of one.

    Args:
        root: torchvision's folder; or a folder, or a tar or zip archive of one, that holds
            ``train/<class>/<file>`` and ``test/<class>/<file>``; a folder with ``val`` besides
            is validated on that. ``predict`` takes a folder of images without labels, too.
        batch_size: Of all processes together.
        val_size: Images cut out of the training set for validation.
        seed: Of the split, the order and the augmentation.
        crop: Pixels of padding for a random crop.
        flip: Mirror half of the images.
        cutout: Side of the blacked-out square (16 in the recipes that use it).
        train_size: Number of images to train on; 0: all.
        download: Fetch what ``root`` lacks.
        cache: Where a packed image tree is kept.
        skip_corrupt: Leave out files that are not images.
        balanced: Train on as many images of each class: those of small classes come several times
            in an epoch.
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
        balanced: bool = False,
    ) -> None:
        pixels = Pixels(self.mean, self.std, crop=crop, flip=flip, cutout=cutout)
        super().__init__(batch_size, val_size, seed, pixels, train_size, balanced)
        self.root, self.download = Path(root), download
        self.cache, self.skip_corrupt = Path(cache), skip_corrupt

    def prepare_data(self) -> None:
        """Download or pack, on one process of each machine."""
        if not self._is_tree() and not self.download:
            return
        if not self.root.exists() and self.root.suffix:
            raise UserError(f"--data.root {self.root} does not exist")
        testing = self.trainer is not None and self.trainer.state.fn in ("test", "predict")
        if not (testing and trees.loose_images(self.root)):
            self.load(train=not testing)

    def _is_tree(self) -> bool:
        return self.root.is_file() or any(trees.has_split(self.root, s) for s in trees.SPLITS)

    def split_classes(self, split: str) -> tuple[str, ...]:
        if not self.root.is_file():
            return trees.class_names(self.root / split)
        return sources.archived_classes(self.root, split, self.cache)

    def load_val(self) -> Images | None:
        return self._packed("val") if trees.has_own_val(self.root) else None

    def load_loose(self) -> Images | None:
        if not trees.loose_images(self.root):
            return None
        return sources.loose(self.root, skip_corrupt=self.skip_corrupt)

    def _packed(self, split: str) -> Images:
        return sources.packed(self.root, split, self.cache, skip_corrupt=self.skip_corrupt)

    def load(self, train: bool) -> Images:
        if self._is_tree():
            return self._packed("train" if train else "test")
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
