"""Tasks of fairseq's that could not start."""

from __future__ import annotations

from pathlib import Path

import pytest
from fairseq.data.legacy.masked_lm_dictionary import BertDictionary, MaskedLMDictionary

import fixup_mt  # noqa: F401 (applies the repairs)
from fixup_mt.errors import UserError
from tests.conftest import fairseq, train_flags


@pytest.mark.parametrize("kind", [MaskedLMDictionary, BertDictionary])
def test_dictionaries_with_a_mask_are_loaded(kind: type, tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text("word 3\n")
    words = kind.load(str(tmp_path / "dict.txt"))  # type: ignore[attr-defined]
    assert words.mask() == words.index("<mask>") and words.index("word") == len(words) - 1
    with pytest.raises(UserError, match="always has its special symbols"):
        kind.load(str(tmp_path / "dict.txt"), add_special_symbols=False)  # type: ignore[attr-defined]


def test_a_model_of_the_bart_task_trains(data_bin: Path, tmp_path: Path) -> None:
    task = ("--task", "translation_from_pretrained_bart", "--langs", "de,en")
    languages = ("-s", "de", "-t", "en", "--max-epoch", "1")
    fairseq("train", *train_flags(data_bin, tmp_path, *task, *languages))
    assert (tmp_path / "checkpoint_last.pt").is_file()
    flags = ("--user-dir", "fixup_mt", "--cpu", "--path", tmp_path / "checkpoint_last.pt")
    done = fairseq("generate", data_bin, *task, "-s", "de", "-t", "en", *flags)
    assert done.stdout.count("\nH-") == 41
