"""Command line: ``python -m vision fit|validate|test|predict --config ...`` and ``... sweep``."""

from __future__ import annotations

import sys

from jsonargparse import auto_cli

from fixup_core.errors import explain
from vision.cli import VisionCLI
from vision.errors import KNOWN, Parser
from vision.sweep import COMMANDS


def main() -> None:
    """Run the command line; a mistake ends in one line and status 1."""
    try:
        if sys.argv[1:2] == ["sweep"]:
            auto_cli(
                COMMANDS, args=sys.argv[2:], parser_class=Parser, prog="python -m vision sweep"
            )
        else:
            VisionCLI()
    except Exception as error:
        line = explain(error, KNOWN)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
