"""What fairseq does wrong while it translates, mended; each with the twin that shows the fault."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from fairseq.data import token_block_dataset
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq.search import DiverseBeamSearch

import fixup_mt
from fixup_mt.host import generation
from tests.conftest import fairseq
from tests.mt.helpers import dictionary

fixup_mt.register()


def _banned(block: NGramRepeatBlock, decoded: list[int], padded: int) -> set[int]:
    tokens = torch.ones(1, padded, dtype=torch.long)
    tokens[0, : len(decoded)] = torch.tensor(decoded)
    probabilities = torch.zeros(1, 20)
    block(tokens, probabilities, 1, 1, len(decoded) - 1)
    return set((probabilities[0] == -math.inf).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("size", "decoded", "banned"),
    [
        (2, [2, 5, 6, 5], {6}),
        (3, [2, 5, 6, 7, 5, 6], {7}),
        (3, [2, 5, 6, 7, 8, 9], set()),
        (1, [2, 5, 6], {2, 5, 6}),
        (4, [2, 5], set()),
    ],
)
def test_no_ngram_is_repeated_whatever_the_padding(
    size: int, decoded: list[int], banned: set[int]
) -> None:
    block = NGramRepeatBlock(size, use_extension=False)
    for padded in (len(decoded), 30):
        assert _banned(block, decoded, padded) == banned


def test_without_the_repair_padding_hides_the_repetition() -> None:
    block = NGramRepeatBlock(3, use_extension=False)
    mended = NGramRepeatBlock._no_repeat_ngram
    generation.repeat_no_ngram.undo()
    try:
        assert _banned(block, [2, 5, 6, 7, 5, 6], 30) == set()
    finally:
        generation.repeat_no_ngram.apply()
    assert NGramRepeatBlock._no_repeat_ngram is not mended  # wrapped anew


def _diverse(numbers: list[int]) -> torch.Tensor:
    """Two steps of a search of two groups; then the first sentence is finished, and a third."""
    torch.manual_seed(0)
    search = DiverseBeamSearch(dictionary(), 2, 0.5, 0.5)
    left, found = torch.tensor(numbers), []
    for step in range(3):
        if step == 2:
            left = left[1:]
        probabilities = torch.randn(len(left), 4, 12).log_softmax(-1)
        scores = torch.zeros(len(left), 4, step)
        found.append(search.step(step, probabilities, scores, None, left)[1].flatten())
    return torch.cat(found)


def test_groups_are_those_of_the_batch() -> None:
    assert torch.equal(_diverse([0, 1, 2]), _diverse([907, 13, 55]))


def test_without_the_repair_the_second_batch_dies() -> None:
    generation.number_sentences_within_their_batch.undo()
    try:
        _diverse([0, 1, 2])
        with pytest.raises(IndexError):
            _diverse([907, 13, 55])
    finally:
        generation.number_sentences_within_their_batch.apply()


def test_shards_share_the_sentences_out(data_bin: Path, trained: Path) -> None:
    common = (data_bin, "--user-dir", "fixup_mt", "--cpu", "--beam", 1, "--max-tokens", 60)
    path = ("--path", trained / "checkpoint_last.pt")

    def numbers(*more: object) -> list[int]:
        lines = fairseq("generate", *common, *path, *more).stdout.splitlines()
        return sorted(int(line.split("\t")[0][2:]) for line in lines if line.startswith("H-"))

    shards = [numbers("--num-shards", 2, "--shard-id", i) for i in (0, 1)]
    assert all(shards) and not set(shards[0]) & set(shards[1])
    assert sorted(shards[0] + shards[1]) == numbers() == list(range(41))


def test_only_a_translating_command_has_shards() -> None:
    given = {"num_shards": 1, "shard_id": 0}
    generation.share_out(SimpleNamespace(num_shards=4, shard_id=1))  # of a training
    assert generation.batches_of_a_shard(given) == given
    generation.share_out(SimpleNamespace(num_shards=4, shard_id=1, beam=5))
    assert generation.batches_of_a_shard(given) == {"num_shards": 4, "shard_id": 1}
    assert generation.batches_of_a_shard(given | {"num_shards": 2})["num_shards"] == 2
    generation.share_out(SimpleNamespace())


def test_language_models_are_broken_at_sentences() -> None:
    assert token_block_dataset.np.compat.long is int
    assert token_block_dataset.np.zeros is numpy.zeros
    assert not hasattr(numpy, "compat") or numpy.__version__ < "2"
    generation.take_numpys_old_names_away()
    assert token_block_dataset.np is numpy
    generation.give_numpy_its_old_names()


def test_a_language_model_is_evaluated_and_used_sentence_by_sentence(
    corpus: Path, tmp_path: Path
) -> None:
    data_bin, text = tmp_path / "bin", tmp_path / "lm"
    prefixes = [f"--{split}pref={corpus / split}.de" for split in ("train", "valid", "test")]
    fairseq("preprocess", "--only-source", *prefixes, "--destdir", data_bin)
    train = ("--task", "language_modeling", "--user-dir", "fixup_mt", "--cpu", "--num-workers", 0)
    fairseq(
        "train", data_bin, *train, "--arch", "transformer_fixup_lm_tiny", "--optimizer", "adam",
        "--lr", 1e-3, "--max-tokens", 400, "--tokens-per-sample", 20, "--max-update", 3,
        "--sample-break-mode", "eos", "--save-dir", text, "--no-epoch-checkpoints",
    )  # fmt: skip
    path = ("--path", text / "checkpoint_last.pt", "--user-dir", "fixup_mt", "--cpu")
    task = ("--task", "language_modeling")
    scored = fairseq(
        "eval_lm", data_bin, *path, *task, "--sample-break-mode", "eos", "--max-tokens", 400
    )
    assert "Perplexity" in scored.stdout + scored.stderr
    spoken = fairseq("interactive", data_bin, *path, *task, "--beam", 2, input="w1 w2 w3\n")
    assert [line for line in spoken.stdout.splitlines() if line.startswith("H-0")]


def test_weights_that_are_no_numbers_are_told(
    trained: Path, data_bin: Path, tmp_path: Path
) -> None:
    state = torch.load(trained / "checkpoint_best.pt", weights_only=True)
    state["model"]["decoder.layers.0.fc1.weight"][0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    flags = ("--user-dir", "fixup_mt", "--cpu", "--path", tmp_path / "nan.pt")
    done = fairseq("generate", data_bin, *flags, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    says = f"error: {tmp_path}/nan.pt holds weights that are NaN or infinite (decoder.layers.0.fc1"
    assert done.stderr.splitlines()[-1].startswith(says)
