"""``python -m fixup_core convert TARGET``: what ``fixup_`` makes of a network, as a report.

The network is built with random weights, converted in memory and called; nothing is kept but what
``--json`` writes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fixup_core.convert.convert import fixup_
from fixup_core.convert.notation import parse_options
from fixup_core.convert.targets import Target, find
from fixup_core.errors import UserError
from fixup_core.files import write_text
from fixup_core.probing import Inputs
from fixup_core.rules.branches import collect_branches
from fixup_core.rules.methods import method_named
from fixup_core.rules.report import ConversionReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="package.module:function, which returns a network, or a network and its inputs; "
        "timm:NAME; torchvision:NAME; hf:CONFIG (a folder, a config.json, or a class of "
        "transformers such as GPT2Config)",
    )
    parser.add_argument(
        "--inputs",
        nargs="+",
        metavar="INPUT",
        default=[],
        help="random inputs: 2x3x224x224, int:2x16 (below the vocabulary), int:2x16:200, ones:2x16 "
        "or, named, input_ids=int:2x16; default: what the library or the function says",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="options of the function or configuration, as n_layer=2",
    )
    parser.add_argument(
        "--model",
        metavar="CLASS",
        help="of transformers, as AutoModelForCausalLM or BertForPreTraining; default: the "
        "configuration's own, else the first that knows it",
    )
    parser.add_argument("--method", default="fixup", help="default: fixup")
    parser.add_argument(
        "--head", metavar="PATH", help="output layer; none: there is none; default: the last layer"
    )
    parser.add_argument("--keep-norms", action="store_true", help="leave the normalisation layers")
    parser.add_argument(
        "--allow", nargs="+", metavar="PATH", default=[], help="what no rule covers and may stay"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="keep what the norms did to the inputs; random ones show which norms those are",
    )
    parser.add_argument(
        "--meta",
        action="store_true",
        help="build the network without memory for its weights: nothing is called, so what learns "
        "is not checked",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report, over an earlier one")


def run(args: argparse.Namespace) -> None:
    """Convert the network and print the report."""
    method_named(args.method)  # before the network is built
    if args.meta and args.calibrate:
        raise UserError("--calibrate needs numbers, and --meta has none: give one of them")
    report = convert(args)
    print(report)
    if args.json:
        write_text(Path(args.json), json.dumps(plain(report, args), indent=2) + "\n")


def convert(args: argparse.Namespace) -> ConversionReport:
    """Build and convert what the options name; the report says so where inputs are random.

    Raises:
        UserError: It cannot be built or converted.
    """
    target = find(args.target, parse_options(args.set), args.model, meta=args.meta)
    inputs = inputs_of(target, args)
    report = fixup_(
        target.net,
        inputs,
        method=args.method,
        head=False if args.head == "none" else args.head,
        keep_norms=args.keep_norms,
        allow=args.allow,
        calibrate=args.calibrate,
        verbose=False,
    )
    if args.calibrate and inputs is not target.given:
        print("calibrated on random inputs: the constants show the places, not the values")
    if args.meta:
        print("on the meta device: nothing was called, so what learns was not checked")
    return report


def inputs_of(target: Target, args: argparse.Namespace) -> Inputs | None:
    """The inputs of a command line's network; ``None`` where it declares its branches itself.

    Raises:
        UserError: They are unknown or cannot be read.
    """
    inputs = target.inputs(args.inputs, device="meta" if args.meta else "cpu")
    if inputs is None and not collect_branches(target.net):
        raise UserError(f"{args.target} needs inputs: give --inputs, as --inputs 2x3x224x224")
    return inputs


def plain(report: ConversionReport, args: argparse.Namespace) -> dict[str, Any]:
    """The report as JSON has it, without the list of what was drawn."""
    found = asdict(report)
    del found["init"]
    asked = {"target": args.target, "method": args.method, "num_branches": report.num_branches}
    return asked | found
