"""Mistakes a user can make, each explained in one line.

The advice here is common to both halves: files that are missing, damaged or cannot be written.
``fixup_mt.errors`` and ``vision.errors`` add what is their own; ``fixup_core.command_line`` prints
the line.
"""

from __future__ import annotations

import csv
import errno
import json
import lzma
import os
import pickle
import re
import tarfile
import traceback
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


class UserError(ValueError):
    """A mistake the user can mend; its text is one line that says what to do.

    Commands print the text alone, without a traceback, and exit with status 2.
    """


Kind = type[BaseException] | str
"""A class of errors, or its name where importing the class would take long."""
Kinds = Kind | tuple[Kind, ...]
Advice = tuple[Kinds, str, str]
"""Type of an error, pattern in its text, and what to say: ``{error}`` in it stands for the error's
text, ``{file}`` for the file it is about."""


def _errno(*numbers: int) -> str:
    return rf"^\[Errno ({'|'.join(map(str, numbers))})\]"


COMMON: tuple[Advice, ...] = (
    (OSError, _errno(errno.ENOENT), "{file} does not exist: check the path"),
    (FileNotFoundError, r"^(?!\[Errno)", "{error}: check the path"),
    (OSError, _errno(errno.EISDIR), "{file} is a folder: give a file"),
    (OSError, _errno(errno.ENOTDIR), "{file} goes through a file, not a folder: check the path"),
    (OSError, _errno(errno.EEXIST), "{file} is in the way: give another place"),
    (OSError, _errno(errno.EACCES, errno.EPERM), "{file} is not yours to read or write"),
    (OSError, _errno(errno.EROFS), "{file} lies on a read-only disk: give another place"),
    (OSError, _errno(errno.ENAMETOOLONG), "this name is too long: {file}"),
    (
        OSError,
        _errno(errno.ENOSPC, errno.EDQUOT),
        "no space is left on the disk: make room, and start again",
    ),
    (
        OSError,
        _errno(errno.EFBIG),
        "a file would grow above the limit for files: raise it (ulimit -f), and start again",
    ),
    (OSError, _errno(errno.EMFILE), "too many files are open: raise the limit (ulimit -n)"),
    (
        RuntimeError,
        r"PytorchStreamWriter|inline_container\.cc.*(write|unexpected pos)|unexpected pos \d+ vs",
        "a file could not be written whole: make room on the disk, and start again",
    ),
    (
        RuntimeError,
        "PytorchStreamReader|central directory",
        "{file} is truncated or not a checkpoint: take another file of the same folder",
    ),
    (
        pickle.UnpicklingError,
        "",
        "{file} cannot be loaded safely: it is damaged, or holds objects of other classes than a "
        "checkpoint does",
    ),
    (EOFError, "Ran out of input", "{file} is empty: take another file of the same folder"),
    (EOFError, "", "{file} is empty or ends too early: it is damaged"),
    (UnicodeDecodeError, "", "{file} is not UTF-8 text ({error}): convert it first"),
    (json.JSONDecodeError, "", "{file} is not JSON, or is damaged: {error}"),
    (
        (csv.Error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error),
        "",
        "{file} is damaged: {error}",
    ),
    ("BadGzipFile", "", "{file} is damaged: {error}"),
)
"""What to say of errors that Python and torch raise about files."""

LOADING = "{file} is damaged, or not a checkpoint: take another file of the same folder"
"""What to say of any other error inside ``torch.load``: bytes of other files can raise anything."""

RAISED = re.compile(r"^(?:\w+\.)*(\w+): (.*(?:\n[ \t].*)*)", re.MULTILINE)
"""An error at the end of a printed traceback: its class and its text."""


def explain(error: BaseException, known: Sequence[Advice] = ()) -> str | None:
    """One line for an error a user can cause, ``None`` for any other.

    The errors it was raised from are looked at too: frameworks hide the reason behind their own.

    Args:
        error: What was raised.
        known: What to say of errors that other people's code raises, before the common advice; a
            ``UserError`` speaks for itself.
    """
    found = list(_causes(error))
    for one in found:
        if UserError.__name__ in one.kinds:
            return one_line(one.text)
    # The first cause says most.
    for one in reversed(found):
        # A file that was looked for in vain does not explain what failed while it was made.
        for kind, pattern, advice in (*known, *(COMMON if one.direct else ())):
            if one.is_a(kind) and re.search(pattern, one.text):
                return one_line(advice.format(error=one_line(one.text), file=one.file))
        if one.direct and one.loading:
            return one_line(LOADING.format(file=one.file))
    return None


@dataclass(frozen=True)
class _Cause:
    """An error as it can be matched.

    Attributes:
        kinds: The names of its classes.
        text: What it says.
        file: The file it is about, as a sentence can name it.
        loading: Whether it was raised while that file was loaded.
        direct: Whether it is the error itself, or what that was explicitly raised from.
    """

    kinds: frozenset[str]
    text: str
    file: str = "the file"
    loading: bool = False
    direct: bool = True

    def is_a(self, kinds: Kinds) -> bool:
        each = kinds if isinstance(kinds, tuple) else (kinds,)
        return any(
            (kind if isinstance(kind, str) else kind.__name__) in self.kinds for kind in each
        )


def _causes(error: BaseException | None) -> Iterator[_Cause]:
    """The error, then what it was raised from; last the errors of a spawned rank, which hands its
    traceback over as a text.
    """
    seen: set[int] = set()
    direct = True
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        kinds = frozenset(kind.__name__ for kind in type(error).__mro__)
        text, loaded = str(error), _loaded_file(error)
        named = getattr(error, "filename2", None) or getattr(error, "filename", None) or loaded
        # Of the machine, not of the file: nobody should throw a good checkpoint away for it.
        machine = kinds & {"MemoryError", "OutOfMemoryError"} or "CUDA" in text
        loading = loaded is not None and not machine
        yield _Cause(kinds, text, str(named or "the file"), loading, direct)
        if "ProcessRaisedException" in kinds:
            for number, (kind, raised) in enumerate(reversed(RAISED.findall(text))):
                yield _Cause(frozenset({kind}), raised, direct=direct and not number)
        direct = direct and error.__cause__ is not None
        hidden = error.__suppress_context__
        error = error.__cause__ or (None if hidden else error.__context__)


def _loaded_file(error: BaseException) -> str | None:
    """The file that ``torch.load`` was reading; its errors do not name it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_name == "load" and code.co_filename.endswith("torch/serialization.py"):
            file = frame.f_locals.get("f")
            name = getattr(file, "name", file)
            return os.fspath(name) if isinstance(name, str | os.PathLike) else "the file"
    return None


def one_line(text: str) -> str:
    """The text without line breaks, 500 characters of it at the most."""
    return " ".join(text.split())[:500]
