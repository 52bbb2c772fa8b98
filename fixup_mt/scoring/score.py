"""BLEU and chrF of what ``fairseq-generate`` printed, with signatures and settings.

Two numbers answer two questions. sacreBLEU (13a) of plain text against the untouched test file can
be compared with anyone's. The legacy tokenised BLEU is the one that papers of 2018 report: words
as the corpus preparation cut them, on both sides, as multi-bleu.perl counts them; WMT'14 English-
German papers also split compounds at hyphens first. A translation missing from the output is an
error here, never a smaller test set.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from fixup_core.files import write_text
from fixup_mt.errors import UserError

LINE = re.compile(r"([STDHP])-(\d+)\t(.*)", re.DOTALL)
# As a byte-wise tool sees it: only ASCII white space separates.
HYPHENATED = re.compile(r"(\S)-(\S)", re.ASCII)
PACKAGES = ("sacrebleu", "sacremoses", "sentencepiece", "torch", "fairseq-fixed", "fairseq")


@dataclass(frozen=True)
class Translations:
    """What fairseq-generate printed, ordered by sentence id: entry i belongs to test line i.

    ``sources`` and ``references`` are fairseq's own, after ``--remove-bpe``; they are empty when it
    printed none. ``hypotheses`` are the best of each n-best list.
    """

    sources: list[str]
    references: list[str]
    hypotheses: list[str]


@dataclass(frozen=True)
class Score:
    value: float
    signature: str
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--generated", type=Path, required=True, metavar="FILE", help="fairseq-generate's output")
    add("--reference", type=Path, metavar="FILE", help="the test file as plain text")
    add(
        "--detokenise",
        default="none",
        metavar="none|moses:LANG",
        help="how hypotheses become plain text (SentencePiece output already is; default: none)",
    )
    add("--lowercase", action="store_true", help="ignore case in every score")
    add("--tokenised", action="store_true", help="the legacy tokenised BLEU, too")
    add(
        "--tokenised-reference",
        type=Path,
        metavar="FILE",
        help="the tokenised test file for --tokenised (default: the T- lines of the output)",
    )
    add("--compound-split", action="store_true", help="split at hyphens before --tokenised")
    add("--json", type=Path, metavar="FILE", help="write every number and setting here")
    add("--checkpoint", metavar="A.pt[:B.pt]", help="described in --json, with its training flags")
    add(
        "--setting",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="kept in --json: beam=5 and the like; may be repeated",
    )


def run(args: argparse.Namespace) -> None:
    references = None if args.reference is None else read_lines(args.reference)
    tokenised = None if args.tokenised_reference is None else read_lines(args.tokenised_reference)
    check_arguments(args)
    known = next((lines for lines in (references, tokenised) if lines is not None), None)
    translations = read_generate_output(
        args.generated, num_sentences=None if known is None else len(known)
    )
    if args.tokenised and tokenised is None:
        tokenised = translations.references
    scores = score(
        translations,
        references,
        detokenise=args.detokenise,
        lowercase=args.lowercase,
        tokenised_references=tokenised,
        compound_split=args.compound_split,
    )
    for name, result in scores.items():
        print(f"{name}: {result.value:.2f}  ({result.detail})  {result.signature}")
    if args.json is not None:
        write_json(describe(args, len(translations.hypotheses), scores), args.json)


def check_arguments(args: argparse.Namespace) -> None:
    if args.reference is None and not args.tokenised:
        raise UserError("there is nothing to score against; add --reference FILE or --tokenised")
    if args.compound_split and not args.tokenised:
        raise UserError("--compound-split belongs to the tokenised BLEU; add --tokenised")
    if args.tokenised_reference is not None and not args.tokenised:
        raise UserError("--tokenised-reference is used by --tokenised only; add --tokenised")
    parse_settings(args.setting)


def read_lines(path: Path) -> list[str]:
    """Only the newline ends a line, as in fairseq's numbering; str.splitlines knows ten more."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from error
    return text.removesuffix("\n").split("\n") if text else []


def read_generate_output(path: Path, *, num_sentences: int | None = None) -> Translations:
    """The S-, T- and D- lines of a file that holds fairseq-generate's standard output.

    Args:
        path: the file, log lines and all.
        num_sentences: how many test lines there are, where that is known.

    Raises:
        UserError: no translations, a sentence missing or translated twice, or a cut-off file.
    """
    found: dict[str, dict[int, str]] = {"S": {}, "T": {}, "D": {}}
    for line in read_lines(path):
        match = LINE.fullmatch(line)
        if match is None or match[1] not in found:
            continue
        kind, number, text = match[1], int(match[2]), match[3]
        if kind == "S" and number in found["S"]:
            raise UserError(f"{path} holds sentence {number} twice; generate into a new file")
        # The first of an n-best list is the best.
        found[kind].setdefault(number, text.partition("\t")[2] if kind == "D" else text)
    check_complete(path, sorted(found["D"]), num_sentences)
    return Translations(
        sources=[found["S"][number] for number in sorted(found["S"])],
        references=[found["T"][number] for number in sorted(found["T"])],
        hypotheses=[found["D"][number] for number in sorted(found["D"])],
    )


def check_complete(path: Path, numbers: Sequence[int], num_sentences: int | None) -> None:
    """Ids must be exactly 0 ... n-1; by default fairseq drops the end of its last batch."""
    if not numbers:
        raise UserError(f"{path} holds no translations; give the output of fairseq-generate")
    if not path.read_bytes().endswith(b"\n"):
        raise UserError(f"{path} ends within a line, so it is cut off; generate it again")
    expected = num_sentences if num_sentences is not None else numbers[-1] + 1
    if numbers[-1] >= expected:
        raise UserError(
            f"{path} translates sentence {numbers[-1]} but the reference has {expected} lines; "
            "give the reference of the same test set"
        )
    if len(numbers) != expected:
        raise UserError(
            f"{len(numbers)} of {expected} sentences were translated in {path}; run "
            "fairseq-generate with --required-batch-size-multiple 1 and without "
            "--skip-invalid-size-inputs-valid-test"
        )


def score(
    translations: Translations,
    references: Sequence[str] | None,
    *,
    detokenise: str = "none",
    lowercase: bool = False,
    tokenised_references: Sequence[str] | None = None,
    compound_split: bool = False,
) -> dict[str, Score]:
    """``sacrebleu`` and ``chrf`` where there are plain references, ``tokenised_bleu`` where there
    are tokenised ones. ``compound_split`` concerns the last alone.

    Raises:
        UserError: references of another number than the hypotheses.
    """
    scores = {}
    if references is not None:
        check_lengths(translations, references)
        plain = list(map(detokeniser(detokenise), translations.hypotheses))
        scores["sacrebleu"] = corpus_score(BLEU(lowercase=lowercase), plain, references)
        scores["chrf"] = corpus_score(CHRF(lowercase=lowercase), plain, references)
    if tokenised_references is not None:
        check_lengths(translations, tokenised_references)
        scores["tokenised_bleu"] = tokenised_bleu(
            translations.hypotheses,
            tokenised_references,
            lowercase=lowercase,
            compound_split=compound_split,
        )
    return scores


def check_lengths(translations: Translations, references: Sequence[str]) -> None:
    if len(translations.hypotheses) != len(references):
        raise UserError(
            f"there are {len(translations.hypotheses)} translations but {len(references)} "
            "references; give the reference of the same test set"
        )


def corpus_score(
    metric: BLEU | CHRF, hypotheses: Sequence[str], references: Sequence[str]
) -> Score:
    result = metric.corpus_score(list(hypotheses), [list(references)])
    detail = str(result).partition(" = ")[2]
    return Score(value=result.score, signature=str(metric.get_signature()), detail=detail)


def tokenised_bleu(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    lowercase: bool = False,
    compound_split: bool = False,
) -> Score:
    """BLEU over the words as they stand, unsmoothed: what multi-bleu.perl prints."""
    if compound_split:
        hypotheses = list(map(split_compounds, hypotheses))
        references = list(map(split_compounds, references))
    metric = BLEU(tokenize="none", force=True, smooth_method="none", lowercase=lowercase)
    result = corpus_score(metric, hypotheses, references)
    marked = result.signature + "|compounds:split" if compound_split else result.signature
    return Score(value=result.value, signature=marked, detail=result.detail)


def split_compounds(text: str) -> str:
    """``well-known`` becomes ``well ##AT##-##AT## known``, as in Ott et al. (2018)."""
    return HYPHENATED.sub(r"\1 ##AT##-##AT## \2", text)


def detokeniser(name: str) -> Callable[[str], str]:
    """A function from one hypothesis to plain text.

    Raises:
        UserError: unknown name, or sacremoses is not installed.
    """
    if name == "none":
        return str
    kind, _, language = name.partition(":")
    if kind != "moses" or not language:
        raise UserError(f"--detokenise is {name}; give none, or moses:LANG such as moses:en")
    try:
        from sacremoses import MosesDetokenizer
    except ImportError as error:
        raise UserError("--detokenise moses needs sacremoses; pip install sacremoses") from error
    moses = MosesDetokenizer(lang=language)
    return lambda text: str(moses.detokenize(text.split()))


def describe(
    args: argparse.Namespace, num_sentences: int, scores: dict[str, Score]
) -> dict[str, Any]:
    settings = {key: value for key, value in vars(args).items() if key not in ("run", "command")}
    checkpoints = [] if args.checkpoint is None else args.checkpoint.split(os.pathsep)
    return {
        "scores": {name: asdict(result) for name, result in scores.items()},
        "sentences": num_sentences,
        "settings": {**settings, "setting": parse_settings(args.setting)},
        "versions": installed_versions(),
        "checkpoints": [describe_checkpoint(Path(path)) for path in checkpoints],
    }


def parse_settings(items: Sequence[str]) -> dict[str, str]:
    for item in items:
        if "=" not in item:
            raise UserError(f"--setting {item} has no value; write --setting NAME=VALUE")
    return {name: value for name, _, value in (item.partition("=") for item in items)}


def installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_checkpoint(path: Path) -> dict[str, Any]:
    # Only here is a checkpoint read, and torch needed.
    from fixup_mt.scoring.average import load_checkpoint

    state = load_checkpoint(path)
    history = state.get("optimizer_history") or [{}]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "path": str(path),
        "sha256": digest,
        "num_updates": history[-1].get("num_updates"),
        "averaged_from": (state.get("extra_state") or {}).get("averaged_from"),
        "training": to_plain(state.get("cfg")),
    }


def to_plain(value: Any) -> Any:
    """What JSON can hold: namespaces become objects, whatever is left becomes text."""
    if isinstance(value, argparse.Namespace):
        return to_plain(vars(value))
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write what is worked out anew from its inputs: an earlier file is replaced."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")
