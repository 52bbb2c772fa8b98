"""Scoring: nothing translated may go missing, and the numbers agree with independent ones."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import sacrebleu
import torch

from fixup_mt.__main__ import main
from fixup_mt.errors import UserError
from fixup_mt.scoring import score

NUM_SENTENCES = 100
WORDS = ["the", "a", "man", "dog", "plays", "runs", "well-known", ",", ".", "red", "two"]


def sentences(seed: int, count: int = NUM_SENTENCES) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


def nearly(lines: Sequence[str], seed: int) -> list[str]:
    """The lines with about one word in five replaced."""
    rng = random.Random(seed)
    return [
        " ".join(word if rng.random() < 0.8 else rng.choice(WORDS) for word in line.split())
        for line in lines
    ]


REFERENCES = sentences(1)
HYPOTHESES = nearly(REFERENCES, 2)


def write_output(
    path: Path, hypotheses: Sequence[str], *, skip: Iterable[int] = (), nbest: int = 1
) -> Path:
    """What fairseq-generate prints, in an order of its own."""
    numbers = [number for number in range(len(hypotheses)) if number not in set(skip)]
    random.Random(0).shuffle(numbers)
    lines = ["2026-01-01 00:00:00 | INFO | fairseq_cli.generate | loading model(s) from a.pt"]
    for number in numbers:
        lines += [f"S-{number}\tquelle {number}", f"T-{number}\treference {number}"]
        for rank in range(nbest):
            text = hypotheses[number] if rank == 0 else "a worse one"
            lines += [f"H-{number}\t-0.5\t{text}", f"D-{number}\t-0.5\t{text}"]
            lines += [f"P-{number}\t-0.1 -0.9"]
    lines += ["Generate test with beam=5: BLEU4 = 12.34, 1.0/1.0"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def run_command(*words: object) -> None:
    parser = argparse.ArgumentParser()
    score.add_arguments(parser)
    score.run(parser.parse_args([str(word) for word in words]))


def translations(hypotheses: Sequence[str]) -> score.Translations:
    return score.Translations(sources=[], references=[], hypotheses=list(hypotheses))


def plain_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU by its definition: no smoothing, words by white space."""
    matches, totals = [0] * 4, [0] * 4
    hypothesis_length = reference_length = 0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        ours, theirs = hypothesis.split(), reference.split()
        hypothesis_length += len(ours)
        reference_length += len(theirs)
        for n in range(1, 5):
            found = Counter(tuple(ours[i : i + n]) for i in range(len(ours) - n + 1))
            wanted = Counter(tuple(theirs[i : i + n]) for i in range(len(theirs) - n + 1))
            matches[n - 1] += (found & wanted).total()
            totals[n - 1] += found.total()
    if 0 in matches:
        return 0.0
    precision = sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4
    brevity = min(0.0, 1 - reference_length / hypothesis_length)
    return 100 * math.exp(precision + brevity)


def test_translations_are_ordered_by_id(tmp_path: Path) -> None:
    result = score.read_generate_output(write_output(tmp_path / "g", HYPOTHESES))
    assert result.hypotheses == HYPOTHESES
    assert result.sources == [f"quelle {number}" for number in range(NUM_SENTENCES)]
    assert result.references == [f"reference {number}" for number in range(NUM_SENTENCES)]


def test_best_of_an_nbest_list_is_taken(tmp_path: Path) -> None:
    result = score.read_generate_output(write_output(tmp_path / "g", HYPOTHESES, nbest=3))
    assert result.hypotheses == HYPOTHESES


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    odd = ["", "a line\u2028separator", "next\x85line", "a\ttab", " spaces ", "D-3\tx"]
    assert score.read_generate_output(write_output(tmp_path / "g", odd)).hypotheses == odd


@pytest.mark.parametrize("skip", [[0], [50], [99], [96, 97, 98, 99]])
def test_a_dropped_sentence_is_caught(tmp_path: Path, skip: list[int]) -> None:
    path = write_output(tmp_path / "g", HYPOTHESES, skip=skip)
    with pytest.raises(UserError, match=f"{NUM_SENTENCES - len(skip)} of {NUM_SENTENCES} sent"):
        score.read_generate_output(path, num_sentences=NUM_SENTENCES)
    reference = write_lines(tmp_path / "r", REFERENCES)
    with pytest.raises(UserError, match="--required-batch-size-multiple 1"):
        run_command("--generated", path, "--reference", reference)


def test_a_hole_is_caught_without_knowing_the_number(tmp_path: Path) -> None:
    path = write_output(tmp_path / "g", HYPOTHESES, skip=[50])
    with pytest.raises(UserError, match="99 of 100"):
        score.read_generate_output(path)


def test_reference_of_another_test_set_is_caught(tmp_path: Path) -> None:
    path = write_output(tmp_path / "g", HYPOTHESES)
    with pytest.raises(UserError, match="sentence 99 but the reference has 90 lines"):
        score.read_generate_output(path, num_sentences=90)
    with pytest.raises(UserError, match="100 translations but 90 references"):
        score.score(translations(HYPOTHESES), REFERENCES[:90])


def test_two_outputs_in_one_file_are_caught(tmp_path: Path) -> None:
    path = write_output(tmp_path / "g", HYPOTHESES)
    path.write_text(path.read_text() * 2)
    with pytest.raises(UserError, match="twice"):
        score.read_generate_output(path)


def test_cut_off_or_foreign_files_are_caught(tmp_path: Path) -> None:
    path = write_output(tmp_path / "g", HYPOTHESES)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut off"):
        score.read_generate_output(path)
    with pytest.raises(UserError, match="no translations"):
        score.read_generate_output(write_lines(tmp_path / "r", REFERENCES))
    with pytest.raises(FileNotFoundError):
        score.read_generate_output(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        score.read_generate_output(tmp_path / "binary")


@pytest.mark.parametrize("seed", range(5))
def test_tokenised_bleu_equals_its_definition(seed: int) -> None:
    references = sentences(seed)
    hypotheses = nearly(references, seed + 100)
    result = score.tokenised_bleu(hypotheses, references)
    assert result.value == pytest.approx(plain_bleu(hypotheses, references), abs=1e-9)
    assert "tok:none" in result.signature


def test_tokenised_bleu_is_not_smoothed() -> None:
    assert score.tokenised_bleu(["a b c x"], ["a b c d"]).value == 0.0
    assert sacrebleu.corpus_bleu(["a b c x"], [["a b c d"]], tokenize="none").score > 0.0


def test_sacrebleu_is_sacrebleu() -> None:
    result = score.score(translations(HYPOTHESES), REFERENCES)
    expected = sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert result["sacrebleu"].value == pytest.approx(expected, abs=1e-9)
    assert "tok:13a" in result["sacrebleu"].signature
    assert result["chrf"].value == pytest.approx(
        sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score, abs=1e-9
    )
    assert result.keys() == {"sacrebleu", "chrf"}


def test_perfect_translations_score_100_in_every_way() -> None:
    result = score.score(translations(REFERENCES), REFERENCES, tokenised_references=REFERENCES)
    assert [round(item.value, 9) for item in result.values()] == [100.0, 100.0, 100.0]


def test_lowercase_concerns_every_score() -> None:
    shouted = translations([line.upper() for line in REFERENCES])
    options = {"references": REFERENCES, "tokenised_references": REFERENCES}
    plain = score.score(shouted, **options)
    lower = score.score(shouted, **options, lowercase=True)
    assert all(item.value > 99.99 for item in lower.values())
    assert all(item.value < 50 for item in plain.values())


def test_compounds_are_split_on_both_sides() -> None:
    assert score.split_compounds("a well-known - x--y-z -") == (
        "a well ##AT##-##AT## known - x ##AT##-##AT## -y ##AT##-##AT## z -"
    )
    split = score.tokenised_bleu(HYPOTHESES, REFERENCES, compound_split=True)
    ours, theirs = (
        [line.replace("well-known", "well ##AT##-##AT## known") for line in lines]
        for lines in (HYPOTHESES, REFERENCES)
    )
    assert split.value == pytest.approx(plain_bleu(ours, theirs), abs=1e-9)
    assert split.value != score.tokenised_bleu(HYPOTHESES, REFERENCES).value
    assert "compounds:split" in split.signature


def test_moses_tokens_become_plain_text() -> None:
    pytest.importorskip("sacremoses")
    plain = score.detokeniser("moses:en")("it &apos;s &quot; fine &quot; , isn &apos;t it ?")
    assert plain == "it's \"fine\", isn't it?"
    assert score.detokeniser("none")("it &apos;s") == "it &apos;s"


@pytest.mark.parametrize("name", ["moses", "moses:", "spm", ""])
def test_unknown_detokeniser_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="moses:en"):
        score.detokeniser(name)


def test_json_holds_every_number_and_setting(tmp_path: Path) -> None:
    checkpoint, output = tmp_path / "a.pt", tmp_path / "new" / "score.json"
    state = {
        "model": {"w": torch.ones(1)},
        "cfg": {"model": argparse.Namespace(arch="transformer_fixup", dropout=0.5)},
        "optimizer_history": [{"num_updates": 7}],
    }
    torch.save(state, checkpoint)
    run_command(
        *("--generated", write_output(tmp_path / "g", HYPOTHESES)),
        *("--reference", write_lines(tmp_path / "r", REFERENCES)),
        *("--tokenised-reference", tmp_path / "r", "--tokenised", "--lowercase"),
        *("--checkpoint", f"{checkpoint}:{checkpoint}", "--json", output),
        *("--setting", "beam=5", "--setting", "flags=--a=b"),
    )
    content = json.loads(output.read_text())
    assert content["scores"].keys() == {"sacrebleu", "chrf", "tokenised_bleu"}
    assert "case:lc" in content["scores"]["sacrebleu"]["signature"]
    assert content["sentences"] == NUM_SENTENCES
    assert content["settings"]["lowercase"] is True
    assert content["settings"]["setting"] == {"beam": "5", "flags": "--a=b"}
    assert {"python", "torch", "sacrebleu"} <= content["versions"].keys()
    assert len(content["checkpoints"]) == 2
    described = content["checkpoints"][0]
    assert described["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert described["training"]["model"] == {"arch": "transformer_fixup", "dropout": 0.5}
    assert described["num_updates"] == 7


def test_tokenised_falls_back_to_fairseqs_references(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [f"reference {number}" for number in range(NUM_SENTENCES)]
    run_command("--generated", write_output(tmp_path / "g", same), "--tokenised")
    # Two words a line hold no 4-gram: the unsmoothed score is 0, its word precision is 100.
    assert "tokenised_bleu: 0.00  (0.00 100.0/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to score against"),
        (["--reference", "r", "--compound-split"], "add --tokenised"),
        (["--reference", "r", "--tokenised-reference", "r"], "add --tokenised"),
        (["--reference", "r", "--setting", "beam", "--json", "j"], "--setting NAME=VALUE"),
        (["--reference", "r", "--checkpoint", "no.pt", "--json", "j"], "no.pt does not exist"),
        (["--reference", "elsewhere"], "elsewhere does not exist"),
    ],
)
def test_wrong_options_end_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_output(tmp_path / "g", HYPOTHESES)
    write_lines(tmp_path / "r", REFERENCES)
    assert main(["score", "--generated", "g", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "j").exists()
