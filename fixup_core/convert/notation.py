"""Inputs and options as a command line writes them.

========================  ==============================================================
``2x3x224x224``           numbers from the normal distribution
``int:2x16``              whole numbers below the network's vocabulary (token ids)
``int:2x16:200``          whole numbers below 200
``ones:2x16``             whole numbers, all 1 (a mask)
``input_ids=int:2x16``    a named argument
========================  ==============================================================
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fixup_core.errors import UserError
from fixup_core.probing import Inputs

INPUT = re.compile(r"((?P<name>\w+)=)?((?P<kind>[a-z]+):)?(?P<shape>\d+(x\d+)*)(:(?P<below>\d+))?")
KINDS = ("float", "int", "ones")
FORM = "write inputs as 2x3x224x224, int:2x16, int:2x16:200, ones:2x16 or input_ids=int:2x16"


def parse_inputs(texts: Sequence[str], vocabulary: int | None, device: str = "cpu") -> Inputs:
    """Random inputs of the kinds and shapes that ``texts`` describe.

    Args:
        texts: One for each argument, all named or none.
        vocabulary: What token ids are below where the text gives no limit.
        device: Where they lie.

    Returns:
        A tensor, a tuple of positional arguments or a dictionary of named ones.

    Raises:
        UserError: A text that cannot be read, or named and positional arguments together.
    """
    named = dict(_parse(text, vocabulary, device) for text in texts)
    if "" not in named and len(named) == len(texts):
        return named
    if len(named) > 1 or "" not in named:
        raise UserError("name all inputs or none, each once: input_ids=int:2x16")
    values = tuple(_parse(text, vocabulary, device)[1] for text in texts)
    return values[0] if len(values) == 1 else values


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts; values as Python or JSON has them, else texts.

    Raises:
        UserError: A text without a key.
    """
    pairs = [text.partition("=") for text in texts]
    for (key, sign, _), text in zip(pairs, texts, strict=True):
        if not sign or not key.isidentifier():
            raise UserError(f"{text!r} is no KEY=VALUE: write options as depth=2")
    return {key: _value(value) for key, _, value in pairs}


def _parse(text: str, vocabulary: int | None, device: str) -> tuple[str, Tensor]:
    found = INPUT.fullmatch(text)
    kind = (found["kind"] or "float") if found else ""
    if found is None or kind not in KINDS or (found["below"] and kind != "int"):
        raise UserError(f"the input {text!r} cannot be read: {FORM}")
    shape = [int(size) for size in found["shape"].split("x")]
    limit = int(found["below"]) if found["below"] else vocabulary
    return found["name"] or "", _drawn(text, kind, shape, limit, device)


def _drawn(text: str, kind: str, shape: list[int], limit: int | None, device: str) -> Tensor:
    if kind == "float":
        return torch.randn(shape, device=device)
    if kind == "ones":
        return torch.ones(shape, dtype=torch.long, device=device)
    if not limit:
        raise UserError(f"{text!r}: the network has no vocabulary, so give a limit, as {text}:200")
    return torch.randint(0, limit, shape, device=device)


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text
