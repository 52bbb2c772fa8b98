"""``python -m fixup_core COMMAND``: measurements of networks."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import warnings

from fixup_core.errors import explain

COMMANDS = {"check": "how one step's change of the network's function depends on its depth"}
"""Each a module with ``add_arguments(parser)`` and ``run(args)``, which returns the exit status."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; a mistake ends in one line and status 2."""
    parser = argparse.ArgumentParser(prog="python -m fixup_core", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"fixup_core.measure.{name}")
        subparser = subparsers.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # What libraries and networks say as they are loaded and built is nothing a user could mend.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.exit(main())
