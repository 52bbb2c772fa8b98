"""Trees of images, ``<split>/<class>/<file>``, in a folder, a tar or a zip archive.

Hidden files and folders (``.ipynb_checkpoints``) are no part of a tree; links are followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath, PurePosixPath

from fixup_core.errors import UserError, one_line
from fixup_core.files import whole_folder
from vision.data.pictures import IMAGE_ENDINGS

FORMAT = 2
"""Of what is made of a tree: a new number makes everything anew."""
SPLITS = ("train", "val", "test")

Entries = Iterable[tuple[PurePosixPath, bytes | None]]
"""Path below the source, and content; a folder has none."""


def visible(path: PurePath) -> bool:
    """Whether neither the file nor a folder on the way to it is hidden."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def has_split(root: Path, split: str) -> bool:
    """Whether a folder has the images of a split."""
    return (root / split).is_dir()


def has_own_val(root: Path) -> bool:
    """Whether a folder has all three splits; without ``test``, ``val`` holds the test images."""
    return all(has_split(root, split) for split in SPLITS)


def class_names(folder: Path) -> tuple[str, ...]:
    """The folders of the classes in a split, sorted; empty where there is no such split."""
    if not folder.is_dir():
        return ()
    folders = (PurePath(path.name) for path in folder.iterdir() if path.is_dir())
    return tuple(sorted(path.name for path in folders if visible(path)))


def top(root: Path) -> Path:
    """The folder of the splits: ``root``, or what lies below it alone, as in many archives."""
    folder = root
    while not any(has_split(folder, split) for split in SPLITS):
        within = [path for path in folder.iterdir() if visible(PurePath(path.name))]
        if len(within) != 1 or not within[0].is_dir():
            return root
        folder = within[0]
    return folder


def images_below(root: Path) -> list[Path]:
    """Every image below a folder, relative to it, sorted."""
    found = (path.relative_to(root) for path in _walk(root))
    return sorted(p for p in found if visible(p) and p.suffix.lower() in IMAGE_ENDINGS)


def loose_images(root: Path) -> list[Path]:
    """The images of a folder that has no splits: they have no labels."""
    if not root.is_dir() or any(has_split(root, split) for split in SPLITS):
        return []
    return images_below(root)


def places_in(known: Iterable[str], found: Iterable[str], whose: str = "the images") -> list[int]:
    """The place of every class found in the list of known ones; ``whose`` is for the message.

    Raises:
        UserError: A class that is not known.
    """
    places = {name: place for place, name in enumerate(known)}
    new = [name for name in found if name not in places]
    if new:
        names, more = ", ".join(new[:3]), " and others" if len(new) > 3 else ""
        few = ", ".join(list(places)[:5]) + (", ..." if len(places) > 5 else "")
        raise UserError(
            f"{whose} have classes that the training set does not have ({names}{more}); it has "
            f"{len(places)}: {few}"
        )
    return [places[name] for name in found]


def labelled_files(source: Path, split: str) -> Iterator[tuple[str, str, bytes | None]]:
    """Name, class and content of every file below ``split``; a class itself has no content."""
    entries = _archived(source) if source.is_file() else _lying(source, split)
    for path, content in entries:
        parts = path.parts
        if split not in parts[:-1] or not visible(path):
            continue
        below = parts[parts.index(split) + 1 :]
        if len(below) == 1 and content is None:
            yield str(path), below[0], None
        elif len(below) == 2 and content is not None and path.suffix.lower() in IMAGE_ENDINGS:
            yield str(path), below[0], content


def read_bytes(path: Path) -> bytes:
    """The content of a file; none where it cannot be read, as at the end of a dangling link."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def unpacked(archive: Path, cache: Path) -> Path:
    """The folder of an archive's content, unpacked once.

    Raises:
        UserError: Not an archive, or a damaged one, or one whose members lie outside of it.
    """
    folder = cache / key(archive, "tree")
    if folder.exists():
        return folder
    with whole_folder(folder, shared=True) as temporary, _explained(archive):
        if _is_zip(archive):
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(temporary)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
    return folder


def key(source: Path, *what: object) -> str:
    """A name for what is made of ``source``, which changes with any file of it."""
    digest = hashlib.sha256(f"{source.resolve()} {what} {FORMAT}".encode())
    for file in sorted(_walk(source)) if source.is_dir() else [source]:
        stat = file.stat() if file.exists() else file.lstat()  # a dangling link
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{source.name}-{digest.hexdigest()[:12]}"


def _walk(root: Path) -> Iterator[Path]:
    """Every file below ``root``, through links to folders, but around no circle."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in files)


def _is_zip(archive: Path) -> bool:
    return archive.suffix.lower() == ".zip"


@contextlib.contextmanager
def _explained(archive: Path) -> Iterator[None]:
    kind = "zip" if _is_zip(archive) else "tar"
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, lzma.LZMAError, zlib.error) as error:
        cause = one_line(str(error)).split(": - method")[0]  # tarfile lists all it has tried
        raise UserError(f"{archive} is not a {kind} archive, or is damaged: {cause}") from error


def _archived(source: Path) -> Entries:
    with _explained(source):
        if _is_zip(source):
            with zipfile.ZipFile(source) as archive:
                for info in archive.infolist():
                    content = None if info.is_dir() else archive.read(info)
                    yield PurePosixPath(info.filename), content
            return
        with tarfile.open(source) as tar:
            for member in tar:
                reader = tar.extractfile(member) if member.isfile() else None
                if reader or member.isdir():
                    yield PurePosixPath(member.name), reader.read() if reader else None


def _lying(source: Path, split: str) -> Entries:
    for path in sorted((source / split).glob("*/")):
        yield PurePosixPath(path.relative_to(source)), None
    for path in sorted((source / split).glob("*/*")):
        if not path.is_dir():
            yield PurePosixPath(path.relative_to(source)), read_bytes(path)
