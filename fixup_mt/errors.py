"""What a user can get wrong, told in one line."""

from __future__ import annotations

import difflib
import pickle
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from torch.multiprocessing import ProcessRaisedException


class UserError(ValueError):
    """A mistake the user can mend; its text is one line that says what to do.

    Commands print the text alone, without a traceback, and exit with status 1.
    """


Kinds = type[BaseException] | tuple[type[BaseException], ...]
KNOWN: tuple[tuple[Kinds, str, str], ...] = (
    (
        FloatingPointError,
        "",
        "training diverged ({error}). No checkpoint was harmed: lower --lr, lengthen "
        "--warmup-updates or set --clip-norm, and start again",
    ),
    (
        pickle.UnpicklingError,
        "",
        "not a checkpoint that can be loaded safely: it is damaged, or holds objects of other "
        "classes than fairseq's own checkpoints do. Use one that fairseq wrote",
    ),
    (
        RuntimeError,
        "PytorchStreamReader|central directory",
        "the checkpoint is truncated or not a checkpoint ({error}). Restore from another "
        "file of the same folder with --restore-file or --path",
    ),
    (
        EOFError,
        "Ran out of input",
        "the checkpoint is empty. Restore from another file of the same folder",
    ),
    (
        (RuntimeError, KeyError),
        "Neither args nor cfg exist|^'(best_loss|extra_state|optimizer_history)'$",
        "this file is not a fairseq checkpoint: it lacks what fairseq-train writes. Use one "
        "that it wrote",
    ),
    (
        RuntimeError,
        r"Error\(s\) in loading state_dict",
        "the checkpoint does not fit the model: it was trained with another --arch, other sizes "
        "or another dictionary. Use the settings and the data directory it was trained with",
    ),
    (
        Exception,
        "Cannot load model parameters",
        "{error} Use the --arch, sizes and data directory it was trained with",
    ),
    (
        Exception,
        "Could not infer language pair",
        "no fairseq data in this directory: give the folder that fairseq-preprocess wrote, or "
        "--source-lang and --target-lang",
    ),
    (FileNotFoundError, "Dataset not found", "{error}: run fairseq-preprocess for this split"),
    (FileNotFoundError, "", "{filename} does not exist: check the path"),
    (AssertionError, "Source and target must contain", "{error}: prepare the data again"),
    (
        IndexError,
        "index out of range in self",
        "the data hold a word id beyond the dictionary, or a sentence beyond the learned "
        "positions: prepare the data again, or raise --max-source-positions",
    ),
)
"""Type, pattern in the text, and what the user is told, for errors that fairseq lets through."""

RAISED = re.compile(r"^(?:\w+\.)*(\w+): (.*(?:\n[ \t].*)*)", re.MULTILINE)
"""An error at the end of a printed traceback: its class and its text."""


def explain(error: BaseException) -> str | None:
    """One line for an error a user can cause, ``None`` for any other.

    The errors it was raised from are looked at too: fairseq hides the reason behind its own.
    """
    told = list(_told(error))
    for one in told:
        if UserError.__name__ in one.kinds:
            return _one_line(one.text)
    # The first cause says most.
    for one in reversed(told):
        for kind, pattern, advice in KNOWN:
            if one.is_a(kind) and re.search(pattern, one.text):
                return _one_line(advice.format(error=_one_line(one.text), filename=one.subject))
    return None


def check_architecture(argv: Sequence[str], known: Sequence[str]) -> None:
    """Raise ``UserError`` naming the nearest architectures where ``--arch`` names none."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        name = value if flag in ("--arch", "-a") else flag.removeprefix("--arch=")
        if (flag in ("--arch", "-a") or name != flag) and name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise UserError(
                f"there is no architecture {name!r}; the nearest: {', '.join(near) or 'none'}"
            )


def install_hook() -> None:
    """Let a command that dies of an explained error print its line, without a traceback."""
    before = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        line = explain(error)
        if line is None:
            before(kind, error, traceback)
        else:
            print(f"error: {line}", file=sys.stderr)

    sys.excepthook = hook


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


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
