"""``python -m fixup_mt``: where the plugin lies, and the tools around it.

Without a command it prints the folder for fairseq's ``--user-dir``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from fixup_mt.errors import UserError

COMMANDS = {
    "scoring.average": "average the weights of several checkpoints into one",
    "demo.corpus": "write the built-in German-English corpus",
    "demo.demo": "train Fixup and LayerNorm side by side on the built-in corpus",
    "serving.export": "write a trained model for other engines: CTranslate2, ONNX, plain weights",
    "scoring.score": "BLEU of what fairseq-generate wrote, with signature and settings",
    "serving.translate": "translate text with an exported model",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fixup_mt", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for place, summary in COMMANDS.items():
        name = place.rpartition(".")[2]
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        module = importlib.import_module(f"fixup_mt.{place}")
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.command is None:
        print(Path(__file__).resolve().parent)
        return 0
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
