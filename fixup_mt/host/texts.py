"""Repairs of how fairseq reads text and what it has made of it.

The newline alone ends a line: fairseq's files end lines at a lone carriage return, too, so that the
pairs of a parallel text shift without a word. A line that is no UTF-8 text is named.
"""

from __future__ import annotations

import codecs
import itertools
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from fairseq.data.indexed_dataset import MMapIndexedDataset, _code_to_dtype

from fixup_mt.errors import UserError, install_hook
from fixup_mt.host.patches import Patch, patch

HEADER = struct.Struct("<9sQBQ")
"""Of an index: a mark, a version, the kind of numbers, and how many sentences there are."""


@patch("fairseq.file_chunker_utils:Chunker.__enter__", "self")
def end_lines_at_newlines(original: Any) -> Any:
    """See above; ``fairseq-preprocess --user-dir fixup_mt`` reads through it."""

    def enter(self: Any) -> Iterator[str]:
        self.fd = Path(self.path).open("rb")  # noqa: SIM115 (Chunker closes it)
        return _lines(self.fd, self.start_offset, self.end_offset)

    return enter


def _lines(file: BinaryIO, start: int, end: int) -> Iterator[str]:
    """The lines that end within a part of the file; an ``end`` of 0 stands for its own."""
    file.seek(start)
    while line := file.readline():
        if 0 < end < file.tell():
            return
        if file.tell() == len(line):  # the mark at the head of a file is no part of its first word
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            place = file.tell() - len(line)
            file.seek(0)
            before = file.read(place).count(b"\n")
            raise _no_text(file.name, before + 1, error) from error


def _no_text(file: str, number: int, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{file}: line {number} is not UTF-8 text ({error.reason}): convert it first")


def _cut_at_newlines(original: Any) -> Any:
    def find_offsets(filename: str, num_chunks: int) -> list[int]:
        with Path(filename).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            offsets = [0]
            for number in range(1, num_chunks):
                file.seek(size // num_chunks * number)
                file.readline()
                offsets.append(file.tell())
            return [*offsets, size]

    return find_offsets


@patch("fairseq.binarizer:find_offsets", "filename num_chunks")
def share_out_lines_at_newlines(original: Any) -> Any:
    """What several workers read has to begin where lines begin."""
    return _cut_at_newlines(original)


@patch("fairseq.data.dictionary:find_offsets", "filename num_chunks")
def count_words_of_whole_lines(original: Any) -> Any:
    """The same while the dictionary is made."""
    return _cut_at_newlines(original)


def buffered_read(input: str, buffer_size: int) -> Iterator[list[str]]:
    """The lines of ``fairseq-interactive``, ``buffer_size`` at a time.

    Raises:
        UserError: A line is not UTF-8 text; those before it have been yielded.
    """
    name = "stdin" if input == "-" else input
    with sys.stdin.buffer if input == "-" else Path(input).open("rb") as file:
        numbered = enumerate(file, 1)
        while chunk := list(itertools.islice(numbered, buffer_size)):
            lines = []
            for number, line in chunk:
                try:
                    lines.append(line.decode("utf-8").strip())
                except UnicodeDecodeError as error:
                    if lines:
                        yield lines
                    raise _no_text(name, number, error) from error
            yield lines


def read_interactive_lines() -> None:
    """Let ``fairseq-interactive``, if it is what runs, read by ``buffered_read``."""
    for name in ("fairseq_cli.interactive", "__main__"):
        module: Any = sys.modules.get(name)
        if getattr(module, "make_batches", None) and hasattr(module, "buffered_read"):
            module.buffered_read = buffered_read


@patch("fairseq.data.indexed_dataset:make_dataset", "path impl fix_lua_indexing dictionary")
def refuse_damaged_data(original: Any) -> Any:
    """Of a cut or empty file fairseq dies while it reads, or trains on what is left."""

    def make_dataset(
        path: str, impl: str | None, fix_lua_indexing: bool = False, dictionary: Any = None
    ) -> Any:
        if MMapIndexedDataset.exists(path) and impl in ("mmap", "cached", "lazy"):
            check_data(path, impl)
        return original(path, impl, fix_lua_indexing, dictionary)

    return make_dataset


def check_data(path: str, impl: str) -> None:
    """Raise ``UserError`` unless the files ``path.idx`` and ``path.bin`` are whole.

    Only what ``fairseq-preprocess`` writes today is looked into; an older index has another mark.
    """
    index, content = Path(f"{path}.idx"), Path(f"{path}.bin")
    again = "prepare the data again (fairseq-preprocess)"
    with index.open("rb") as file:
        header = file.read(HEADER.size)
        if impl != "mmap" and header[:8] in (b"TNTIDX\x00\x00",):
            return
        damaged = UserError(f"{index} is damaged, or no index of fairseq: {again}")
        if len(header) < HEADER.size:
            raise damaged
        mark, version, code, number = HEADER.unpack(header)
        kind = _code_to_dtype.get(code)
        if mark != MMapIndexedDataset.Index._HDR_MAGIC or version != 1 or kind is None:
            raise damaged
        rest = os.fstat(file.fileno()).st_size - HEADER.size
        if rest != number * 12:
            raise damaged
        words = int(numpy.fromfile(file, numpy.int32, number).sum(dtype=numpy.int64))
    if not number:
        raise UserError(f"{content} holds no sentences: {again}")
    if content.stat().st_size != words * numpy.dtype(kind).itemsize:
        raise UserError(f"{content} is damaged, or not the one of its index: {again}")


def check_parallel_text(args: Any) -> None:
    """Raise ``UserError`` where the texts of ``fairseq-preprocess`` are empty or no pairs of lines:
    it writes them, and says nothing.
    """
    languages = [args.source_lang] if args.only_source else [args.source_lang, args.target_lang]
    if not args.only_source and (None in languages or len(set(languages)) == 1):
        raise UserError(
            "give --source-lang and --target-lang, two of them, or --only-source for a single text"
        )
    if args.dict_only:
        return
    others = [name for text in (args.validpref, args.testpref) if text for name in text.split(",")]
    for prefix in (*([args.trainpref] if args.trainpref else []), *others):
        files = [Path(f"{prefix}.{name}" if name else prefix) for name in languages]
        if not all(file.is_file() for file in files):
            continue  # fairseq names what is missing
        counts = {str(file): _count_lines(file) for file in files}
        for file, count in counts.items():
            if not count:
                raise UserError(f"{file} holds no lines")
        if len(set(counts.values())) > 1:
            found = " and ".join(f"{file} {count}" for file, count in counts.items())
            raise UserError(f"a line of one text belongs to a line of the other; lines: {found}")


def _count_lines(file: Path) -> int:
    count, last = 0, b"\n"
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


@patch("fairseq.options:add_preprocess_args", "parser")
def explain_mistakes_in_text(original: Any) -> Any:
    """What ``fairseq-preprocess`` cannot read is one line, as everywhere. Its parser is all that it
    asks for, as others may who use fairseq from Python.
    """

    def add_preprocess_args(parser: Any) -> Any:
        if Path(sys.argv[0]).stem in ("preprocess", "fairseq-preprocess"):
            install_hook(parser)
            parse = parser.parse_args

            def parse_args(*args: Any, **kwargs: Any) -> Any:
                options = parse(*args, **kwargs)
                check_parallel_text(options)
                return options

            parser.parse_args = parse_args
        return original(parser)

    return add_preprocess_args


REPAIRS: tuple[Patch, ...] = (
    end_lines_at_newlines,
    share_out_lines_at_newlines,
    count_words_of_whole_lines,
    refuse_damaged_data,
    explain_mistakes_in_text,
)
