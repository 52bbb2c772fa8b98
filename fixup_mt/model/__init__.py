"""The models ``transformer_fixup``, ``transformer_fixup_lm`` and ``transformer_fixup_encoder``, and
what they are made of.
"""

from fixup_mt.model.encoder_model import FixupEncoderModel
from fixup_mt.model.model import FixupLanguageModel, FixupTransformerModel

__all__ = ["FixupEncoderModel", "FixupLanguageModel", "FixupTransformerModel"]
