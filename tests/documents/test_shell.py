"""Every command line of the documents is one that its program accepts."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tests.documents.blocks import Block, labelled, spans
from tests.documents.lines import BadLineError, check, commands

PAGES = labelled("sh")
STARTS = ("python -m ", "python benchmarks/", "python recipes/", "fairseq-", "recipes/", "make ")
KNOWN_TO_FAIL = {"fairseq-train --user-dir /nowhere", "fairseq-score --sacrebleu"}
SENTENCES = {
    page: [c for c in code if c.startswith(STARTS) and " --" in c and c not in KNOWN_TO_FAIL]
    for page, code in spans().items()
}
"""Command lines within sentences; they may leave out what is required."""


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def refused(block: Block) -> list[str]:
    """What is wrong with the commands of a block."""
    found = []
    for command in commands(block.text):
        try:
            check(command)
        except BadLineError as error:
            found.append(f"{block.where}: {error}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_is_accepted(page: str) -> None:
    assert [mistake for block in PAGES[page] for mistake in refused(block)] == []


@pytest.mark.parametrize("page", [page for page, lines in SENTENCES.items() if lines])
def test_every_option_in_a_sentence_is_known(page: str) -> None:
    mistakes = [m for line in SENTENCES[page] for m in refused(Block(page, 0, "sh", line + "\n"))]
    assert [mistake for mistake in mistakes if "are required: " not in mistake] == []


def test_sentences_hold_many_commands() -> None:
    assert sum(map(len, SENTENCES.values())) > 20


@pytest.mark.parametrize(
    "line",
    [
        "python -m tests.campaign.kills --counts 20",
        "python -m fixup_mt export --checkpoint a --data-bin b --output c --quantisation int8",
        "python -m fixup_core check cifar --methods fixup",
        "python -m fixup_core chekc cifar",
        "python -m vision fit --model.learning_rate 0.1",
        "python -m vision sweep depth --recipe.datum CIFAR10",
        "python -m vision export --checkpoint a",
        "python benchmarks/bounds.py --figure a.png",
        "fairseq-train data --arch transformer_fixup --user-dir fixup_mt --fixup-norm layer",
        "fairseq-hydra-train '+model={_name: transformer_fixup_huge}'",
        "torchrun --nproc-per-node 2 -m fairseq_cli.train ... --distributed-backends gloo",
        "recipes/mt/multi30k.sh --prepare",
        "recipes/mt/evaluate.sh --model F",
        "make everything",
        "pip install -e '.[everything]'",
        "curl https://example.org",
    ],
)
def test_a_wrong_line_is_refused(line: str) -> None:
    assert len(refused(Block("page", 1, "sh", line + "\n"))) == 1


def test_the_words_of_a_block() -> None:
    block = "echo 'a b' | python -m x --y \\\n    z > file   # why\nmake a && make b\n"
    expected = [["echo", "a b"], ["python", "-m", "x", "--y", "z"], ["make", "a"], ["make", "b"]]
    assert list(commands(block)) == expected
