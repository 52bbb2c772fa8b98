"""Where small images come from: one tensor of bytes for a whole split.

The built-in digits, torchvision's CIFAR and SVHN, and any tree of ``<split>/<class>/<file>``,
in a folder or a tar archive, packed into one file the first time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision import datasets

from fixup_core.errors import UserError
from fixup_core.files import whole_file, whole_folder

IMAGE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"})
TEST_SHARE = 0.25
"""Of the built-in digits, drawn once with a fixed seed."""


@dataclass(frozen=True)
class Images:
    """One split.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        classes: Their names, in the order of the labels.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Images:
        """A part of the split."""
        return Images(self.images[indices], self.labels[indices], self.classes)


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
        source: A folder, or a tar archive of one, that holds ``<split>/<class>/<file>``.
        split: "train", "test", ...
        cache: Where the packed file lies; it is made anew when ``source`` has changed.
        skip_corrupt: Leave out files that are not images, instead of raising.

    Raises:
        UserError: No such split, a class without images, images of different sizes, or a file
            that is not an image (all named).
    """
    file = cache / f"{_key(source, split, skip_corrupt)}.pt"
    if not file.exists():
        state = _decode(source, split, skip_corrupt)
        with whole_file(file, shared=True) as temporary:  # others may pack it too
            torch.save(state, temporary)
    images, labels, classes = torch.load(file, weights_only=True)
    return Images(images, labels, tuple(classes))


class CorruptImageError(UserError):
    """A file that is not an image, or the half of one."""


def read_image(name: str, content: bytes) -> Image.Image:
    """The RGB image in a file's content.

    Raises:
        CorruptImageError: The content is not an image; the message has ``name``.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise CorruptImageError(
            f"{name} is not an image that can be read: remove it, or leave such files out with "
            "--data.skip_corrupt true"
        ) from error


def unpacked(archive: Path, cache: Path) -> Path:
    """The folder of an archive's content, unpacked once.

    Raises:
        UserError: Not a tar archive, or a damaged one.
    """
    folder = cache / _key(archive, "tree")
    if folder.exists():
        return folder
    with whole_folder(folder, shared=True) as temporary, _open(archive) as tar:
        tar.extractall(temporary, filter="data")
    return folder


def _key(source: Path, *what: object) -> str:
    """A name for what is made of ``source``, which changes with any file of it."""
    digest = hashlib.sha256(f"{source.resolve()} {what}".encode())
    for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
        stat = file.stat()
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{source.name}-{digest.hexdigest()[:12]}"


@contextlib.contextmanager
def _open(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive) as tar:
            yield tar
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{archive} is not a tar archive, or is damaged: {error}") from error


def _decode(source: Path, split: str, skip_corrupt: bool) -> tuple[Tensor, Tensor, list[str]]:
    found: dict[str, list[np.ndarray]] = {}
    shapes: dict[tuple[int, ...], str] = {}
    for name, label, content in _files(source, split):
        members = found.setdefault(label, [])
        if content is None:
            continue
        try:
            pixels = np.asarray(read_image(name, content))
        except CorruptImageError:
            if skip_corrupt:
                continue
            raise
        members.append(pixels)
        shapes.setdefault(pixels.shape, name)
    if not found:
        raise UserError(f"{source} has no images in {split}/<class>/")
    empty = [label for label, members in found.items() if not members]
    if empty:
        raise UserError(f"no images of the class {empty[0]} in {source}, {split}")
    if len(shapes) > 1:
        raise UserError(
            f"the images differ in size ({', '.join(list(shapes.values())[:2])}): "
            "use the data module ImageFolderData, which resizes"
        )
    classes = sorted(found)
    images = np.concatenate([np.stack(found[label]) for label in classes])
    labels = torch.cat([torch.full((len(found[c]),), i) for i, c in enumerate(classes)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels, classes


def _files(source: Path, split: str) -> Iterator[tuple[str, str, bytes | None]]:
    """Name, class and content of every file below ``split``; a class itself has no content."""
    entries = _archived(source) if source.is_file() else _lying(source, split)
    for path, content in entries:
        parts = path.parts
        if split not in parts[:-1]:
            continue
        below = parts[parts.index(split) + 1 :]
        if len(below) == 1 and content is None:
            yield str(path), below[0], None
        elif len(below) == 2 and content is not None and path.suffix.lower() in IMAGE_ENDINGS:
            yield str(path), below[0], content


Entries = Iterable[tuple[PurePosixPath, bytes | None]]


def _archived(source: Path) -> Entries:
    with _open(source) as archive:
        for member in archive:
            reader = archive.extractfile(member) if member.isfile() else None
            if reader or member.isdir():
                yield PurePosixPath(member.name), reader.read() if reader else None


def _lying(source: Path, split: str) -> Entries:
    for path in sorted((source / split).glob("*/")):
        yield PurePosixPath(path.relative_to(source)), None
    for path in sorted((source / split).glob("*/*")):
        if path.is_file():
            yield PurePosixPath(path.relative_to(source)), path.read_bytes()
