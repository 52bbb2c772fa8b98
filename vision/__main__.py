"""Command line: ``python -m vision fit|validate|test|predict --config ...``, and tools around it.

``sweep depth|lr|degradation|lesion`` draws the paper's figures, ``compare`` sets finished runs side
by side, ``export`` writes a network as ONNX, ``demo`` trains Fixup and BatchNorm on the built-in
digits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from fixup_core.errors import explain
from vision.cli import RUNS, VisionCLI
from vision.compare import compare, demo
from vision.errors import KNOWN, Parser
from vision.export import export
from vision.sweep.points import COMMANDS


def _compare(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vision compare", description="A table of finished runs, and their curves."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    default = RUNS / "compare.png"
    parser.add_argument("--output", type=Path, default=default, help=f"figure; {default}")
    args = parser.parse_args(argv)
    compare(args.runs, args.output)


def _tool(functions: Any, name: str) -> Callable[[list[str]], object]:
    program = f"python -m vision {name}"
    return lambda argv: auto_cli(
        functions, as_positional=False, args=argv, parser_class=Parser, prog=program
    )


TOOLS: dict[str, Callable[[list[str]], object]] = {
    "sweep": _tool(COMMANDS, "sweep"),
    "compare": _compare,
    "export": _tool(export, "export"),
    "demo": _tool(demo, "demo"),
}


def main() -> None:
    """Run the command line; a mistake ends in one line and status 1."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        if command in TOOLS:
            TOOLS[command](sys.argv[2:])
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
