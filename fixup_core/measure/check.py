"""``python -m fixup_core check NET``: the depth check of a network, as a table, figure or JSON.

NET is one of this project's networks or ``package.module:function``. The function, called without
arguments or with a ``--method``, returns what ``depth_check`` takes: a dictionary with ``make_net``
and ``batch``, and what else it wants to set. Status 0: flat; 1: not; 2: a mistake. The
figure of ``--plot`` replaces an earlier one.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from fixup_core.errors import UserError
from fixup_core.measure.depth import (
    DEPTHS,
    MOVED,
    DepthCheck,
    branch_weights,
    depth_check,
    plot_depth_checks,
)
from fixup_core.measure.figures import check_figure_file
from fixup_core.rules.methods import METHODS

NETS = {
    "cifar": "vision.nets.depth_nets:cifar",
    "bottleneck": "vision.nets.depth_nets:bottleneck",
    "transformer": "fixup_mt.model.depth_nets:transformer",
}
"""The project's own; the core knows their names alone."""

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    nets = ", ".join(NETS)
    parser.add_argument("net", metavar="NET", help=f"{nets}, or package.module:function")
    parser.add_argument(
        "--method",
        nargs="+",
        help=f"passed to the function; several are compared: {', '.join(METHODS)}; "
        "all: those that are defined for the network",
    )
    parser.add_argument("--depths", nargs="+", type=int, help="three or more")
    parser.add_argument("--seeds", type=int, help="networks of each depth")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="default: sgd")
    parser.add_argument("--steps", type=int, default=1, help="how many; default: 1")
    parser.add_argument("--lr", type=float, help="step size; default: tiny, 1e-3 for several steps")
    parser.add_argument("--moved", choices=MOVED, help="what takes the step; default: branches")
    parser.add_argument(
        "--branches", metavar="ENDING", help="move only the branches whose name ends so"
    )
    parser.add_argument("--plot", metavar="FILE", help="write a figure, as depth.png")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    form.add_argument(
        "--verdicts", action="store_true", help="print one table in Markdown, a line a method"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0 where every method is flat, else 1."""
    if args.moved and args.branches:
        raise UserError("give --moved or --branches, not both")
    if args.plot:
        check_figure_file(args.plot)
    checks = {method or args.net: _check(args, method) for method in _methods(args)}
    if args.json:
        print(json.dumps({name: _plain(check) for name, check in checks.items()}, indent=2))
    elif args.verdicts:
        print(verdicts(checks))
    else:
        print("\n\n".join(f"{name}\n{check}" for name, check in checks.items()))
    if args.plot:
        plot_depth_checks(checks, args.plot)
    return 0 if all(check.flat for check in checks.values()) else 1


def verdicts(checks: Mapping[str, DepthCheck]) -> str:
    """A table in Markdown: the slope after each step, that of the inner layers' movement."""
    steps = max(len(check.slopes) for check in checks.values())
    heads = [f"step {k + 1}" for k in range(steps)]
    lines = [
        f"| method | {' | '.join(heads)} | movement | verdict |",
        "|---" * (steps + 3) + "|",
    ]
    for name, check in checks.items():
        cells = [f"{slope.value:.2f}" for slope in check.slopes]
        moves = f"{check.movement.value:.2f}" if check.movement else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {moves} | {check.verdict} |")
    return "\n".join(lines)


def _methods(args: argparse.Namespace) -> list[str | None]:
    """Those that were asked for; ``None`` where the network takes none."""
    if args.method != ["all"]:
        return list(args.method or [None])
    return [name for name in METHODS if _takes(args.net, name)]


def _takes(net: str, method: str) -> bool:
    """Whether a network of that method can be built; if not, stderr says why."""
    try:
        options = _subject(net, method)
        options["make_net"](min(options.get("depths", DEPTHS)))
    except UserError as error:
        print(f"{method} is left out: {error}", file=sys.stderr)
        return False
    return True


def _check(args: argparse.Namespace, method: str | None) -> DepthCheck:
    options = _subject(args.net, method)
    for name in ("depths", "seeds", "moved"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if args.branches:
        options["moved"] = partial(branch_weights, ending=args.branches)
    prefix = f"{method}: " if method else ""
    return depth_check(
        **options,
        optimizer=OPTIMIZERS[args.optimizer],
        steps=args.steps,
        eta=args.lr,
        progress=lambda line: print(prefix + line, file=sys.stderr),
    )


def _subject(net: str, method: str | None) -> dict[str, Any]:
    """What the network's function returns."""
    path, _, name = NETS.get(net, net).partition(":")
    if not name or not path or path.startswith("."):
        raise UserError(f"there is no network {net!r}: take {', '.join(NETS)} or module:function")
    try:
        function = getattr(importlib.import_module(path), name)
    except (ImportError, SyntaxError, AttributeError) as error:
        raise UserError(f"{net}: {error}") from error
    if method is not None and "method" not in inspect.signature(function).parameters:
        raise UserError(f"{net} takes no method: leave --method away")
    options = function() if method is None else function(method=method)
    if not isinstance(options, dict) or not {"make_net", "batch"} <= options.keys():
        raise UserError(f"{net} must return a dictionary with make_net and batch")
    return dict(options)


def _plain(check: DepthCheck) -> dict[str, Any]:
    """As JSON has it: what is infinite or no number becomes null."""
    found = {
        **asdict(check),
        "slope": asdict(check.slope),
        "slopes": [asdict(slope) for slope in check.slopes],
        "movement": check.movement and asdict(check.movement),
        "verdict": check.verdict,
    }
    return {key: _finite(value) for key, value in found.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
