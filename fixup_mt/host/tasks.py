"""Repairs of tasks of fairseq's that cannot start today."""

from __future__ import annotations

from typing import Any

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


REPAIRS: tuple[Patch, ...] = (
    give_the_bart_task_its_arguments,
    load_masked_dictionaries,
    load_dictionaries_of_bert,
)
