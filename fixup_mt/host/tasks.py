"""Repairs of tasks of fairseq's that cannot start today, or start with other languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fairseq import utils

from fixup_mt.errors import UserError
from fixup_mt.host.patches import Patch, patch


@patch(
    "fairseq.tasks.translation_from_pretrained_bart:TranslationFromPretrainedBARTTask.__init__",
    "self args src_dict tgt_dict",
)
def give_the_bart_task_its_arguments(original: Any) -> Any:
    """It reads ``self.args``, which its newer parent calls ``self.cfg``."""

    def init(self: Any, args: Any, src_dict: Any, tgt_dict: Any) -> None:
        self.args = args
        original(self, args, src_dict, tgt_dict)

    return init


def _with_special_symbols(original: Any) -> Any:
    def init(self: Any, *args: Any, add_special_symbols: bool = True, **kwargs: Any) -> None:
        if not add_special_symbols:
            raise UserError(f"a {type(self).__name__} always has its special symbols")
        original(self, *args, **kwargs)

    return init


@patch(
    "fairseq.data.legacy.masked_lm_dictionary:MaskedLMDictionary.__init__",
    "self pad eos unk mask",
)
def load_masked_dictionaries(original: Any) -> Any:
    """``Dictionary.load`` gives its class an argument that this one does not know."""
    return _with_special_symbols(original)


@patch(
    "fairseq.data.legacy.masked_lm_dictionary:BertDictionary.__init__",
    "self pad eos unk mask cls sep",
)
def load_dictionaries_of_bert(original: Any) -> Any:
    """The same."""
    return _with_special_symbols(original)


@patch("fairseq.tasks.translation:TranslationTask.setup_task", "cls cfg **kwargs")
def infer_what_is_not_given(original: Any) -> Any:
    """With ``--source-lang`` or ``--target-lang`` alone, both are inferred, from whichever file
    comes first: the option is ignored, and of several pairs any is taken.
    """

    def setup_task(cls: Any, cfg: Any, **kwargs: Any) -> Any:
        if None in (cfg.source_lang, cfg.target_lang):
            _infer(cfg, Path(utils.split_paths(cfg.data)[0]))
        return original(cls, cfg, **kwargs)

    return setup_task


def _infer(cfg: Any, folder: Path) -> None:
    """Set the languages that are not given, where the data leave no choice."""
    given = cfg.source_lang or cfg.target_lang
    pairs = _pairs(folder, given)
    if len(pairs) == 1:
        first, second = pairs.pop()
        source_is_second = given and (cfg.source_lang == second or cfg.target_lang == first)
        pair = (second, first) if source_is_second else (first, second)
        cfg.source_lang, cfg.target_lang = pair
    elif pairs or given:
        of, found = f" of {given}" if given else "", ", ".join(sorted(map("-".join, pairs)))
        raise UserError(
            f"language pairs{of} in {folder}: {found or 'none'}; give --source-lang and "
            "--target-lang"
        )


def _pairs(folder: Path, language: str | None) -> set[tuple[str, ...]]:
    """The language pairs of a data directory's files, ``train.de-en.de.bin`` and the like."""
    names = (file.name.split(".") for file in (folder.iterdir() if folder.is_dir() else ()))
    pairs = {tuple(parts[1].split("-")) for parts in names if len(parts) > 2 and parts[0] != "dict"}
    return {p for p in pairs if len(p) == 2 and p[1] and (language is None or language in p)}


REPAIRS: tuple[Patch, ...] = (
    give_the_bart_task_its_arguments,
    load_masked_dictionaries,
    load_dictionaries_of_bert,
    infer_what_is_not_given,
)
