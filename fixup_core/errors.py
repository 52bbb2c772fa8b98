"""Mistakes a user can make, told in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.multiprocessing import ProcessRaisedException


class UserError(ValueError):
    """A mistake the user can mend; its text is one line that says what to do.

    Commands print the text alone, without a traceback, and exit with status 1.
    """


Kinds = type[BaseException] | tuple[type[BaseException], ...]
Advice = tuple[Kinds, str, str]
"""Type of an error, pattern in its text, and what the user is told: ``{error}`` in it stands for
the error's text, ``{filename}`` for the file it is about."""

RAISED = re.compile(r"^(?:\w+\.)*(\w+): (.*(?:\n[ \t].*)*)", re.MULTILINE)
"""An error at the end of a printed traceback: its class and its text."""


def explain(error: BaseException, known: Sequence[Advice] = ()) -> str | None:
    """One line for an error a user can cause, ``None`` for any other.

    The errors it was raised from are looked at too: frameworks hide the reason behind their own.

    Args:
        error: What was raised.
        known: What to say of errors that other people's code raises; a ``UserError`` speaks for
            itself.
    """
    told = list(_told(error))
    for one in told:
        if UserError.__name__ in one.kinds:
            return one_line(one.text)
    # The first cause says most.
    for one in reversed(told):
        for kind, pattern, advice in known:
            if one.is_a(kind) and re.search(pattern, one.text):
                return one_line(advice.format(error=one_line(one.text), filename=one.subject))
    return None


@dataclass(frozen=True)
class _Told:
    """An error as it can be matched: the names of its classes, its text, and what it is about."""

    kinds: frozenset[str]
    text: str
    subject: str

    def is_a(self, kind: Kinds) -> bool:
        classes = kind if isinstance(kind, tuple) else (kind,)
        return any(one.__name__ in self.kinds for one in classes)


def _told(error: BaseException | None) -> Iterator[_Told]:
    """The error, then what it was raised from; last the errors of a spawned rank, which hands its
    traceback over as a text.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text, kinds = str(error), frozenset(kind.__name__ for kind in type(error).__mro__)
        yield _Told(kinds, text, str(getattr(error, "filename", None) or text))
        if isinstance(error, ProcessRaisedException):
            for kind, raised in reversed(RAISED.findall(text)):
                yield _Told(frozenset({kind}), raised, raised)
        hidden = error.__suppress_context__
        error = error.__cause__ or (None if hidden else error.__context__)


def one_line(text: str) -> str:
    """The text without line breaks, 500 characters of it at the most."""
    return " ".join(text.split())[:500]
