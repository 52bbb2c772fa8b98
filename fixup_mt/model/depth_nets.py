"""Narrow Transformers for the depth check: ``python -m fixup_core check transformer``.

A depth is a number of layers of the encoder, and of the decoder: L is five times that.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from fairseq import models
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch import nn

from fixup_core import initialise_
from fixup_mt.model.config import FixupOptions

DEPTHS = (1, 2, 4, 8, 16, 32)
SENTENCES, SOURCE, TARGET, WORDS = 8, 7, 6, 40
SIZES = {
    f"{stack}_{option}": size
    for stack in ("encoder", "decoder")
    for option, size in (("embed_dim", 32), ("ffn_embed_dim", 64), ("attention_heads", 2))
}


def transformer(method: str = "fixup") -> dict[str, Any]:
    """Encoder and decoder, 32 wide, without dropout.

    Args:
        method: Of the registry: "fixup", "fixup_authors" with their slip in cross-attention,
            "fixup_no_factor", "fixup_attention_m2", ...

    Raises:
        UserError: There is no such method, or it is not defined for Transformers.
    """
    record = FixupOptions(method=method).record  # an unknown one is refused here
    dictionary = Dictionary()
    for i in range(WORDS):
        dictionary.add_symbol(f"w{i}")
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)

    def make_net(depth: int) -> nn.Module:
        layers = {"encoder_layers": depth, "decoder_layers": depth}
        cfg = {"_name": "transformer_fixup", "fixup_method": method, "dropout": 0.0}
        net = models.build_model(OmegaConf.create(cfg | SIZES | layers), task)
        initialise_(net, method)  # the second draw is the one that the documented figures show
        return net

    return {
        "make_net": make_net,
        "batch": _batch(len(dictionary), dictionary.eos()),
        "depths": DEPTHS,
        # Behind a multiplier at 0 nothing but the multiplier can move.
        "moved": "scalars" if record.multiplier == 0 else "branches",
    }


def _batch(words: int, eos: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random sentences, [B, S] and [B, T]; the decoder sees the target behind an end mark."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(eos + 2, words, (SENTENCES, SOURCE), generator=generator)
    target = torch.randint(eos + 2, words, (SENTENCES, TARGET), generator=generator)
    previous = target.roll(1, dims=1)
    previous[:, 0] = eos
    lengths = torch.full((SENTENCES,), SOURCE)
    inputs = {"src_tokens": source, "src_lengths": lengths, "prev_output_tokens": previous}
    return inputs, target
