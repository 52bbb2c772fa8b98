"""The parser of the commands that jsonargparse serves: a mistake is one line."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from typing import Any, NoReturn

from lightning import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from fixup_core.command_line import MISTAKE
from fixup_core.errors import UserError, one_line
from vision.data import TensorData, VisionData
from vision.imports import import_object


class Parser(LightningArgumentParser):
    """Lightning's parser; a mistake is one line, with the nearest right option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and exit with status 2."""
        print(f"error: {_shortened(message)}{self._nearest(message)}", file=sys.stderr)
        sys.exit(MISTAKE)

    def _nearest(self, message: str) -> str:
        wrong = re.search(
            r"[Uu]nrecognized arguments: (--\S+)|Option '(\S+)' is not accepted", message
        )
        if not wrong:
            return ""
        name = (wrong[1] or f"--data.{wrong[2]}").split("=")[0]
        if wrong[2] and name in self._options():
            return _owners(name)
        options = sorted(self._options() - {name, "--help"})
        same = [option for option in options if option.split(".")[-1] == name.lstrip("-")]
        if same:
            return f"; did you mean {' or '.join(same[:3])}?"
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
        return f"; did you mean {near[0]}?" if near else "; see --help"

    def _options(self) -> set[str]:
        """All options of all subcommands, and those of the data modules."""
        parsers: list[Any] = [self]
        for action in self._actions:
            parsers += (getattr(action, "choices", None) and _parsers(action.choices)) or []
        found = {name for parser in parsers for name in parser._option_string_actions}
        modules = [VisionData, *_subclasses(VisionData)]
        return found | {f"--data.{name}" for cls in modules for name in _parameters(cls)}


def _parsers(choices: Any) -> list[Any]:
    values = choices.values() if isinstance(choices, dict) else ()
    return [value for value in values if hasattr(value, "_option_string_actions")]


def _subclasses(cls: type) -> list[type]:
    direct: list[type] = cls.__subclasses__()
    return direct + [below for one in direct for below in _subclasses(one)]


def _owners(option: str) -> str:
    """Which data modules an option of some belongs to."""
    name = option.removeprefix("--data.")
    if name in _parameters(VisionData):
        return f"; give --data before {option}"
    modules = [cls for cls in _subclasses(VisionData) if cls is not TensorData]
    having = ", ".join(sorted(cls.__name__ for cls in modules if name in _parameters(cls)))
    return f" by these data: it is an option of {having}; give --data before it"


def _parameters(cls: type) -> set[str]:
    """Of a class and of those that it passes further options on to."""
    found: set[str] = set()
    for above in cls.__mro__:
        parameters = inspect.signature(above).parameters.values()
        found |= {one.name for one in parameters}
        if all(one.kind is not one.VAR_KEYWORD for one in parameters):
            break
    return found


def _why_not(path: str, message: str) -> str:
    """What is wrong with a data module of the user's own."""
    try:
        kind = import_object(path, "--data")
    except UserError as error:
        return str(error)
    if not (isinstance(kind, type) and issubclass(kind, LightningDataModule)):
        return f"--data {path} is no LightningDataModule"
    return one_line(f"--data {path}: {message.splitlines()[-1]}")


def _shortened(message: str) -> str:
    """The sentences that say what is wrong, without the listings of types that were tried."""
    wrong = re.search(r'Parser key "(?:recipe\.)?data":.*Given value: (\S+)$', message, re.DOTALL)
    if wrong:
        if "." in wrong[1]:
            return _why_not(wrong[1], message)
        names = [cls.__name__ for cls in _subclasses(VisionData) if cls is not TensorData]
        near = difflib.get_close_matches(wrong[1].split(".")[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        return f"there is no data module {wrong[1]}; {hint}"
    lines = [line.strip(" -") for line in message.splitlines()]
    refused = [line for line in lines if line.startswith("Option '")]
    said = one_line(refused[0] if refused else " ".join(lines))
    return said.replace("a <class 'collections.abc.Sequence'>", "a list, as '[1,2]'")
