"""Turn the IWSLT'14 German-English archive into the text that published systems were trained on.

``prepare_iwslt14.py ORIG OUT``: ORIG is the unpacked ``de-en`` folder. Writes OUT/{train,valid,
test}.{de,en} (lower-cased Moses tokens in BPE pieces), OUT/code (the merges), OUT/words/ (the same
before BPE) and OUT/plain/test.{de,en} (the test lines before tokenisation, their curly apostrophes
made straight, as the models never see any).

The steps and their numbers are those of fairseq's preparation: marked-up lines dropped, Moses
tokens, pairs of 1 to 175 tokens and a ratio of at most 1.5, lower case; every 23rd pair is
validation; dev2010, TEDX dev2012 and tst2010-2012 are the test set; 10,000 BPE merges learnt on
both languages together. Differs: the tokeniser is sacremoses, a port of Moses' Perl script, so
single tokens may differ.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

from sacremoses import MosesTokenizer
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

LANGUAGES = ("de", "en")
TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
DROPPED_TAGS = ("url", "talkid", "keywords")
DROPPED = re.compile("|".join(rf"<{tag}\b" for tag in DROPPED_TAGS))
STRIPPED = re.compile("</?(?:title|description)>")
SEGMENT_MARKS = re.compile(r'<seg id="\d+">|</seg>')

MAX_RATIO = 1.5
MAX_LENGTH = 175
VALIDATION_EVERY = 23
NUM_MERGES = 10_000
EXPECTED_PAIRS = {"train": 160_239, "valid": 7_283, "test": 6_750}

Pairs = list[tuple[str, str]]


def read_lines(path: Path) -> list[str]:
    """Only the newline ends a line: files read as text end one at a lone carriage return, too."""
    if not path.is_file():
        raise SystemExit(f"error: {path} is missing; give the complete de-en folder or archive")
    return path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as output:
        output.writelines(line + "\n" for line in lines)


def training_text(path: Path) -> list[str]:
    """The spoken lines, titles and descriptions of a ``train.tags`` file."""
    return [STRIPPED.sub("", line) for line in read_lines(path) if not DROPPED.search(line)]


def segments(path: Path) -> list[str]:
    """The text of every ``<seg>`` of a test file, curly apostrophes made straight."""
    found = (line for line in read_lines(path) if "<seg id" in line)
    texts = (SEGMENT_MARKS.sub("", line).strip() for line in found)
    return [text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'") for text in texts]


def tokenise(lines: Sequence[str], language: str, num_workers: int) -> list[str]:
    if num_workers == 1:
        return [tokenise_line(line, language) for line in lines]
    with ProcessPoolExecutor(num_workers) as pool:
        return list(pool.map(tokenise_line, lines, [language] * len(lines), chunksize=500))


def tokenise_pairs(pairs: Iterable[tuple[str, str]], num_workers: int) -> Pairs:
    columns = list(zip(*pairs, strict=True))
    tokens = [
        tokenise(column, language, num_workers)
        for column, language in zip(columns, LANGUAGES, strict=True)
    ]
    return list(zip(*tokens, strict=True))


def tokenise_line(line: str, language: str) -> str:
    return str(tokeniser(language).tokenize(line, return_str=True))


@lru_cache
def tokeniser(language: str) -> MosesTokenizer:
    return MosesTokenizer(lang=language)


def is_clean(source: str, target: str) -> bool:
    """Both sides of 1 to 175 tokens, neither more than 1.5 times the other."""
    lengths = sorted((len(source.split()), len(target.split())))
    return lengths[0] >= 1 and lengths[1] <= min(MAX_LENGTH, MAX_RATIO * lengths[0])


def training_pairs(orig: Path, num_workers: int) -> Pairs:
    texts = [training_text(orig / f"train.tags.de-en.{language}") for language in LANGUAGES]
    check_parallel("train.tags.de-en", texts)
    tokens = tokenise_pairs(zip(*texts, strict=True), num_workers)
    return [(de.lower(), en.lower()) for de, en in tokens if is_clean(de, en)]


def plain_test_pairs(orig: Path) -> Pairs:
    pairs: Pairs = []
    for name in TEST_SETS:
        texts = [segments(orig / f"IWSLT14.{name}.de-en.{language}.xml") for language in LANGUAGES]
        check_parallel(name, texts)
        pairs.extend(zip(*texts, strict=True))
    return pairs


def check_parallel(name: str, texts: Sequence[Sequence[str]]) -> None:
    if len(texts[0]) != len(texts[1]):
        raise SystemExit(
            f"error: {name} has {len(texts[0])} German but {len(texts[1])} English lines; "
            "get the archive again"
        )


def split_validation(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """Training and validation pairs; the 23rd, 46th, ... are validation."""
    train = [pair for number, pair in enumerate(pairs, 1) if number % VALIDATION_EVERY]
    return train, pairs[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]


def write_pairs(folder: Path, name: str, pairs: Pairs) -> None:
    for column, language in enumerate(LANGUAGES):
        write_lines(folder / f"{name}.{language}", (pair[column] for pair in pairs))


def learn_codes(train: Pairs, path: Path, num_merges: int) -> BPE:
    """Merges from the German lines followed by the English ones."""
    words = (pair[column] + "\n" for column in range(len(LANGUAGES)) for pair in train)
    with path.open("w", encoding="utf-8", newline="\n") as output:
        learn_bpe(words, output, num_merges)
    with path.open(encoding="utf-8") as codes:
        return BPE(codes)


def report_counts(splits: dict[str, Pairs]) -> None:
    for name, pairs in splits.items():
        expected = EXPECTED_PAIRS[name]
        note = "" if len(pairs) == expected else f" (published preparations have {expected})"
        print(f"{name}: {len(pairs)} pairs{note}")


def prepare(orig: Path, out: Path, *, num_merges: int, num_workers: int) -> None:
    train, valid = split_validation(training_pairs(orig, num_workers))
    plain = plain_test_pairs(orig)
    test = [(de.lower(), en.lower()) for de, en in tokenise_pairs(plain, num_workers)]
    splits = {"train": train, "valid": valid, "test": test}
    report_counts(splits)
    write_pairs(out / "plain", "test", plain)
    out.mkdir(parents=True, exist_ok=True)
    bpe = learn_codes(train, out / "code", num_merges)
    for name, pairs in splits.items():
        write_pairs(out / "words", name, pairs)
        write_pairs(out, name, [(bpe.process_line(de), bpe.process_line(en)) for de, en in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("orig", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--merges", type=int, default=NUM_MERGES)
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenise")
    args = parser.parse_args()
    prepare(args.orig, args.out, num_merges=args.merges, num_workers=args.workers)


if __name__ == "__main__":
    main()
