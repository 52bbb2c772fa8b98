"""A model remembers which dictionary its embeddings belong to.

fairseq loads a checkpoint beside any dictionary of the right size, and then translates with the
wrong words, without a complaint.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import nn

from fixup_mt.errors import UserError


class VocabularyDigest(nn.Module):
    """Part of a model's state dict: a digest of the words and their order, int64, shape [1].

    Raises:
        UserError: On loading a state dict that was trained with another dictionary. One without
            a digest is accepted.
    """

    def __init__(self, dictionary: Dictionary, side: str) -> None:
        super().__init__()
        self.side = side
        # fairseq's moving averages leave what is called a version alone.
        self.register_buffer("version", torch.tensor([_digest(dictionary)]))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        own: Any = self.version
        saved = state_dict.setdefault(prefix + "version", own)
        if not torch.equal(saved.cpu(), own.cpu()):
            raise UserError(
                f"the {self.side} dictionary is not the one this checkpoint was trained with: "
                "give the data directory whose dict.*.txt it was trained on"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _digest(dictionary: Dictionary) -> int:
    text = "\n".join(dictionary.symbols).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big", signed=True)
