"""Files and folders that are whole or not there.

The rule for what a command writes under a name the user gives (``--output`` and the like): what
exists is refused unless ``--overwrite`` is given. Two kinds are exempt. A figure or a table is
drawn anew, for it holds nothing that the command could not draw again. A run's folder (``fit``,
``sweep``, ``demo``) goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from fixup_core.errors import UserError

fcntl: Any
try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

PREFIX = ".tmp-."
"""Before the name of what is not whole yet: endings stay, for writers that go by them. A name whose
only dot is its first one would be no name to ``torch.save``, hence the second."""
LOCK = ".lock"
_held: dict[Path, TextIO] = {}
"""The locks of this process, open for as long as it lives."""


def add_output(
    parser: argparse.ArgumentParser, *, metavar: str = "FILE", help: str = "file to write"
) -> None:
    """The options ``--output`` and ``--overwrite``, under the rule above."""
    parser.add_argument("--output", type=Path, required=True, metavar=metavar, help=help)
    add_overwrite(parser)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """The option ``--overwrite`` alone."""
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def refuse_existing(output: Path, overwrite: bool = False) -> None:
    """Raise ``UserError`` where ``output`` exists; to be called before minutes of work."""
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists: give another --output, or add --overwrite")


@contextlib.contextmanager
def whole_file(file: Path | str, *, shared: bool = False) -> Iterator[Path]:
    """A name to write ``file`` under; it takes its own when the block ends well.

    A block that fails leaves nothing behind, and a kill leaves what was there before. Folders on
    the way are made.

    Args:
        file: What is written, replaced where it exists.
        shared: Several processes may write it at once.
    """
    target = Path(file)
    if target.is_dir():
        raise UserError(f"{target} is a folder: give a file")
    if target.exists() and not target.is_file():  # /dev/stdout and its like
        yield target
        return
    target = target.resolve()  # a link stays a link
    temporary = _beside(target, shared)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def whole_folder(folder: Path, *, shared: bool = False) -> Iterator[Path]:
    """An empty folder that takes the name ``folder`` when the block ends well.

    Args:
        folder: What is written. Where it exists, it is replaced, but only if each of its files has
            a successor.
        shared: Several processes may write it at once; the first one's stays.

    Raises:
        UserError: ``folder`` is a file, or holds other files.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder")
    folder = folder.resolve()
    temporary = _beside(folder, shared)
    temporary.mkdir()
    try:
        yield temporary
        _give_name(temporary, folder, shared)
    finally:
        _remove(temporary)


def hold_folder(folder: Path) -> None:
    """Keep other processes from writing into ``folder`` until this one ends, however it ends.

    The lock is the system's, on the file ``.lock`` in it: a kill leaves nothing to be removed. A
    process that holds a folder may ask again.

    Raises:
        UserError: Another process holds it.
    """
    file = folder.resolve() / LOCK
    if fcntl is None or file in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = file.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        raise UserError(
            f"process {owner} writes into {folder}: wait for it, stop it, or give another folder"
        ) from error
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    _held[file] = lock


def write_text(file: Path, text: str) -> None:
    """Write a whole file of UTF-8 text."""
    with whole_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def once(target: Path, build: Callable[[Path], object]) -> bool:
    """Let ``build`` write ``target``, a file or a folder, unless it is there: a step done once.

    Returns:
        Whether it was done now.
    """
    if target.exists():
        return False
    temporary = _beside(target, shared=False)
    try:
        build(temporary)
        temporary.replace(target)
    finally:
        _remove(temporary)
    return True


def _beside(target: Path, shared: bool) -> Path:
    """The temporary name, free of what a kill has left there."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{target.parent} is not a folder: a file is in the way") from error
    number = f"{os.getpid()}-" if shared else ""
    temporary = target.with_name(f"{PREFIX}{number}{target.name}")
    _remove(temporary)
    return temporary


def _give_name(temporary: Path, folder: Path, shared: bool) -> None:
    if shared or not folder.exists():
        try:
            temporary.rename(folder)
        except OSError as error:
            # Another process was faster: its folder is in the way of this one.
            if not shared or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        return
    others = _files(folder) - _files(temporary)
    if others:
        raise UserError(
            f"{folder} holds other files ({min(others)}): remove it, or give another --output"
        )
    old = _beside(folder.with_name(f"old-{folder.name}"), shared=False)
    folder.rename(old)
    temporary.rename(folder)
    _remove(old)


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
