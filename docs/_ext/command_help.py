"""``{command-help} python -m fixup_mt score``: what the command's ``--help`` prints, at build."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

WIDTH = "88"


def help_text(line: str) -> str:
    """The text that ``python -m PACKAGE ... --help`` prints."""
    words = line.split()
    if words[:2] != ["python", "-m"]:
        raise ValueError(f"no command of this project: {line}")
    program = importlib.import_module(f"{words[2]}.__main__")
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": WIDTH, "NO_COLOR": "1"}),
        contextlib.redirect_stdout(printed),
    ):
        status = program.main([*words[3:], "--help"])
    if status:
        raise ValueError(f"{line} --help ends with status {status}")
    return printed.getvalue().strip()


class CommandHelp(SphinxDirective):
    """A literal block of a help text."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        text = help_text(self.arguments[0])
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": False}
