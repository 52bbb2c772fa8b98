"""One custom at every door: how the project's command lines end.

======  ===============================================================================
status  meaning
======  ===============================================================================
0       done
1       ``check`` finds a network that is not flat; or a bug, with its traceback
2       a mistake: one line on stderr that begins with ``error:``
130     Ctrl-C: one line
141     the reader of a pipe has gone (``| head``): silent
143     SIGTERM, before the work was done: one line
======  ===============================================================================
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fixup_core.errors import Advice, UserError, explain, one_line

MISTAKE = 2
INTERRUPTED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM


class Terminated(BaseException):
    """SIGTERM has come; raised in the main thread, so that files and processes are put in order."""


class Parser(argparse.ArgumentParser):
    """argparse's parser; a mistake is a ``UserError``, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Raise the mistake."""
        raise UserError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class Command:
    """A subcommand, as a help text lists it.

    Attributes:
        module: Imported when the command is called alone. It has ``add_arguments(parser)`` and
            ``run(args)``, which returns the status or ``None``.
        summary: One line.
    """

    module: str
    summary: str


def build_parser(
    prog: str, description: str | None, commands: Mapping[str, Command], chosen: str = ""
) -> Parser:
    """The parser of all commands, with the options of the ``chosen`` one alone."""
    parser = Parser(prog=prog, description=description)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary)
        if name == chosen:
            module = importlib.import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def run_chosen(
    prog: str, description: str | None, commands: Mapping[str, Command], argv: Sequence[str]
) -> int | None:
    """Import the command that ``argv`` names and run it; returns its status."""
    parser = build_parser(prog, description, commands, chosen=argv[0] if argv else "")
    args = parser.parse_args(argv)
    return args.run(args)


def speak_utf8() -> None:
    """Let standard input and output be UTF-8, whatever the locale says."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if encoding.lower().replace("-", "") != "utf8" and hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")


def run_command(command: Callable[[], int | None], known: Sequence[Advice] = ()) -> int:
    """Call ``command`` and return the exit status, as the table above has it.

    Args:
        command: All of the work, the imports that take long included.
        known: What to say of errors that other people's code raises (see ``explain``).

    Raises:
        Exception: A bug; it keeps its traceback.
    """
    speak_utf8()
    with _noting_sigterm() as sigterm:
        try:
            status = command() or 0
            sys.stdout.flush()
            return status
        except BaseException as error:
            # Whatever has ended the work since: Lightning exits with 0, a worker's death raises.
            if sigterm.is_set() and not isinstance(error, KeyboardInterrupt):
                error = Terminated()
            ended = report(error, known)
            if ended is None:
                raise
            return ended


def report(error: BaseException, known: Sequence[Advice] = ()) -> int | None:
    """Print the line that ``error`` deserves; returns the exit status, ``None`` for a bug."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
        error = error.__context__  # Lightning exits with 1 in its place
    match error:
        case SystemExit(code=None | int() as code):
            return code or 0
        case KeyboardInterrupt():
            _say("; ".join(["interrupted", *map(str, error.args)]))
            return INTERRUPTED
        case Terminated():
            _say("terminated before the work was done")
            return TERMINATED
        case BrokenPipeError() if _reader_has_gone():
            # Python flushes once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED
    line = explain(error, known) if isinstance(error, Exception) else None
    if line is None:
        return None
    _say(f"error: {line}")
    return MISTAKE


def _say(line: str) -> None:
    """A line of its own, below the progress bars that are still open."""
    for bar in list(getattr(sys.modules.get("tqdm"), "tqdm", _NoBars)._instances):
        with contextlib.suppress(Exception):
            bar.close()
    print(one_line(line), file=sys.stderr, flush=True)


class _NoBars:
    """Stands for tqdm where nothing has imported it."""

    _instances: tuple[Any, ...] = ()


def _reader_has_gone() -> bool:
    """Whether stdout is a pipe that nobody reads; another pipe's end would be a bug."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):
        return False


@contextlib.contextmanager
def _noting_sigterm() -> Iterator[threading.Event]:
    """Raise ``Terminated`` at SIGTERM, or note it only where a framework stops by itself.

    Lightning puts a handler before this one and stops behind the step, its checkpoint written.
    """
    came, owner = threading.Event(), os.getpid()

    def handler(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a forked worker ends as it would have done
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        came.set()
        if signal.getsignal(number) is handler:
            raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, handler)
    try:
        yield came
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)
