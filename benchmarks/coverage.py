"""Which networks of timm, torchvision and transformers ``fixup_`` converts, and what it leaves.

``python benchmarks/coverage.py --output runs/coverage.jsonl`` converts every network of
``coverage.txt``, each in a process of its own, and prints a line for it; ``--only`` chooses. Every
finished network is a line of the output; another start goes on behind it. ``--table`` prints counts
in Markdown.

=========  ====================================================================================
converted  every parameter that had a gradient before has one after, and every scalar
dead       some have none within four steps
refused    by a line of ``fixup_``
crashed    anything else went wrong, or it took longer than ``--limit`` seconds
=========  ====================================================================================
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import logging
import os
import re
import shlex
import string
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fixup_core import fixup_
from fixup_core.convert.command import add_arguments, inputs_of
from fixup_core.convert.notation import parse_options
from fixup_core.convert.targets import find
from fixup_core.errors import UserError, one_line
from fixup_core.probing import Inputs, arguments_of, float_tensors

LIST = Path(__file__).with_suffix(".txt")
OUTCOMES = ("converted", "dead", "refused", "crashed")
NORMALISING = re.compile(r"(batch|layer|group|instance|rms)_norm|linalg_vector_norm|rsqrt")
STEPS, RATE = 4, 0.05


@dataclass(frozen=True)
class Listed:
    """A network of the list.

    Attributes:
        library: Where it comes from.
        family: What it is among the library's networks.
        line: What ``python -m fixup_core convert`` takes.
    """

    library: str
    family: str
    line: str

    @property
    def name(self) -> str:
        """Its own, for those who read."""
        return self.line.split()[0]


def listed(text: str) -> Iterator[Listed]:
    """The networks of a list: words to be filled in, headings and lines."""
    words: dict[str, str] = {}
    library = family = ""
    for row in filter(None, (row.partition("#")[0].strip() for row in text.splitlines())):
        if heading := re.fullmatch(r"\[(.+), (.+)\]", row):
            library, family = heading.groups()
        elif definition := re.fullmatch(r"([A-Z]+) = (.+)", row):
            words[definition[1]] = string.Template(definition[2]).substitute(words)
        else:
            yield Listed(library, family, string.Template(row).substitute(words))


class Normalising(TorchDispatchMode):
    """Counts the operations that normalise, in ``found``."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += bool(NORMALISING.search(func.__name__))
        return func(*args, **(kwargs or {}))


def measure(line: str) -> dict[str, Any]:
    """Convert one network, as its line says; what was found as JSON has it."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(shlex.split(line))
    torch.manual_seed(0)
    target = find(args.target, parse_options(args.set), args.model, meta=False)
    net, inputs = target.net.train(), inputs_of(target, args)
    assert inputs is not None
    known = {name for name, _ in net.named_parameters()}
    before, before_ops = learning(net, inputs), normalising(net, inputs)
    try:
        report = fixup_(net, inputs, verbose=False)
    except UserError as error:
        return {"outcome": "refused", "reason": str(error)}
    now = {name for name, _ in net.named_parameters()}
    # Those of removed norms are gone; the scalars that have come should learn too.
    lost = sorted((now & before | now - known) - learning(net, inputs))
    return {
        "outcome": "dead" if lost else "converted",
        "branches": report.num_branches,
        "m": dict(Counter(str(branch.m) for branch in report.branches)),
        "left_out": list(report.left_out),
        "norms_removed": len(report.removed),
        "normalising_before": before_ops,
        "normalising_after": normalising(net, inputs),
        "lost": lost,
    }


def normalising(net: nn.Module, inputs: Inputs) -> int:
    """How many operations of a forward pass normalise."""
    args, named = arguments_of(inputs)
    with Normalising() as counted, torch.no_grad():
        copy.deepcopy(net)(*args, **named)
    return counted.found


def learning(net: nn.Module, inputs: Inputs) -> set[str]:
    """Names of the parameters that have a gradient in the last of a few steps from here."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if "drop" in type(module).__name__.lower() or "depth" in type(module).__name__.lower():
            module.eval()  # a branch that chance leaves out would seem not to learn
    args, named = arguments_of(inputs)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.manual_seed(1)
        outputs = [out for out in float_tensors(net(*args, **named)) if out.requires_grad]
        # Random targets: every output has a reason to move, and none is at its best.
        torch.stack(
            [(out - torch.randn_like(out)).square().mean() for out in outputs]
        ).sum().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    named_grads = ((name, parameter.grad) for name, parameter in net.named_parameters())
    return {name for name, grad in named_grads if grad is not None and bool(grad.any())}


def tried(one: Listed, limit: float) -> dict[str, Any]:
    """What a process of its own finds."""
    start = time.monotonic()
    command = [sys.executable, __file__, "--measure", one.line]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        last = (done.stdout if not done.returncode else done.stderr).strip().splitlines()[-1:]
        found = json.loads(last[0]) if last and not done.returncode else None
        reason = one_line(last[0]) if last else f"it ended with status {done.returncode}"
    except subprocess.TimeoutExpired:
        found, reason = None, f"longer than {limit:.0f} seconds"
    seconds = round(time.monotonic() - start, 1)
    return {
        **asdict(one),
        **(found or {"outcome": "crashed", "reason": reason}),
        "seconds": seconds,
    }


def described(row: dict[str, Any]) -> str:
    """A line on what was found."""
    head = f"{row['outcome']:<10} {row['line'].split()[0]}"
    if "reason" in row:
        return f"{head}: {row['reason']}"
    m = ", ".join(f"{count} of m = {m}" for m, count in sorted(row["m"].items()))
    parts = [
        f"{m}; {len(row['left_out'])} left out",
        f"{row['norms_removed']} norms removed",
        f"normalising operations {row['normalising_before']} -> {row['normalising_after']}",
        *([f"no gradient any more: {', '.join(row['lost'][:3])}"] if row["lost"] else []),
    ]
    return f"{head}: {'; '.join(parts)}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Counts in Markdown, a line for each family and one for each library."""
    heads = ("networks", *OUTCOMES, "some branches left out", "still normalising")
    lines = [f"| library | family | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for library in dict.fromkeys(row["library"] for row in rows):
        own = [row for row in rows if row["library"] == library]
        families = dict.fromkeys(row["family"] for row in own)
        chosen = [(name, [row for row in own if row["family"] == name]) for name in families]
        for family, group in [*chosen, ("all", own)]:
            counts = Counter(row["outcome"] for row in group)
            left = sum(bool(row.get("left_out")) for row in group)
            still = sum(bool(row.get("normalising_after")) for row in group)
            cells = (len(group), *(counts[name] for name in OUTCOMES), left, still)
            lines.append(f"| {library} | {family} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, default=Path("runs/coverage.jsonl"))
    parser.add_argument("--only", nargs="+", default=["*"], help="as 'timm:*' or 'hf:GPT*'")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for each network")
    parser.add_argument("--table", action="store_true", help="print counts, try nothing")
    parser.add_argument("--measure", metavar="LINE", help="one network, in this process")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    text = args.output.read_text(encoding="utf-8") if args.output.exists() else ""
    rows = [json.loads(row) for row in text.splitlines()]
    if args.table:
        print(table(rows))
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    finished = {row["line"] for row in rows}
    for one in listed(LIST.read_text(encoding="utf-8")):
        chosen = any(fnmatch.fnmatch(one.name, pattern) for pattern in args.only)
        if chosen and one.line not in finished:
            row = tried(one, args.limit)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(described(row), flush=True)


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
