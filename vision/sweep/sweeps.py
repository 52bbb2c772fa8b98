"""The commands ``python -m vision sweep depth|lr|degradation|lesion``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import auto_cli

from vision.cli import silence_needless
from vision.parser import Parser
from vision.sweep.figures import degradation, depth, lr
from vision.sweep.lesion import lesion

COMMANDS: dict[str, Any] = {
    "depth": depth,
    "lr": lr,
    "degradation": degradation,
    "lesion": lesion,
}


def run_sweep(line: Sequence[str]) -> None:
    """Run the sweep that ``line`` names, with its options."""
    silence_needless()
    auto_cli(
        COMMANDS,
        as_positional=False,
        args=list(line),
        parser_class=Parser,
        prog="python -m vision sweep",
    )
