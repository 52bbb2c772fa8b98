"""What the exports of both halves share: their options, their check and what they say.

An export is written under a temporary name, run, and held against the network's own outputs; only
then does it get its name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fixup_core.errors import UserError
from fixup_core.files import add_output


def add_export_options(
    parser: argparse.ArgumentParser, *, source: str, metavar: str, help: str
) -> None:
    """``--checkpoint``, ``--output`` and ``--overwrite``.

    Args:
        parser: The command's.
        source: The command that writes checkpoints.
        metavar: ``FILE`` or ``PATH``: what is written.
        help: What is written, in words.
    """
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help=f"of {source}"
    )
    add_output(parser, metavar=metavar, help=help)


def check_checkpoint(file: Path, source: str) -> None:
    """Raise ``UserError`` unless ``file`` is one; what is in it shows when it is loaded."""
    if file.is_dir():
        raise UserError(f"{file} is a folder: give a checkpoint of {source}")
    if not file.exists():
        raise UserError(f"{file} does not exist: give a checkpoint of {source}")


def check_difference(engine: str, outputs: str, off: float, tolerance: float) -> None:
    """Raise ``UserError`` unless an engine's outputs are the network's.

    Args:
        engine: That has run the written files.
        outputs: What is compared, as "logits".
        off: Their largest difference; not a number is too large.
        tolerance: The largest that other orders of additions explain.
    """
    if not off <= tolerance:
        raise UserError(
            f"the {outputs} of {engine} differ from the network's by up to {off:.1e}: nothing is "
            "written"
        )


def describe_export(output: Path, engine: str, outputs: str, off: float) -> str:
    """The line that a finished export prints."""
    files = [output] if output.is_file() else [each for each in output.rglob("*") if each.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    return f"{output}: {size:.1f} MB; the {outputs} of {engine} differ by {off:.1e} at the most"
