"""Cut the Multi30k texts into pieces with one SentencePiece model for both languages.

``prepare_multi30k.py RAW NUM_PIECES PIECES``: reads RAW/{train,val,test_2016_flickr}.{de,en} and
writes PIECES/{train,valid,test}.{de,en}, PIECES/sentencepiece.model and .vocab.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

LANGUAGES = ("de", "en")
SPLITS = {"train": "train", "val": "valid", "test_2016_flickr": "test"}


def read_lines(path: Path) -> list[str]:
    """Only the newline ends a line: files read as text end one at a lone carriage return, too."""
    return path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")


def check_parallel(raw: Path) -> None:
    for split in SPLITS:
        counts = [len(read_lines(raw / f"{split}.{language}")) for language in LANGUAGES]
        if counts[0] != counts[1]:
            raise SystemExit(
                f"error: {raw}/{split} has {counts[0]} lines of German but {counts[1]} of English; "
                "get both files from the same source"
            )


def learn_pieces(raw: Path, folder: Path, num_pieces: int) -> sentencepiece.SentencePieceProcessor:
    """Both languages together, since the dictionary is shared; one thread, so it repeats."""
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(raw),
            model_prefix=str(folder / "sentencepiece"),
            vocab_size=num_pieces,
            model_type="unigram",
            character_coverage=1.0,
            num_threads=1,
            minloglevel=1,
        )
    except RuntimeError as error:
        raise SystemExit(
            f"error: SentencePiece cannot learn {num_pieces} pieces: {error}"
        ) from None
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))


def training_lines(raw: Path) -> Iterator[str]:
    for language in LANGUAGES:
        yield from read_lines(raw / f"train.{language}")


def encode_file(model: sentencepiece.SentencePieceProcessor, source: Path, target: Path) -> None:
    with target.open("w", encoding="utf-8", newline="\n") as output:
        for line in read_lines(source):
            output.write(" ".join(model.encode(line, out_type=str)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path)
    parser.add_argument("num_pieces", type=int)
    parser.add_argument("pieces", type=Path)
    args = parser.parse_args()
    check_parallel(args.raw)
    model = learn_pieces(args.raw, args.pieces, args.num_pieces)
    for split, name in SPLITS.items():
        for language in LANGUAGES:
            source = args.raw / f"{split}.{language}"
            encode_file(model, source, args.pieces / f"{name}.{language}")


if __name__ == "__main__":
    main()
