"""Fixup ResNets and their rivals; the command line is ``python -m vision``."""

from pathlib import Path

RUNS = Path("runs/vision")
"""Where commands leave what they make, unless another place is given."""
