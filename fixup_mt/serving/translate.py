"""Translate text with an exported model: ``python -m fixup_mt translate --model DIR < in > out``.

A line is a sentence; the folder is one that ``python -m fixup_mt export`` wrote for CTranslate2.
With a sentencepiece model in it, text goes in and comes out; without, lines are pieces with spaces
between. Lines come out in the order in which they went in; an empty one stays empty.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from fixup_core.files import add_overwrite, refuse_existing, whole_file
from fixup_mt.errors import UserError
from fixup_mt.host.jobs import cores
from fixup_mt.serving.export import SENTENCEPIECE

LINES = 1024
"""Read at a time, and sorted by length for the engine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="of python -m fixup_mt export")
    add("--input", default="-", metavar="FILE", help="text, a sentence a line (default: stdin)")
    add("--output", default="-", metavar="FILE", help="translations (default: stdout)")
    add_overwrite(parser)
    add("--beam", type=int, default=5, metavar="N", help="default: %(default)s")
    add("--lenpen", type=float, default=1.0, metavar="X", help="length penalty; default: 1")
    add("--max-length", type=int, default=256, metavar="N", help="pieces; default: %(default)s")
    add("--batch-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    add("--compute-type", default="default", help="float32, int8, ...; default: as exported")
    add("--device", default="cpu", choices=("cpu", "cuda", "auto"), help="default: %(default)s")
    add("--threads", type=int, default=0, metavar="N", help="of the CPU (default: one for a core)")


def run(args: argparse.Namespace) -> None:
    for option in ("beam", "max_length", "batch_tokens"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1")
    if args.input != "-" and Path(args.input).resolve() == Path(args.output).resolve():
        raise UserError(f"--output {args.output} would overwrite the input: give another file")
    if args.output != "-":
        refuse_existing(Path(args.output), args.overwrite)
    translator = load(args)
    pieces = Pieces(args.model / SENTENCEPIECE)
    options = {
        "beam_size": args.beam,
        "length_penalty": args.lenpen,
        "max_decoding_length": args.max_length,
        "max_batch_size": args.batch_tokens,
        "batch_type": "tokens",
    }
    with _lines(args.input) as lines, _written(args.output) as out:
        for line in translated(lines, translator, pieces, options):
            print(line, file=out, flush=args.output == "-")


def load(args: argparse.Namespace) -> Any:
    """The engine with the exported model.

    Raises:
        UserError: No such folder or model, or a compute type the device cannot have.
    """
    try:
        import ctranslate2
    except ModuleNotFoundError as error:
        raise UserError("this wants CTranslate2: pip install ctranslate2") from error
    if not (args.model / "model.bin").is_file():
        raise UserError(
            f"{args.model} holds no exported model: python -m fixup_mt export writes one"
        )
    try:
        return ctranslate2.Translator(
            str(args.model),
            device=args.device,
            compute_type=args.compute_type,
            # A batch for each thread is faster than all threads for a batch.
            inter_threads=_threads(args),
            intra_threads=1,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"CTranslate2 cannot load {args.model}: {error}") from error


def _threads(args: argparse.Namespace) -> int:
    if args.device != "cpu":
        return 1
    return args.threads or cores()


class Pieces:
    """Text to pieces and back; without a model of sentencepiece, spaces part the pieces."""

    def __init__(self, file: Path) -> None:
        self.processor: Any = None
        if file.is_file():
            import sentencepiece

            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(file))

    def cut(self, line: str) -> list[str]:
        return self.processor.encode(line, out_type=str) if self.processor else line.split()

    def join(self, pieces: list[str]) -> str:
        return self.processor.decode(pieces) if self.processor else " ".join(pieces)


def translated(
    lines: Iterable[str], translator: Any, pieces: Pieces, options: dict[str, Any]
) -> Iterator[str]:
    """The translation of each line, with a progress bar on stderr."""
    source = iter(lines)
    with tqdm(unit=" lines", desc="translated", disable=None) as bar:
        while chunk := list(islice(source, LINES)):
            cut = [pieces.cut(line.strip()) for line in chunk]
            full = [number for number, words in enumerate(cut) if words]
            results = translator.translate_batch([cut[number] for number in full], **options)
            found = {
                number: pieces.join(result.hypotheses[0])
                for number, result in zip(full, results, strict=True)
            }
            for number in range(len(chunk)):
                yield found.get(number, "")
            bar.update(len(chunk))


def _lines(name: str) -> Any:
    return contextlib.nullcontext(sys.stdin) if name == "-" else Path(name).open(encoding="utf-8")


@contextlib.contextmanager
def _written(name: str) -> Iterator[TextIO]:
    if name == "-":
        yield sys.stdout
        return
    with whole_file(name) as place, place.open("w", encoding="utf-8") as out:
        yield out
