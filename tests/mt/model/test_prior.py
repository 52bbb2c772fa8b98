"""The output layer's bias vector starts at the words' frequencies, and goes wherever weights go."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.data import indexed_dataset

from fixup_core import METHODS, initialise_
from fixup_core.errors import UserError
from fixup_mt.model.prior import log_frequencies
from fixup_mt.serving.fold import fold_transformer
from tests.mt.helpers import batch, build, build_lm, dictionary, trained

COUNTS = {4: 6, 5: 3, 2: 2}
"""Word -> how often it stands in the data below."""


def _write(prefix: str, sentences: list[list[int]]) -> None:
    builder = indexed_dataset.MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for sentence in sentences:
        builder.add_item(torch.tensor(sentence))
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def counted(tmp_path) -> Any:
    """A translation task whose data lie on the disk; the dictionary says something else."""
    _write(str(tmp_path / "train.de-en.en"), [[4, 4, 5, 4, 2], [5, 4, 4, 5, 4, 2]])
    _write(str(tmp_path / "train.de-en.de"), [[7] * 50])
    words = dictionary()
    words.count[7] = 1000
    cfg = SimpleNamespace(data=str(tmp_path), source_lang="de", target_lang="en")
    return SimpleNamespace(cfg=cfg, source_dictionary=words, target_dictionary=words)


def _expected(words: int) -> list[float]:
    total = sum(COUNTS.values()) + words
    return [math.log((COUNTS.get(word, 0) + 1) / total) for word in range(words)]


def test_the_target_side_of_the_data_is_counted(counted: Any) -> None:
    found = log_frequencies(counted, counted.target_dictionary)
    assert found.tolist() == pytest.approx(_expected(len(counted.target_dictionary)), rel=1e-5)


def test_languages_the_other_way_round(counted: Any) -> None:
    counted.cfg.source_lang, counted.cfg.target_lang = "en", "de"
    assert log_frequencies(counted, counted.target_dictionary).argmax().item() == 7


def test_without_data_the_dictionary_has_counts(counted: Any, tmp_path) -> None:
    counted.cfg.data = str(tmp_path / "elsewhere")
    assert log_frequencies(counted, counted.target_dictionary).argmax().item() == 7


def test_a_model_starts_there_and_is_drawn_so_again(counted: Any) -> None:
    model = build(on=counted, fixup_method="fixup_adam")
    expected = _expected(len(counted.target_dictionary))
    for _ in range(2):
        logits, _ = model(**batch())
        assert logits[0, 0].tolist() == pytest.approx(expected, rel=1e-4)
        trained(model)
        initialise_(model, METHODS["fixup_adam"])


@pytest.mark.parametrize("options", [{}, {"share_all_embeddings": True}])
def test_it_is_folded(options: dict[str, Any]) -> None:
    model = trained(build(fixup_output_bias="frequencies", **options))
    weights = fold_transformer(model)
    bias = model.decoder.output_projection.bias
    extra = model.decoder.layer_norm.value() * weights["decoder.output_projection.weight"].sum(1)
    torch.testing.assert_close(weights["decoder.output_projection.bias"], bias + extra)


@pytest.mark.parametrize("make", [build, build_lm])
def test_whether_there_is_one(make: Any) -> None:
    def has_bias(**options: Any) -> bool:
        return make(**options).decoder.output_projection.bias is not None

    assert not has_bias() and has_bias(fixup_method="fixup_adam")
    assert has_bias(fixup_method="prenorm", fixup_output_bias="frequencies")
    assert not has_bias(fixup_method="fixup_adam", fixup_output_bias="none")


def test_not_with_an_adaptive_softmax() -> None:
    cutoff = {"adaptive_softmax_cutoff": "10,20"}
    with pytest.raises(UserError, match="is for one output layer"):
        build_lm(fixup_output_bias="frequencies", **cutoff)
    assert build_lm(fixup_method="fixup_adam", **cutoff).decoder.adaptive_softmax is not None
