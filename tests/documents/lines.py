"""Command lines as documents show them, parsed by the programs' own parsers and not run."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.conftest import ROOT

RECIPE = "recipes/vision/cifar10_cpu.yaml"
"""Stands for a configuration that a document does not name, or that a run leaves."""
SEPARATORS = {"|", ">", ">>", ";", "&&", "||", "&"}
NOTHING_TO_PARSE = {"echo", "."}


class Parsed(BaseException):
    """The parser has accepted the line; raised before anything is done."""


class BadLineError(Exception):
    """A line that its program refuses, or that no program is known for."""


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a shell block, word by word."""
    for line in re.sub(r"\\\n", " ", block).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|>;&")
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        into_file = False
        for word in lexer:
            if word in SEPARATORS:
                if command:
                    yield command
                command, into_file = [], word in {">", ">>"}
            elif into_file:
                into_file = False
            else:
                command.append(word)
        if command:
            yield command


def check(command: list[str]) -> None:
    """Parse a command; ``...`` in it stands for what its reader puts there.

    Raises:
        BadLineError: It is refused, or of no known kind.
    """
    program, *rest = command
    if program in NOTHING_TO_PARSE:
        return
    for kind, parse in KINDS.items():
        if match := re.fullmatch(kind, program):
            parse(match, rest)
            return
    raise BadLineError(f"no parser is known for {' '.join(command)}")


def _python(_: re.Match[str], words: list[str]) -> None:
    if words[0] != "-m":
        _parse(lambda: runpy.run_path(str(ROOT / words[0]), run_name="__main__"), words[0], words)
    elif words[1] == "vision":
        _vision(words[2:])
    elif words[1].startswith("tests."):
        _parse(lambda: runpy.run_module(words[1], run_name="__main__"), words[1], words[1:])
    else:
        main = importlib.import_module(f"{words[1]}.__main__").main
        if words[2:]:
            _parse(lambda: main(words[2:]), words[1], words[1:])


def _vision(words: list[str]) -> None:
    from vision.__main__ import main

    # A configuration of a run that a reader has made, or one of the reader's choice.
    for i, word in enumerate(words[:-1]):
        if word == "--config" and not Path(ROOT, words[i + 1]).exists():
            words[i + 1] = RECIPE
    line = [word for word in words if word != "..."]
    _parse(lambda: main(line), "vision", line)


def _fairseq(match: re.Match[str], words: list[str]) -> None:
    from fairseq import options

    if match[1] == "hydra-train":
        _overrides([word for word in words if word != "..."])
        return
    make = {
        "train": options.get_training_parser,
        "generate": options.get_generation_parser,
        "preprocess": options.get_preprocessing_parser,
    }[match[1]]
    parser = make()
    if match[1] == "preprocess":
        line = [word for word in words if word != "..."]
        _parse(lambda: parser.parse_args(line), "fairseq", line)
    else:
        words = ["data" if word == "..." else word for word in words]
        _parse(lambda: options.parse_args_and_arch(parser, words), "fairseq", words, raises=False)


def _overrides(words: list[str]) -> None:
    from fairseq.models import ARCH_MODEL_REGISTRY
    from hydra.core.override_parser.overrides_parser import OverridesParser

    import fixup_mt  # noqa: F401 (registers the models)

    for override in OverridesParser.create().parse_overrides(words):
        value = override.value()
        if isinstance(value, dict) and value["_name"] not in ARCH_MODEL_REGISTRY:
            raise BadLineError(f"there is no architecture {value['_name']}")


def _launched(_: re.Match[str], words: list[str]) -> None:
    """``torchrun`` and ``srun`` start a module; their own options come before it."""
    at = words.index("-m")
    if words[at + 1] != "fairseq_cli.train":
        raise BadLineError(f"{words[at + 1]} is launched")
    given = ["--user-dir", "fixup_mt", "--arch", "transformer_fixup"]
    line = [*given, *(word for word in words[at + 2 :] if word != "...")]
    _fairseq(re.fullmatch("(.*)", "train"), ["data", *line])  # type: ignore[arg-type]


def _recipe(match: re.Match[str], words: list[str]) -> None:
    usage = _run(match[0], "--help")
    unknown = [w for w in words if w.startswith("--") and not re.search(rf"^ +{w}\b", usage, re.M)]
    if unknown:
        raise BadLineError(f"{match[0]} has no {', '.join(unknown)}")
    if match[1] != "evaluate":
        _run(match[0], *words, "--dry-run", "--output", "/no/such/folder")


def _grid(_: re.Match[str], words: list[str]) -> None:
    if not Path(ROOT, words[0]).is_file():
        raise BadLineError(f"{words[0]} is missing")
    _vision(["fit", "--config", RECIPE, *words[3:]])


def _make(_: re.Match[str], words: list[str]) -> None:
    known = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert known is not None
    unknown = set(words) - set(known[1].split())
    if unknown:
        raise BadLineError(f"make knows no {' '.join(unknown)}")


def _pip(_: re.Match[str], words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    match = re.fullmatch(r"\.\[(.*)\]", words[-1])
    if match is None or match[1] not in extras["optional-dependencies"]:
        raise BadLineError(f"pip cannot install {words[-1]}")


KINDS: dict[str, Callable[[re.Match[str], list[str]], None]] = {
    "python": _python,
    "fairseq-(train|generate|preprocess|hydra-train)": _fairseq,
    "torchrun|srun": _launched,
    r"recipes/mt/(\w+)\.sh": _recipe,
    r"benchmarks/cifar10/grid\.sh": _grid,
    "make": _make,
    "pip": _pip,
}


@functools.cache
def _run(*line: str) -> str:
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise BadLineError(f"{' '.join(line)}: {done.stderr}")
    return done.stdout


def _parse(call: Callable[[], Any], name: str, words: list[str], raises: bool = True) -> None:
    """Call what parses ``words``, and stop it there."""
    said = io.StringIO()
    with (
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
        mock.patch.object(sys, "argv", words),
        mock.patch.object(sys, "path", [str(ROOT / Path(name).parent), *sys.path]),
        _stopping(raises),
    ):
        try:
            status = call()
        except Parsed:
            return
        except SystemExit as error:
            status = error.code
    if raises or status in (1, 2):
        raise BadLineError(f"{name} {' '.join(words)}: {said.getvalue()}")


@contextlib.contextmanager
def _stopping(raises: bool) -> Iterator[None]:
    """Let the outermost ``parse_args`` end in ``Parsed``."""
    if not raises:
        yield
        return
    from vision.parser import Parser

    depth = 0

    def stopping(original: Any) -> Any:
        def parse_args(self: Any, *args: Any, **options: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                found = original(self, *args, **options)
            finally:
                depth -= 1
            if not depth:
                raise Parsed
            return found

        return parse_args

    with (
        mock.patch.object(
            argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args)
        ),
        mock.patch.object(Parser, "parse_args", stopping(Parser.parse_args)),
    ):
        yield
