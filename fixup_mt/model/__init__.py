"""The models ``transformer_fixup`` and ``transformer_fixup_lm``, and what they are made of."""

from fixup_mt.model.model import FixupLanguageModel, FixupTransformerModel

__all__ = ["FixupLanguageModel", "FixupTransformerModel"]
