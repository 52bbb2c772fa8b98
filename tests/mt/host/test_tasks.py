"""Tasks of fairseq's that could not start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from fairseq.data.legacy.masked_lm_dictionary import BertDictionary, MaskedLMDictionary
from fairseq.tasks.translation import TranslationTask

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


def _languages(folder: Path, source: str | None, target: str | None) -> tuple[str, str]:
    cfg = SimpleNamespace(data=str(folder), source_lang=source, target_lang=target)
    task = TranslationTask.setup_task(cfg)  # type: ignore[arg-type]
    return task.cfg.source_lang, task.cfg.target_lang


def _data_of(folder: Path, *pairs: str) -> Path:
    for pair in pairs:
        for language in pair.split("-"):
            (folder / f"train.{pair}.{language}.bin").touch()
            (folder / f"dict.{language}.txt").write_text("word 3\n")
    return folder


@pytest.mark.parametrize(
    ("source", "target", "both"),
    [
        (None, None, ("de", "en")),
        ("de", None, ("de", "en")),
        (None, "de", ("en", "de")),
        ("en", None, ("en", "de")),
        ("en", "de", ("en", "de")),
    ],
)
def test_the_language_that_is_given_stays(
    source: str | None, target: str | None, both: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "dict.zh-cn.txt").write_text("word 3\n")
    assert _languages(_data_of(tmp_path, "de-en"), source, target) == both


def test_one_of_several_pairs_is_not_taken_at_random(tmp_path: Path) -> None:
    _data_of(tmp_path, "de-en", "fr-en")
    assert _languages(tmp_path, "de", None) == ("de", "en")
    assert _languages(tmp_path, "fr", "en") == ("fr", "en")
    for source, says in ((None, "language pairs in"), ("en", "of en"), ("xx", "of xx.*: none")):
        with pytest.raises(UserError, match=f"{says}.*give --source-lang and --target-lang"):
            _languages(tmp_path, source, None)
