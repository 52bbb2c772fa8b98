"""Where small images come from: one tensor of bytes for a whole split.

The built-in digits, torchvision's CIFAR and SVHN, and any tree of ``<split>/<class>/<file>``,
in a folder or an archive, packed into one file the first time.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from fixup_core.errors import UserError
from fixup_core.files import whole_file
from vision.data import trees
from vision.data.pictures import CorruptImageError, read_image

TEST_SHARE = 0.25
"""Of the built-in digits, drawn once with a fixed seed."""


@dataclass(frozen=True)
class Images:
    """One split.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        classes: Their names, in the order of the labels.
        names: Of the images' files; empty where they have none.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Images:
        """A part of the split."""
        names = tuple(self.names[i] for i in indices.tolist()) if self.names else ()
        return Images(self.images[indices], self.labels[indices], self.classes, names)

    def numbered_by(self, classes: tuple[str, ...]) -> Images:
        """The same images, their labels counted in another list of classes.

        Raises:
            UserError: It lacks a class.
        """
        places = torch.tensor(trees.places_in(classes, self.classes), dtype=torch.long)
        return replace(self, labels=places[self.labels], classes=classes)

    def numbered(self) -> Images:
        """The same images, each with its own number in place of a label."""
        return replace(self, labels=torch.arange(len(self)))


def digits(train: bool) -> Images:
    """scikit-learn's 1,797 handwritten digits, [1, 8, 8]; a quarter of them is the test set."""
    from sklearn.datasets import load_digits  # only this data set needs it

    data = load_digits()
    pixels = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)[:, None]
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    border = round(TEST_SHARE * len(order))
    chosen = order[border:] if train else order[:border]
    labels = torch.from_numpy(data.target).long()
    return Images(pixels[chosen], labels[chosen], tuple(map(str, range(10))))


def cifar(kind: str, root: Path, train: bool, download: bool) -> Images:
    """CIFAR-10 or CIFAR-100, [3, 32, 32], as torchvision downloads and checks it."""
    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    data = cls(str(root), train=train, download=download)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(data.targets), tuple(data.classes))


def svhn(root: Path, train: bool, download: bool, extra: bool) -> Images:
    """Street view house numbers, [3, 32, 32]; the paper trains on the extra images too."""
    splits = (["train", "extra"] if extra else ["train"]) if train else ["test"]
    parts = [datasets.SVHN(str(root), split=split, download=download) for split in splits]
    images = torch.from_numpy(np.concatenate([part.data for part in parts]))
    labels = torch.from_numpy(np.concatenate([part.labels for part in parts])).long()
    return Images(images, labels, tuple(map(str, range(10))))


def packed(source: Path, split: str, cache: Path, *, skip_corrupt: bool = False) -> Images:
    """A split of an image tree, decoded once into one file in ``cache``.

    Args:
        source: A folder, or a tar or zip archive of one, that holds ``<split>/<class>/<file>``.
        split: "train", "test", ...
        cache: Where the packed file lies; it is made anew when ``source`` has changed.
        skip_corrupt: Leave out files that are not images, instead of raising.

    Raises:
        UserError: No such split, a class without images, images of different sizes, or a file
            that is not an image (all named).
    """
    file = cache / f"{trees.key(source, split, skip_corrupt)}.pt"
    state = _cached(file)
    if state is None:
        state = _decode(source, split, skip_corrupt)
        with whole_file(file, shared=True) as temporary:  # others may pack it too
            torch.save(state, temporary)
    images, labels, classes, names = state
    return Images(images, labels, tuple(classes), tuple(names))


def loose(root: Path, *, skip_corrupt: bool = False) -> Images:
    """The images of a folder without splits, which have no labels.

    Raises:
        UserError: They differ in size, or a file is not an image.
    """
    paths = trees.loose_images(root)
    files = ((str(path), "", trees.read_bytes(root / path)) for path in paths)
    images = _decoded(files, skip_corrupt).get("")
    if not images:
        raise UserError(f"{root} has no images, and no folders train, val or test of them")
    names = [name for name, _ in images]
    pixels = np.stack([pixels for _, pixels in images])
    return Images(_channels_first(pixels), torch.arange(len(names)), (), tuple(names))


def archived_classes(source: Path, split: str, cache: Path) -> tuple[str, ...]:
    """The classes of a split in an archive, whose names are read once; empty without the split."""
    file = cache / f"{trees.key(source, split, 'classes')}.json"
    if not file.exists():
        classes = sorted({label for _, label, _ in trees.labelled_files(source, split)})
        with whole_file(file, shared=True) as temporary:
            Path(temporary).write_text(json.dumps(classes), encoding="utf-8")
    return tuple(json.loads(file.read_text(encoding="utf-8")))


State = tuple[Tensor, Tensor, list[str], list[str]]
"""Images, labels, classes and names, as a packed file holds them."""


def _cached(file: Path) -> State | None:
    """What was packed before, unless the file is not there or damaged."""
    if not file.exists():
        return None
    try:
        state: State = torch.load(file, weights_only=True)
        return state
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError):
        return None


def _decode(source: Path, split: str, skip_corrupt: bool) -> State:
    found = _decoded(trees.labelled_files(source, split), skip_corrupt)
    if not found:
        raise UserError(f"{source} has no images in {split}/<class>/")
    empty = [label for label, members in found.items() if not members]
    if empty:
        raise UserError(f"no images of the class {empty[0]} in {source}, {split}")
    classes = sorted(found)
    images = np.concatenate([np.stack([p for _, p in found[label]]) for label in classes])
    labels = torch.cat([torch.full((len(found[c]),), i) for i, c in enumerate(classes)])
    names = [name for label in classes for name, _ in found[label]]
    return _channels_first(images), labels, classes, names


Files = Iterable[tuple[str, str, bytes | None]]
Members = dict[str, list[tuple[str, np.ndarray]]]


def _decoded(files: Files, skip_corrupt: bool) -> Members:
    """Images of one size: the name and pixels of each, by class.

    Raises:
        UserError: They differ in size, or a file is not an image and ``skip_corrupt`` is off.
    """
    found: Members = {}
    shapes: dict[tuple[int, ...], str] = {}
    for name, label, content in files:
        members = found.setdefault(label, [])
        if content is None:
            continue
        try:
            pixels = np.asarray(read_image(name, content))
        except CorruptImageError:
            if skip_corrupt:
                continue
            raise
        members.append((name, pixels))
        shapes.setdefault(pixels.shape, name)
    if len(shapes) > 1:
        raise UserError(
            f"the images differ in size ({', '.join(list(shapes.values())[:2])}): "
            "use the data module ImageFolderData, which resizes"
        )
    return found


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
