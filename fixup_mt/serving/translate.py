"""Translate text with an exported model: ``python -m fixup_mt translate --model DIR < in > out``.

A line is a sentence, and the newline alone ends it; text is UTF-8 whatever the locale. The folder
is one that ``python -m fixup_mt export`` wrote for CTranslate2. With a sentencepiece model in it,
text goes in and comes out; without, lines are pieces with spaces between. Lines come out in the
order in which they went in; an empty one stays empty. So does one that cannot be translated: all
others are, then the command names it and ends with status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from fixup_core.files import add_overwrite, refuse_existing, whole_file
from fixup_mt.errors import UserError
from fixup_mt.host.jobs import cores
from fixup_mt.serving.ctranslate2_model import MAX_SOURCE, MAX_TARGET
from fixup_mt.serving.export import SENTENCEPIECE
from fixup_mt.serving.onnx_model import FILES as ONNX_FILES

LINES = 1024
"""Read at a time, and sorted by length for the engine."""
NAMED = 5
"""Lines that a message names; it counts the others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="of python -m fixup_mt export")
    add("--input", default="-", metavar="FILE", help="text, a sentence a line (default: stdin)")
    add("--output", default="-", metavar="FILE", help="translations (default: stdout)")
    add_overwrite(parser)
    add("--beam", type=int, default=5, metavar="N", help="default: %(default)s")
    add("--lenpen", type=float, default=1.0, metavar="X", help="length penalty; default: 1")
    add(
        "--max-length",
        type=int,
        default=256,
        metavar="N",
        help="pieces of a translation, as far as the model has positions (default: %(default)s; "
        "fairseq-generate stops at 200, see its --max-len-b)",
    )
    add("--batch-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    add("--compute-type", default="default", help="float32, int8, ...; default: as exported")
    add("--device", default="cpu", choices=("cpu", "cuda", "auto"), help="default: %(default)s")
    add("--threads", type=int, default=0, metavar="N", help="of the CPU (default: one for a core)")


def run(args: argparse.Namespace) -> None:
    for option, least in (("beam", 1), ("max_length", 1), ("batch_tokens", 1), ("threads", 0)):
        if getattr(args, option) < least:
            raise UserError(f"--{option.replace('_', '-')} must be at least {least}")
    if args.input != "-" and Path(args.input).resolve() == Path(args.output).resolve():
        raise UserError(f"--output {args.output} would overwrite the input: give another file")
    if args.output != "-":
        refuse_existing(Path(args.output), args.overwrite)
    translation = Translation(
        load(args), Pieces(args.model / SENTENCEPIECE), Limits.of(args.model, args.max_length), args
    )
    with _lines(args.input) as lines, _written(args.output) as out:
        for line in translation.of(lines):
            out.write(f"{line}\n".encode())
            if args.output == "-":
                out.flush()
    translation.report()


def load(args: argparse.Namespace) -> Any:
    """The engine with the exported model.

    Raises:
        UserError: No such folder or model, or a compute type the device cannot have.
    """
    try:
        import ctranslate2
    except ModuleNotFoundError as error:
        raise UserError("this wants CTranslate2: pip install ctranslate2") from error
    if (args.model / ONNX_FILES["decoder"]).is_file():
        raise UserError(
            f"{args.model} holds an ONNX export, and translate takes CTranslate2's: export the "
            "checkpoint with --format ctranslate2"
        )
    if args.model.is_file():
        raise UserError(
            f"{args.model} is a file: give the folder that python -m fixup_mt export wrote"
        )
    if not (args.model / "model.bin").is_file():
        raise UserError(
            f"{args.model} holds no exported model: python -m fixup_mt export writes one"
        )
    if (args.model / "vocabulary.json").is_file():
        raise UserError(
            f"{args.model} holds a language model, which does not translate: "
            "ctranslate2.Generator takes it"
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


@dataclass(frozen=True)
class Limits:
    """How many pieces a sentence and its translation may have."""

    source: int
    target: int

    @classmethod
    def of(cls, folder: Path, max_length: int) -> Limits:
        """Those of an exported model: one position is the sentence's end, or its beginning."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        source, target = (config.get(name, sys.maxsize) - 1 for name in (MAX_SOURCE, MAX_TARGET))
        return cls(source, min(max_length, target))


@dataclass
class Translation:
    """The lines of a text through the engine, and what there is to say of them afterwards.

    Attributes:
        engine: CTranslate2's translator.
        pieces: Of the model.
        limits: Of the model and the command line.
        args: The command's options.
        failed: Lines left empty, and why.
        stopped: Lines whose translation has been stopped at the limit.
    """

    engine: Any
    pieces: Pieces
    limits: Limits
    args: argparse.Namespace
    failed: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def of(self, lines: Iterable[bytes]) -> Iterator[str]:
        """The translation of each line, with a progress bar on stderr."""
        numbered = enumerate(lines, 1)
        with tqdm(unit=" lines", desc="translated", disable=None) as bar:
            while chunk := list(islice(numbered, LINES)):
                cut = {number: self._cut(number, line) for number, line in chunk}
                found = self._translate({number: row for number, row in cut.items() if row})
                yield from (found.get(number, "") for number in cut)
                bar.update(len(chunk))

    def report(self) -> None:
        """Say what was stopped; raise ``UserError`` for lines that were left empty."""
        if self.stopped:
            limit = f"stopped at {self.limits.target} pieces (see --max-length)"
            print(f"{limit}: {_some(self.stopped)}", file=sys.stderr)
        if self.failed:
            raise UserError(f"not translated, and left empty: {_some(self.failed)}")

    def _cut(self, number: int, line: bytes) -> list[str]:
        try:
            row = self.pieces.cut(line.decode("utf-8").strip())
        except UnicodeDecodeError:
            self.failed.append(f"line {number} (no UTF-8 text)")
            return []
        if len(row) > self.limits.source:
            limit = f"{len(row)} pieces; the model takes {self.limits.source}"
            self.failed.append(f"line {number} ({limit})")
            return []
        return row

    def _translate(self, rows: dict[int, list[str]]) -> dict[int, str]:
        options = {
            "beam_size": self.args.beam,
            "length_penalty": self.args.lenpen,
            "max_input_length": 0,  # the engine would drop what is beyond it
            "max_decoding_length": self.limits.target,
            "max_batch_size": self.args.batch_tokens,
            "batch_type": "tokens",
        }
        try:
            results = self.engine.translate_batch(list(rows.values()), **options)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"CTranslate2 stops at lines from {min(rows)} on: {error}") from error
        best = {n: result.hypotheses[0] for n, result in zip(rows, results, strict=True)}
        full = (n for n, row in best.items() if len(row) >= self.limits.target)
        self.stopped += [f"line {number}" for number in full]
        return {number: self.pieces.join(row) for number, row in best.items()}


def _some(lines: Sequence[str]) -> str:
    rest = len(lines) - NAMED
    return ", ".join(lines[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _lines(name: str) -> Any:
    """Binary lines: as text, a lone carriage return would end one, too."""
    if name != "-":
        return Path(name).open("rb")
    if sys.stdin is None:
        raise UserError("stdin is closed: give --input FILE")
    return contextlib.nullcontext(sys.stdin.buffer)


@contextlib.contextmanager
def _written(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        if sys.stdout is None:
            raise UserError("stdout is closed: give --output FILE")
        yield sys.stdout.buffer
        return
    with whole_file(name) as place, place.open("wb") as out:
        yield out
