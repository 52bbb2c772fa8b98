"""``python -m fixup_core COMMAND``: measurements and conversions of networks."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence

from fixup_core.command_line import Command, run_chosen, run_command

COMMANDS = {
    "check": Command(
        "fixup_core.measure.check",
        "how one step's change of the network's function depends on its depth",
    ),
    "convert": Command(
        "fixup_core.convert.command",
        "what fixup_ makes of a network, found by the name of a function or of a library",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    line = sys.argv[1:] if argv is None else argv
    return run_command(lambda: run_chosen("python -m fixup_core", __doc__, COMMANDS, line))


if __name__ == "__main__":
    # What libraries and networks say as they are loaded and built is nothing a user could mend.
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    sys.exit(main())
