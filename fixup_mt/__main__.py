"""``python -m fixup_mt``: where the plugin lies, and the tools around it.

Without a command it prints the folder for fairseq's ``--user-dir``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "average": ("scoring.average", "average the weights of several checkpoints into one"),
    "corpus": ("demo.corpus", "write the built-in German-English corpus"),
    "demo": ("demo.demo", "train Fixup, T-Fixup and LayerNorm side by side on the built-in corpus"),
    "export": (
        "serving.export",
        "write a trained model for other engines: CTranslate2, ONNX, plain weights",
    ),
    "score": (
        "scoring.score",
        "BLEU of what fairseq-generate wrote, with signature and settings",
    ),
    "sweep": ("sweep.sweep", "train methods over depths, learning rates and warm-ups, and compare"),
    "translate": ("serving.translate", "translate text with an exported model"),
}
"""Module and summary of each command; the module is imported when the command is called."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    line = sys.argv[1:] if argv is None else argv
    if not line:
        print(Path(__file__).resolve().parent)
        return 0
    # Scripts ask for the folder alone, and torch takes seconds to import.
    from fixup_core.command_line import Command, run_chosen, run_command
    from fixup_mt.errors import KNOWN

    commands = {
        name: Command(f"fixup_mt.{place}", summary) for name, (place, summary) in COMMANDS.items()
    }
    return run_command(lambda: run_chosen("python -m fixup_mt", __doc__, commands, line), KNOWN)


if __name__ == "__main__":
    # fairseq's log is for fairseq's commands.
    logging.disable(logging.INFO)
    sys.exit(main())
