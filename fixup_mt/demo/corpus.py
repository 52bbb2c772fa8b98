"""The built-in corpus: real German-English sentence pairs made by a grammar, without downloads.

One German sentence has exactly one English translation, and the other way round; no sentence of
either language stands in two splits. The same seed gives the same bytes on every machine.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from fixup_core.files import add_overwrite, refuse_existing, write_text
from fixup_mt.demo.grammar.draw import Draw
from fixup_mt.demo.grammar.numerals import Pair
from fixup_mt.demo.grammar.sentences import draw_sentence
from fixup_mt.errors import UserError

SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = 24_000, 500, 500
MAX_MISSES = 2_000
LARGEST = 2_000_000
"""Pairs that are made in a minute or two, and held in memory."""


def unique_pairs(count: int, *, seed: int) -> list[Pair]:
    """`count` pairs in random order, every German and every English sentence only once.

    Raises:
        UserError: the grammar hardly finds anything new, so `count` is too large.
    """
    rng = random.Random(seed)
    draw = Draw(rng)
    translation: dict[str, str] = {}
    seen_english: set[str] = set()
    misses = 0
    while len(translation) < count:
        pair = draw_sentence(draw)
        known = translation.get(pair.de)
        if known is not None and known != pair.en:
            raise AssertionError(f"two translations of {pair.de!r}: {known!r} and {pair.en!r}")
        if known is not None or pair.en in seen_english:
            misses += 1
            if misses > MAX_MISSES:
                raise UserError(f"the grammar makes no {count} different sentences; ask for fewer")
            continue
        misses = 0
        translation[pair.de] = pair.en
        seen_english.add(pair.en)
    return _shuffled([Pair(de, en) for de, en in translation.items()], rng)


def _shuffled(pairs: list[Pair], rng: random.Random) -> list[Pair]:
    # Templates with few sentences run dry early: without mixing, the splits would differ in kind.
    for last in range(len(pairs) - 1, 0, -1):
        other = rng.randrange(last + 1)
        pairs[last], pairs[other] = pairs[other], pairs[last]
    return pairs


def write_corpus(
    directory: Path, *, seed: int = 1, train: int = TRAIN, valid: int = VALID, test: int = TEST
) -> None:
    """Write train, valid and test as `SPLIT.de` and `SPLIT.en`, one sentence a line.

    Args:
        directory: Created if missing; files of these names in it are replaced.
        seed: Decides every sentence.
        train: Number of training pairs.
        valid: Number of validation pairs.
        test: Number of test pairs.

    Raises:
        UserError: a size is not positive, or more sentences are asked for than the grammar has.
    """
    sizes = dict(zip(SPLITS, (train, valid, test), strict=True))
    for split, size in sizes.items():
        if size < 1:
            raise UserError(f"the {split} set needs at least 1 sentence pair, not {size}")
    if sum(sizes.values()) > LARGEST:
        raise UserError(f"the corpus holds {LARGEST:,} sentence pairs at the most: ask for fewer")
    pairs = unique_pairs(sum(sizes.values()), seed=seed)
    for split in reversed(SPLITS):
        part, pairs = pairs[: sizes[split]], pairs[sizes[split] :]
        write_text(directory / f"{split}.de", "".join(f"{pair.de}\n" for pair in part))
        write_text(directory / f"{split}.en", "".join(f"{pair.en}\n" for pair in part))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="folder for train/valid/test .de and .en")
    parser.add_argument("--seed", type=int, default=1, help="another seed, another corpus")
    parser.add_argument("--train", type=int, default=TRAIN, metavar="N", help="training pairs")
    parser.add_argument("--valid", type=int, default=VALID, metavar="N", help="validation pairs")
    parser.add_argument("--test", type=int, default=TEST, metavar="N", help="test pairs")
    add_overwrite(parser)


def run(args: argparse.Namespace) -> None:
    for split in SPLITS:
        for side in ("de", "en"):
            refuse_existing(args.directory / f"{split}.{side}", args.overwrite)
    write_corpus(args.directory, seed=args.seed, train=args.train, valid=args.valid, test=args.test)
    total = args.train + args.valid + args.test
    print(f"wrote {total:,} German-English sentence pairs to {args.directory}")
